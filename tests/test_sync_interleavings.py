"""What comes between: outages, restarts, other writers and later entries in the middle of a study's way."""

import asyncio
import concurrent.futures
import sqlite3
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy
from hospital import Hospital, HurriedClock, Json, Scripted, a_study, entry_of, json_of, serving, uid, until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dicomcast import app, errors
from dicomcast import sandbox as services
from dicomcast.sandbox import fhir
from dicomcast.state import store
from dicomcast.sync.worker import Worker

HEAD = {"dicom": {"poll": 1.0}, "web": {"port": 0}}
"""Settings of a worker that goes on: looks for more every few milliseconds of the hurried clock."""


class CalendarClock(HurriedClock):
    """Its time of day moves only with `skip`: what is due in a minute is not due because a test was slow."""

    def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self._skipped)


class Gate:
    """A FHIR service in front of another, which keeps the first request that is `meant` until it is let `go`."""

    def __init__(self, fhir_url: str, meant: Callable[[str, bytes], bool]):
        self._url = fhir_url
        self._meant = meant
        self.reached = threading.Event()
        self.go = threading.Event()

    def app(self) -> Starlette:
        methods = ["GET", "POST", "PUT", "DELETE"]
        return Starlette(routes=[Route("/{path:path}", self._pass_on, methods=methods)])

    async def _pass_on(self, request: Request) -> Response:
        content = await request.body()
        if not self.reached.is_set() and self._meant(request.url.path, content):
            self.reached.set()
            await asyncio.to_thread(self.go.wait, 60)
        address = self._url + request.url.path.removeprefix("/fhir")
        kept = {name: value for name, value in request.headers.items() if name not in ("host", "accept-encoding")}
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.request(
                request.method, address, params=request.query_params, content=content, headers=kept
            )
        passed = {name: value for name, value in answer.headers.items() if name in ("etag", "location", "content-type")}
        return Response(answer.content, answer.status_code, passed)


@contextmanager
def meanwhile(work: Coroutine[Any, Any, Json]) -> Iterator[Callable[[float], Json]]:
    """Work in a thread of its own, cut off at the end of the block; what is yielded waits for its result instead.

    It takes the seconds after which work that hangs is a failure.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        done = threads.submit(loop.run_until_complete, task)
        try:
            yield done.result
        finally:
            loop.call_soon_threadsafe(task.cancel)
            concurrent.futures.wait([done])
            loop.close()
            with suppress(asyncio.CancelledError):
                done.result()


@contextmanager
def running(hospital: Hospital, **sections: dict[str, Json]) -> Iterator[None]:
    """`run` is at work while the block lasts, and is then killed."""
    options = hospital.options(**HEAD, **sections)
    app.configure_logging(options.log)
    with meanwhile(app.run(options, clock=hospital.clock)):
        yield


def polled(hospital: Hospital, times: int) -> None:
    """Wait until the worker has asked for the newest entry so many times more."""
    before = polls(hospital)
    until(lambda: polls(hospital) >= before + times)


def polls(hospital: Hospital) -> int:
    return hospital.log("dicom").count("GET /v1/changefeed/latest")


def execute(hospital: Hospital, statement: str) -> list[Any]:
    with closing(sqlite3.connect(hospital.database.removeprefix("sqlite:///"))) as db, db:
        return db.execute(statement).fetchall()


def names(hospital: Hospital, patient_id: str) -> list[str]:
    return [one["name"][0]["family"] for one in hospital.patients(patient_id)]


# Outages and restarts


def test_a_late_entry_that_waits_for_fhir_is_not_given_up_however_long_that_takes(hospital: Hospital) -> None:
    hospital.clock = CalendarClock()
    late, seen = a_study(), a_study()
    hospital.feed("hold", entries=1)
    hospital.send(*late)
    hospital.send(*seen)
    assert hospital.sync() == {"created": 1}
    hospital.feed("release")
    hospital.fault("fhir", status=503, skip=1)  # after the look at it with which a worker starts

    with running(hospital):
        until(lambda: len(hospital.log()) > 3)
        for _ in range(2):
            hospital.clock.skip(700)
            polled(hospital, 3)  # between the last two of them it has looked at gaps
    assert [row for (row,) in execute(hospital, "SELECT sequence FROM gap")] == [1]
    hospital.heal()
    hospital.clock.skip(7200)

    assert hospital.sync() == {"created": 1}
    hospital.check(uid(late[0]))
    assert execute(hospital, "SELECT sequence FROM gap") == []


def test_a_commit_that_the_database_refuses_loses_nothing(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.sync()
    study = a_study(instances=2)
    hospital.send(*study)
    hospital.fault("fhir", method="POST", path="fhir$", status=422)
    hospital.fault("fhir", method="PUT", status=422)
    execute(hospital, "CREATE TRIGGER no BEFORE INSERT ON failure BEGIN SELECT RAISE(ABORT, 'no'); END")

    options = hospital.options(**HEAD)
    app.configure_logging(options.log)
    with pytest.raises(sqlalchemy.exc.IntegrityError), meanwhile(app.run(options, clock=hospital.clock)) as finished:
        finished(60)

    assert (hospital.watermark(), hospital.failures(), hospital.study(uid(study[0]))) == (1, [], None)
    execute(hospital, "DROP TRIGGER no")
    hospital.heal()
    hospital.clock.skip(7200)  # past the lease, if it was not given back
    assert hospital.sync(sync={"lease": 600}) == {"created": 1}
    hospital.check(uid(study[0]))
    assert hospital.watermark() == hospital.latest()


def test_a_name_that_waits_for_the_head_is_applied_by_the_next_sync(hospital: Hospital, tmp_path: Path) -> None:
    study = a_study()
    hospital.send(*study)
    hospital.sync()
    hospital.modality.correct([uid(study[0])], {"PatientName": "Later^Name"})
    hospital.send(*a_study(instances=350))
    hospital.database = f"sqlite:///{tmp_path}/fresh.db"
    hospital.fault("fhir", method="PUT", path="/Patient/", status=503)
    hospital.patience = 30

    with pytest.raises(errors.Unavailable):
        hospital.sync(sync={"buffer": 100})  # too small to keep the first study until the head is reached
    hospital.heal()
    assert hospital.failures() == []
    hospital.sync()

    assert names(hospital, str(study[0].PatientID)) == ["Later"]
    assert hospital.watermark() == hospital.latest()


@pytest.mark.parametrize(
    ("service", "rule"),
    [
        ("dicom", {"path": "/metadata", "status": 424}),
        ("fhir", {"method": "PUT", "status": 302}),
    ],
)
def test_an_answer_that_is_no_refusal_is_an_outage(hospital: Hospital, service: str, rule: Json) -> None:
    studies = [a_study(instances=2) for _ in range(3)]
    hospital.send(*(one for study in studies for one in study))
    hospital.sync()
    before = hospital.watermark()
    hospital.modality.correct([uid(study[0]) for study in studies], {"StudyDescription": "second look"})
    hospital.fault(service, **rule)
    hospital.patience = 30

    with pytest.raises(errors.Unavailable):
        hospital.sync()

    assert (hospital.watermark(), hospital.failures()) == (before, [])
    hospital.heal()
    assert hospital.sync() == {"updated": 3}
    for study in studies:
        hospital.check(uid(study[0]))


def test_trouble_with_fhir_is_no_less_for_a_dicom_service_that_answers(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.sync()
    study = a_study()
    workers: list[Worker] = []
    stop = asyncio.Event()

    async def work() -> None:
        options = hospital.options(**HEAD)
        app.configure_logging(options.log)
        with closing(store.Store(options.database.url, clock=hospital.clock)) as state:
            async with app.services(options, clock=hospital.clock) as (dicom, fhir_service):
                worker = Worker(
                    options,
                    dicom=dicom,
                    fhir=fhir_service,
                    rules=app.rules(options),
                    state=state,
                    clock=hospital.clock,
                    owner="a test",
                    once=False,
                    stop=stop,
                )
                workers.append(worker)
                await worker.work()

    with meanwhile(work()):
        polled(hospital, 2)
        (worker,) = workers
        assert worker.trouble() is None
        hospital.fault("fhir", status=429, retry_after=300)
        hospital.send(*study)
        until(worker.trouble)
        polled(hospital, 4)
        assert worker.trouble() == "fhir: HTTP 429"
        hospital.heal()
        until(lambda: worker.trouble() is None)
        until(lambda: hospital.study(uid(study[0])))
    hospital.check(uid(study[0]))


# Entries that come while a study is under way


def test_a_late_update_that_changed_uids_makes_the_new_study_and_removes_the_old(
    feed: Scripted, scripted: Hospital
) -> None:
    old, new, other = a_study(), a_study(), a_study()
    feed.create(old[0], 1)
    feed.create(other[0], 3)
    assert scripted.sync() == {"created": 2}
    moved = json_of(old[0]) | {"0020000D": {"vr": "UI", "Value": [uid(new[0])]}}
    feed.entries.insert(1, entry_of(old[0], 2, action="Update", metadata=moved))
    del feed.studies[uid(old[0])]
    feed.studies[uid(new[0])] = [moved]

    assert scripted.sync() == {"created": 1, "deleted": 1}

    scripted.check(uid(old[0]))
    scripted.check(uid(new[0]))
    assert (scripted.kinds(), scripted.watermark()) == ([], 3)
    assert execute(scripted, "SELECT sequence FROM gap") == []


def test_a_failure_that_is_noted_after_the_dicom_service_was_read_stays_open(
    feed: Scripted, scripted: Hospital
) -> None:
    study = a_study(instances=2)
    feed.create(study[0], 1)
    feed.create(study[1], 2, action="Update")
    gate = Gate(scripted.fhir_url, lambda _, body: b'"transaction"' in body)
    with serving(gate.app()) as url, running(scripted, fhir={"url": f"{url}/fhir"}):
        until(gate.reached.is_set)
        feed.entries.append(entry_of(study[1], 3, action="Purge", metadata=None))
        until(scripted.failures)
        assert scripted.study(uid(study[0])) is None
        gate.go.set()
        until(lambda: scripted.watermark() == 3)

    scripted.check(uid(study[0]))
    assert scripted.kinds() == ["unknown-action"]
    assert scripted.failures("resolved") == []


def test_metadata_of_an_instance_that_is_deleted_meanwhile_is_not_missed(feed: Scripted, scripted: Hospital) -> None:
    study = a_study(instances=2)
    feed.create(study[0], 1)
    feed.create(study[1], 2, metadata=None)
    feed.studies[uid(study[0])].pop()
    gate = Gate(scripted.fhir_url, lambda path, _: path.endswith("ImagingStudy/_search"))
    with serving(gate.app()) as url, running(scripted, fhir={"url": f"{url}/fhir"}):
        until(gate.reached.is_set)
        feed.entries[1]["state"] = "Deleted"
        feed.entries.append(entry_of(study[1], 3, action="Delete", state="Deleted", metadata=None))
        until(lambda: any("changefeed?offset=2" in asked for asked in feed.log))
        asked = len(feed.log)
        until(lambda: len(feed.log) > asked)  # it asks for more only after it has taken in what it read
        gate.go.set()
        until(lambda: scripted.watermark() == 3)

    scripted.check(uid(study[0]))
    assert scripted.failures() == []


def test_instances_that_come_before_a_retry_is_due_are_one_attempt(hospital: Hospital) -> None:
    hospital.clock = CalendarClock()
    hospital.flags["patient"] = {"policy": "lookup"}
    study = a_study(instances=6)
    tried = []
    for instance in study[:5]:
        hospital.send(instance)
        hospital.sync()
        (failure,) = hospital.failures()
        tried.append((failure["attempts"], failure["next_retry"]))

    assert tried[0][0] == 1
    assert tried == [tried[0]] * 5
    hospital.clock.skip(3600)
    hospital.send(study[5])
    hospital.sync()
    (failure,) = hospital.failures()
    assert failure["attempts"] == 2
    assert failure["next_retry"] > tried[0][1]


# Other writers, and what FHIR refuses


def test_a_foreign_edit_of_our_patient_while_our_write_is_throttled_survives(hospital: Hospital) -> None:
    study = a_study()
    hospital.send(*study)
    hospital.sync()
    hospital.modality.correct([uid(study[0])], {"PatientName": "Archive^Name"})
    (patient,) = hospital.patients(str(study[0].PatientID))
    theirs = {**patient, "name": [{"use": "usual", "family": "Registrar"}], "birthDate": "1950-01-01"}
    entry = {"resource": theirs, "request": {"method": "PUT", "url": f"Patient/{patient['id']}"}}
    hospital.fault("fhir", method="PUT", path="/Patient/", status=503)  # their transaction takes another path
    hospital.patience = 100_000
    hospital.log(clear=True)

    options = hospital.options()
    app.configure_logging(options.log)
    with meanwhile(app.sync(options, clock=hospital.clock)) as finished:
        until(hospital.writes)
        hospital.http.post(
            hospital.fhir_url,
            json={"resourceType": "Bundle", "type": "transaction", "entry": [entry]},
            headers={"Content-Type": "application/fhir+json"},
        ).raise_for_status()
        hospital.heal()
        finished(60)

    (shown,) = hospital.patients(str(study[0].PatientID))
    assert (shown["name"], shown["birthDate"]) == (theirs["name"], "1950-01-01")
    assert hospital.kinds() == []
    assert hospital.watermark() == hospital.latest()


def test_a_patient_written_before_its_study_met_a_conflict_stays_ours(tmp_path: Path) -> None:
    with services.start(fhir_options=fhir.Options(batch=False, transaction=False)) as box, ExitStack() as stack:
        hospital = Hospital(box.dicom_url, box.fhir_url, f"sqlite:///{tmp_path}/state.db")
        stack.callback(hospital.close)
        study = a_study()
        hospital.send(*study)
        hospital.sync()
        hospital.fault("fhir", method="PUT", path="/ImagingStudy/", status=412, times=1)
        hospital.modality.correct([uid(study[0])], {"PatientName": "First^Name", "StudyDescription": "one"})
        hospital.log(clear=True)
        assert hospital.sync() == {"updated": 1}
        assert [one.split("/")[2] for one in hospital.writes()] == ["Patient", "ImagingStudy", "ImagingStudy"]
        assert names(hospital, str(study[0].PatientID)) == ["First"]

        hospital.modality.correct([uid(study[0])], {"PatientName": "Second^Name", "StudyDescription": "two"})
        hospital.sync()

        assert names(hospital, str(study[0].PatientID)) == ["Second"]
        hospital.check(uid(study[0]))


def test_a_study_of_which_nothing_can_be_mapped_stays_and_comes_back(feed: Scripted, scripted: Hospital) -> None:
    study = a_study(instances=2)
    for sequence, instance in enumerate(study, 1):
        feed.create(instance, sequence)
    scripted.flags["mapping"] = {"strict": True}
    assert scripted.sync() == {"created": 1}
    sound = [json_of(one) for one in study]
    feed.studies[uid(study[0])] = [one | {"00100040": {"vr": "CS", "Value": ["FEMALE"]}} for one in sound]
    feed.entries.append(entry_of(study[0], 3, action="Update", metadata=feed.studies[uid(study[0])][0]))
    before = scripted.study(uid(study[0]))
    scripted.log(clear=True)

    assert scripted.sync() == {"failed": 1}

    shown = scripted.study(uid(study[0]))
    assert not [one for one in scripted.log() if one.startswith("DELETE")]
    assert (shown["id"], shown["status"], shown["numberOfInstances"]) == (before["id"], "cancelled", 0)
    assert "series" not in shown
    assert set(scripted.kinds()) == {"value-invalid"}

    feed.studies[uid(study[0])] = sound
    feed.entries.append(entry_of(study[0], 4, action="Update", metadata=sound[0]))
    assert scripted.sync() == {"updated": 1}
    scripted.check(uid(study[0]))
    assert scripted.study(uid(study[0]))["id"] == before["id"]
    assert scripted.failures() == []
