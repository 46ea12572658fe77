"""The life of studies: what comes, grows, changes and goes in the DICOM service, and what FHIR shows of it."""

from collections.abc import Iterator

import gateway
import pytest
from hospital import SYSTEM, Hospital, a_study, uid, until

from dicomcast import sandbox as services
from dicomcast.fhir import resources
from dicomcast.sandbox import fhir


@pytest.fixture
def hospital(everywhere: Hospital) -> Hospital:
    """On each FHIR service that there is."""
    return everywhere


@pytest.fixture
def plain_hospital(sandbox: services.Sandbox, database_url: str) -> Iterator[Hospital]:
    """On the sandbox's FHIR service, with each database."""
    one = Hospital(sandbox.dicom_url, sandbox.fhir_url, database_url)
    yield one
    one.close()


# On every FHIR service


def test_a_study_arrives_with_all_series_and_instances(hospital: Hospital) -> None:
    study = a_study(instances=7, series=3)
    hospital.send(*study)

    assert hospital.sync() == {"created": 1}

    shown = hospital.study(uid(study[0]))
    assert (shown["numberOfSeries"], shown["numberOfInstances"], shown["status"]) == (3, 7, "available")
    hospital.check(uid(study[0]))
    patient = hospital.read(shown["subject"]["reference"])
    assert patient["identifier"][0]["system"] == SYSTEM
    assert patient["identifier"][0]["value"] == study[0].PatientID
    endpoint = hospital.read(shown["endpoint"][0]["reference"])
    assert endpoint["address"] == f"{hospital.dicom_url}/v1"


def test_a_second_sync_changes_nothing(hospital: Hospital) -> None:
    study = a_study(instances=3)
    hospital.send(*study)
    hospital.sync()
    before = hospital.study(uid(study[0]))

    assert hospital.sync() == {}

    assert hospital.study(uid(study[0])) == before


def test_instances_and_series_that_come_later_are_added(hospital: Hospital) -> None:
    study = a_study(instances=6, series=2)
    hospital.send(study[0])
    hospital.sync()
    hospital.send(study[2])

    assert hospital.sync() == {"updated": 1}
    hospital.check(uid(study[0]))

    hospital.send(study[1], study[3], study[4], study[5])

    assert hospital.sync() == {"updated": 1}
    hospital.check(uid(study[0]))
    assert hospital.study(uid(study[0]))["numberOfSeries"] == 2


def test_a_deleted_instance_series_and_study_go_from_fhir(hospital: Hospital) -> None:
    study = a_study(instances=6, series=3)
    hospital.send(*study)
    hospital.sync()
    first = study[0]

    hospital.modality.delete(uid(first), str(first.SeriesInstanceUID), str(first.SOPInstanceUID))
    assert hospital.sync() == {"updated": 1}
    assert hospital.study(uid(first))["numberOfInstances"] == 5
    hospital.check(uid(first))

    hospital.modality.delete(uid(first), str(study[1].SeriesInstanceUID))
    assert hospital.sync() == {"updated": 1}
    assert hospital.study(uid(first))["numberOfSeries"] == 2
    hospital.check(uid(first))

    hospital.modality.delete(uid(first))
    assert hospital.sync() == {"deleted": 1}
    assert hospital.study(uid(first)) is None
    assert hospital.sync() == {}


def test_the_last_series_takes_the_study_with_it(hospital: Hospital) -> None:
    study = a_study(instances=2)
    hospital.send(*study)
    hospital.sync()

    hospital.modality.delete(uid(study[0]), str(study[0].SeriesInstanceUID))
    hospital.sync()

    assert hospital.study(uid(study[0])) is None


def test_a_study_that_was_deleted_can_come_again(hospital: Hospital) -> None:
    study = a_study(instances=2)
    hospital.send(*study)
    hospital.sync()
    hospital.modality.delete(uid(study[0]))
    hospital.sync()

    hospital.send(*study)
    hospital.sync()

    hospital.check(uid(study[0]))


def test_a_study_that_was_deleted_can_come_again_for_another_patient(hospital: Hospital) -> None:
    study = a_study(instances=2, patient_id="first-" + a_study()[0].PatientID)
    hospital.send(*study)
    hospital.sync()
    hospital.modality.delete(uid(study[0]))
    for one in study:
        one.PatientID = "second-" + one.PatientID[6:]
    hospital.send(*study)

    hospital.sync()

    hospital.check(uid(study[0]))
    (patient,) = hospital.patients(str(study[0].PatientID))
    assert hospital.study(uid(study[0]))["subject"]["reference"] == f"Patient/{patient['id']}"


def test_an_instance_sent_again_with_other_content_shows_the_new(hospital: Hospital) -> None:
    study = a_study(instances=3)
    hospital.send(*study)
    hospital.sync()
    for one in study:
        one.SeriesDescription = "corrected"

    hospital.modality.resend(study, replace=True)
    hospital.sync()

    hospital.check(uid(study[0]))
    assert hospital.study(uid(study[0]))["series"][0]["description"] == "corrected"


def test_a_correction_of_patient_and_accession_shows_in_fhir(hospital: Hospital) -> None:
    study = a_study(instances=3, series=2)
    hospital.send(*study)
    hospital.sync()
    new = f"N{study[0].PatientID}"

    hospital.modality.correct([uid(study[0])], {"PatientName": "New^Name", "PatientID": new, "AccessionNumber": "A9"})
    hospital.sync()

    shown = hospital.study(uid(study[0]))
    (patient,) = hospital.patients(new)
    assert shown["subject"]["reference"] == f"Patient/{patient['id']}"
    assert patient["name"][0]["family"] == "New"
    assert "A9" in [one.get("value") for one in shown["identifier"]]
    assert study[0].AccessionNumber not in str(shown)
    hospital.check(uid(study[0]))


def test_a_patient_of_ours_follows_a_corrected_name(hospital: Hospital) -> None:
    study = a_study()
    hospital.send(*study)
    hospital.sync()

    hospital.modality.correct([uid(study[0])], {"PatientName": "Married^Name", "PatientSex": "F"})
    hospital.sync()

    (patient,) = hospital.patients(str(study[0].PatientID))
    assert (patient["name"][0]["family"], patient["gender"]) == ("Married", "female")


def test_studies_of_one_patient_share_one_patient(hospital: Hospital) -> None:
    first = a_study(instances=2)
    second = a_study("MR", instances=2, patient_id=str(first[0].PatientID))
    hospital.send(*first, *second)

    hospital.sync()

    (patient,) = hospital.patients(str(first[0].PatientID))
    subjects = {hospital.study(uid(one[0]))["subject"]["reference"] for one in (first, second)}
    assert subjects == {f"Patient/{patient['id']}"}


def test_many_new_studies_of_one_patient_and_one_endpoint_make_no_doubles(hospital: Hospital) -> None:
    patient = a_study()[0].PatientID
    studies = [a_study(patient_id=patient)[0] for _ in range(8)]
    hospital.send(*studies)

    assert hospital.sync(sync={"parallel": 8}) == {"created": 8}

    assert len(hospital.patients(patient)) == 1
    endpoints = {hospital.study(uid(one))["endpoint"][0]["reference"] for one in studies}
    assert len(endpoints) == 1


def test_a_lost_database_leaves_fhir_as_it_was(hospital: Hospital, tmp_path: object) -> None:
    kept, gone = a_study(instances=3), a_study(instances=2)
    hospital.send(*kept, *gone)
    hospital.sync()
    hospital.modality.correct([uid(kept[0])], {"PatientName": "Later^Name"})
    hospital.modality.delete(uid(gone[0]))
    hospital.sync()
    before = hospital.study(uid(kept[0]))
    patient = hospital.read(before["subject"]["reference"])

    hospital.database = f"sqlite:///{tmp_path}/fresh.db"
    done = hospital.sync()

    assert done == {"unchanged": 2}
    assert hospital.study(uid(kept[0])) == before
    assert hospital.read(before["subject"]["reference"]) == patient
    assert hospital.study(uid(gone[0])) is None


def test_ids_may_be_left_to_the_service(hospital: Hospital, tmp_path: object) -> None:
    hospital.flags["fhir"] = {"ids": "server"}
    study = a_study(instances=3)
    hospital.send(*study[:2])
    assert hospital.sync() == {"created": 1}
    shown = hospital.study(uid(study[0]))
    assert shown["id"] != resources.assigned_id("ImagingStudy", f"urn:oid:{uid(study[0])}")
    hospital.database = f"sqlite:///{tmp_path}/fresh.db"
    hospital.send(study[2])
    assert hospital.sync() == {"updated": 1}
    hospital.check(uid(study[0]))
    assert hospital.study(uid(study[0]))["id"] == shown["id"]

    hospital.modality.delete(uid(study[0]))

    assert hospital.sync() == {"deleted": 1}
    hospital.check(uid(study[0]))


def test_a_worker_that_is_killed_before_its_write_is_answered_is_made_good_by_the_next(hospital: Hospital) -> None:
    grown, gone, new = a_study(instances=4, series=2), a_study(), a_study(instances=2)
    hospital.send(*grown[:3], *gone)
    hospital.sync()
    before = hospital.watermark()
    hospital.send(grown[3], *new)
    hospital.modality.delete(uid(gone[0]))
    with gateway.before(hospital.fhir_url) as between:
        unanswered = between.hold(answered=True)
        with hospital.dicomcast("sync", DICOMCAST_FHIR__URL=between.url, DICOMCAST_SYNC__PARALLEL="1") as process:
            until(unanswered.passed.is_set)
            process.kill()
            process.communicate()
    assert len(between.log) == 1
    assert hospital.watermark() == before

    done = hospital.synced(sync={"lease": 400}).report

    assert (done["watermark"], done["failures"]["open"]) == (hospital.latest(), 0)
    for study in (grown, gone, new):
        hospital.check(uid(study[0]))


# What it costs, by the sandbox's log of requests


def test_a_new_study_costs_one_search_and_one_write(plain_hospital: Hospital) -> None:
    hospital = plain_hospital
    hospital.send(*a_study(instances=250, series=3))

    done = hospital.synced().report

    assert hospital.log() == ["GET /fhir/metadata", "POST /fhir", "POST /fhir"]
    assert done["requests"]["fhir"] == 3
    assert done["requests"]["dicom"] == len(hospital.log("dicom")) - 1  # the modality's own


def test_more_instances_of_a_known_study_cost_one_read_and_one_write(plain_hospital: Hospital) -> None:
    hospital = plain_hospital
    study = a_study(instances=150)
    hospital.send(*study[:50])
    hospital.sync()
    hospital.log(clear=True)
    hospital.send(*study[50:])

    hospital.sync()

    shown = hospital.study(uid(study[0]))
    asked = hospital.log()[:-1]  # the last one was ours
    there = f"/fhir/ImagingStudy/{shown['id']}"
    assert sorted(asked) == sorted(["GET /fhir/metadata", f"GET {there}", "POST /fhir", f"PUT {there}"])


def test_nothing_to_do_costs_one_look_at_fhir(plain_hospital: Hospital) -> None:
    hospital = plain_hospital
    hospital.send(*a_study(instances=3), *a_study(instances=3))
    hospital.sync()
    before = hospital.versions()
    hospital.log(clear=True)

    done = hospital.synced().report

    assert hospital.log() == ["GET /fhir/metadata"]
    assert (done["entries"], done["requests"]["fhir"]) == (0, 1)
    assert hospital.versions() == before


def test_a_new_study_of_a_known_patient_is_written_alone(plain_hospital: Hospital) -> None:
    hospital = plain_hospital
    first = a_study()
    hospital.send(*first)
    hospital.sync()
    before = hospital.versions()
    person = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
    second = a_study(**{keyword: str(first[0][keyword].value) for keyword in person})
    hospital.send(*second)

    hospital.sync()

    new = set(hospital.versions()) - set(before)
    assert [one[0] for one in new] == ["ImagingStudy"]


def test_fhir_requests_do_not_grow_with_instances(plain_hospital: Hospital) -> None:
    hospital = plain_hospital
    counts = []
    for instances in (1, 120):
        hospital.send(*a_study(instances=instances))
        counts.append(hospital.synced().report["requests"]["fhir"])

    assert counts[0] == counts[1]


def test_the_report_counts_each_study_once(plain_hospital: Hospital) -> None:
    hospital = plain_hospital
    old, gone = a_study(instances=2), a_study()
    hospital.send(old[0], *gone)
    first = hospital.synced().report
    hospital.send(old[1], *a_study())
    hospital.modality.delete(uid(gone[0]))

    second = hospital.synced().report

    assert first["studies"] == {"created": 2, "updated": 0, "unchanged": 0, "deleted": 0, "failed": 0}
    assert second["studies"] == {"created": 1, "updated": 1, "unchanged": 0, "deleted": 1, "failed": 0}
    assert (first["entries"], second["entries"]) == (2, 3)
    assert second["watermark"] == hospital.latest() == 5


def test_a_lost_database_is_rebuilt_without_a_write(plain_hospital: Hospital, tmp_path: object) -> None:
    hospital = plain_hospital
    studies = [a_study(instances=4, series=2) for _ in range(3)]
    hospital.send(*(one for study in studies for one in study))
    hospital.sync()
    before = hospital.versions()

    hospital.database = f"sqlite:///{tmp_path}/fresh.db"
    assert hospital.sync() == {"unchanged": 3}

    assert hospital.versions() == before


# Servers that can do less


@pytest.mark.parametrize(
    "options",
    [
        fhir.Options(batch=False, transaction=False),
        fhir.Options(transaction=False),
        fhir.Options(client_ids=False, update_create=True),
        fhir.Options(client_ids=False, batch=False, transaction=False),
        fhir.Options(invalid_status=400, delete_checks_version=False),
        fhir.HAPI,
        fhir.Options(page_size=1, total=False),
    ],
    ids=["no bundles", "no transactions", "server ids", "server ids, no bundles", "azure", "hapi", "pages of one"],
)
def test_the_life_of_a_study_on_another_kind_of_server(options: fhir.Options, tmp_path: object) -> None:
    with services.start(fhir_options=options) as box:
        hospital = Hospital(box.dicom_url, box.fhir_url, f"sqlite:///{tmp_path}/state.db")
        study, other = a_study(instances=4, series=2), a_study(instances=2)
        hospital.send(*study[:3], *other)
        assert hospital.sync() == {"created": 2}
        hospital.send(study[3])
        assert hospital.sync() == {"updated": 1}
        hospital.check(uid(study[0]))
        hospital.modality.correct([uid(study[0])], {"PatientID": "moved", "PatientName": "Moved^On"})
        hospital.modality.delete(uid(other[0]))
        assert hospital.sync() == {"updated": 1, "deleted": 1}
        hospital.check(uid(study[0]))
        hospital.check(uid(other[0]))
        before = hospital.versions()
        hospital.database = f"sqlite:///{tmp_path}/fresh.db"
        hospital.sync()
        assert hospital.versions() == before
        assert hospital.kinds() == []
        hospital.close()
