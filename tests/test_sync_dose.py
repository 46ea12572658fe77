"""Dose reports: their Observations come, follow, and go with them, on every FHIR service."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import dose
import pydicom
import pytest
import stack
from hospital import Hospital, a_study, uid

from dicomcast import sandbox as services
from dicomcast.sandbox import fhir

Json = Any
MODULES = ("patient", "endpoint", "imaging_study", "radiation_dose")


@pytest.fixture
def hospital(everywhere: Hospital) -> Hospital:
    """On each FHIR service that there is, with the module for dose reports."""
    everywhere.flags["mapping"] = {"modules": MODULES}
    return everywhere


def with_report(instances: int = 2, number: int = 1) -> tuple[list[pydicom.Dataset], pydicom.Dataset]:
    """The images of a study, and a dose report in it."""
    images = a_study(instances=instances)
    return images, report_of(images, number)


def report_of(images: list[pydicom.Dataset], number: int = 1) -> pydicom.Dataset:
    study = uid(images[0])
    report = dose.ct(study, sop=f"{study}.77.{number}", events=[f"{study}.88.{number}.1", f"{study}.88.{number}.2"])
    report.SeriesInstanceUID = f"{study}.70.{number}"
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
        setattr(report, keyword, images[0].get(keyword, ""))
    return report


def observations(hospital: Hospital, study: str) -> list[Json]:
    shown = hospital.study(study)
    return hospital.search("Observation", **{"part-of": f"ImagingStudy/{shown['id']}"}) if shown else []


def ours(found: list[Json], report: pydicom.Dataset) -> list[Json]:
    """The summary of a report."""
    value = f"urn:oid:{report.SOPInstanceUID}"
    return [one for one in found if any(each["value"] == value for each in one.get("identifier", ()))]


def versions(found: list[Json]) -> set[tuple[str, str]]:
    return {(one["id"], one["meta"]["versionId"]) for one in found}


def test_a_report_brings_a_summary_and_its_events(hospital: Hospital) -> None:
    images, report = with_report()
    hospital.send(*images, report)
    assert hospital.sync() == {"created": 1}

    study = hospital.study(uid(report))
    found = observations(hospital, uid(report))
    (summary,) = ours(found, report)
    events = [one for one in found if one["code"]["coding"][0]["code"] == "113852"]
    assert (study["numberOfInstances"], len(found), len(events)) == (3, 3, 2)
    assert all(one["subject"] == study["subject"] for one in found)
    values = {one["code"]["coding"][0]["code"]: one for one in summary["component"]}
    assert values["113813"]["valueQuantity"] == {
        "value": 507.07, "unit": "mGy.cm", "system": "http://unitsofmeasure.org", "code": "mGy.cm",
    }  # fmt: skip
    assert values["113812"]["valueInteger"] == 2


def test_nothing_new_writes_nothing_even_with_a_lost_database(hospital: Hospital, tmp_path: object) -> None:
    images, report = with_report()
    hospital.send(*images, report)
    hospital.sync()
    before = versions(observations(hospital, uid(report)))
    assert hospital.sync() == {}
    hospital.database = f"sqlite:///{tmp_path}/another.db"
    assert hospital.sync() == {"unchanged": 1}
    assert versions(observations(hospital, uid(report))) == before
    assert len(before) == 3


def test_a_report_sent_again_with_other_values_updates_its_observations(hospital: Hospital) -> None:
    images, report = with_report()
    hospital.send(*images, report)
    hospital.sync()
    ids = {one["id"] for one in observations(hospital, uid(report))}

    hospital.modality.resend([dose.set_number(copy.deepcopy(report), "113813", "99.5")], replace=True)
    hospital.sync()

    found = observations(hospital, uid(report))
    assert {one["id"] for one in found} == ids
    (summary,) = ours(found, report)
    assert 99.5 in [one.get("valueQuantity", {}).get("value") for one in summary["component"]]


def test_each_report_goes_alone_and_images_take_none_with_them(hospital: Hospital) -> None:
    images, first = with_report()
    second = report_of(images, 2)
    hospital.send(*images, first)
    hospital.sync()
    hospital.send(second)
    hospital.sync()
    assert len(observations(hospital, uid(first))) == 6

    hospital.modality.delete(uid(first), images[0].SeriesInstanceUID, images[0].SOPInstanceUID)
    hospital.sync()
    assert len(observations(hospital, uid(first))) == 6

    hospital.modality.delete(uid(first), first.SeriesInstanceUID, first.SOPInstanceUID)
    hospital.sync()
    left = observations(hospital, uid(first))
    assert (len(left), len(ours(left, first)), len(ours(left, second))) == (3, 0, 1)


def test_the_end_of_a_study_takes_its_observations_along(hospital: Hospital) -> None:
    images, report = with_report()
    hospital.send(*images, report)
    hospital.sync()
    references = [f"Observation/{one['id']}" for one in observations(hospital, uid(report))]
    hospital.modality.delete(uid(report))
    assert hospital.sync() == {"deleted": 1}
    assert hospital.study(uid(report)) is None
    codes = {hospital.http.get(f"{hospital.fhir_url}/{one}").status_code for one in references}
    assert (len(references), codes) == (3, {410})


def test_what_others_say_of_an_observation_or_a_study_survives(hospital: Hospital) -> None:
    images, report = with_report()
    hospital.send(*images, report)
    hospital.sync()
    found = observations(hospital, uid(report))
    (summary,) = ours(found, report)
    hospital.put({**summary, "note": [{"text": "checked"}]})
    study = hospital.study(uid(report))
    theirs = hospital.post(
        {
            "resourceType": "Observation",
            "status": "final",
            "code": {"text": "quality of the images"},
            "partOf": [{"reference": f"ImagingStudy/{study['id']}"}],
        }
    )

    hospital.modality.resend([dose.set_number(copy.deepcopy(report), "113813", "99.5")], replace=True)
    hospital.sync()
    (now,) = ours(observations(hospital, uid(report)), report)
    assert now["note"] == [{"text": "checked"}]
    assert 99.5 in [one.get("valueQuantity", {}).get("value") for one in now["component"]]

    hospital.modality.delete(uid(report), report.SeriesInstanceUID, report.SOPInstanceUID)
    hospital.sync()
    assert [one["id"] for one in observations(hospital, uid(report))] == [theirs["id"]]


def test_observations_follow_the_study_to_another_patient(hospital: Hospital) -> None:
    images, report = with_report()
    hospital.send(*images, report)
    hospital.sync()
    hospital.modality.correct([uid(report)], {"PatientID": "OTHER-7"})
    hospital.sync()
    study = hospital.study(uid(report))
    assert {one["subject"]["reference"] for one in observations(hospital, uid(report))} == {
        study["subject"]["reference"]
    }
    assert study["subject"]["reference"] == f"Patient/{hospital.patients('OTHER-7')[0]['id']}"


@contextlib.contextmanager
def another(tmp_path: object, **options: Json) -> Iterator[Hospital]:
    """A hospital with another kind of FHIR server."""
    with services.start(fhir_options=fhir.Options(**options)) as sandbox:
        one = Hospital(sandbox.dicom_url, sandbox.fhir_url, f"sqlite:///{tmp_path}/state.db")
        one.flags["mapping"] = {"modules": MODULES}
        yield one
        one.close()


def refer_to(hospital: Hospital, summary: Json) -> None:
    """Somebody concludes something from a summary."""
    theirs = {"resourceType": "Observation", "status": "final", "code": {"text": "of theirs"}}
    hospital.post({**theirs, "derivedFrom": [{"reference": f"Observation/{summary['id']}"}]})


def test_where_a_study_may_not_go_its_observations_still_do(tmp_path: object) -> None:
    with another(tmp_path, references=True) as hospital:
        images, report = with_report()
        hospital.send(*images, report)
        hospital.sync()
        refer_to(hospital, *ours(observations(hospital, uid(report)), report))

        hospital.modality.delete(uid(report))
        hospital.sync()

        assert hospital.study(uid(report))["status"] == "cancelled"
        assert {one["status"] for one in observations(hospital, uid(report))} == {"entered-in-error"}


def test_a_summary_that_others_refer_to_does_not_hold_its_study(tmp_path: object) -> None:
    with another(tmp_path, references=True) as hospital:
        images, report = with_report()
        hospital.send(*images, report)
        hospital.sync()
        refer_to(hospital, *ours(observations(hospital, uid(report)), report))

        hospital.modality.delete(uid(report), report.SeriesInstanceUID, report.SOPInstanceUID)
        assert hospital.sync() == {"updated": 1}

        assert hospital.study(uid(report))["numberOfInstances"] == 2
        left = observations(hospital, uid(report))
        assert {one["status"] for one in left} == {"entered-in-error"}
        hospital.modality.correct([uid(report)], {"StudyDescription": "looked at again"})
        hospital.sync()
        assert versions(observations(hospital, uid(report))) == versions(left)


def test_a_server_that_can_not_search_by_part_loses_nothing_of_other_studies(tmp_path: object) -> None:
    with another(tmp_path, unknown=("part-of",)) as hospital:
        pairs = [with_report() for _ in range(2)]
        for images, report in pairs:
            hospital.send(*images, report)
            hospital.sync()
        hospital.modality.correct([uid(pairs[0][1])], {"StudyDescription": "second look"})
        hospital.sync()
        assert len(hospital.search("Observation")) == 6
        hospital.modality.delete(uid(pairs[0][1]))
        hospital.sync()
        study = hospital.study(uid(pairs[1][1]))
        parts = {one["partOf"][0]["reference"] for one in hospital.search("Observation")}
        assert parts == {f"ImagingStudy/{study['id']}"}


@pytest.mark.parametrize("client_ids", [True, pytest.param(False, marks=stack.long)], ids=["client ids", "server ids"])
def test_more_events_than_one_transaction_takes(tmp_path: object, client_ids: bool) -> None:
    with another(tmp_path, entry_limit=110, client_ids=client_ids) as hospital:
        images = a_study(instances=1)
        study = uid(images[0])
        report = dose.ct(study, sop=f"{study}.77", events=[f"{study}.88.{n}" for n in range(120)])
        hospital.send(*images, report)
        assert hospital.sync() == {"created": 1}
        before = observations(hospital, study)
        assert len(before) == 121
        hospital.database = f"sqlite:///{tmp_path}/another.db"
        assert hospital.sync() == {"unchanged": 1}
        assert versions(observations(hospital, study)) == versions(before)
        hospital.modality.delete(study)
        assert hospital.sync() == {"deleted": 1}
        assert hospital.search("Observation") == []


def test_a_number_that_is_out_of_all_bounds_holds_nothing_else(hospital: Hospital) -> None:
    images, report = with_report()
    hospital.send(*images, dose.set_number(report, "113813", "1e25"))
    assert hospital.sync() == {"created": 1}
    (summary,) = ours(observations(hospital, uid(report)), report)
    assert [one["code"]["coding"][0]["code"] for one in summary["component"]] == ["113812"]
