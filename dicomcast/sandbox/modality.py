"""A modality on the desk: makes studies, stores them over DICOMweb, sends again, deletes and corrects. For tests."""

import io
import random
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import httpx
import orjson
import pydicom
from pydicom import data as pydicom_data
from pydicom import uid

from dicomcast.dicom import files
from dicomcast.sandbox import multipart

Json = Any  # a JSON value
Source = Path | bytes | pydicom.Dataset

_DUPLICATE = 45070
_KINDS = {
    "CT": (uid.CTImageStorage, ("CHEST", "ABDOMEN", "HEAD"), "Axial", 512),
    "MR": (uid.MRImageStorage, ("BRAIN", "KNEE", "LSPINE"), "T2 TSE", 256),
    "CR": (uid.ComputedRadiographyImageStorage, ("CHEST", "HAND", "FOOT"), "PA", 2048),
}
_NAMES = (
    "Meyer^Anna=麥^安娜",
    "Okafor^Chidi",
    "Sørensen^Åse",
    "Иванов^Пётр",
    "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "Müller^Jörg^^Dr.",
    "Παπαδοπούλου^Ελένη",
    "O'Neil^Mary Ann",
)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one instance; `failure` and `warning` are the reason codes of the answer, None for neither."""

    sop_instance_uid: str
    failure: int | None = None
    warning: int | None = None

    @property
    def stored(self) -> bool:
        """Whether the service took it."""
        return self.failure is None


class Modality:
    """A sender to one DICOM service. `url` has no version segment; `client` brings credentials or time limits."""

    def __init__(
        self, url: str, *, version: str = "v2", client: httpx.Client | None = None, batch_bytes: int = 16 * 2**20
    ):
        self._url = f"{url.rstrip('/')}/{version}"
        self._client = client or httpx.Client(timeout=60)
        self._batch_bytes = batch_bytes

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def send(self, sources: Iterable[Source]) -> list[Result]:
        """STOW in requests of at most `batch_bytes` (one instance may be larger); one result per instance.

        Of each request the stored instances come first; httpx.HTTPStatusError where a request fails as a whole.
        """
        return [result for batch in self._batches(sources) for result in self._stow(batch)]

    def _batches(self, sources: Iterable[Source]) -> Iterator[list[bytes]]:
        batch: list[bytes] = []
        size = 0
        for source in sources:
            data = _bytes(source)
            if batch and size + len(data) > self._batch_bytes:
                yield batch
                batch, size = [], 0
            batch.append(data)
            size += len(data)
        if batch:
            yield batch

    def _stow(self, batch: Sequence[bytes]) -> list[Result]:
        boundary = uuid.uuid4().hex
        content = b"".join(multipart.encoded((("application/dicom", data) for data in batch), boundary))
        media = f'multipart/related; type="application/dicom"; boundary={boundary}'
        headers = {"Content-Type": media, "Accept": "application/dicom+json"}
        answer = self._client.post(f"{self._url}/studies", content=content, headers=headers)
        if answer.status_code not in (200, 202, 409):
            answer.raise_for_status()
        body = orjson.loads(answer.content)
        items = [item for tag in ("00081199", "00081198") for item in body.get(tag, {}).get("Value", ())]
        return [
            Result(str(_value(item, "00081155") or ""), _value(item, "00081197"), _value(item, "00081196"))
            for item in items
        ]

    def resend(self, sources: Iterable[Source], *, replace: bool = False) -> list[Result]:
        """Send what was sent before: refused as duplicates, or deleted first and stored anew where `replace`."""
        listed = [_bytes(source) for source in sources]
        for data in listed if replace else ():
            dataset = files.read(data)
            self.delete(dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID)
        return self.send(listed)

    def delete(self, study: str, series: str | None = None, sop: str | None = None) -> bool:
        """Delete a study, series or instance; False where there was none."""
        path = f"/studies/{study}" + (f"/series/{series}" if series else "") + (f"/instances/{sop}" if sop else "")
        answer = self._client.delete(self._url + path)
        if answer.status_code == 404:
            return False
        answer.raise_for_status()
        return True

    def correct(self, studies: Sequence[str], change: Mapping[str, str], *, patience: float = 30) -> dict[str, Json]:
        """Bulk update by keyword (`{"PatientName": "New^Name"}`); waits for the operation and returns its results.

        RuntimeError when it fails, TimeoutError when it takes longer than `patience` seconds.
        """
        dataset = pydicom.Dataset()
        with files.quiet():
            for keyword, value in change.items():
                setattr(dataset, keyword, value)
        body = {"studyInstanceUids": list(studies), "changeDataset": files.metadata(dataset)}
        headers = {"Content-Type": "application/json"}
        answer = self._client.post(f"{self._url}/studies/$bulkUpdate", content=orjson.dumps(body), headers=headers)
        answer.raise_for_status()
        end = time.monotonic() + patience
        while True:
            operation = self._client.get(answer.json()["href"]).raise_for_status().json()
            status = operation["status"].lower()
            if status in ("succeeded", "completed"):
                return dict(operation.get("results", {}))
            if status in ("failed", "canceled"):
                raise RuntimeError(f"the bulk update {status}")
            if time.monotonic() > end:
                raise TimeoutError("the bulk update takes too long")
            time.sleep(0.02)


def _value(item: Mapping[str, Json], tag: str) -> Json:
    values = item.get(tag, {}).get("Value")
    return values[0] if values else None


def _bytes(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    return source.read_bytes() if isinstance(source, Path) else encoded(source)


def encoded(dataset: pydicom.Dataset) -> bytes:
    """The DICOM file of a data set, explicit VR little endian unless it says otherwise."""
    buffer = io.BytesIO()
    with files.quiet():
        dataset.ensure_file_meta()
        if not dataset.file_meta.get("TransferSyntaxUID"):
            dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def synthesise(
    modality: str = "CT",
    *,
    instances: int = 1,
    series: int = 1,
    seed: int = 0,
    patient_id: str | None = None,
    pixels: bool = False,
) -> list[pydicom.Dataset]:
    """One study of `instances` in all, spread over `series`; the same arguments give the same study, byte for byte.

    CT, MR or CR; another modality gets secondary captures. `pixels` adds a black 8 x 8 image to each.
    """
    source = random.Random(f"{modality} {seed}")  # noqa: S311 - reproducible, not secret
    shared = _study(source, modality, f"{modality}/{seed}", patient_id)
    result = []
    for number in range(instances):
        place, within = number % series, number // series
        dataset = pydicom.Dataset()
        dataset.update(shared)
        _series(dataset, modality, f"{modality}/{seed}/{place}", place + 1)
        dataset.SOPInstanceUID = _uid(f"{modality}/{seed}/{place}/{within}")
        dataset.InstanceNumber = within + 1
        if modality in ("CT", "MR"):
            dataset.SliceThickness = "2.5"
            dataset.ImagePositionPatient = ["-125", "-125", str(2.5 * within)]
            dataset.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
        if pixels:
            dataset.Rows = dataset.Columns = 8
            dataset.PixelData = bytes(128)
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        result.append(dataset)
    return result


def _uid(name: str) -> str:
    """A UID of the 2.25 arc (PS3.5 B.2) that follows from a name."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, 'dicomcast sandbox ' + name).int}"


def _study(source: random.Random, modality: str, name: str, patient_id: str | None) -> pydicom.Dataset:
    sop_class, parts, _, size = _KINDS.get(modality, (uid.SecondaryCaptureImageStorage, ("",), "", 64))
    day = date(2015, 1, 1) + timedelta(days=source.randrange(3650))
    born = date(1930, 1, 1) + timedelta(days=source.randrange(30000))
    dataset = pydicom.Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = sop_class
    dataset.StudyDate = dataset.SeriesDate = f"{day:%Y%m%d}"
    dataset.StudyTime = f"{source.randrange(24):02d}{source.randrange(60):02d}{source.randrange(60):02d}"
    dataset.TimezoneOffsetFromUTC = source.choice(["+0000", "+0200", "-0500", "+0530"])
    dataset.AccessionNumber = f"A{source.randrange(10**7):07d}"
    dataset.Modality = modality
    dataset.Manufacturer = "Sandbox"
    dataset.ManufacturerModelName = f"Desk {modality}"
    dataset.ReferringPhysicianName = source.choice(_NAMES).partition("=")[0]
    dataset.BodyPartExamined = source.choice(parts)
    dataset.StudyDescription = f"{modality} {dataset.BodyPartExamined}".strip()
    dataset.PatientName = source.choice(_NAMES)
    dataset.PatientID = patient_id or f"S{source.randrange(10**6):06d}"
    dataset.PatientBirthDate = f"{born:%Y%m%d}"
    dataset.PatientSex = source.choice("MFO")
    dataset.StudyInstanceUID = _uid(name)
    dataset.StudyID = str(source.randrange(1, 10**4))
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = size
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    return dataset


def _series(dataset: pydicom.Dataset, modality: str, name: str, number: int) -> None:
    dataset.SeriesInstanceUID = _uid(name)
    dataset.SeriesNumber = number
    dataset.SeriesDescription = f"{_KINDS[modality][2] if modality in _KINDS else modality} {number}"
    minutes = int(dataset.StudyTime[:2]) * 60 + int(dataset.StudyTime[2:4]) + number
    dataset.SeriesTime = f"{minutes // 60 % 24:02d}{minutes % 60:02d}{dataset.StudyTime[4:]}"


def real_studies() -> list[Path]:
    """The DICOM files with an instance in them that come with pydicom, in a fixed order; nothing is downloaded."""
    root = Path(pydicom_data.__file__).parent
    found = []
    for folder in ("charset_files", "test_files"):
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.name != "DICOMDIR" and _is_instance(path):
                found.append(path)
    return found


def _is_instance(path: Path) -> bool:
    try:
        dataset = files.read(path)
    except ValueError:
        return False
    # A DICOMDIR under another name says so in its file meta.
    return bool(dataset.file_meta.get("MediaStorageSOPClassUID") != uid.MediaStorageDirectoryStorage)
