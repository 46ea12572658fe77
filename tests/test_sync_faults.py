"""Services that fail: one fault at every request in turn, outages, crashes. What FHIR shows in the end is the same."""

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import stack
from hospital import Hospital, Json, a_study, uid

from dicomcast import app, errors
from dicomcast import sandbox as services
from dicomcast.sandbox import modality

FAULTS: dict[str, Json] = {
    "reset before": {"drop": True, "when": "before"},
    "reset after": {"drop": True, "when": "after"},
    "500 after": {"status": 500, "when": "after"},
    "503": {"status": 503},
    "429": {"status": 429, "retry_after": 1},
    "truncated": {"truncate": True},
}
OLD = modality.synthesise("CT", instances=4, series=2, seed=11, patient_id="one")
MOVED = modality.synthesise("MR", instances=2, seed=12, patient_id="one")
GONE = modality.synthesise("CR", instances=2, seed=13, patient_id="two")
NEW = modality.synthesise("CT", instances=3, seed=14, patient_id="three")


@contextmanager
def a_hospital(folder: Path, ports: tuple[int, int]) -> Iterator[Hospital]:
    """One whose services and database live in `folder`."""
    with services.start(data=folder, dicom_port=ports[0], fhir_port=ports[1]) as box:
        one = Hospital(box.dicom_url, box.fhir_url, f"sqlite:///{folder}/state.db", patience=100_000)
        one.flags["sync"] = {"parallel": 1}
        try:
            yield one
        finally:
            one.close()


@dataclass(frozen=True)
class Script:
    """Where the services stand before the sync that is disturbed, what FHIR shows after it, how many requests it is."""

    folder: Path
    ports: tuple[int, int]
    content: list[Json]
    requests: dict[str, int]

    @contextmanager
    def played(self, copy: Path) -> Iterator[Hospital]:
        """All as it stands, once more."""
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy)
        with a_hospital(copy, self.ports) as hospital:
            yield hospital


def before(hospital: Hospital) -> None:
    hospital.send(*OLD[:3], *MOVED, *GONE)
    hospital.sync()


def change(hospital: Hospital) -> None:
    """A new study, a larger one, a smaller one, one that is gone, one that has moved to another patient."""
    hospital.send(OLD[3], *NEW)
    hospital.modality.delete(uid(OLD[0]), str(OLD[0].SeriesInstanceUID), str(OLD[0].SOPInstanceUID))
    hospital.modality.delete(uid(GONE[0]))
    hospital.modality.correct([uid(MOVED[0])], {"PatientID": "four", "PatientName": "Four^Patient"})


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    folder, ports = tmp_path_factory.mktemp("script"), (stack.free_port(), stack.free_port())
    with a_hospital(folder, ports) as hospital:
        before(hospital)
        change(hospital)
    played = Script(folder, ports, [], {})
    with played.played(tmp_path_factory.mktemp("undisturbed") / "copy") as hospital:
        hospital.sync()
        requests = {service: len(hospital.log(service)) for service in ("dicom", "fhir")}
        for study in (OLD, MOVED, GONE, NEW):
            hospital.check(uid(study[0]))
        return replace(played, content=hospital.content(), requests=requests)


@pytest.mark.parametrize(
    ("service", "fault"),
    [("dicom", "truncated"), ("fhir", "reset after"), ("fhir", "500 after")]
    + [("dicom", fault) for fault in ("reset before", "503") if stack.CI]
    + [("fhir", fault) for fault in ("reset before", "429", "truncated") if stack.CI],
)
def test_one_fault_at_any_request_changes_nothing_in_the_end(
    script: Script, tmp_path: Path, service: str, fault: str
) -> None:
    assert script.requests[service] >= 5
    for at in range(script.requests[service]):
        with script.played(tmp_path / "copy") as hospital:
            hospital.fault(service, **FAULTS[fault], skip=at, times=1)

            hospital.sync()

            assert hospital.content() == script.content, f"request {at + 1}"
            assert hospital.kinds() == [], f"request {at + 1}"
            assert hospital.watermark() == hospital.latest(), f"request {at + 1}"


@pytest.mark.parametrize("service", ["dicom", "fhir"])
def test_a_worker_that_is_cancelled_at_any_request_is_made_good_by_the_next(
    script: Script, tmp_path: Path, service: str
) -> None:
    for at in range(script.requests[service]):
        with script.played(tmp_path / "copy") as hospital:
            hospital.fault(service, latency=60, skip=at, times=1)
            asyncio.run(_cancelled(hospital, service, at + 1))
            hospital.heal()

            hospital.sync()

            assert hospital.content() == script.content, f"request {at + 1}"


async def _cancelled(hospital: Hospital, service: str, requests: int) -> None:
    """A sync that is cut off while its `requests`-th request to the service waits for an answer."""
    work = asyncio.create_task(app.sync(hospital.options(), clock=hospital.clock))
    while len(await asyncio.to_thread(hospital.log, service)) < requests:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


# Outages


@pytest.fixture
def hospital(sandbox: services.Sandbox, tmp_path: Path) -> Iterator[Hospital]:
    one = Hospital(sandbox.dicom_url, sandbox.fhir_url, f"sqlite:///{tmp_path}/state.db", patience=30)
    yield one
    one.close()


@pytest.mark.parametrize("service", ["dicom", "fhir"])
@pytest.mark.parametrize("answer", [500, 503, 403, "drop"] if stack.CI else [503, "drop"])
def test_an_outage_moves_no_watermark_and_parks_nothing(hospital: Hospital, service: str, answer: Json) -> None:
    old, new = a_study(), a_study(instances=2)
    hospital.send(*old)
    hospital.sync()
    shown = hospital.versions()
    hospital.send(*new)
    hospital.fault(service, **({"drop": True} if answer == "drop" else {"status": answer}))

    with pytest.raises(errors.Unavailable):
        hospital.sync()
    hospital.heal()

    assert (hospital.watermark(), hospital.failures()) == (1, [])
    assert hospital.versions() == shown
    assert hospital.sync() == {"created": 1}
    hospital.check(uid(new[0]))


@pytest.mark.parametrize("answer", [500, 429])
def test_an_outage_of_fhir_that_begins_after_the_start_parks_nothing(hospital: Hospital, answer: int) -> None:
    studies = [a_study() for _ in range(6)]
    hospital.send(*(one for study in studies for one in study))
    hospital.fault("fhir", status=answer, skip=4)

    with pytest.raises(errors.Unavailable):
        hospital.sync()

    assert hospital.failures() == []
    hospital.heal()
    hospital.sync()
    for study in studies:
        hospital.check(uid(study[0]))
    assert hospital.watermark() == hospital.latest()


@pytest.mark.parametrize("service", ["dicom", "fhir"])
def test_a_short_outage_is_waited_for(hospital: Hospital, service: str) -> None:
    study = a_study(instances=2)
    hospital.send(*study)
    hospital.fault(service, status=503, times=7)
    hospital.patience = 3600

    assert hospital.sync() == {"created": 1}
    assert hospital.kinds() == []


@pytest.mark.parametrize("service", ["dicom", "fhir"])
def test_retry_after_is_waited_for(hospital: Hospital, service: str) -> None:
    hospital.send(*a_study())
    hospital.fault(service, status=429, retry_after=300, times=1)
    hospital.patience = 3600
    began = hospital.clock.monotonic()

    assert hospital.sync() == {"created": 1}

    assert hospital.clock.monotonic() - began > 250


def test_retry_after_longer_than_patience_ends_the_sync(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.fault("fhir", status=503, retry_after=86_400)

    with pytest.raises(errors.Unavailable):
        hospital.sync()

    assert not hospital.watermark()


def test_a_study_that_alone_breaks_the_fhir_service_stops_no_other(hospital: Hospital) -> None:
    poison, sane = a_study(), a_study()
    hospital.send(*poison)
    hospital.sync()
    there = hospital.study(uid(poison[0]))["id"]
    hospital.modality.correct([uid(poison[0])], {"StudyDescription": "poison"})
    hospital.send(*sane)
    hospital.fault("fhir", method="PUT", path=there, status=500)
    hospital.patience = 3600

    done = hospital.synced()

    assert done.failed
    assert done.report["watermark"] == hospital.latest()
    hospital.check(uid(sane[0]))
    (failure,) = hospital.failures()
    assert (failure["kind"], failure["study_instance_uid"]) == ("server-error", uid(poison[0]))
    assert failure["next_retry"] is not None
    hospital.heal()
    hospital.clock.skip(3600)
    hospital.sync()
    hospital.check(uid(poison[0]))
    assert hospital.failures() == []


def test_a_study_that_the_fhir_service_refuses_is_parked_and_tried_again(hospital: Hospital) -> None:
    refused, sane = a_study(), a_study()
    hospital.send(*refused)
    hospital.sync()
    there = hospital.study(uid(refused[0]))["id"]
    hospital.modality.correct([uid(refused[0])], {"StudyDescription": "refused"})
    hospital.send(*sane)
    hospital.fault("fhir", method="PUT", path=there, status=422)

    assert hospital.sync() == {"created": 1, "failed": 1}
    assert hospital.kinds() == ["rejected"]
    hospital.heal()
    hospital.clock.skip(3600)

    assert hospital.sync() == {"updated": 1}
    assert hospital.failures() == []
    hospital.check(uid(refused[0]))


def test_metadata_of_one_study_that_cannot_be_read_stops_no_other(hospital: Hospital) -> None:
    poison, sane = a_study(instances=2), a_study()
    hospital.send(*poison, *sane)
    hospital.sync()
    hospital.modality.delete(uid(poison[0]), str(poison[0].SeriesInstanceUID), str(poison[0].SOPInstanceUID))
    hospital.modality.correct([uid(sane[0])], {"StudyDescription": "later"})
    hospital.fault("dicom", path=f"{uid(poison[0])}/metadata", status=500)
    hospital.patience = 3600

    assert hospital.sync() == {"updated": 1, "failed": 1}
    assert hospital.watermark() == hospital.latest()
    hospital.check(uid(sane[0]))
    hospital.heal()
    hospital.clock.skip(3600)
    assert hospital.sync() == {"updated": 1}
    hospital.check(uid(poison[0]))


def test_a_page_that_fails_with_metadata_is_read_without(hospital: Hospital) -> None:
    study = a_study(instances=3)
    hospital.send(*study)
    hospital.fault("dicom", path="changefeed.*includeMetadata=true", status=500)
    hospital.patience = 3600

    assert hospital.sync() == {"created": 1}
    hospital.check(uid(study[0]))


def test_a_database_that_is_away_is_unavailable(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.database = "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"

    with pytest.raises(errors.Unavailable):
        hospital.sync()


@pytest.mark.parametrize(("answer", "kinds"), [(412, []), (503, []), (500, []), (422, ["rejected"])])
def test_demographics_that_wait_for_the_head_survive_a_refusal(
    hospital: Hospital, tmp_path: Path, answer: int, kinds: list[str]
) -> None:
    study = a_study()
    hospital.send(*study)
    hospital.sync()
    hospital.modality.correct([uid(study[0])], {"PatientName": "Later^Name"})
    hospital.send(*a_study(instances=350))
    hospital.database = f"sqlite:///{tmp_path}/fresh.db"
    hospital.fault("fhir", method="PUT", path="/Patient/", status=answer, times=9 if kinds else 1)
    hospital.patience = 3600

    hospital.sync(sync={"buffer": 100})  # too small to keep the first study until the head is reached

    assert hospital.kinds() == kinds
    assert hospital.watermark() == hospital.latest()
    (patient,) = hospital.patients(str(study[0].PatientID))
    assert (patient["name"][0]["family"] == "Later") is not bool(kinds)
