"""Any history, synced at any moments, ends in what the mapping makes of the living instances."""

import copy
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pydicom
import pytest
from hospital import Hospital, uid
from hypothesis import strategies as st

from dicomcast import sandbox as services
from dicomcast.sandbox import modality

STUDIES = [
    modality.synthesise("CT", instances=4, series=2, seed=1, patient_id="one"),
    modality.synthesise("MR", instances=3, series=3, seed=2, patient_id="one"),
    modality.synthesise("CR", instances=2, seed=3, patient_id="two"),
]
INSTANCES = [(study, number) for study, some in enumerate(STUDIES) for number in range(len(some))]
ONE = st.sampled_from(INSTANCES)
VALUES = st.sampled_from(["alpha", "beta"])
STEPS = st.one_of(
    st.tuples(st.just("send"), ONE, VALUES),
    st.tuples(st.just("send"), ONE, VALUES),
    st.tuples(st.just("replace"), ONE, VALUES),
    st.tuples(st.just("delete instance"), ONE, VALUES),
    st.tuples(st.just("delete series"), ONE, VALUES),
    st.tuples(st.just("delete study"), ONE, VALUES),
    st.tuples(st.just("describe"), ONE, VALUES),
    st.tuples(st.just("move"), ONE, VALUES),
    st.tuples(st.just("rename"), ONE, VALUES),
    st.tuples(st.just("sync"), ONE, VALUES),
    st.tuples(st.just("sync"), ONE, VALUES),
    st.tuples(st.just("lose database"), ONE, VALUES),
    st.tuples(st.just("gap"), ONE, VALUES),
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def varied(dataset: pydicom.Dataset, value: str) -> pydicom.Dataset:
    """An instance that says one thing or another about itself, its series, its study and its patient."""
    one = copy.deepcopy(dataset)
    one.SeriesDescription = one.StudyDescription = value
    one.BodyPartExamined = "HEAD" if value == "alpha" else "CHEST"
    one.PatientID = f"{dataset.PatientID}-{value}" if value == "beta" else dataset.PatientID
    one.InstanceNumber = dataset.InstanceNumber + (value == "beta")
    return one


def step(hospital: Hospital, folder: Path, what: str, place: tuple[int, int], value: str) -> None:
    study, number = place
    dataset = STUDIES[study][number]
    uids = (uid(dataset), str(dataset.SeriesInstanceUID), str(dataset.SOPInstanceUID))
    match what:
        case "send":
            hospital.modality.send([varied(dataset, value)])  # refused where it is there already
        case "replace":
            hospital.modality.resend([varied(dataset, value)], replace=True)
        case "delete instance":
            hospital.modality.delete(*uids)
        case "delete series":
            hospital.modality.delete(*uids[:2])
        case "delete study":
            hospital.modality.delete(uids[0])
        case "describe":
            hospital.modality.correct([uids[0]], {"StudyDescription": f"{value} corrected"})
        case "move":
            hospital.modality.correct([uids[0]], {"PatientID": f"moved {value}"})
        case "rename":
            hospital.modality.correct([uids[0]], {"PatientName": f"{value}^Renamed"})
        case "sync":
            hospital.sync()
        case "lose database":
            hospital.database = f"sqlite:///{folder}/{uuid.uuid4()}.db"
        case "gap":
            hospital.feed("gaps", skip=3)


@hypothesis.given(st.lists(STEPS, min_size=4, max_size=16), st.sampled_from([1, 4]), st.booleans())
@hypothesis.settings(
    max_examples=15,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
def test_fhir_is_a_function_of_the_living_instances(
    folder: Path, history: list[tuple[str, tuple[int, int], str]], parallel: int, twice: bool
) -> None:
    with services.start() as box:
        database = f"sqlite:///{folder}/{uuid.uuid4()}.db"
        hospital = Hospital(box.dicom_url, box.fhir_url, database)
        hospital.flags["sync"] = {"parallel": parallel}
        try:
            for what, place, value in history:
                step(hospital, folder, what, place, value)
            hospital.sync()
            if twice:
                hospital.sync()
            for study in STUDIES:
                hospital.check(uid(study[0]))
            assert hospital.kinds() == []
        finally:
            hospital.close()


@pytest.mark.parametrize("width", [1, 3, 100])
def test_a_study_that_comes_in_pieces_is_what_it_is_in_one(folder: Path, width: int) -> None:
    with services.start() as box:
        database = f"sqlite:///{folder}/{uuid.uuid4()}.db"
        hospital = Hospital(box.dicom_url, box.fhir_url, database)
        study = [varied(one, "alpha") for one in STUDIES[0]] + [varied(one, "alpha") for one in STUDIES[1]]
        for start in range(0, len(study), width):
            hospital.send(*study[start : start + width])
            hospital.sync()
        for one in STUDIES[:2]:
            hospital.check(uid(one[0]))
        hospital.close()
