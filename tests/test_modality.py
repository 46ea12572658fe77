"""The modality simulator against the sandbox's DICOM service."""

import collections
from collections.abc import Iterator

import pydicom
import pytest

from dicomcast import sandbox
from dicomcast.dicom import files
from dicomcast.sandbox import dicom, modality


@pytest.fixture
def box() -> Iterator[sandbox.Sandbox]:
    with sandbox.start() as running:
        yield running


@pytest.fixture
def sender(box: sandbox.Sandbox) -> Iterator[modality.Modality]:
    sending = modality.Modality(box.dicom_url)
    yield sending
    sending.close()


def feed(box: sandbox.Sandbox) -> list[dict]:
    import httpx

    return list(httpx.get(f"{box.dicom_url}/v2/changefeed", params={"limit": 200}).json())


@pytest.mark.parametrize("kind", ["CT", "MR", "CR", "US"])
def test_synthetic_studies_are_stored_without_a_warning(sender: modality.Modality, kind: str) -> None:
    results = sender.send(modality.synthesise(kind, instances=6, series=2, seed=3))

    assert [(result.failure, result.warning) for result in results] == [(None, None)] * 6


def test_same_seed_gives_the_same_bytes_and_another_seed_another_study() -> None:
    first, again, other = (modality.synthesise(instances=3, series=2, seed=seed) for seed in (7, 7, 8))

    assert [modality.encoded(one) for one in first] == [modality.encoded(one) for one in again]
    assert first[0].StudyInstanceUID != other[0].StudyInstanceUID


def test_instances_are_spread_over_the_series_with_distinct_uids() -> None:
    study = modality.synthesise(instances=10, series=3)

    assert len({one.StudyInstanceUID for one in study}) == 1
    assert sorted(collections.Counter(one.SeriesInstanceUID for one in study).values(), reverse=True) == [4, 3, 3]
    assert len({one.SOPInstanceUID for one in study}) == 10
    assert {1, 2, 3} == {int(one.SeriesNumber) for one in study}
    assert [int(one.InstanceNumber) for one in study if one.SeriesNumber == 1] == [1, 2, 3, 4]


def test_synthetic_study_has_what_a_mapping_needs() -> None:
    (one,) = modality.synthesise("MR", seed=1)

    study = "AccessionNumber StudyDate StudyTime TimezoneOffsetFromUTC StudyDescription PatientBirthDate PatientSex"
    for keyword in [*study.split(), "BodyPartExamined", "SeriesNumber", "InstanceNumber"]:
        assert getattr(one, keyword) not in ("", None)


def test_small_batches_store_everything_in_several_requests(box: sandbox.Sandbox) -> None:
    import httpx

    sender = modality.Modality(box.dicom_url, batch_bytes=2500)
    results = sender.send(modality.synthesise(instances=7))
    sender.close()

    assert len([result for result in results if result.stored]) == 7
    stows = [one for one in httpx.get(f"{box.dicom_url}/sandbox/requests").json() if one["method"] == "POST"]
    assert 3 < len(stows) <= 7


def test_resending_is_refused_as_duplicate_and_leaves_the_feed(box: sandbox.Sandbox, sender: modality.Modality) -> None:
    study = modality.synthesise(instances=2)
    sender.send(study)

    assert {45070} == {result.failure for result in sender.resend(study)}
    assert len(feed(box)) == 2


def test_resending_to_replace_deletes_first(box: sandbox.Sandbox, sender: modality.Modality) -> None:
    study = modality.synthesise(instances=1)
    sender.send(study)

    assert all(result.stored for result in sender.resend(study, replace=True))
    assert [(entry["action"], entry["state"]) for entry in feed(box)] == [
        ("Create", "Replaced"),
        ("Delete", "Replaced"),
        ("Create", "Current"),
    ]


def test_delete_tells_whether_something_was_there(sender: modality.Modality) -> None:
    study = modality.synthesise(instances=3, series=3)
    sender.send(study)
    first = study[0]

    assert sender.delete(first.StudyInstanceUID, first.SeriesInstanceUID, first.SOPInstanceUID)
    assert not sender.delete(first.StudyInstanceUID, first.SeriesInstanceUID)
    assert sender.delete(first.StudyInstanceUID)
    assert not sender.delete(first.StudyInstanceUID)


def test_correct_waits_until_the_operation_is_over(box: sandbox.Sandbox) -> None:
    with sandbox.start(dicom_options=dicom.Options(operation_polls=3)) as slow:
        sender = modality.Modality(slow.dicom_url)
        study = modality.synthesise(instances=2)
        sender.send(study)

        results = sender.correct([study[0].StudyInstanceUID], {"PatientName": "Neu^Ährlich", "PatientID": "N1"})
        sender.close()

        assert (results["studyUpdated"], results["instanceUpdated"]) == (1, 2)
        assert {"Neu^Ährlich"} == {entry["metadata"]["00100010"]["Value"][0]["Alphabetic"] for entry in feed(slow)}


def test_real_files_are_many_studies_without_directories() -> None:
    paths = modality.real_studies()
    studies = {files.metadata(files.read(path)).get("0020000D", {}).get("Value", [""])[0] for path in paths} - {""}

    assert len(studies) >= 40
    assert not any("DICOMDIR" in path.name for path in paths)
    assert paths == modality.real_studies()


def test_real_files_give_one_result_each(sender: modality.Modality) -> None:
    paths = modality.real_studies()

    results = sender.send(paths)

    outcomes = collections.Counter(result.failure for result in results)
    assert len(paths) == len(results)
    assert {None, 43264, 45070} == set(outcomes)
    assert outcomes[None] > 100


def test_dataset_that_names_no_transfer_syntax_can_be_sent(sender: modality.Modality) -> None:
    (study,) = modality.synthesise()
    bare = pydicom.Dataset()
    bare.update(study)

    assert sender.send([bare])[0].stored
