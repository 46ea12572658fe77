"""Composition root: what the verbs do. Nothing else constructs services, stores, rules or workers."""

import asyncio
import gc
import logging
import math
import os
import platform
import signal
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

import structlog

from dicomcast import errors, mapping, settings, wire
from dicomcast.clock import Clock
from dicomcast.dicom.service import DicomService
from dicomcast.fhir.service import FhirService
from dicomcast.state import jobs, store
from dicomcast.sync.ledger import Outcome
from dicomcast.sync.rehearsal import Unwritten
from dicomcast.sync.worker import Worker

Json = Any
Progress = Callable[[int, int], None]
"""Called with the watermark and the newest sequence known."""

log = structlog.get_logger("dicomcast")


def configure_logging(options: settings.Log) -> None:
    """Events to stderr: text on a terminal, else a JSON object per line."""
    text = options.format == "text" or (options.format == "auto" and sys.stderr.isatty())
    renderer = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if text else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[options.level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def rules(options: settings.Settings) -> mapping.Mapping:
    """The mapping modules that the settings name, compiled. Raises `Misconfigured`."""
    context = mapping.Context(
        patient_system=options.patient.system,
        accession_system=options.accession.system,
        timezone=options.mapping.timezone,
        missing_modality=options.mapping.missing_modality,
        strict=options.mapping.strict,
        issuers=options.mapping.issuers,
        coding_schemes=options.mapping.coding_schemes,
        body_parts=options.mapping.body_parts,
        dicom_url=options.dicom_identity,
        endpoint_address=options.dicom.public_url or options.dicom_root,
        endpoint_name=options.dicom.endpoint_name,
    )
    return mapping.load([*options.mapping.modules, *options.mapping.overlays], context)


@contextmanager
def known(options: settings.Settings) -> Iterator[tuple[store.Store, store.Row | None]]:
    """The state database and the feed's row, for questions; None where nothing was ever synced (nothing is made)."""
    with closing(store.Store(options.database.url, clock=Clock())) as opened:
        yield opened, opened.feed(options.feed_name) if opened.exists() else None


@asynccontextmanager
async def services(
    options: settings.Settings, *, clock: Clock, dry: bool = False
) -> AsyncIterator[tuple[DicomService, FhirService]]:
    """Clients of both services; `dry`: what would be written to FHIR is not."""
    dicom = DicomService(
        _wire("dicom", options, clock), version=options.dicom_version, partition=options.dicom.partition
    )
    fhir = (Unwritten if dry else FhirService)(_wire("fhir", options, clock), ids=options.fhir.ids)
    try:
        yield dicom, fhir
    finally:
        await dicom.close()
        await fhir.close()


def _wire(name: Literal["dicom", "fhir"], options: settings.Settings, clock: Clock) -> wire.Service:
    service: settings.Dicom | settings.Fhir = getattr(options, name)
    auth = wire.credentials(
        username=service.username,
        password=service.password.get_secret_value() if service.password else None,
        token=service.token.get_secret_value() if service.token else None,
    )
    return wire.Service(
        name=name, url=service.url, auth=auth, timeout=service.timeout, clock=clock, parallel=options.sync.parallel
    )


# sync and run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Synced:
    """What one `sync` did. `report` is its JSON form; `stopped` the signal that ended it early, if one did."""

    report: dict[str, Json]
    failed: bool
    stopped: int | None


async def sync(options: settings.Settings, *, clock: Clock | None = None, progress: Progress | None = None) -> Synced:
    """Catch up with the change feed once.

    Raises `NeedsPerson`, `LeaseHeld`, and `Unavailable` when patience runs out; what was settled is kept.
    """
    settings.require_patient_system(options)
    compiled = rules(options)
    clock = clock or Clock()
    began = clock.monotonic()
    with closing(store.Store(options.database.url, clock=clock)) as opened, stop_on_signals() as stop:
        async with services(options, clock=clock) as (dicom, fhir):
            engine = worker(
                options,
                compiled,
                dicom=dicom,
                fhir=fhir,
                state=opened,
                clock=clock,
                stop=stop,
                once=True,
                progress=progress,
            )
            await engine.work()
            ledger = engine.ledger
            still_open = await asyncio.to_thread(_open_failures, opened, options.feed_name)
            studies: list[str] = list(ledger.outcomes.values())
            report = {
                "watermark": ledger.position.watermark if ledger.position else 0,
                "entries": ledger.entries,
                "studies": {word: studies.count(word) for word in get_args(Outcome)},
                "failures": {"opened": ledger.opened, "open": still_open},
                "requests": {"dicom": dicom.requests, "fhir": fhir.requests},
                "seconds": round(clock.monotonic() - began, 3),
            }
            return Synced(report, failed=ledger.failed > 0, stopped=stop.signal)


def _open_failures(opened: store.Store, feed_name: str) -> int:
    feed = opened.feed(feed_name) if opened.exists() else None
    return sum(opened.counts(feed["id"])[1].values()) if feed else 0


async def run(options: settings.Settings, *, clock: Clock | None = None) -> int:
    """Keep in step until a signal; its number. Stands by while another worker holds the lease."""
    from dicomcast.web import health

    settings.require_patient_system(options)
    compiled = rules(options)
    clock = clock or Clock()
    with closing(store.Store(options.database.url, clock=clock)) as opened, stop_on_signals() as stop:
        pulse = health.Pulse(clock=clock)
        with health.serving(pulse, host=options.web.host, port=options.web.port):
            async with services(options, clock=clock) as (dicom, fhir):
                while not stop.is_set():
                    engine = worker(
                        options, compiled, dicom=dicom, fhir=fhir, state=opened, clock=clock, stop=stop, once=False
                    )
                    try:
                        async with pulse.beating(engine.trouble):
                            await engine.work()
                    except (errors.LeaseLost, errors.Unavailable) as lost:
                        log.warning("standing by", reason=str(lost))
    return stop.signal or signal.SIGTERM


def worker(
    options: settings.Settings,
    compiled: mapping.Mapping,
    *,
    dicom: DicomService,
    fhir: FhirService,
    state: store.Store,
    clock: Clock,
    stop: asyncio.Event,
    once: bool,
    job: int | None = None,
    until: float = math.inf,
    progress: Progress | None = None,
) -> Worker:
    """A worker for one time with the lease; its name says where it runs, and no restart repeats it."""
    # What waits to be written is many small objects that are no garbage: to look at them less often saves a fifth.
    gc.set_threshold(50_000, 20, 50)
    return Worker(
        options,
        dicom=dicom,
        fhir=fhir,
        rules=compiled,
        state=state,
        clock=clock,
        owner=f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}",
        once=once,
        stop=stop,
        job=job,
        until=until,
        progress=progress or (lambda watermark, latest: None),
    )


class Stop(asyncio.Event):
    """Set by SIGTERM or SIGINT; `signal` says which."""

    signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """An event that SIGTERM and SIGINT set."""
    stop, loop = Stop(), asyncio.get_running_loop()

    def received(number: int) -> None:
        stop.signal = number
        stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    for number in numbers:
        loop.add_signal_handler(number, received, number)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


# What people ask ------------------------------------------------------------------------------------------------------


def status(options: settings.Settings) -> dict[str, Json]:
    """Where the feed is, how many studies and failures there are, and who holds the lease."""
    with known(options) as (opened, feed):
        if feed is None:
            nothing = dict.fromkeys(("watermark", "latest", "lag_entries", "lag_seconds", "seen_at", "trouble"))
            return {
                "feed": {"url": options.dicom.url, **nothing, **asyncio.run(asked(options, Clock().now()))},
                "studies": {},
                "failures": {"open": 0, "by_kind": {}},
                "jobs": [],
                "lease": {"owner": None, "until": None, "held": False},
            }
        now = opened.now()
        studies, failures = opened.counts(feed["id"])
        waiting = jobs.unfinished(opened, feed["id"])
    newest = asyncio.run(asked(options, now))
    feed |= newest
    at = feed["watermark"] if isinstance(feed["watermark"], int) else None
    behind = max(0, feed["latest"] - (at or 0))
    # Up to date is who has reached the newest entry that there is now; else as of when it was so.
    current = at is not None and not behind
    since = (now if newest else feed["seen_at"]) if current else feed["current_at"]
    lag = round((now - since).total_seconds(), 1) if since else None
    held = feed["lease_owner"] is not None and feed["lease_until"] > now
    return {
        "feed": {
            "url": feed["url"],
            "watermark": at,
            "latest": feed["latest"],
            "lag_entries": behind,
            "lag_seconds": lag,
            "seen_at": feed["seen_at"],
            "trouble": feed["trouble"],
        },
        "studies": studies,
        "failures": {"open": sum(failures.values()), "by_kind": failures},
        "jobs": [{name: job[name] for name in ("id", "verb", "left", "held")} for job in waiting],
        "lease": {"owner": feed["lease_owner"], "until": feed["lease_until"], "held": held},
    }


async def asked(options: settings.Settings, now: datetime) -> dict[str, Json]:
    """The newest entry as the DICOM service has it now; nothing where it does not say so within a few seconds."""
    async with services(options, clock=Clock()) as (dicom, _):
        try:
            latest = await asyncio.wait_for(dicom.latest(), timeout=3)
        except (TimeoutError, errors.Error):
            return {}
    return {"latest": latest.sequence if latest else 0, "seen_at": now}


def study_status(options: settings.Settings, study_uid: str) -> dict[str, Json]:
    """What became of one study, and what is wrong with it."""
    columns = ("imaging_study", "patient", "series", "instances", "last_sequence", "mapping_digest", "synced_at")
    with known(options) as (opened, feed):
        row = opened.study_row(feed["id"], study_uid) if feed else None
        failures = opened.failures(feed["id"], study_uid=study_uid) if feed else []
        issues = opened.issues(feed["id"], study_uid=study_uid) if feed else []
    found = row or {}
    outcome = found.get("outcome") or ("failed" if failures else "unknown")
    return {
        "study_instance_uid": study_uid,
        "outcome": outcome,
        **{name: found.get(name) for name in columns},
        "failures": [_public(failure) for failure in failures],
        "issues": issues,
    }


def failures(
    options: settings.Settings,
    *,
    status: str | None = None,
    kind: str | None = None,
    study_uid: str | None = None,
    failure_id: int | None = None,
) -> list[dict[str, Json]]:
    """Failure rows; those that are not over, unless `status` or an id is named."""
    with known(options) as (opened, feed):
        if feed is None:
            return []
        statuses = (status,) if status else store.ATTENTION if failure_id is None else ()
        rows = opened.failures(feed["id"], statuses=statuses, kind=kind, study_uid=study_uid, failure_id=failure_id)
    return [_public(row) for row in rows]


def failures_summary(options: settings.Settings) -> list[dict[str, Json]]:
    """Failures that are not over by kind: how many, of how many studies, since when, and what to do about them."""
    by_kind: dict[str, list[dict[str, Json]]] = {}
    for row in failures(options):
        by_kind.setdefault(row["kind"], []).append(row)
    return [
        {
            "kind": kind,
            "failures": len(rows),
            "instances": sum(row["instances"] for row in rows),
            "studies": len({row["study_instance_uid"] for row in rows}),
            "first_seen": min(row["first_seen"] for row in rows),
            "last_seen": max(row["last_seen"] for row in rows),
            "to_do": errors.kind(kind).to_do,
        }
        for kind, rows in sorted(by_kind.items(), key=lambda item: -len(item[1]))
    ]


FAILURE_FIELDS = (
    "id",
    "status",
    "kind",
    "stage",
    "study_instance_uid",
    "series_instance_uid",
    "sop_instance_uid",
    "sequence",
    "rule",
    "tag",
    "message",
    "attempts",
    "first_seen",
    "last_seen",
    "next_retry",
    "resolution",
    "instances",
    "note",
)
"""What is shown of a failure."""


def _public(failure: store.Row) -> dict[str, Json]:
    return {name: failure[name] for name in FAILURE_FIELDS}


def issues(options: settings.Settings) -> list[dict[str, Json]]:
    """What was left out or guessed, by rule, tag and reason."""
    with known(options) as (opened, feed):
        return opened.issues(feed["id"]) if feed else []


def upgrade(options: settings.Settings) -> tuple[str | None, str]:
    """Bring the schema up to this version: revision before and after."""
    with closing(store.Store(options.database.url, clock=Clock())) as opened:
        return opened.upgrade()


def revision(options: settings.Settings) -> tuple[str | None, str]:
    """Revision of the schema, and the one that this version needs."""
    with closing(store.Store(options.database.url, clock=Clock())) as opened:
        return opened.revision()
