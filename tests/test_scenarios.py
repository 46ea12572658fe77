"""What a hospital must be able to rely on, one story after the other, on each database. Their numbers are stable.

Stories about mapping (5, 6, 8, 10, 11) are told where mapping and sync are tested; 13 in test_no_patient_data.
"""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hospital import (
    Hospital,
    HurriedClock,
    Scripted,
    a_failing_study,
    a_study,
    corrected,
    counts,
    database,
    serving,
    uid,
    until,
)

from dicomcast import app, errors
from dicomcast.state import tables


@pytest.fixture
def feed_clinic(feed: Scripted, sandbox: Any, database_url: str) -> Iterator[Hospital]:
    """A hospital whose DICOM service is `feed`."""
    with serving(feed.app()) as url:
        one = Hospital(url, sandbox.fhir_url, database_url)
        yield one
        one.close()


def test_scenario_1_wrong_audience_moves_nothing_and_is_named(clinic: Hospital) -> None:
    clinic.send(*a_study())
    clinic.fault("fhir", status=401)
    clinic.patience = 5

    with pytest.raises(errors.Denied, match="401"):
        clinic.sync()
    during = clinic.watermark(), clinic.failures()
    clinic.heal()

    assert during == (None, [])
    assert clinic.sync() == {"created": 1}


def test_scenario_2_two_hours_of_503_park_and_lose_nothing(clinic: Hospital) -> None:
    studies = [a_study(instances=10) for _ in range(30)]
    clinic.send(*a_study())
    clinic.sync()
    clinic.send(*(one for study in studies for one in study))
    clinic.clock, clinic.patience = HurriedClock(2000), 10**6
    clinic.flags["sync"] = {"lease": 10**7}
    clinic.fault("fhir", status=503)
    back = threading.Timer(2.05 * 3600 / 2000, clinic.heal)  # seconds of the machine
    back.start()

    done = clinic.sync()

    assert clinic.clock.monotonic() > 2 * 3600
    assert (done, clinic.failures(""), clinic.watermark()) == ({"created": 30}, [], 301)
    for study in studies:
        clinic.check(uid(study[0]))


def test_scenario_3_one_impossible_study_among_many_is_corrected_and_replayed(clinic: Hospital) -> None:
    others, failing = [a_study() for _ in range(40)], a_failing_study()
    clinic.send(*(one for study in others for one in study), *failing)
    clinic.sync()
    parked = clinic.kinds()
    corrected(clinic, failing)
    before = clinic.versions()

    first = clinic.replay(everything=True)
    after = clinic.versions()
    second = clinic.replay(everything=True)

    assert parked == ["patient-id-missing"]
    assert (counts(first), first.amiss) == ({"replayed": 1, "updated": 1}, False)
    assert [one[1] for one in after if one not in before] == [clinic.study(uid(failing[0]))["id"]]
    assert (counts(second), second.amiss, clinic.versions()) == ({}, False, after)
    assert [(one["status"], one["resolution"]) for one in clinic.failures("resolved")] == [("resolved", "mapped")]
    clinic.check(uid(failing[0]))


def test_scenario_4_of_two_workers_one_writes_and_the_other_goes_on(clinic: Hospital) -> None:
    settings = {"DICOMCAST_WEB__PORT": "0", "DICOMCAST_DICOM__POLL": "0.2", "DICOMCAST_SYNC__LEASE": "2"}
    first, second = a_study(instances=3), a_study(instances=3)

    def owner() -> str | None:
        found = app.status(clinic.options())["lease"]
        return found["owner"] if found["held"] else None

    with clinic.dicomcast("run", **settings) as one, clinic.dicomcast("run", **settings) as other:
        clinic.send(*first)
        until(lambda: clinic.watermark() == 3)
        holder = owner()
        assert holder is not None
        killed, left = (one, other) if f":{one.pid}:" in holder else (other, one)
        killed.kill()
        clinic.send(*second)
        until(lambda: clinic.watermark() == 6)

        assert f":{left.pid}:" in (owner() or "")
        left.terminate()
        assert left.wait(timeout=30) == 143
    for study in (first, second):
        clinic.check(uid(study[0]))
    assert [len(clinic.search(kind)) for kind in ("ImagingStudy", "Patient", "Endpoint")] == [2, 2, 1]


def test_scenario_7_the_same_uids_of_another_patient_leave_no_ghost(clinic: Hospital) -> None:
    study = a_study(instances=2)
    clinic.send(*study)
    clinic.sync()
    clinic.modality.delete(uid(study[0]))
    for one in study:
        one.PatientID, one.PatientName = "ANOTHER", "Other^Name"
    clinic.send(*study)

    clinic.sync()

    clinic.check(uid(study[0]))
    (patient,) = clinic.patients("ANOTHER")
    assert clinic.study(uid(study[0]))["subject"]["reference"] == f"Patient/{patient['id']}"
    assert [one["outcome"] for one in [clinic.status(uid(study[0]))]] == ["synced"]


def test_scenario_9_whatever_the_feed_holds_is_passed_and_accounted_for(feed: Scripted, feed_clinic: Hospital) -> None:
    first, gone, last = a_study(), a_study(), a_study()
    feed.create(first[0], 1)
    feed.entries.append({"sequence": 2, "action": "Create", "state": "Current"})
    feed.create(gone[0], 3, state="Deleted", metadata=None)
    feed.create(gone[0], 4, action="Delete", state="Deleted", metadata=None)
    del feed.studies[uid(gone[0])]
    feed.create(last[0], 460)  # pages of none before it

    done = feed_clinic.sync()

    assert (done.get("created"), feed_clinic.watermark()) == (2, 460)
    assert [(one["kind"], one["sequence"]) for one in feed_clinic.failures()] == [("malformed-entry", 2)]
    assert feed_clinic.study(uid(gone[0])) is None
    feed_clinic.check(uid(first[0]))
    feed_clinic.check(uid(last[0]))
    with feed_clinic.state() as (state, feed_id):
        lease = state.acquire(feed_clinic.options().feed_name, url=feed_clinic.dicom_url, owner="me", seconds=9)
        missed = state.gaps(lease)
        assert lease.feed_id == feed_id
        assert set(missed) == {*range(5, 55), *range(410, 460)}


def test_scenario_12_an_unknown_patient_is_parked_and_linked_when_it_arrives(clinic: Hospital) -> None:
    study = a_study(instances=2)
    clinic.send(*study)
    clinic.flags["patient"] = {"policy": "lookup"}
    clinic.sync()
    (parked,) = clinic.failures()
    identifier = [{"system": clinic.options().patient.system, "value": str(study[0].PatientID)}]

    patient = clinic.post({"resourceType": "Patient", "identifier": identifier, "gender": "other"})
    clinic.clock.skip(3600)
    clinic.sync()

    assert (parked["kind"], parked["status"]) == ("patient-unknown", "retrying")
    assert parked["next_retry"] > parked["last_seen"]
    assert clinic.study(uid(study[0]))["subject"]["reference"] == f"Patient/{patient['id']}"
    assert clinic.read(f"Patient/{patient['id']}") == patient
    assert [(one["status"], one["resolution"]) for one in clinic.failures("resolved")] == [("resolved", "mapped")]


@pytest.mark.parametrize("lost", [{"watermark": None}, {"first": None, "watermark": None}, {"watermark": -1}])
def test_scenario_14_a_position_that_cannot_be_read_is_never_zero(clinic: Hospital, lost: dict[str, Any]) -> None:
    clinic.send(*a_study(instances=3))
    clinic.sync()
    with database(clinic) as connection:
        connection.execute(sa.update(tables.feed).values(lost))
    clinic.log("fhir", clear=True)

    with pytest.raises(errors.Incompatible, match="state set"):
        clinic.sync()
    with database(clinic) as connection:
        row = connection.execute(sa.select(tables.feed)).one()

    assert (clinic.writes(), {name: getattr(row, name) for name in lost}) == ([], lost)


def test_scenario_15_studies_of_a_bulk_import_are_found_and_backfilled(clinic: Hospital) -> None:
    known, *imported = [a_study(instances=2) for _ in range(4)]
    clinic.send(*known)
    with clinic.untold():
        clinic.send(*(one for study in imported for one in study))
    clinic.sync()

    found = clinic.verify()
    done = clinic.backfill()
    after = clinic.verify()

    differences = {one["study_instance_uid"]: one["kind"] for one in found.document["differences"]}
    assert differences == {uid(study[0]): "missing" for study in imported}
    assert counts(done) == {"listed": 4, "created": 3, "unchanged": 1}
    assert after.document == {"checked": 4, "differences": [], "repaired": 0, "pending": 0}
    for study in [known, *imported]:
        clinic.check(uid(study[0]))


def test_failure_waits_longer_from_try_to_try(clinic: Hospital) -> None:
    clinic.send(*a_study())
    clinic.flags["patient"] = {"policy": "lookup"}
    pauses = []
    for _ in range(4):
        clinic.sync()
        (failure,) = clinic.failures()
        pauses.append(failure["next_retry"] - failure["last_seen"])
        clinic.clock.skip((failure["next_retry"] - clinic.clock.now()).total_seconds() + 1)

    assert pauses == [timedelta(minutes=1), timedelta(minutes=5), timedelta(minutes=30), timedelta(hours=2)]
    assert (failure["attempts"], failure["first_seen"] > datetime(2030, 1, 1, tzinfo=UTC)) == (4, True)
