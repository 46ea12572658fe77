"""Studies that somebody has asked for: taken from the database a few at a time, behind the live traffic."""

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial

import structlog

from dicomcast import errors
from dicomcast.clock import Clock
from dicomcast.state import store, waiting
from dicomcast.state.waiting import Work
from dicomcast.sync.changes import StudyChange
from dicomcast.sync.ledger import Ledger, Outcome, in_thread

log = structlog.get_logger("dicomcast.sync")

_AT_HAND = 200
_ASK_EVERY = 1.0
MAY_DELETE = 20
_MAY_DELETE_SHARE = 0.05
"""A job that would take more studies than this out of FHIR, and more than this share of all, waits for an operator."""


@dataclass(slots=True)
class _Running:
    """A job as this worker goes through it: studies looked at, those that it takes out of FHIR, and its pace."""

    looked: int
    deleted: int
    since: float
    """When `left` was so."""
    per_second: float | None = None
    allow_deletes: int | None = None
    held: bool = False
    left: float = 1.0
    """Studies that it may start at once."""
    ends: set[str] = field(default_factory=set)

    def may_start(self, now: float) -> bool:
        """Whether its pace allows one more."""
        if self.per_second is None:
            return True
        self.left = min(max(1.0, self.per_second), self.left + self.per_second * (now - self.since))
        self.since = now
        return self.left >= 1


class Backlog:
    """What waits in `work`; with `job` only that one's. After `until` (monotonic) nothing more is taken."""

    def __init__(
        self, state: store.Store, *, ledger: Ledger, clock: Clock, job: int | None = None, until: float = math.inf
    ):
        self._store = state
        self._ledger = ledger
        self._clock = clock
        self._job = job
        self._until = until
        self._at_hand: deque[Work] = deque()
        self._taken: set[int] = set()
        """Rows that are being worked on."""
        self._ask_at = 0.0
        self._jobs: dict[int, _Running] = {}
        self.idle = False
        """Whether nothing is to be taken: nothing waits, or only for the pace of another's job, or time is up."""

    async def fill(self) -> None:
        """Look for more where none is at hand: at once after there was some, else once a second."""
        now = self._clock.monotonic()
        if now >= self._until:
            self._at_hand.clear()
            self.idle = True
            return
        if self._at_hand or now < self._ask_at:
            return
        known = self._taken | self._ledger.uncommitted_work
        was_held = {job_id for job_id, job in self._jobs.items() if job.held}
        resting = [job_id for job_id, job in self._jobs.items() if not job.may_start(now)]
        ask = partial(waiting.due, self._store, self._ledger.lease, now=self._clock.now(), passing_over=resting)
        found = await in_thread(ask, only=self._job, limit=len(known) + _AT_HAND)
        for work in found:
            if work.job_id is None:
                continue
            job = self._jobs.get(work.job_id)
            if job is None:
                results = await in_thread(waiting.results, self._store, work.job_id)
                job = self._jobs[work.job_id] = _Running(results.total(), results["deleted"], since=now)
                log.info("working on a job", job=work.job_id, verb=work.reason)
            # An operator may have said more. What was put on hold while we asked stays so.
            job.held = job.held and work.job_id not in was_held
            job.per_second, job.allow_deletes = work.per_second, work.allow_deletes
        held = {job_id for job_id, job in self._jobs.items() if job.held}
        self._at_hand.extend(work for work in found if work.id not in known and work.job_id not in held)
        self._ask_at = now if self._at_hand else now + _ASK_EVERY
        self.idle = not self._at_hand and not (resting and self._job is not None)

    def take(self, busy: Collection[str]) -> list[Work]:
        """All that is at hand of the next study that no lane is `busy` with; empty where there is none."""
        now = self._clock.monotonic()
        while self._at_hand:
            first = self._at_hand.popleft()
            job = self._jobs.get(first.job_id) if first.job_id is not None else None
            if first.study_instance_uid in busy or (job is not None and not job.may_start(now)):
                continue  # it is read again when the others are done
            if job is not None:
                job.left -= 1
            same = [first, *(one for one in self._at_hand if one.study_instance_uid == first.study_instance_uid)]
            self._taken |= {one.id for one in same}
            self._at_hand = deque(one for one in self._at_hand if one.id not in self._taken)
            return same
        return []

    def done(self, change: StudyChange, outcome: Outcome) -> None:
        """What became of the study whose change carried work."""
        for work in change.work:
            self._ledger.worked(work.id, change.study_uid, outcome)
            self._taken.discard(work.id)
            if work.job_id is not None:
                self._jobs[work.job_id].looked += 1

    def may_end(self, change: StudyChange) -> None:
        """Before a study is taken out of FHIR. Raises `Held` where only an operator's work says so, and it is too much.

        What the feed itself says needs no leave.
        """
        for work in change.work if not change.deleted else ():
            if work.job_id is None:
                continue
            job = self._jobs[work.job_id]
            ends = job.ends | {change.study_uid}
            if job.held or too_many(job.deleted + len(ends), of=job.looked + 1, allowed=job.allow_deletes):
                many = job.deleted + len(job.ends)
                raise errors.Held(work.job_id, f"more than {many} studies would be taken out of FHIR")
            job.ends = ends

    async def hold(self, held: errors.Held, change: StudyChange) -> None:
        """Leave the rest of a job until an operator says more; what else is pending of its study stays in `change`."""
        await in_thread(waiting.hold, self._store, held.job_id, str(held))
        log.warning("a job waits for an operator", job=held.job_id, reason=str(held))
        self._taken -= {work.id for work in change.work if work.job_id == held.job_id}
        change.work = [work for work in change.work if work.job_id != held.job_id]
        self._at_hand = deque(work for work in self._at_hand if work.job_id != held.job_id)
        self._jobs[held.job_id].held = True


def too_many(deletes: int, *, of: int, allowed: int | None) -> bool:
    """Whether so many studies may not go without a word of an operator."""
    if allowed is not None:
        return deletes > allowed
    return deletes > MAY_DELETE and deletes > _MAY_DELETE_SHARE * of
