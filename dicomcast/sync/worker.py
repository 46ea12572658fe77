"""One worker's time with the lease of a feed: what comes in is settled in parallel lanes, and committed."""

import asyncio
import math
import random
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import structlog

from dicomcast import errors, mapping, settings
from dicomcast.clock import Clock
from dicomcast.dicom.service import DicomService
from dicomcast.fhir.service import FhirService
from dicomcast.state import store
from dicomcast.sync.backlog import Backlog
from dicomcast.sync.changes import Buffer, StudyChange, failure_of
from dicomcast.sync.intake import Intake
from dicomcast.sync.ledger import Ledger, Settled
from dicomcast.sync.links import ASKED_TOGETHER, PatientKey, Question
from dicomcast.sync.patience import LONGEST_PAUSE, Patience, Stopped
from dicomcast.sync.roads import ways

_COMMIT_EVERY = 1.0
_CONFLICTS = 8
_REFUSED_IN_A_ROW = 25
_REFUSALS = "refusals"
"""The circuit that opens when so many studies are refused for one reason, and none is taken between."""
_TROUBLES = 5
_TROUBLE_LASTS = 120.0
"""Seconds and tries after which a request that alone fails, while the service is well, is its study's failure."""
_STOP_WITHIN = 5.0
_LATE = 60.0
"""Seconds, beside twice the timeout, after which a write that we gave up won't arrive any more."""

_DOUBTFUL = (errors.Troubled, errors.Forbidden)
"""What may be the service's trouble or the study's own."""

log = structlog.get_logger("dicomcast.sync")


@dataclass(slots=True)
class _Tries:
    """What one lane has been through."""

    conflicts: int = 0
    refusals: int = 0
    troubles: int = 0
    trouble_since: float = 0.0
    held: bool = False
    in_doubt: bool = False


class Worker:
    """Keeps one feed in step, and does the work that waits.

    `once`: catch up and return, else go on until `stop` is set. `job`: leave the feed alone, do this job's work and
    return; after `until` (monotonic) begin no more of it.
    """

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
        once: bool,
        stop: asyncio.Event,
        job: int | None = None,
        until: float = math.inf,
        progress: Callable[[int, int], None] = lambda watermark, latest: None,
    ):
        self._options = options
        self._dicom = dicom
        self._fhir = fhir
        self._rules = rules
        self._clock = clock
        self._owner = owner
        self._once = once
        self._job = job
        self._stop = stop
        self._progress = progress
        self._patience = Patience(clock=clock, stop=stop, limit=options.sync.patience if once else None)
        self.ledger = Ledger(state, clock=clock, seconds=options.sync.lease, tally=once, reads=job is None)
        self._buffer = Buffer(settle=options.settle, limit=options.sync.buffer)
        self._lanes: dict[str, asyncio.Task[None]] = {}
        self._intake = Intake(
            dicom,
            ledger=self.ledger,
            buffer=self._buffer,
            rules=rules,
            patience=self._patience,
            clock=clock,
            options=options.dicom,
            busy=lambda study_uid: study_uid in self._lanes,
        )
        self._working: set[str] = set()
        """Studies in lanes that somebody has asked for."""
        self._looking: asyncio.Task[None] | None = None
        self._alone: set[str] = set()
        """Studies that could not be looked up together with others."""
        self._refused: tuple[str, set[str]] = ("", set())
        self._taken_at = 0.0
        self._backlog = Backlog(state, ledger=self.ledger, clock=clock, job=job, until=until)
        self._last_commit = 0.0

    def trouble(self) -> str | None:
        """What the worker waits for; None while all is well."""
        return self._patience.trouble

    async def work(self) -> None:
        """Take the lease, work, give it back.

        Raises `LeaseHeld`, `LeaseLost`, `NeedsPerson`, and with `once` also `Unavailable` when patience runs out.
        """
        take = partial(self.ledger.open, self._options.feed_name, url=self._options.dicom.url, owner=self._owner)
        try:
            await self._patience.with_("lease", take)
            self._patience.well("database")
            try:
                async with asyncio.TaskGroup() as tasks:
                    await self._session(tasks)
            except BaseExceptionGroup as group:
                raise _gravest(group) from None
            finally:
                await self._give_back()
        except Stopped:
            pass
        log.info("stopped", watermark=self.ledger.watermark.low)

    async def _session(self, tasks: asyncio.TaskGroup) -> None:
        keeper = tasks.create_task(self.ledger.keep())
        await self._patience.unless_stopped(self._prepare())
        reader = tasks.create_task(self._intake.read(once=self._once) if self._job is None else _nothing_to_read())
        while not self._stop.is_set():
            await self._start_lanes(tasks)
            await self._start_work(tasks)
            self._settle_demographics()
            await self._commit_in_time()
            at_rest = not self._lanes and not self._buffer and self._backlog.idle
            if reader.done() and at_rest and self.ledger.watermark.idle():
                await self._patience.with_("database", self.ledger.commit)
                break
            self._intake.moved.clear()
            await self._patience.wait(_COMMIT_EVERY / 2, moved=self._intake.moved)
        reader.cancel()
        if self._looking is not None:
            self._looking.cancel()
        if self._lanes:
            _, late = await asyncio.wait(self._lanes.values(), timeout=_STOP_WITHIN)
            for lane in late:
                lane.cancel()
        keeper.cancel()

    async def _prepare(self) -> None:
        """Look at both services before anything is changed."""
        self._fhir.may_write = self.ledger.guard
        can = await self._patience.with_("fhir", self._fhir.capability)
        self._links, self._roads = ways(
            self._options,
            can,
            dicom=self._dicom,
            fhir=self._fhir,
            ledger=self.ledger,
            rules=self._rules,
            clock=self._clock,
            may_end=self._backlog.may_end,
        )
        if self._job is None:
            await self._patience.with_("dicom", self._intake.take_up)
        else:
            latest = await self._patience.with_("dicom", self._dicom.latest)
            # All that the feed tells has been settled: no Patient waits for older news.
            self._links.behind = self.ledger.watermark.low < (latest.sequence if latest else 0)
        log.info(
            "started",
            software=can.software,
            transaction=can.transaction,
            batch=can.batch,
            client_ids=can.client_ids,
            watermark=self.ledger.watermark.low,
        )

    async def _commit_in_time(self) -> None:
        if self._clock.monotonic() - self._last_commit >= _COMMIT_EVERY:
            self.ledger.trouble = self._patience.trouble
            await self._patience.with_("database", self.ledger.commit)
            self._last_commit = self._clock.monotonic()
            self._progress(self.ledger.watermark.low, self.ledger.latest)

    async def _give_back(self) -> None:
        """Commit what is settled and free the lease; what can't be committed will be read again."""
        self.ledger.trouble = self._patience.trouble
        try:
            with _in_vain():
                await self.ledger.commit()
        finally:
            with _in_vain():
                await self.ledger.close()
        self._progress(self.ledger.watermark.low, self.ledger.latest)

    # Lanes ----------------------------------------------------------------------------------------------------------

    def _free(self) -> int:
        """Lanes that may be started."""
        return max(0, min(self._options.sync.parallel, self._fhir.parallel) - len(self._lanes))

    async def _start_work(self, tasks: asyncio.TaskGroup) -> None:
        """Behind the live traffic: in lanes that it leaves free, or else in one more."""
        await self._patience.with_("database", self._backlog.fill)
        if self._lanes and self._patience.troubled("dicom", "database", "fhir", _REFUSALS):
            return
        self._working &= self._lanes.keys()
        room = max(0 if self._working else 1, self._free())
        while room > 0 and (works := self._backlog.take(self._lanes.keys())):
            uid, now = works[0].study_instance_uid, self._clock.monotonic()
            change = self._buffer.take(uid) or StudyChange(uid, arrived=now, touched=now)
            change.reconcile(works[0].reason)
            change.work += works
            self._working.add(uid)
            self._lanes[uid] = tasks.create_task(self._lane(change))
            room -= 1

    async def _start_lanes(self, tasks: asyncio.TaskGroup) -> None:
        if self._lanes and self._patience.troubled("database", "fhir", _REFUSALS):
            return
        free = self._free()
        # At the head it decides when a study is due whether it is new to us.
        await self._read_rows(self._due(free) if self._intake.behind else self._buffer)
        due = self._due(free)  # from here on nothing is awaited: what is due may change meanwhile
        asked = self._questions(due)
        known = [change for change in due if change.study_uid not in asked and not self._waits(change)]
        for change in known[:free]:
            self._buffer.take(change.study_uid)
            self._lanes[change.study_uid] = tasks.create_task(self._lane(change))
        many = len(asked) >= ASKED_TOGETHER or self._buffer.full or not self._intake.behind
        if asked and many and len(known) <= free and (self._looking is None or self._looking.done()):
            self._looking = tasks.create_task(self._look_up(dict(islice(asked.items(), ASKED_TOGETHER))))

    def _due(self, free: int) -> list[StudyChange]:
        """What is due, no more of it than lanes are free and can be asked about at once."""
        buffer, intake = self._buffer, self._intake
        due = buffer.due_behind(intake.feed_time) if intake.behind else buffer.due_at_head(now=self._clock.monotonic())
        idle = (change for change in due if change.study_uid not in self._lanes)
        return list(islice(idle, free + ASKED_TOGETHER))

    async def _read_rows(self, changes: Iterable[StudyChange]) -> None:
        blank = {one.study_uid: one for one in changes if one.held is None and one.study_uid not in self._lanes}
        if blank:
            rows = await self._patience.with_("database", partial(self.ledger.studies, list(blank)))
            for uid, (row, _) in rows.items():
                blank[uid].held = row.instances or 1 if row and row.outcome != "deleted" else 0

    def _questions(self, due: list[StudyChange]) -> dict[str, Question]:
        """What FHIR is to be asked about these before their lanes start, by study."""
        folds = (change for change in due if _to_fold(change) and change.study_uid not in self._alone)
        asked = {change.study_uid: _question(change) for change in folds}
        return {uid: question for uid, question in asked.items() if self._links.must_ask(question)}

    def _waits(self, change: StudyChange) -> bool:
        """Whether a lane of it would only wait for another of the same Patient."""
        return _to_fold(change) and self._links.in_use(_question(change)[0])

    async def _look_up(self, questions: dict[str, Question]) -> None:
        """Ask all that at once; where that can't be answered, each lane asks its own."""
        try:
            await self._patience.turn("fhir")
            await self._links.look_up(questions.values())
            self._patience.well("fhir")
        except Stopped:
            raise
        except Exception as refused:  # a bug of ours, or an answer that nobody has foreseen, is one study's too
            if isinstance(refused, errors.Unavailable) and not (
                isinstance(refused, _DOUBTFUL) and await self._fhir.answers()
            ):
                self._patience.note(refused)
            else:
                log.warning("studies are looked up one by one", studies=len(questions), reason=type(refused).__name__)
                self._alone |= questions.keys()
        self._intake.moved.set()

    def _settle_demographics(self) -> None:
        """Once all that was there at the start is settled, Patients without a row can be told old news from new."""
        head = self._intake.head
        if (
            self._links.behind
            and head is not None
            and self.ledger.watermark.idle(but=self._links.held_back, up_to=head)
        ):
            for study_uid, sequences in self._links.caught_up():
                change = self._intake.reconcile_soon(study_uid, "demographics")
                if sequences:
                    change.note(*sequences)

    async def _lane(self, change: StudyChange) -> None:
        """Settle one study; never two lanes of one study at a time."""
        uid, tries, exact = change.study_uid, _Tries(), change.reason is not None
        began = self._clock.monotonic()
        settled: Settled | None = None
        with structlog.contextvars.bound_contextvars(study=uid):
            while settled is None:
                try:
                    await self._patience.turn("fhir", _REFUSALS, *(["dicom"] if exact else []))
                    self.ledger.guard()
                    if exact:
                        settled = await self._roads.reconcile(change, lambda: self._buffer.take(uid))
                        self._patience.well("dicom", "fhir")
                    else:
                        settled = await self._roads.fold(change)
                        self._patience.unused("fhir", _REFUSALS)
                    if settled.outcome in ("created", "updated", "deleted"):
                        self._refused, self._taken_at = ("", set()), self._clock.monotonic()
                        self._patience.well("fhir", _REFUSALS)
                except (errors.Replan, errors.Rejected, errors.StudyFailed, *_DOUBTFUL) as failure:
                    settled = await self._after(failure, change, tries)
                    exact = exact or not isinstance(failure, _DOUBTFUL)
                except errors.Unavailable as failure:
                    if self._patience.note(failure) == "database":
                        await self._patience.with_("database", partial(self.ledger.study, uid))
                except errors.Held as held:
                    await self._patience.with_("database", partial(self._backlog.hold, held, change))
                    if not (change.work or change.sequences):
                        break
                except (errors.Error, Stopped):
                    raise
                except Exception as surprise:  # a bug of ours stays with its study: the rest of the feed goes on
                    settled = await self._park(change, _internal(surprise))
            if settled is not None:
                self._settle(change, settled, tries, exact=exact, seconds=self._clock.monotonic() - began)
        del self._lanes[uid]
        self._alone.discard(uid)
        self._intake.moved.set()

    def _settle(self, change: StudyChange, settled: Settled, tries: _Tries, *, exact: bool, seconds: float) -> None:
        road, reason = ("reconcile", change.reason or "base") if exact else ("fold", None)
        log.debug("settled", outcome=settled.outcome, road=road, reason=reason)
        now = self._clock.now()
        lag = max(0.0, (now - change.entered).total_seconds()) if change.entered else None
        entries = len(change.sequences)
        flush = store.Flush(change.study_uid, now, road, reason, settled.outcome, entries, seconds, lag)
        self.ledger.settle(change.study_uid, *self._links.settled(change, settled), flush)
        self._backlog.done(change, settled.outcome)
        if tries.in_doubt:
            # A create has no If-Match: once it can't take effect any more, somebody must see whether it did.
            self.ledger.look_again(change.study_uid, seconds=2 * self._options.fhir.timeout + _LATE)

    async def _after(self, failure: errors.Error, change: StudyChange, tries: _Tries) -> Settled | None:
        """What becomes of a study whose attempt went wrong: parked, or None to look at both services and try again."""
        if isinstance(failure, errors.StudyFailed):
            self._patience.well({"read": "dicom", "write": "fhir"}.get(failure.stage, ""))
            return await self._park(change, failure)
        if isinstance(failure, errors.OutcomeUnknown | errors.Troubled | errors.Forbidden):
            return await self._after_trouble(failure, change, tries)
        self._patience.well("fhir")
        if type(failure) is errors.Replan:
            return None  # a base that we can't vouch for: Patient and Endpoint are what they were
        self._forget(change, refused=not failure.partial)
        if isinstance(failure, errors.Rejected):
            tries.refusals += 1
            if tries.refusals >= 2:
                message = f"the FHIR service refuses the study's resources: {failure}"
                return await self._refuse(change, errors.StudyFailed("rejected", message, stage="write"), tries)
        elif isinstance(failure, errors.Conflict):
            tries.conflicts += 1
            if tries.conflicts == _CONFLICTS:
                message = f"{_CONFLICTS} tries in a row met somebody else's write"
                return await self._park(change, errors.StudyFailed("conflict", message, stage="write"))
            await self._patience.wait(random.uniform(0.05, 0.5) * tries.conflicts)  # noqa: S311 - jitter
        return None

    async def _after_trouble(
        self, failure: errors.OutcomeUnknown | errors.Troubled | errors.Forbidden, change: StudyChange, tries: _Tries
    ) -> Settled | None:
        """A request without a clear answer: the service's trouble if a probe fails too, else in the end the study's."""
        service = "fhir" if isinstance(failure, errors.OutcomeUnknown) else failure.service
        now = self._clock.monotonic()
        since = tries.trouble_since or now
        if service == "dicom":
            well = await self._dicom.answers()
        elif isinstance(failure, errors.Forbidden):
            tries.trouble_since = since
            well = self._taken_at > since or await self._links.permitted()
        else:
            well = await self._fhir.answers()
        if isinstance(failure, errors.OutcomeUnknown):
            tries.in_doubt = True
            self._forget(change, refused=False)
        if not well:
            self._patience.note(
                errors.Troubled(service, str(failure)) if isinstance(failure, errors.OutcomeUnknown) else failure
            )
            return None
        self._patience.well(service)
        tries.trouble_since = since
        tries.troubles += 1
        if tries.troubles >= _TROUBLES and now - tries.trouble_since >= _TROUBLE_LASTS:
            kind = "denied" if isinstance(failure, errors.Forbidden) else "server-error"
            message = f"{tries.troubles} requests for this study alone failed: {failure}"
            failed = errors.StudyFailed(kind, message, stage="read" if service == "dicom" else "write")
            return await (self._park(change, failed) if service == "dicom" else self._refuse(change, failed, tries))
        await self._patience.wait(min(LONGEST_PAUSE, 2.0**tries.troubles))
        if self._stop.is_set():
            raise Stopped
        return None

    async def _refuse(self, change: StudyChange, failed: errors.StudyFailed, tries: _Tries) -> Settled | None:
        """Park what the FHIR service does not take; where it takes nothing any more, one a pause and no faster.

        Many in a row for one reason are a misconfiguration, and somebody should look before they are thousands.
        """
        kind, studies = self._refused
        self._refused = (failed.kind, studies | {change.study_uid} if kind == failed.kind else {change.study_uid})
        if len(self._refused[1]) >= _REFUSED_IN_A_ROW:
            reason = f"{_REFUSED_IN_A_ROW} studies in a row were refused ({failed.kind}); see dicomcast failures"
            self._patience.note(errors.Unavailable("fhir", reason), circuit=_REFUSALS)
            if not tries.held:
                tries.held = True
                return None
        return await self._park(change, failed)

    def _forget(self, change: StudyChange, *, refused: bool) -> None:
        self._roads.forget(change.study_uid)
        self._links.forget(change.patient_key, refused=refused)

    async def _park(self, change: StudyChange, failed: errors.StudyFailed) -> Settled:
        row, _ = await self._patience.with_("database", partial(self.ledger.study, change.study_uid))
        log.warning("study failed", kind=failed.kind, reason=str(failed))
        sequence = change.last_sequence or (row.last_sequence if row else None)
        failure = failure_of(failed, study_uid=change.study_uid, sequence=sequence)
        study = self._roads.parked(change, row)
        return Settled("failed", study, failures=(*change.failures, failure))


async def _nothing_to_read() -> None:
    """A job leaves the feed alone."""


@contextmanager
def _in_vain() -> Iterator[None]:
    """What is not given back runs out, and what is not committed will be read again."""
    try:
        yield
    except (errors.LeaseLost, errors.Unavailable) as failure:
        log.warning("not given back", reason=str(failure))


def _to_fold(change: StudyChange) -> bool:
    return change.reason is None and bool(change.instances)


def _question(change: StudyChange) -> tuple[PatientKey, str | None]:
    """What FHIR is asked about a study that is to be folded: its one patient, and itself if it is new to us."""
    _, instance = next(iter(change.instances.values()))
    return instance.patient_key, None if change.held else change.study_uid


def _internal(surprise: Exception) -> errors.StudyFailed:
    """A bug: its type and place. Its text may quote values."""
    frame = traceback.extract_tb(surprise.__traceback__)[-1]
    message = f"{type(surprise).__name__} at {frame.filename.rpartition('/')[2]}:{frame.lineno}; please report it"
    return errors.StudyFailed("internal", message, stage="write")


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
    others = [one for one in flat if not isinstance(one, errors.Error | Stopped)]
    return (others or known or flat)[0]
