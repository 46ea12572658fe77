"""A real PACS as the source: real files go into Orthanc, and FHIR follows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import stack
from hospital import Hospital, until

from dicomcast import sandbox as services
from dicomcast.dicom import files
from dicomcast.sandbox import modality


@pytest.fixture
def hospital(orthanc: stack.Orthanc, sandbox: services.Sandbox, tmp_path: Path) -> Iterator[Hospital]:
    one = Hospital(orthanc.url, sandbox.fhir_url, f"sqlite:///{tmp_path}/state.db")
    yield one
    one.close()


def usable() -> dict[str, list[Path]]:
    """Files that come with pydicom, by study: those that name a patient and are no second copy of an instance."""
    found: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for path in modality.real_studies():
        dataset = files.read(path)
        names = [str(dataset.get(keyword) or "") for keyword in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")]
        if all(names) and str(dataset.SOPInstanceUID) not in seen:
            seen.add(str(dataset.SOPInstanceUID))
            found.setdefault(names[1], []).append(path)
    return found


def test_fhir_follows_orthanc(hospital: Hospital, orthanc: stack.Orthanc) -> None:
    studies = usable()
    largest = max(studies, key=lambda study: len(studies[study]))
    for paths in studies.values():
        orthanc.store(*paths)
    until(lambda: hospital.latest() >= sum(map(len, studies.values())))

    hospital.sync()

    for study in studies:
        hospital.check(study)
    assert hospital.kinds() == []
    assert hospital.sync() == {}

    before = hospital.latest()
    orthanc.delete(str(files.read(studies[largest][0]).SOPInstanceUID))
    until(lambda: hospital.latest() > before)
    assert hospital.sync() == {"updated": 1}
    hospital.check(largest)

    gone = next(study for study in studies if len(studies[study]) == 1)
    before = hospital.latest()
    orthanc.delete(gone)
    until(lambda: hospital.latest() > before)
    assert hospital.sync() == {"deleted": 1}
    assert hospital.study(gone) is None

    before = hospital.latest()
    orthanc.store(*studies[gone])
    until(lambda: hospital.latest() > before)
    assert hospital.sync() == {"created": 1}
    hospital.check(gone)
    assert hospital.watermark() == hospital.latest()
