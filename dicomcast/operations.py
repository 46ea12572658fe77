"""What operators do: `replay`, `verify` and `backfill` of studies, and what they change in the state itself.

Each of the three is a job: studies are listed into the database, and then worked through by whoever holds the feed's
lease; by this process, where nobody does. So each can be stopped and taken up again, and goes on beside a worker.
"""

import asyncio
import getpass
import hashlib
import platform
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import orjson
import structlog

from dicomcast import app, errors, mapping, settings
from dicomcast.clock import Clock
from dicomcast.dicom import values
from dicomcast.dicom.service import PAGE, DicomService
from dicomcast.fhir import resources
from dicomcast.fhir.service import FhirService, Query
from dicomcast.state import jobs, operators, store, tables, waiting
from dicomcast.sync.backlog import MAY_DELETE, too_many
from dicomcast.sync.ledger import Ledger, in_thread
from dicomcast.sync.links import Links
from dicomcast.sync.patience import Patience, Stopped
from dicomcast.sync.rehearsal import Rehearsal, Rehearsed
from dicomcast.sync.roads import ways

Json = Any
Progress = Callable[[int, int], None]
"""Called with the studies that are done, and all of them."""

_LOOK_EVERY = 1.0
_SLICE, _BREATH = 20.0, 3.0
"""Seconds after which a verb that holds the lease gives it back, and leaves it to others: images come first."""
_COMPARED_AT_ONCE = 16
_COMPARED_TOGETHER = 200
_WINDOW = timedelta(days=31)
_LATE = 1000
"""Sequences below the newest that the DICOM service may still be about to commit."""
_SAME = "same"
_GOOD_FOR = timedelta(days=1)
"""How long a list of studies to compare, and what was found of them, are good for."""
log = structlog.get_logger("dicomcast")

_COUNTED = ("created", "updated", "unchanged", "deleted")


@dataclass(frozen=True, slots=True)
class Limits:
    """How fast a job may go (studies a second), and how many studies it may take out of FHIR; None: as by default."""

    per_second: float | None = None
    allow_deletes: int | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which studies: those of failures, some by name, those of another mapping, or all that failed."""

    ids: tuple[int, ...] = ()
    studies: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    since: str | None = None
    everything: bool = False
    outdated: bool = False
    limit: int | None = None

    @property
    def scope(self) -> str:
        """The same in words: who asks for it again takes an unfinished job up."""
        named = {"id": self.ids, "study": self.studies, "series": self.series, "kind": self.kinds}
        words = [f"--{name} {value}" for name, values in named.items() for value in values]
        words += [f"--since {self.since}"] if self.since else []
        words += ["--all"] * self.everything + ["--outdated"] * self.outdated
        words += [f"--limit {self.limit}"] if self.limit is not None else []
        return " ".join(words)


@dataclass(slots=True)
class Report:
    """What a verb did: its JSON form, rows for people, whether something is amiss, and the signal that ended it."""

    document: dict[str, Json]
    rows: list[dict[str, Json]] = field(default_factory=list)
    amiss: bool = False
    stopped: int | None = None


@dataclass(slots=True)
class Desk:
    """Where an operator works: the database, and both services to look at; nothing is written to FHIR from here."""

    options: settings.Settings
    rules: mapping.Mapping
    state: store.Store
    feed_id: int
    clock: Clock
    stop: app.Stop
    patience: Patience
    dicom: DicomService
    fhir: FhirService
    links: Links
    rehearsal: Rehearsal
    progress: Progress
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a turn at work is over."""

    def begin(self, verb: str, scope: str, limits: Limits) -> jobs.Job:
        """The unfinished job of this verb and scope, or a new one; the audit says who asked."""
        now = self.clock.now()
        job = jobs.begin(
            self.state,
            self.feed_id,
            verb,
            scope,
            by=operator(),
            now=now,
            per_second=limits.per_second,
            allow_deletes=limits.allow_deletes,
        )
        if job.requested_at < now:
            begun = job.requested_at.isoformat(timespec="seconds")
            log.info("going on with an unfinished job", job=job.id, verb=verb, begun=begun)
        return job

    def worked_on(self) -> bool:
        """Whether somebody holds the feed's lease."""
        feed = self.state.feed(self.options.feed_name)
        return feed is not None and feed["lease_owner"] is not None and feed["lease_until"] > self.state.now()


def operator() -> str:
    """Who sits at this machine, for the audit."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{platform.node()}"[:128]


async def at_desk(
    options: settings.Settings,
    verb: Callable[[Desk], Awaitable[Report]],
    *,
    clock: Clock | None = None,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Do `verb` until it is done or a signal comes.

    Raises `NeedsPerson`, `LeaseHeld`, and `Unavailable` when patience runs out: what was done stays done, and the same
    call goes on from there.
    """
    settings.require_patient_system(options)
    rules, clock = app.rules(options), clock or Clock()
    with closing(store.Store(options.database.url, clock=clock)) as state, app.stop_on_signals() as stop:
        state.open()
        feed_id = state.know(options.feed_name, url=options.dicom.url)
        patience = Patience(clock=clock, stop=stop, limit=options.sync.patience)
        ledger = Ledger(state, clock=clock, seconds=options.sync.lease, tally=False)
        ledger.look(feed_id)
        async with app.services(options, clock=clock, dry=True) as (dicom, fhir):
            try:
                can = await patience.with_("fhir", fhir.capability)
                links, roads = ways(options, can, dicom=dicom, fhir=fhir, ledger=ledger, rules=rules, clock=clock)
                rehearsal = Rehearsal(roads, fhir=fhir, dicom=dicom, links=links, ledger=ledger, patience=patience)
                desk = Desk(
                    options, rules, state, feed_id, clock, stop, patience, dicom, fhir, links, rehearsal, progress
                )
                return await verb(desk)
            except Stopped:
                return Report({}, stopped=stop.signal)


async def _put(
    desk: Desk, job: jobs.Job, studies: Iterable[str], *, to_compare: bool = False, cursor: str | None = None
) -> None:
    """Studies into the database, a few at a time, and with the last of them `cursor`."""
    coming = iter(studies)
    while len(some := list(islice(coming, jobs.TOGETHER))) == jobs.TOGETHER:
        await in_thread(jobs.add, desk.state, job, some, to_compare=to_compare, cursor=job.cursor)
        if desk.stop.is_set():
            raise Stopped
    await in_thread(jobs.add, desk.state, job, some, to_compare=to_compare, cursor=cursor)


async def _work_through(desk: Desk, job: jobs.Job) -> jobs.Progress:
    """Until all of a job's work is done: by the worker that holds the lease, or by ourselves where none does."""
    alive: tuple[Any, ...] = ()
    since = desk.clock.monotonic()
    at_work: asyncio.Task[None] | None = None
    try:
        while True:
            looked = desk.clock.monotonic()
            now = await in_thread(jobs.progress, desk.state, job)
            pause = max(_LOOK_EVERY, 10 * (desk.clock.monotonic() - looked))  # to count a million takes a while
            desk.progress(now.done, now.states.total())
            if at_work is not None and at_work.done():
                await at_work  # raises what ended it
                at_work, since = None, desk.clock.monotonic()
            elif at_work is None:
                if now.held is not None and now.left:
                    raise errors.NeedsPerson(_held(job, now))
                if not now.left or desk.stop.is_set():
                    if now.held == jobs.CANCELLED:
                        log.warning("somebody has cancelled the job", job=job.id)
                    return now
                if not await in_thread(desk.worked_on):
                    at_work = asyncio.create_task(_work(desk, job))
                sign = await in_thread(jobs.sign_of_life, desk.state, desk.feed_id)
                if sign != alive or at_work is not None:
                    alive, since = sign, desk.clock.monotonic()
                elif desk.clock.monotonic() - since > desk.options.sync.patience:
                    raise _silent(desk)
            await desk.patience.wait(pause, moved=desk.finished)
            desk.finished.clear()
    finally:
        if at_work is not None:
            await asyncio.gather(at_work, return_exceptions=True)


def _held(job: jobs.Job, now: jobs.Progress) -> str:
    if now.held == jobs.CANCELLED:
        return f"job {job.id} was cancelled"
    return (
        f"{now.held}, and {now.left} studies of this {job.verb} still wait: look at them with --dry-run or verify, and "
        "where it is right say --allow-deletes N"
    )


def _silent(desk: Desk) -> errors.Error:
    """Why the worker that holds the lease does nothing."""
    feed = desk.state.feed(desk.options.feed_name) or {}
    if feed.get("trouble"):
        return errors.Unavailable("worker", feed["trouble"])
    return errors.LeaseHeld("the worker that holds the lease has not come to this; it goes on all the same")


async def _work(desk: Desk, job: jobs.Job) -> None:
    """Hold the lease while the job has work, and give it back now and then: a worker may wait for it."""
    try:
        async with app.services(desk.options, clock=desk.clock) as (dicom, fhir):
            worker = app.worker(
                desk.options,
                desk.rules,
                dicom=dicom,
                fhir=fhir,
                state=desk.state,
                clock=desk.clock,
                stop=desk.stop,
                once=True,
                job=job.id,
                until=desk.clock.monotonic() + _SLICE,
            )
            await worker.work()
    except (errors.LeaseHeld, errors.LeaseLost):
        pass  # somebody else came first
    else:
        if (await in_thread(jobs.progress, desk.state, job)).left:
            await desk.patience.wait(_BREATH)
    finally:
        desk.finished.set()


async def _rehearsed(desk: Desk, studies: Sequence[str], limits: Limits) -> list[Rehearsed]:
    """What a reconcile of each would do; several at once, and no more than allowed a second."""
    lanes = asyncio.Semaphore(_COMPARED_AT_ONCE)

    async def one(study_uid: str) -> Rehearsed:
        async with lanes:
            return await desk.rehearsal.of(study_uid)

    tasks = []
    try:
        for study_uid in studies:
            tasks.append(asyncio.ensure_future(one(study_uid)))
            if limits.per_second:
                await desk.patience.wait(1 / limits.per_second)
        return list(await desk.patience.unless_stopped(asyncio.gather(*tasks)))
    finally:
        for task in tasks:
            task.cancel()


# replay ---------------------------------------------------------------------------------------------------------------


async def replay(desk: Desk, selection: Selection, limits: Limits, *, dry_run: bool = False) -> Report:
    """Read studies anew and reconcile them; with `dry_run` only say what that would do."""
    chosen = await _chosen(desk, selection)
    if dry_run:
        return await _rehearse(desk, islice(chosen, selection.limit), limits)
    job = desk.begin("replay", selection.scope, limits)
    if selection.limit is not None:
        chosen = islice(chosen, max(0, selection.limit - jobs.progress(desk.state, job).states.total()))
    await _put(desk, job, chosen)  # also what has come to fit since an earlier call of the same
    jobs.listed(desk.state, job, now=desk.clock.now())
    done = await _work_through(desk, job)
    results = waiting.results(desk.state, job.id)
    document = {
        "replayed": results.total(),
        **{word: results[word] for word in _COUNTED},
        "still_failing": results["failed"],
    }
    amiss = results["failed"] > 0 or done.states["cancelled"] > 0
    return Report(document, amiss=amiss, stopped=desk.stop.signal)


async def _chosen(desk: Desk, selection: Selection) -> Iterable[str]:
    """Study Instance UIDs. Raises `Misconfigured` for a failure, a study or a series that nobody knows."""
    state, failure = desk.state, tables.failure.c
    for study_uid in selection.studies:
        if not await _known(desk, study_uid):
            raise errors.Misconfigured([f"--study {study_uid}: neither service knows it, nor does the database"])
    found: dict[str, None] = dict.fromkeys(selection.studies)
    for one in selection.ids:
        rows = state.failures(desk.feed_id, statuses=(), failure_id=one)  # what is over costs a look, and is no error
        studies = [row["study_instance_uid"] for row in rows if row["study_instance_uid"]]
        if not studies:
            raise errors.Misconfigured([f"--id {one}: no failure of a study has this id"])
        found |= dict.fromkeys(studies)
    for series_uid in selection.series:
        studies = jobs.failing(state, desk.feed_id, failure.series_instance_uid == series_uid)
        if not studies:
            there = await desk.patience.with_("dicom", partial(desk.dicom.study_of, series_uid))
            studies = [there] if there else []
        if not studies:
            raise errors.Misconfigured([f"--series {series_uid}: neither a failure nor the DICOM service knows it"])
        found |= dict.fromkeys(studies)
    narrowed: list[Any] = [failure.kind.in_(selection.kinds)] if selection.kinds else []
    narrowed += [failure.last_seen >= settings.moment(selection.since, desk.clock.now())] if selection.since else []
    for kind in selection.kinds:
        if kind not in errors.KINDS and not jobs.failing(state, desk.feed_id, failure.kind == kind, limit=1):
            raise errors.Misconfigured([f"--kind {kind}: no failure is of this kind"])
    if selection.everything or narrowed:
        found |= dict.fromkeys(jobs.failing(state, desk.feed_id, *narrowed))
    other = tables.study.c.mapping_digest != desk.rules.digest
    outdated = jobs.known(state, desk.feed_id, other) if selection.outdated else ()
    return chain(found, (uid for uid in outdated if uid not in found))


async def _known(desk: Desk, study_uid: str) -> bool:
    """Whether the database, the DICOM service or the FHIR service knows of a study."""
    if desk.state.study_row(desk.feed_id, study_uid) or desk.state.failures(desk.feed_id, study_uid=study_uid):
        return True
    if await desk.patience.with_("dicom", partial(desk.dicom.lists, study_uid)):
        return True
    try:
        return await desk.patience.with_("fhir", partial(desk.links.study, study_uid)) is not None
    except errors.StudyFailed:  # there are several
        return True


async def _rehearse(desk: Desk, studies: Iterable[str], limits: Limits) -> Report:
    counts: Counter[str] = Counter()
    rows: list[dict[str, Json]] = []
    coming = iter(studies)
    while some := list(islice(coming, _COMPARED_TOGETHER)):
        for study_uid, rehearsed in zip(some, await _rehearsed(desk, some, limits), strict=True):
            failures = _not_dismissed(desk, study_uid, rehearsed.failures)
            outcome = "failed" if failures else rehearsed.outcome
            counts[outcome] += 1
            if outcome != "unchanged":
                kinds = sorted({one.kind for one in failures})
                changes = _changes(rehearsed)
                rows.append(
                    {"study_instance_uid": study_uid, "outcome": outcome, "changes": changes, "failures": kinds}
                )
        desk.progress(counts.total(), counts.total() + len(some))
    document = {
        "replayed": counts.total(),
        **{word: counts[word] for word in _COUNTED},
        "still_failing": counts["failed"],
        "dry_run": True,
        "studies": rows,
    }
    return Report(document, [*map(_in_words, rows)], amiss=counts["failed"] > 0, stopped=desk.stop.signal)


def _changes(rehearsed: Rehearsed) -> list[dict[str, Json]]:
    return [{"action": one.action, "resource": one.type, "elements": list(one.elements)} for one in rehearsed.writes]


def _in_words(one: dict[str, Json]) -> dict[str, Json]:
    """The same for a table: `update ImagingStudy (series.description)`."""
    changes = [
        f"{change['action']} {change['resource']}" + f" ({', '.join(change['elements'])})" * bool(change["elements"])
        for change in one.get("changes", ())
    ]
    return {**one, "changes": changes}


# verify ---------------------------------------------------------------------------------------------------------------


async def verify(
    desk: Desk, limits: Limits, *, studies: Sequence[str] = (), since: str | None = None, repair: bool = False
) -> Report:
    """Compare what DICOM, FHIR and the database say of these studies, or of all; with `repair` reconcile what differs.

    Raises `NeedsPerson` too where a repair would take more studies out of FHIR than was allowed.
    """
    scope = [f"--study {one}" for one in studies] or ([f"--since {since}"] if since else ["--all"])
    job = desk.begin("verify", " ".join([*scope, *["--repair"] * repair]), limits)
    now, every = desk.clock.now(), True
    if job.listed_at is None or job.listed_at < now - _GOOD_FOR:
        await _put(desk, job, studies, to_compare=True, cursor=job.cursor)
        every = bool(studies) or await desk.patience.unless_stopped(_list_all(desk, job, since=since))
        if every:
            jobs.listed(desk.state, job, now=desk.clock.now())
    # What an earlier call of the same found may not be so any more.
    await in_thread(jobs.compare_again, desk.state, job, before=now - _GOOD_FOR)
    differing, pending = await _compare(desk, job, limits), set[int]()
    if differing and desk.worked_on():
        # The worker may just have been about to write what is missing.
        log.info("some seem to differ: looking again", studies=len(differing), seconds=2 * desk.options.settle.idle)
        await desk.patience.wait(2 * desk.options.settle.idle)
        differing = await _compare(desk, job, limits)
        pending = await desk.patience.unless_stopped(_pending(desk, differing))
        await in_thread(jobs.pending, desk.state, pending)
        differing = {work_id: one for work_id, one in differing.items() if work_id not in pending}
    jobs.listed(desk.state, job, now=desk.clock.now())  # or it was cancelled meanwhile
    checked = jobs.progress(desk.state, job).done
    found = list(differing.values())
    if not studies and since is None:
        found += await desk.patience.unless_stopped(_orphans(desk))
    found += [] if every else [{"study_instance_uid": None, "kind": "unlisted"}]
    repaired = await _repair(desk, job, differing, limits, checked=checked) if repair and differing else 0
    document = {"checked": checked, "differences": found, "repaired": repaired, "pending": len(pending)}
    return Report(document, [*map(_in_words, found)], amiss=len(found) > repaired, stopped=desk.stop.signal)


async def _pending(desk: Desk, differing: dict[int, dict[str, Json]]) -> set[int]:
    """Those that the feed tells of above the watermark: whoever holds the lease has yet to come to them."""
    feed = desk.state.feed(desk.options.feed_name) or {}
    told: set[str] = set()
    async for studies in _told(desk, after=feed.get("watermark") or 0):
        told |= studies
    return {work_id for work_id, one in differing.items() if one["study_instance_uid"] in told}


async def _list_all(desk: Desk, job: jobs.Job, *, since: str | None) -> bool:
    """Studies that the database, the DICOM service or the FHIR service has, each once; taken up where it stopped.

    False where the FHIR service could not be listed.
    """
    phase = job.cursor or "state"
    if since is not None:
        start = settings.moment(since, desk.clock.now())
        known = jobs.known(desk.state, desk.feed_id, tables.study.c.synced_at >= start)
        await _put(desk, job, known, to_compare=True)
        latest = await desk.patience.with_("dicom", desk.dicom.latest)
        newest = latest.sequence if latest else 0
        after = await desk.patience.with_("dicom", partial(desk.dicom.before, start, newest=newest))
        async for studies in _told(desk, after=after):
            await _put(desk, job, studies, to_compare=True)
        return True
    if phase == "state":
        await _put(desk, job, jobs.known(desk.state, desk.feed_id), to_compare=True, cursor="dicom")
        phase = "dicom"
    if phase == "dicom":
        async for page in desk.dicom.studies():
            await _put(desk, job, page, to_compare=True, cursor="dicom")
        await _put(desk, job, (), cursor="fhir")
    endpoint, _ = await desk.patience.with_("fhir", desk.links.endpoints)
    if endpoint is None:
        return True
    query = Query("ImagingStudy", (("endpoint", endpoint.reference), ("_elements", "identifier"), ("_count", "200")))
    try:
        async for hits in desk.fhir.each(query):
            uids = (_study_uid(one) for one in hits)
            await _put(desk, job, [uid for uid in uids if uid], to_compare=True, cursor="fhir")
    except (errors.Rejected, errors.Conflict) as refused:
        log.warning("not all of FHIR was listed", reason=str(refused))
        return False
    return True


async def _told(desk: Desk, *, after: int) -> AsyncIterator[set[str]]:
    """Studies that the feed tells of after a sequence, page by page."""
    latest = await desk.patience.with_("dicom", desk.dicom.latest)
    while latest is not None and after < latest.sequence:
        page = await desk.patience.with_("dicom", partial(desk.dicom.page, after, metadata=False))
        yield {entry.study_uid for entry in page if entry.study_uid}
        after += PAGE


async def _compare(desk: Desk, job: jobs.Job, limits: Limits) -> dict[int, dict[str, Json]]:
    """Compare what waits for it, and once more what has differed; by id of the work, what differs now.

    A few at a time, and results are kept as they come.
    """
    await in_thread(jobs.put_back, desk.state, job, as_="listed")
    states = (await in_thread(jobs.progress, desk.state, job)).states
    done, total = states["done"], states.total()
    while some := await in_thread(jobs.to_compare, desk.state, job, limit=_COMPARED_TOGETHER):
        studies = [work.study_instance_uid for work in some]
        found = await _rehearsed(desk, studies, limits)
        twice = await desk.patience.with_("fhir", partial(desk.links.repeated, studies))
        results = await in_thread(_verdicts, desk, some, found, twice)
        await in_thread(jobs.compared, desk.state, results, now=desk.clock.now())
        done += len(some)
        desk.progress(done, total)
    rows = await in_thread(lambda: list(jobs.different(desk.state, job)))
    return {row.id: {"study_instance_uid": row.study_instance_uid, **orjson.loads(row.detail)} for row in rows}


def _verdicts(
    desk: Desk, some: list[waiting.Work], found: list[Rehearsed], twice: set[str]
) -> list[tuple[int, str, str | None]]:
    results = []
    for work, rehearsed in zip(some, found, strict=True):
        kind, detail = _verdict(desk, work.study_instance_uid, rehearsed)
        if work.study_instance_uid in twice:
            kind, detail = "duplicates", {"changes": [], **detail}
        results.append((work.id, kind, orjson.dumps({"kind": kind, **detail}).decode() if detail else None))
    return results


def _verdict(desk: Desk, study_uid: str, rehearsed: Rehearsed) -> tuple[str, dict[str, Json]]:
    """In one word how the three differ, and the details; `same` where they do not."""
    detail: dict[str, Json] = {"changes": _changes(rehearsed)}
    if unknown := _not_dismissed(desk, study_uid, rehearsed.failures):
        detail["failures"] = sorted({one.kind for one in unknown})
        return "failed", detail
    word = _difference(rehearsed)
    if word is None and not rehearsed.failures and _unrecorded(desk, study_uid, rehearsed.row):
        word = "unrecorded"
    return (word, detail) if word else (_SAME, {})


def _difference(rehearsed: Rehearsed) -> str | None:
    """Between DICOM and FHIR; None where there is none."""
    study = [one for one in rehearsed.writes if one.type == "ImagingStudy"]
    actions = {one.action for one in study}
    if rehearsed.outcome == "deleted" or "delete" in actions:
        return "extra"
    if "create" in actions:
        return "missing"
    if any({"numberOfSeries", "numberOfInstances"} & {*one.elements} for one in study):
        return "counts"
    return "content" if rehearsed.writes else None


def _unrecorded(desk: Desk, study_uid: str, wanted: store.Study | None) -> bool:
    """Whether the database says otherwise of a study whose FHIR content is right."""
    row = desk.state.study_row(desk.feed_id, study_uid)
    if wanted is None or wanted.outcome == "deleted":
        return wanted is not None and row is not None and row["outcome"] != "deleted"
    columns = ("outcome",) if wanted.outcome == "shared" else ("outcome", "imaging_study", "series", "instances")
    return row is None or any(row[name] != getattr(wanted, name) for name in columns)


def _not_dismissed(desk: Desk, study_uid: str, failures: Iterable[store.Failure]) -> list[store.Failure]:
    found = list(failures)
    if not found:
        return []
    rows = desk.state.failures(desk.feed_id, statuses=("dismissed",), study_uid=study_uid)
    known = {(row["kind"], row["sop_instance_uid"]) for row in rows}
    gathered = {row["kind"] for row in rows if row["instances"] > 1}
    return [one for one in found if (one.kind, one.sop_instance_uid) not in known and one.kind not in gathered]


async def _repair(
    desk: Desk, job: jobs.Job, differing: dict[int, dict[str, Json]], limits: Limits, *, checked: int
) -> int:
    """Reconcile what differs; how many are mended."""
    extra = sum(one["kind"] == "extra" for one in differing.values())
    if too_many(extra, of=checked, allowed=limits.allow_deletes):
        reason = f"{extra} of {checked} studies would be taken out of FHIR"
        await in_thread(jobs.put_back, desk.state, job, as_="listed")
        await in_thread(waiting.hold, desk.state, job.id, reason)
        raise errors.NeedsPerson(
            f"{reason}; where that is right, say --allow-deletes {extra}: only what differs is then looked at again"
        )
    await in_thread(jobs.allow, desk.state, job, max(extra, limits.allow_deletes or MAY_DELETE))
    await in_thread(jobs.put_back, desk.state, job, as_="waiting")
    await _work_through(desk, job)
    left = await _compare(desk, job, limits)
    for work_id, one in differing.items():
        one["repaired"] = work_id not in left
    return sum(one["repaired"] for one in differing.values())


async def _orphans(desk: Desk) -> list[dict[str, Json]]:
    """Endpoints that dicomcast made, that are not this feed's, and that no ImagingStudy refers to."""
    ours, hits = await desk.patience.with_("fhir", desk.links.endpoints)
    found = []
    for one in hits:
        if not resources.is_tagged(one.resource) or (ours is not None and one.id == ours.id):
            continue
        used = Query("ImagingStudy", (("endpoint", one.reference), ("_elements", "identifier"), ("_count", "1")))
        if not await _answered(desk, used):
            found.append({"study_instance_uid": None, "kind": "orphaned-endpoint", "endpoint": one.id})
    return found


async def _answered(desk: Desk, query: Query) -> bool:
    """Whether a search finds anything, or the service can't say."""
    try:
        async with aclosing(desk.fhir.each(query)) as pages:
            async for page in pages:
                return bool(page)
    except (errors.Rejected, errors.Conflict):
        pass
    return True


def _study_uid(held: resources.Held) -> str | None:
    identifiers = held.resource.get("identifier") or ()
    named = (str(one.get("value")) for one in identifiers if one.get("system") == "urn:dicom:uid")
    return next((value.removeprefix("urn:oid:") for value in named if value.startswith("urn:oid:")), None)


# backfill -------------------------------------------------------------------------------------------------------------


async def backfill(
    desk: Desk, limits: Limits, *, dates: tuple[date, date | None] | None = None, named: Sequence[str] | None = None
) -> Report:
    """Bring studies into FHIR that the feed does not tell of: those of some days, those that are named, or all.

    `dates`: the first day and the last; None is today. After `all`, a feed that was never begun begins a little below
    its newest entry of before the listing.
    """
    # What is asked for stands in the database: no date that a study might have, and no file's name.
    wanted = [f"{one}" for one in dates or named or ()]
    what = "--from --to" if dates else "--all" if named is None else "--studies-file"
    scope = f"{what} {hashlib.sha256(' '.join(wanted).encode()).hexdigest()[:12]}" if wanted else what
    job = desk.begin("backfill", scope, limits)
    if job.handover is None:
        latest = await desk.patience.with_("dicom", desk.dicom.latest)
        job = jobs.hand_over_at(desk.state, job, max(0, latest.sequence - _LATE) if latest else 0)
    if job.listed_at is None:
        await desk.patience.unless_stopped(_list_for_backfill(desk, job, dates=dates, named=named))
    done = await _work_through(desk, job)
    results = waiting.results(desk.state, job.id)
    document = {
        "listed": done.states.total(),
        **{word: results[word] for word in (*_COUNTED, "failed")},
        "handover": job.handover,
    }
    amiss = results["failed"] > 0 or done.states["cancelled"] > 0
    return Report(document, amiss=amiss, stopped=desk.stop.signal)


async def _list_for_backfill(
    desk: Desk, job: jobs.Job, *, dates: tuple[date, date | None] | None, named: Sequence[str] | None
) -> None:
    if named is not None:
        await _put(desk, job, named)
    elif dates is None:
        async for page in desk.dicom.studies():
            await _put(desk, job, page)
    else:
        window, last = int(job.cursor or 0), dates[1] or desk.clock.now().date() + timedelta(days=1)  # wherever it is
        while (first := dates[0] + window * _WINDOW) <= last:
            async for page in desk.dicom.studies(dates=(first, min(first + _WINDOW - timedelta(days=1), last))):
                await _put(desk, job, page, cursor=str(window))
            window += 1
    jobs.listed(desk.state, job, whole=named is None and dates is None, now=desk.clock.now())


def named_in(file: Path) -> list[str]:
    """Study Instance UIDs of a file, one a line; blank lines and what follows a # do not count.

    Raises `Misconfigured` with the numbers of the lines that hold something else, and where there is none at all.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as unreadable:
        raise errors.Misconfigured([f"--studies-file {file}: can't be read ({type(unreadable).__name__})"]) from None
    uids = {at: line.partition("#")[0].strip() for at, line in enumerate(lines, 1)}
    wrong = [at for at, uid in uids.items() if uid and not values.is_uid(uid)]
    if wrong:
        raise errors.Misconfigured([f"--studies-file {file}: line {at} is no UID" for at in wrong[:20]])
    if not any(uids.values()):
        raise errors.Misconfigured([f"--studies-file {file}: there is no UID in it"])
    return list(dict.fromkeys(uid for uid in uids.values() if uid))


# The state itself -----------------------------------------------------------------------------------------------------


@contextmanager
def _state(options: settings.Settings) -> Iterator[tuple[store.Store, store.Row]]:
    """The database and the feed's row. Raises `Misconfigured` where nothing of this feed was ever synced."""
    with app.known(options) as (state, feed):
        if feed is None:
            raise errors.Misconfigured([f"database.url: nothing is known there of the feed {options.feed_name}"])
        yield state, feed


def dismiss(
    options: settings.Settings, *, ids: Sequence[int], kind: str | None, study_uid: str | None, reason: str
) -> list[int]:
    """Failures that are to be open no more; ids of those that were."""
    with _state(options) as (state, feed):
        return operators.dismiss(
            state,
            feed["id"],
            ids=ids,
            kind=kind,
            study_uid=study_uid,
            reason=reason,
            who=operator(),
            now=Clock().now(),
        )


def prune(options: settings.Settings, *, before: datetime) -> dict[str, int]:
    """Remove what was over before then; rows by table."""
    with _state(options) as (state, feed):
        return operators.prune(state, feed["id"], before=before, who=operator(), now=Clock().now())


def position(options: settings.Settings) -> operators.Position | None:
    """Where the feed is; None where it was never begun. Raises `Incompatible` where that can't be read."""
    with app.known(options) as (state, feed):
        return operators.position(state, feed["id"]) if feed is not None else None


def newest(options: settings.Settings, watermark: int, name: str) -> int | None:
    """The newest entry that the DICOM service has, None where it can't say. Raises `Misconfigured` below `watermark`.

    `name`: what the watermark is called where it was said.
    """
    latest: int | None = asyncio.run(app.asked(options, Clock().now())).get("latest")
    if latest is not None and watermark > latest:
        raise errors.Misconfigured([f"{name}: {watermark} is beyond the change feed, which ends at {latest}"])
    return latest


def set_position(options: settings.Settings, wanted: operators.Position, *, action: str) -> None:
    """Put the feed there, under its lease. Raises `LeaseHeld` beside a worker."""
    with closing(store.Store(options.database.url, clock=Clock())) as state:
        state.open()
        who = operator()
        lease = state.acquire(options.feed_name, url=options.dicom.url, owner=f"{who}:{action}"[:128], seconds=30)
        try:
            operators.set_position(state, lease, wanted, action=action, who=who, now=Clock().now())
        finally:
            state.release(lease)


def audited(options: settings.Settings, *, limit: int) -> list[store.Row]:
    """The latest actions of operators, the newest first."""
    with app.known(options) as (state, feed):
        return operators.audited(state, feed["id"], limit=limit) if feed is not None else []


def unfinished(options: settings.Settings) -> list[store.Row]:
    """Jobs that are not done with."""
    with app.known(options) as (state, feed):
        return jobs.unfinished(state, feed["id"]) if feed is not None else []


def cancel(options: settings.Settings, job_id: int) -> int | None:
    """Give up what a job still waits for; how many studies, or None where no such job goes on."""
    with _state(options) as (state, feed):
        return jobs.cancel(state, feed["id"], job_id, by=operator(), now=Clock().now())
