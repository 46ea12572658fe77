"""Two feeds into one FHIR service: one owns a study, the other only says that the study is there too."""

from collections.abc import Iterator
from pathlib import Path

import gateway
import pytest
from hospital import Hospital, Json, a_study, uid

from dicomcast import sandbox as services


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Hospital, Hospital]]:
    """Two DICOM services, two databases, one FHIR service."""
    with services.start() as first, services.start() as second:
        one = Hospital(first.dicom_url, first.fhir_url, f"sqlite:///{tmp_path}/one.db")
        other = Hospital(second.dicom_url, first.fhir_url, f"sqlite:///{tmp_path}/other.db")
        yield one, other
        one.close()
        other.close()


def endpoints(hospital: Hospital, study: list[Json]) -> list[str]:
    """The addresses of the Endpoints of a study, in order."""
    shown = hospital.study(uid(study[0]))
    return [hospital.read(one["reference"])["address"].removesuffix("/v1") for one in shown["endpoint"]]


def test_the_second_feed_adds_its_endpoint_and_nothing_else(two: tuple[Hospital, Hospital]) -> None:
    one, other = two
    study = a_study(instances=4)
    one.send(*study[:3])
    one.sync()
    before = one.study(uid(study[0]))
    other.send(*study)

    assert other.sync() == {"updated": 1}

    after = one.study(uid(study[0]))
    assert endpoints(one, study) == [one.dicom_url, other.dicom_url]
    assert {**after, "endpoint": before["endpoint"], "meta": before["meta"]} == before
    assert other.status(uid(study[0]))["outcome"] == "shared"
    assert (other.sync(), other.failures()) == ({}, [])


def test_the_owner_goes_on_beside_the_other(two: tuple[Hospital, Hospital]) -> None:
    one, other = two
    study = a_study(instances=3)
    one.send(*study[:2])
    one.sync()
    other.send(*study[:2])
    other.sync()
    one.send(study[2])

    assert one.sync() == {"updated": 1}

    assert one.study(uid(study[0]))["numberOfInstances"] == 3
    assert endpoints(one, study) == [one.dicom_url, other.dicom_url]
    other.send(study[2])
    before = one.versions()
    assert other.sync() == {"unchanged": 1}
    assert one.versions() == before


def test_the_second_feed_takes_only_its_endpoint_away(two: tuple[Hospital, Hospital]) -> None:
    one, other = two
    study = a_study(instances=2)
    for each in two:
        each.send(*study)
        each.sync()
    other.modality.delete(uid(study[0]))

    other.sync()

    assert endpoints(one, study) == [one.dicom_url]
    assert other.status(uid(study[0]))["outcome"] == "deleted"
    one.sync()
    one.check(uid(study[0]))


def left_by_its_owner(two: tuple[Hospital, Hospital]) -> list[Json]:
    """A study of two instances that both had and the owner has no more; a third one is new to the other."""
    one, other = two
    study = a_study(instances=3)
    for each in two:
        each.send(*study[:2])
        each.sync()
    one.modality.delete(uid(study[0]))
    one.sync()
    other.send(study[2])
    return study


def test_the_second_feed_takes_over_when_the_owner_has_gone(two: tuple[Hospital, Hospital]) -> None:
    one, other = two
    study = left_by_its_owner(two)

    other.sync()

    shown = one.study(uid(study[0]))
    assert (shown["status"], shown["numberOfInstances"]) == ("available", 3)
    assert endpoints(one, study) == [other.dicom_url]
    assert other.status(uid(study[0]))["outcome"] == "synced"
    other.modality.delete(uid(study[0]))
    other.sync()
    assert one.study(uid(study[0])) is None


def test_the_owner_that_has_gone_comes_back_as_the_second(two: tuple[Hospital, Hospital]) -> None:
    one, other = two
    study = left_by_its_owner(two)
    other.sync()
    one.send(study[0])

    one.sync()

    assert one.study(uid(study[0]))["numberOfInstances"] == 3
    assert endpoints(one, study) == [other.dicom_url, one.dicom_url]
    assert one.status(uid(study[0]))["outcome"] == "shared"


def test_a_failure_of_the_second_feed_makes_the_study_not_its_own(two: tuple[Hospital, Hospital]) -> None:
    one, other = two
    study = a_study(instances=3)
    one.send(*study)
    one.sync()
    one.fault("fhir", method="POST", path="^/fhir$", skip=1, status=422)
    other.send(study[0])
    assert other.sync() == {"failed": 1}
    one.heal()
    other.send(study[1])

    assert other.sync() == {"updated": 1}
    assert other.status(uid(study[0]))["outcome"] == "shared"
    other.modality.correct([uid(study[0])], {"StudyDescription": "elsewhere"})
    one.fault("fhir", path="ImagingStudy", status=404)
    other.sync()
    one.heal()
    other.clock.skip(100_000)
    other.sync()

    assert one.study(uid(study[0]))["numberOfInstances"] == 3
    assert endpoints(one, study) == [one.dicom_url, other.dicom_url]


def test_who_comes_first_by_a_moment_keeps_the_study(two: tuple[Hospital, Hospital]) -> None:
    one, other = two
    study = a_study(instances=3)
    one.send(*study)
    other.send(study[0])
    first = [one.sync]

    def somebody() -> None:
        if first:
            first.pop()()

    with gateway.before(other.fhir_url, somebody) as between:
        other.sync(fhir={"url": between.url})  # it has looked, and found nothing

    assert one.study(uid(study[0]))["numberOfInstances"] == 3
    assert endpoints(one, study) == [one.dicom_url, other.dicom_url]
    assert other.status(uid(study[0]))["outcome"] == "shared"


def test_an_adopted_endpoint_owns_its_studies_too(two: tuple[Hospital, Hospital]) -> None:
    one, other = two
    endpoint = {
        "resourceType": "Endpoint",
        "status": "active",
        "connectionType": {
            "system": "http://terminology.hl7.org/CodeSystem/endpoint-connection-type",
            "code": "dicom-wado-rs",
        },
        "payloadType": [{"text": "DICOM WADO-RS"}],
        "address": one.dicom_url,
    }
    one.post(endpoint)
    study = a_study(instances=3)
    one.send(*study)
    one.sync()
    other.send(study[0])

    other.sync()

    assert one.study(uid(study[0]))["numberOfInstances"] == 3
    assert other.status(uid(study[0]))["outcome"] == "shared"
