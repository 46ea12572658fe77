"""What has been settled and is not in the database yet, and the lease under which it may be written there.

The watermark passes an entry only in the transaction that records what became of it. Nothing may be written to FHIR
or to the database unless a quarter of the lease is left on our own clock: fencing can't reach the FHIR service.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal, TypeVar

import structlog

from dicomcast import errors
from dicomcast.clock import Clock
from dicomcast.dicom import feed
from dicomcast.state import store
from dicomcast.sync.watermark import Watermark

_T = TypeVar("_T")

_BEAT = timedelta(seconds=30)
"""At the head, commit that often even if nothing has happened: `status` can then tell idle from dead."""

_ALL = 2**63 - 1
"""The highest sequence there can be."""

log = structlog.get_logger("dicomcast.sync")

Outcome = Literal["created", "updated", "unchanged", "deleted", "failed"]


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a study. `resolution` is set by reconcile: every failure that is not in `failures` is over."""

    outcome: Outcome
    study: store.Study
    failures: tuple[store.Failure, ...] = ()
    issues: Counter[store.IssueKey] = field(default_factory=Counter)
    resolution: Literal["mapped", "deleted"] | None = None
    cut: int = 0
    """The highest sequence read before the DICOM service was: what failed later is not for this to resolve."""


class Ledger:
    """The state of one feed while this worker holds its lease; `reads`: the feed is read meanwhile."""

    def __init__(self, state: store.Store, *, clock: Clock, seconds: float, tally: bool, reads: bool = True):
        self._store = state
        self._clock = clock
        self._seconds = seconds
        self._held_until = 0.0
        self._lease: store.Lease | None = None
        self._looks = False
        self._reads = reads
        self._effects = store.Effects()
        self._writing: store.Effects | None = None
        self._commits = asyncio.Lock()
        self._marks: dict[int, tuple[str, str, str]] = {}
        self._pruned_at = 1000
        self.position: store.Position | None = None
        self.watermark = Watermark(0)
        self.latest = 0
        self.entries = 0
        self.opened = 0
        self.failed = 0
        self.trouble: str | None = None
        self._noted: tuple[int, str | None] | None = None
        self.outcomes: dict[str, Outcome] = {}
        """What became of each study; kept only where somebody will ask (`tally`): a service runs for years."""
        self._tally = tally
        self._away: str | None = None
        self._seen_at: datetime | None = None

    @property
    def lease(self) -> store.Lease:
        """The lease; there is always one while work is done."""
        if self._lease is None:
            raise errors.LeaseLost("no lease is held")
        return self._lease

    @property
    def first(self) -> int:
        """Reading began after this sequence."""
        return self.position.first if self.position else 0

    @property
    def seen(self) -> int:
        """The highest sequence read. Where none is read, all that is known was read before."""
        return self.watermark.seen if self._reads else _ALL

    @property
    def dirty(self) -> bool:
        """Whether there is anything to commit."""
        moved = self.position is not None and self.position.watermark != self.watermark.low
        return moved or self._noted != (self.latest, self.trouble) or self._effects != store.Effects()

    # The lease ------------------------------------------------------------------------------------------------------

    async def open(self, feed_name: str, *, url: str, owner: str) -> None:
        """Open the database, take the lease and read the position. Raises `LeaseHeld` and `Incompatible`."""
        await in_thread(self._store.open)
        asked = self._clock.monotonic()
        lease = await in_thread(self._store.acquire, feed_name, url=url, owner=owner, seconds=self._seconds)
        self._lease, self._held_until = lease, asked + self._seconds
        try:
            if lease.expired:
                # Its last owner may still have a write under way that it began when a quarter was left.
                await self._clock.sleep(self._seconds / 4)
            self.position = await in_thread(self._store.position, lease)
        except errors.NeedsPerson:
            await self.close()  # whoever mends it needs the lease
            raise
        if self.position is not None:
            self.watermark = Watermark(self.position.watermark)
            self.latest = self.position.latest

    def look(self, feed_id: int) -> None:
        """Without the lease: what the database knows can be read, and nothing is ever written."""
        self._lease, self._looks = store.Lease(feed_id, token=-1, owner=""), True

    async def keep(self) -> None:
        """Renew the lease for ever; raises `LeaseLost` where it was taken, `Unavailable` where it ran out."""
        while True:
            await self._clock.sleep(self._seconds / 4)
            asked = self._clock.monotonic()
            try:
                await in_thread(self._store.renew, self.lease, seconds=self._seconds)
            except errors.Unavailable as away:
                self._away = away.reason
                if self._clock.monotonic() > self._held_until:
                    raise
            else:
                self._held_until, self._away = asked + self._seconds, None

    def guard(self) -> None:
        """Before every FHIR write and every plan of one: a quarter of the lease must be left."""
        if self._clock.monotonic() > self._held_until - self._seconds / 4:
            if self._away is not None:
                raise errors.Unavailable("database", self._away)
            raise errors.LeaseLost("the lease has not been renewed in time")

    async def close(self) -> None:
        """Give the lease back at once."""
        if self._lease is not None:
            await in_thread(self._store.release, self._lease)
            self._lease = None

    # What was read --------------------------------------------------------------------------------------------------

    def begin(self, first: int) -> None:
        """Take up a feed that the database does not know, after sequence `first`."""
        self.position = store.Position(first, first, self.latest, None)
        self.watermark = Watermark(first)

    def read(self, entry: feed.Entry, *, parts: int = 1) -> None:
        """Note an entry above all others, and the gap before it."""
        self.entries += 1
        now = self._clock.now()
        for missing in self.watermark.read(entry.sequence, parts=parts):
            self._effects.missed[missing] = now
        if isinstance(entry, feed.ChangeFeedEntry):
            self._marks[entry.sequence] = mark_of(entry)
        self.latest = max(self.latest, entry.sequence)

    def saw(self, latest: int) -> None:
        """The DICOM service has said what its newest entry is."""
        self.latest = max(self.latest, latest)
        now = self._clock.now()
        if self._seen_at is None or now - self._seen_at > _BEAT:
            self._seen_at, self._noted = now, None

    def filled(self, sequence: int, *, parts: int = 1) -> None:
        """Note an entry that filled a gap."""
        self.watermark.late(sequence, parts=parts)
        self.entries += 1

    def give_up_on(self, sequences: Iterable[int]) -> None:
        """Gaps that nothing will fill any more."""
        self._effects.closed_gaps.update(sequences)

    async def gaps(self) -> dict[int, datetime]:
        """Sequences that may still come, and since when they are missed."""
        return await in_thread(self._store.gaps, self.lease)

    # What is known --------------------------------------------------------------------------------------------------

    async def study(self, study_uid: str) -> tuple[store.Study | None, bool]:
        """The study's row, and whether failures of it are open."""
        return (await self.studies([study_uid]))[study_uid]

    async def studies(self, uids: Collection[str]) -> dict[str, tuple[store.Study | None, bool]]:
        """The same of several."""
        if any(not effects.studies.keys().isdisjoint(uids) for effects in (self._effects, self._writing) if effects):
            await self.commit()
        return await in_thread(self._store.studies, self.lease, uids)

    async def patient(self, fhir_id: str) -> store.Patient | None:
        """The Patient's row."""
        for effects in (self._effects, self._writing):
            if effects and fhir_id in effects.patients:
                return effects.patients[fhir_id]
        return await in_thread(self._store.patient, self.lease, fhir_id)

    async def due(self) -> list[str]:
        """Studies with a failure whose next retry has come."""
        return await in_thread(self._store.due, self.lease)

    # What became of it ----------------------------------------------------------------------------------------------

    def remember(self, patient: store.Patient) -> None:
        """A Patient's new row."""
        self._effects.patients[patient.fhir_id] = patient

    def fail(self, failure: store.Failure, *, sequence: int) -> None:
        """An entry that can only be recorded."""
        self._effects.failures.append(failure)
        self.release([sequence])

    def settle(self, study_uid: str, sequences: Iterable[int], settled: Settled, flush: store.Flush) -> None:
        """A study's entries have had their effect."""
        self._effects.studies[study_uid] = settled.study
        self._effects.flushes.append(flush)
        if settled.resolution:
            self._effects.reconcile(study_uid, settled.resolution, cut=settled.cut)
        self._effects.failures += settled.failures
        self._effects.issues.setdefault(study_uid, Counter()).update(settled.issues)
        self.release(sequences)
        if not self._tally:
            return
        before = self.outcomes.get(study_uid)
        stays = before == "created" and settled.outcome in ("updated", "unchanged")
        if not stays and not (before and settled.outcome == "unchanged"):
            self.outcomes[study_uid] = settled.outcome

    def worked(self, work_id: int, study_uid: str, outcome: Outcome) -> None:
        """Work that somebody asked for is done; its row says so with the study's."""
        self._effects.worked[work_id] = (study_uid, outcome)

    @property
    def uncommitted_work(self) -> set[int]:
        """Work that is done, and of which the database does not know it yet."""
        return {one for effects in (self._effects, self._writing) if effects for one in effects.worked}

    def look_again(self, study_uid: str, *, seconds: float) -> None:
        """A study must be looked at once more when this time has passed, by whoever holds the lease then."""
        self._effects.again[study_uid] = self._clock.now() + timedelta(seconds=seconds)

    def release(self, sequences: Iterable[int]) -> None:
        """Entries that have had their effect, or whose effect has become another's."""
        self._effects.closed_gaps.update(sequence for sequence in sequences if self.watermark.settle(sequence))

    async def commit(self) -> None:
        """Effects and watermark, in one transaction. Raises `Unavailable` (and keeps them) and `LeaseLost`."""
        async with self._commits:
            if self._looks:
                self._effects = store.Effects()
                return
            if not self.dirty:
                return
            self.guard()
            position = self._reached()
            self._writing, self._effects = self._effects, store.Effects()
            noted = (self.latest, self.trouble)
            commit = partial(self._store.commit, trouble=self.trouble, seen_at=self._seen_at)
            try:
                committed = await in_thread(commit, self.lease, position, self._writing)
                self._noted = noted
            except BaseException:
                self._writing.follow(self._effects)
                self._effects = self._writing
                raise
            finally:
                self._writing = None
            self.opened += committed.opened
            self.failed += committed.failed
            if position is not None and (self.position is None or position.watermark != self.position.watermark):
                log.info(
                    "committed", watermark=position.watermark, latest=position.latest, failures_opened=committed.opened
                )
            self.position = position or self.position
            if len(self._marks) > self._pruned_at:
                self._marks = {one: mark for one, mark in self._marks.items() if self.watermark.may_be_low(one)}
                self._pruned_at = 2 * len(self._marks) + 1000

    def _reached(self) -> store.Position | None:
        if self.position is None or not self._reads:
            return None  # a job alone says nothing of the feed
        low = self.watermark.low
        mark = self._marks.get(low, self.position.mark if low == self.position.watermark else None)
        return store.Position(self.position.first, low, self.latest, mark)


async def in_thread(function: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
    """Await `function` in a thread to its end, also when cancelled meanwhile: only then is it known what it did."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **named))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.gather(work, return_exceptions=True)
        raise


def mark_of(entry: feed.ChangeFeedEntry) -> tuple[str, str, str]:
    """What tells an entry from another of the same sequence."""
    return (entry.study_uid, entry.sop_uid, entry.timestamp)
