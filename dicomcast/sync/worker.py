"""One worker's time with the lease of a feed: read ahead, gather, settle studies in parallel lanes, commit.

An outage is not a failure: whoever meets `Unavailable` pauses and tries again, and the watermark waits.
"""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

import structlog

from dicomcast import errors, mapping, settings
from dicomcast.clock import Clock
from dicomcast.dicom import feed
from dicomcast.dicom.service import PAGE, DicomService
from dicomcast.fhir.service import FhirService
from dicomcast.state import store
from dicomcast.sync import plan
from dicomcast.sync.changes import Buffer, StudyChange, failure_of
from dicomcast.sync.ledger import Ledger, Settled, mark_of
from dicomcast.sync.links import Links
from dicomcast.sync.roads import Roads

_T = TypeVar("_T")

_PAGES_AHEAD = 4
_COMMIT_EVERY = 1.0
_LOOK_AGAIN_EVERY = 30.0
"""Seconds between looks at gaps and at failures whose retry is due."""
_GAP_MAY_FILL = timedelta(minutes=10)
_LONGEST_PAUSE = 30.0
_LONGEST_ASKED = 600.0
"""Seconds that a `Retry-After` is believed: a wrong date must not stop the worker for years."""
_CONFLICTS = 8
_TROUBLES = 5
_TROUBLE_LASTS = 120.0
"""Seconds and tries after which a write that alone fails, while the service is well, is its study's failure."""
_STOP_WITHIN = 8.0
_DEFAULT_PARTITION = "Microsoft.Default"

log = structlog.get_logger("dicomcast.sync")


class _Stopped(Exception):
    """The stop event was set while something waited."""


@dataclass(slots=True)
class _Tries:
    """What one lane has been through."""

    conflicts: int = 0
    refusals: int = 0
    troubles: int = 0
    trouble_since: float = 0.0


class Worker:
    """Keeps one feed in step. `once`: catch up and return; else go on until `stop` is set."""

    def __init__(
        self,
        options: settings.Settings,
        *,
        dicom: DicomService,
        fhir: FhirService,
        rules: mapping.Mapping,
        state: store.Store,
        clock: Clock,
        owner: str,
        addresses: frozenset[str],
        once: bool,
        stop: asyncio.Event,
        progress: Callable[[int, int], None] = lambda watermark, latest: None,
    ):
        self._options = options
        self._dicom = dicom
        self._fhir = fhir
        self._answers = {"dicom": dicom.answers, "fhir": fhir.answers}
        self._rules = rules
        self._clock = clock
        self._owner = owner
        self._addresses = addresses
        self._once = once
        self._stop = stop
        self._progress = progress
        self.ledger = Ledger(state, clock=clock, seconds=options.sync.lease)
        self._buffer = Buffer(settle=options.settle, limit=options.sync.buffer)
        self._lanes: dict[str, asyncio.Task[None]] = {}
        self._moved = asyncio.Event()
        self._behind = True
        self._read_to = 0
        self._head: int | None = None
        self._feed_time: datetime | None = None
        self._last_progress = clock.monotonic()
        self._last_commit = 0.0
        self._pauses = 0

    def trouble(self) -> str | None:
        """What the worker waits for; None while all is well."""
        return self.ledger.trouble

    async def work(self) -> None:
        """Take the lease, work, give it back.

        Raises `LeaseHeld`, `LeaseLost`, `NeedsPerson`, and with `once` also `Unavailable` when patience runs out.
        """
        try:
            await self._patiently(self._take_lease)
            try:
                async with asyncio.TaskGroup() as tasks:
                    await self._session(tasks)
            except BaseExceptionGroup as group:
                raise _gravest(group) from None
            finally:
                await self._give_back()
        except _Stopped:
            log.info("stopped", watermark=self.ledger.watermark.low)

    # The session ----------------------------------------------------------------------------------------------------

    async def _session(self, tasks: asyncio.TaskGroup) -> None:
        keeper = tasks.create_task(self.ledger.keep())
        await self._unless_stopped(self._patiently(self._prepare))
        reader = tasks.create_task(self._read())
        while not self._stop.is_set():
            await self._look_up_new_studies()
            self._start_lanes(tasks)
            if self._clock.monotonic() - self._last_commit >= _COMMIT_EVERY:
                await self._commit()
            self._settle_demographics()
            if reader.done() and not self._lanes and not self._buffer and self.ledger.watermark.idle:
                break
            await self._wait(_COMMIT_EVERY / 2)
        reader.cancel()
        if self._lanes:
            _, late = await asyncio.wait(self._lanes.values(), timeout=_STOP_WITHIN)
            for lane in late:
                lane.cancel()
        keeper.cancel()

    async def _unless_stopped(self, action: Awaitable[None]) -> None:
        """Cut `action` off at stop: a service that does not answer must not hold up the end."""
        work, stop = asyncio.ensure_future(action), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _Stopped
            await work
        finally:
            work.cancel()
            stop.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    async def _take_lease(self) -> None:
        await self.ledger.open(self._options.feed_name, url=self._options.dicom.url, owner=self._owner)

    async def _give_back(self) -> None:
        """Commit what is settled and free the lease; what can't be committed will be read again."""
        try:
            await self.ledger.commit()
            await self.ledger.close()
        except (errors.LeaseLost, errors.Unavailable) as failure:
            log.warning("not given back", reason=str(failure))

    async def _prepare(self) -> None:
        """Look at both services before anything is changed."""
        can = await self._fhir.capability()
        naming = plan.Naming(client_ids=can.client_ids, source=self._options.dicom_identity)
        self._links = Links(
            self._fhir,
            ledger=self.ledger,
            rules=self._rules,
            naming=naming,
            policy=self._options.patient.policy,
            addresses=self._addresses,
        )
        self._roads = Roads(
            dicom=self._dicom,
            fhir=self._fhir,
            links=self._links,
            ledger=self.ledger,
            rules=self._rules,
            naming=naming,
            end=self._options.imaging_study.end,
            clock=self._clock,
        )
        await self._take_up()
        log.info(
            "started",
            software=can.software,
            transaction=can.transaction,
            batch=can.batch,
            client_ids=can.client_ids,
            watermark=self.ledger.watermark.low,
        )

    async def _take_up(self) -> None:
        """Go on where the feed was left, after making sure that it is the same feed."""
        latest = await self._dicom.latest()
        position = self.ledger.position
        if position is None:
            start = self._options.dicom.start
            if isinstance(start, datetime):
                self.ledger.begin(await self._dicom.before(start))
            else:
                self.ledger.begin(latest.sequence if latest and start == "now" else 0)
        elif position.watermark > 0:
            self._refuse_backwards(latest, position.watermark)
            if position.mark is not None:
                entries = await self._dicom.page(position.watermark - 1, width=1, metadata=False)
                marks = [mark_of(one) for one in entries if isinstance(one, feed.ChangeFeedEntry)]
                if position.mark not in marks:
                    raise errors.FeedWentBackwards(
                        f"the change feed's entry {position.watermark} is not the one that was synced: the feed was "
                        "reset or restored; sync under a new name (dicom.feed) to start it afresh"
                    )
        self._read_to = self.ledger.watermark.seen

    def _refuse_backwards(self, latest: feed.Entry | None, read: int) -> None:
        newest = latest.sequence if latest else 0
        if newest < read:
            raise errors.FeedWentBackwards(
                f"the change feed ends at {newest}, but {read} was read before: it was reset or restored; "
                "sync under a new name (dicom.feed) to start it afresh"
            )

    # Reading --------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Read to the head; then, unless `once`, look for more, at gaps, and at retries that are due."""
        looked = -_LOOK_AGAIN_EVERY
        while True:
            if self._clock.monotonic() - looked >= _LOOK_AGAIN_EVERY:
                looked = self._clock.monotonic()
                await self._patiently(self._read_gaps)
                self.ledger.beat()
            latest = await self._patiently(self._dicom.latest)
            self._refuse_backwards(latest, self._read_to)
            self.ledger.latest = max(self.ledger.latest, latest.sequence if latest else 0)
            if self._read_to < self.ledger.latest:
                await self._read_pages(self.ledger.latest)
                continue
            await self._patiently(self._retry_due)
            self._reached_head()
            if self._once:
                return
            await self._wait(self._options.dicom.poll, moved=False)

    async def _read_pages(self, latest: int) -> None:
        """Pages up to `latest`, in order, a few fetched ahead."""
        self._behind = latest - self._read_to > PAGE
        async with _ahead(self._page(after, latest) for after in range(self._read_to, latest, PAGE)) as pages:
            async for entries in pages:
                end = min(self._read_to + PAGE, latest)
                for entry in entries:
                    if self.ledger.watermark.seen < entry.sequence <= end:
                        self._take(entry)
                self._read_to = end
                self._progressed()
                while self._buffer.full:
                    await self._wait(_COMMIT_EVERY)

    async def _page(self, after: int, latest: int) -> list[feed.Entry]:
        return await self._patiently(partial(self._dicom.page, after, width=min(PAGE, latest - after)))

    def _take(self, entry: feed.Entry) -> None:
        """One entry's way: noted, then recorded as a failure, or handed to its study."""
        if isinstance(entry, feed.Malformed) or self._elsewhere(entry):
            self.ledger.read(entry)
            self._record(entry)
            return
        moved_to = feed.other_study(entry)
        self.ledger.read(entry, parts=2 if moved_to else 1)
        now = self._clock.monotonic()
        change = self._buffer.touch(entry.study_uid, now=now)
        change.add(entry, self._rules)
        change.feed_time = self._feed_time = feed.moment(entry) or self._feed_time
        if moved_to:
            other = self._buffer.touch(moved_to, now=now)
            other.sequences.append(entry.sequence)
            other.reconcile("UIDs changed")

    def _elsewhere(self, entry: feed.ChangeFeedEntry) -> bool:
        return entry.partition not in (None, self._options.dicom.partition or _DEFAULT_PARTITION)

    def _record(self, entry: feed.Entry) -> None:
        """A malformed entry, or another partition's: a failure and no more."""
        if isinstance(entry, feed.Malformed):
            failed = entry.error
        else:
            message = "the entry belongs to a data partition that this worker does not read (dicom.partition)"
            failed = errors.InstanceFailed("partition", message, stage="read")
        key = (entry.series_uid, entry.sop_uid)
        failure = failure_of(failed, study_uid=entry.study_uid, key=key, sequence=entry.sequence)
        self.ledger.fail(failure, sequence=entry.sequence)

    async def _read_gaps(self) -> None:
        """Look again for sequences that were skipped: the service may commit them late.

        However long ago one was missed, it is given up only after one more look: a `sync` may come once a day.
        """
        now = self._clock.now()
        gaps = await self.ledger.gaps()
        wanted, late = list(gaps), set()
        while wanted:
            window = [sequence for sequence in wanted if sequence < wanted[0] + PAGE]
            wanted = wanted[len(window) :]
            width = window[-1] - window[0] + 1
            for entry in await self._dicom.page(window[0] - 1, width=width, metadata=False):
                if entry.sequence in window and self.ledger.filled(entry.sequence):
                    late.add(entry.sequence)
                    if isinstance(entry, feed.Malformed) or self._elsewhere(entry):
                        self._record(entry)
                    else:
                        self._reconcile_soon(entry.study_uid, "late", sequence=entry.sequence)
        over = (sequence for sequence, since in gaps.items() if now - since > _GAP_MAY_FILL)
        self.ledger.give_up_on(sequence for sequence in over if sequence not in late)

    async def _retry_due(self) -> None:
        for study_uid in await self.ledger.due():
            if study_uid not in self._lanes:
                self._reconcile_soon(study_uid, "retry")

    def _reconcile_soon(self, study_uid: str, reason: str, *, sequence: int | None = None) -> None:
        change = self._buffer.touch(study_uid, now=self._clock.monotonic())
        change.sequences += [sequence] if sequence is not None else []
        change.reconcile(reason)
        change.urgent = True
        self._moved.set()

    def _reached_head(self) -> None:
        """Whatever was gathered while catching up is written now."""
        if self._behind or self._once:
            for change in self._buffer:
                change.urgent = True
        self._behind = False
        self._head = self.ledger.latest if self._head is None else self._head
        self._progressed()

    # Settling -------------------------------------------------------------------------------------------------------

    async def _look_up_new_studies(self) -> None:
        """At the head it matters whether a study is new to us."""
        if not self._behind:
            for change in [change for change in self._buffer if change.held is None and not change.urgent]:
                row, _ = await self._patiently(partial(self.ledger.study, change.study_uid))
                change.held = row.instances if row and row.outcome == "synced" else 0

    def _settle_demographics(self) -> None:
        """Once all that was there at the start is settled, Patients without a row can be told old news from new."""
        if self._head is not None and self.ledger.watermark.low >= self._head and self._links.behind:
            for study_uid in self._links.caught_up():
                self._reconcile_soon(study_uid, "demographics")

    def _start_lanes(self, tasks: asyncio.TaskGroup) -> None:
        if self._behind:
            due = self._buffer.due_behind(self._feed_time)
        else:
            due = self._buffer.due_at_head(now=self._clock.monotonic())
        for change in due:
            if len(self._lanes) >= self._options.sync.parallel:
                break
            if change.study_uid not in self._lanes:
                self._buffer.take(change.study_uid)
                self._lanes[change.study_uid] = tasks.create_task(self._lane(change))

    async def _lane(self, change: StudyChange) -> None:
        """Settle one study; never two lanes of one study at a time."""
        uid, tries, exact = change.study_uid, _Tries(), change.reason is not None
        with structlog.contextvars.bound_contextvars(study=uid):
            while True:
                try:
                    self.ledger.guard()
                    if exact:
                        settled = await self._roads.reconcile(change, lambda: self._buffer.take(uid))
                    else:
                        settled = await self._roads.fold(change)
                    break
                except (errors.Replan, errors.Rejected, errors.StudyFailed, errors.Troubled) as failure:
                    parked = await self._parked(change, tries, failure)
                    if parked is not None:
                        settled = parked
                        break
                    exact = exact or not isinstance(failure, errors.Troubled)
                except errors.Unavailable as failure:
                    await self._pause(failure)
            log.debug("settled", outcome=settled.outcome, road="reconcile" if exact else "fold", reason=change.reason)
            self.ledger.settle(uid, change.sequences, settled)
        del self._lanes[uid]
        self._progressed()

    async def _parked(self, change: StudyChange, tries: _Tries, failure: errors.Error) -> Settled | None:
        """What an attempt's failure makes of the study: parked, or None to look at both services and try again."""
        if isinstance(failure, errors.StudyFailed):
            return await self._failed(change, failure, heals=failure.kind != "invalid")
        if isinstance(failure, errors.Troubled):
            return await self._troubled(change, tries, failure, answers=self._answers[failure.service])
        self._roads.forget(change.study_uid)
        refused = not isinstance(failure, errors.OutcomeUnknown)
        self._links.forget(change.patient_key, refused=refused)
        if isinstance(failure, errors.Rejected):
            tries.refusals += 1
            if tries.refusals == 2:
                message = f"the FHIR service refuses the study's resources: {failure}"
                return await self._failed(change, errors.StudyFailed("rejected", message, stage="write"))
        elif isinstance(failure, errors.OutcomeUnknown):
            return await self._troubled(change, tries, failure, answers=self._fhir.answers)
        elif isinstance(failure, errors.Conflict):
            tries.conflicts += 1
            if tries.conflicts == _CONFLICTS:
                message = f"{_CONFLICTS} tries in a row met somebody else's write"
                return await self._failed(change, errors.StudyFailed("conflict", message, stage="write"))
            await self._clock.sleep(random.uniform(0.05, 0.5) * tries.conflicts)  # noqa: S311 - jitter
        return None

    async def _troubled(
        self, change: StudyChange, tries: _Tries, failure: errors.Error, *, answers: Callable[[], Awaitable[bool]]
    ) -> Settled | None:
        """A request without a clear answer: the service's trouble if a probe fails too, else in the end the study's."""
        if not await answers():
            await self._pause(
                failure if isinstance(failure, errors.Troubled) else errors.Troubled("fhir", str(failure))
            )
            return None
        now = self._clock.monotonic()
        tries.trouble_since = tries.trouble_since or now
        tries.troubles += 1
        if tries.troubles >= _TROUBLES and now - tries.trouble_since >= _TROUBLE_LASTS:
            message = f"{tries.troubles} requests for this study alone failed: {failure}"
            return await self._failed(change, errors.StudyFailed("server-error", message, stage="write"))
        await self._clock.sleep(min(_LONGEST_PAUSE, 2.0**tries.troubles))
        return None

    async def _failed(self, change: StudyChange, failed: errors.StudyFailed, *, heals: bool = True) -> Settled:
        row, _ = await self._patiently(partial(self.ledger.study, change.study_uid))
        log.warning("study failed", kind=failed.kind, reason=str(failed))
        sequence = change.last_sequence or (row.last_sequence if row else None)
        failure = failure_of(failed, study_uid=change.study_uid, sequence=sequence, heals=heals)
        study = self._roads.parked(change, row)
        return Settled("failed", study, failures=(*change.failures, failure))

    # Waiting --------------------------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        await self._patiently(self.ledger.commit)
        self._last_commit = self._clock.monotonic()
        self._progress(self.ledger.watermark.low, self.ledger.latest)

    async def _patiently(self, action: Callable[[], Awaitable[_T]]) -> _T:
        """Try until no service is unavailable; with `once`, as long as patience lasts."""
        while True:
            try:
                return await action()
            except errors.Unavailable as failure:
                await self._pause(failure)
            except errors.LeaseHeld as held:
                await self._pause(held)

    async def _pause(self, failure: errors.Unavailable | errors.LeaseHeld) -> None:
        waited = self._clock.monotonic() - self._last_progress
        if self._once and waited >= self._options.sync.patience:
            raise failure
        if self.ledger.trouble != str(failure):
            self.ledger.trouble = str(failure)
            log.warning("waiting", reason=str(failure))
        asked = failure.retry_after if isinstance(failure, errors.Unavailable) else 1.0
        self._pauses += 1
        pause = (
            min(asked, _LONGEST_ASKED) if asked is not None else min(_LONGEST_PAUSE, 0.5 * 2.0 ** min(self._pauses, 10))
        )
        if self._once:
            pause = min(pause, max(0.1, self._options.sync.patience - waited))
        await self._wait(pause * random.uniform(0.9, 1.1), moved=False)  # noqa: S311 - jitter
        if self._stop.is_set():
            raise _Stopped

    def _progressed(self) -> None:
        if self.ledger.trouble is not None:
            log.info("going on")
        self.ledger.trouble, self._pauses = None, 0
        self._last_progress = self._clock.monotonic()
        self._progress(self.ledger.watermark.low, self.ledger.latest)
        self._moved.set()

    async def _wait(self, seconds: float, *, moved: bool = True) -> None:
        """For `seconds`, or until stop, or (with `moved`) until there may be something to do."""
        waits = [self._clock.sleep(seconds), self._stop.wait(), *([self._moved.wait()] if moved else [])]
        pending = {asyncio.ensure_future(wait) for wait in waits}
        try:
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in pending:
                wait.cancel()
        if moved:
            self._moved.clear()


@asynccontextmanager
async def _ahead(fetches: Iterable[Awaitable[_T]]) -> AsyncIterator[AsyncIterator[_T]]:
    """The results of `fetches` in order, with a few under way beyond the one that is awaited."""
    coming = iter(fetches)
    tasks: deque[asyncio.Future[_T]] = deque()

    async def results() -> AsyncIterator[_T]:
        while True:
            for fetch in coming:
                tasks.append(asyncio.ensure_future(fetch))
                if len(tasks) == _PAGES_AHEAD:
                    break
            if not tasks:
                return
            yield await tasks[0]
            tasks.popleft()

    try:
        yield results()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _gravest(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error to report of several that came together."""
    flat: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        one = pending.pop()
        if isinstance(one, BaseExceptionGroup):
            pending += one.exceptions
        else:
            flat.append(one)
    order = (errors.LeaseLost, errors.NeedsPerson, errors.Unavailable)
    known = [one for kind in order for one in flat if isinstance(one, kind)]
    others = [one for one in flat if not isinstance(one, errors.Error | _Stopped)]
    return (others or known or flat)[0]
