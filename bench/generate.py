"""Studies that nobody had, most of them CT, as pages of a DICOM change feed: same arguments, same bytes.

An instance has 100 attributes in about 6 kB of DICOM JSON. What belongs to the patient, the study and a series is the
same in all of its instances; UIDs, numbers, positions, times, doses and references differ from instance to instance.
"""

import datetime
import functools
import itertools
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import orjson
from pydicom import datadict

Json: TypeAlias = Any

PAGE = 100  # entries
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
_IMAGES = {"CT": CT_IMAGE, "MR": "1.2.840.10008.5.1.4.1.1.4", "CR": "1.2.840.10008.5.1.4.1.1.1"}
_START = datetime.datetime(2024, 3, 14, 8, 30, tzinfo=datetime.UTC)
_SERIES = (
    # description, image type, kernel, slice thickness, first axis and second axis of the images
    ("Topogram 0.6 T20f", ["ORIGINAL", "PRIMARY", "LOCALIZER", "CT_TOP"], "T20f", 0.6, [1, 0, 0, 0, 0, -1]),
    ("Thorax nativ 1.0 Br40 A3", ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SPI"], "Br40d\\3", 1.0, [1, 0, 0, 0, 1, 0]),
    ("Thorax KM art. 1.0 Bl57 A3", ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SPI"], "Bl57d\\3", 1, [1, 0, 0, 0, 1, 0]),
    ("Thorax KM MPR cor 3.0", ["DERIVED", "SECONDARY", "MPR", "CT_MPR"], "Br40d\\3", 3.0, [1, 0, 0, 0, 0, -1]),
)


def datasets(
    instances: int,
    *,
    series: int = 4,
    seed: int = 1,
    mixed: bool = False,
    patient: int | None = None,
    modality: str = "CT",
    began: datetime.datetime = _START,
) -> Iterator[dict[str, Json]]:
    """DICOM JSON of all instances: series after series, or, with `mixed`, in turn one of each.

    `patient`: the number of the patient, by default that of the study (`seed`); `modality`: CT, MR or CR.
    """
    sizes = [len(range(number, instances, series)) for number in range(series)]
    each = (zip(itertools.repeat(number), range(size), strict=False) for number, size in enumerate(sizes))
    order: Iterable[Any] = itertools.chain.from_iterable(each)
    if mixed:
        order = ((index % series, index // series) for index in range(instances))
    study = _patient(seed if patient is None else patient) | _study(seed, began)
    of_series = [study | _of_series(seed, number, modality, began) for number in range(series)]
    for number, index in order:
        found = of_series[number] | _of_instance(seed, number, index, sizes, sop_class=_IMAGES[modality], began=began)
        yield {tag: found[tag] for tag in sorted(found)}


def pages(instances: int, *, series: int = 4, seed: int = 1, mixed: bool = False) -> Iterator[bytes]:
    """The JSON text of change feed pages, as v1 of the DICOM service's API serves them."""
    found = datasets(instances, series=series, seed=seed, mixed=mixed)
    entries = (
        entry(sequence, dataset, _START + datetime.timedelta(seconds=sequence / 8))
        for sequence, dataset in enumerate(found, start=1)
    )
    while page := list(itertools.islice(entries, PAGE)):
        yield orjson.dumps(page)


def write(folder: Path, instances: int, *, series: int = 4, seed: int = 1, mixed: bool = False) -> list[Path]:
    """The pages as files of a folder, which is made."""
    folder.mkdir(parents=True)
    written = []
    for number, page in enumerate(pages(instances, series=series, seed=seed, mixed=mixed)):
        written.append(folder / f"page-{number:05}.json")
        written[-1].write_bytes(page)
    return written


def overlay(path: Path, modules: Iterable[str]) -> None:
    """The rules of these shipped modules as an overlay."""
    import importlib

    import yaml

    tables = [importlib.import_module(f"dicomcast_mappings.{name}").RULES for name in modules]
    rows = [rule.row() for table in tables for rule in table]
    path.write_text(yaml.safe_dump({"rules": orjson.loads(orjson.dumps(rows))}), encoding="utf-8")


def entry(sequence: int, dataset: dict[str, Json], at: datetime.datetime, *, action: str = "Create") -> dict[str, Json]:
    """The change feed entry of an instance, recorded at that time; its state and its metadata are the last fields."""
    return {
        "sequence": sequence,
        "partitionName": "Microsoft.Default",
        "studyInstanceUid": dataset["0020000D"]["Value"][0],
        "seriesInstanceUid": dataset["0020000E"]["Value"][0],
        "sopInstanceUid": dataset["00080018"]["Value"][0],
        "action": action,
        "timestamp": f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond:06}0+00:00",
        "state": "Current",
        "metadata": dataset,
    }


def _uid(*parts: object) -> str:
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, '/'.join(map(str, parts))).int}"


def _attributes(**named: Json) -> dict[str, Json]:
    """DICOM JSON elements from keywords; the VR is the dictionary's, a list several values, None no value."""
    found = {}
    for keyword, value in named.items():
        tag, vr = _known(keyword)
        values = value if isinstance(value, list) else [value]
        values = [{"Alphabetic": name} for name in values] if vr == "PN" else values
        found[tag] = {"vr": vr} if value is None else {"vr": vr, "Value": values}
    return found


@functools.cache
def _known(keyword: str) -> tuple[str, str]:
    """Tag (8 hex digits) and VR."""
    tag = datadict.tag_for_keyword(keyword)
    assert tag is not None, keyword
    return f"{tag:08X}", datadict.dictionary_VR(tag).split(" or ")[0]


def _code(value: str, scheme: str, meaning: str) -> dict[str, Json]:
    return _attributes(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def _reference(sop_class: str, uid: str) -> dict[str, Json]:
    return _attributes(ReferencedSOPClassUID=sop_class, ReferencedSOPInstanceUID=uid)


def _issuer(name: str, uid: str) -> dict[str, Json]:
    return _attributes(LocalNamespaceEntityID=name, UniversalEntityID=uid, UniversalEntityIDType="ISO")


def _patient(number: int) -> dict[str, Json]:
    return _attributes(
        PatientName=f"Bench^Number {number}^Middle^Dr.",
        PatientID=f"BENCH-{number:06}",
        IssuerOfPatientID="BENCHMARK",
        IssuerOfPatientIDQualifiersSequence=_attributes(
            UniversalEntityID="2.25.71245198076211", UniversalEntityIDType="ISO"
        ),
        PatientBirthDate="19700101",
        PatientSex="O",
        PatientAge="054Y",
        PatientSize=1.75,
        PatientWeight=70.5,
        PatientComments=None,
    )


def _study(seed: int, began: datetime.datetime) -> dict[str, Json]:
    accession = f"BENCH{seed:06}"
    return _attributes(
        SpecificCharacterSet="ISO_IR 192",
        StudyInstanceUID=_uid(seed),
        StudyDate=f"{began:%Y%m%d}",
        StudyTime=f"{began:%H%M%S}.000000",
        StudyID=f"{seed}",
        TimezoneOffsetFromUTC="+0000",
        AccessionNumber=accession,
        IssuerOfAccessionNumberSequence=_issuer("BENCH-RIS", "2.25.71245198076212"),
        StudyDescription="CT Thorax nativ und mit Kontrastmittel",
        ReferringPhysicianName="Referrer^Example^^Dr. med.",
        PhysiciansOfRecord=["Record^Example^^Prof. Dr.", "Record^Second"],
        NameOfPhysiciansReadingStudy="Reader^Example^^Dr. med.",
        RequestingPhysician="Requester^Example^^Dr. med.",
        RequestedProcedureDescription="CT Thorax mit KM",
        ProcedureCodeSequence=[
            _code("24627-2", "LN", "CT Chest"),
            _code("169069000", "SCT", "Computed tomography of chest"),
        ],
        RequestAttributesSequence=_attributes(
            AccessionNumber=accession,
            RequestedProcedureID=f"RP{seed:06}",
            RequestedProcedureDescription="CT Thorax mit KM",
            ScheduledProcedureStepID=f"SPS{seed:06}",
            ScheduledProcedureStepDescription="CT Thorax mit KM",
            ReasonForTheRequestedProcedure="Verlaufskontrolle",
            ReasonForRequestedProcedureCodeSequence=_code("267036007", "SCT", "Dyspnea"),
        ),
        InstitutionName="Example Hospital",
        InstitutionAddress="1 Example Street, 00000 Example",
        InstitutionalDepartmentName="Radiology",
    )


def _of_series(seed: int, number: int, modality: str, began: datetime.datetime) -> dict[str, Json]:
    description, image_type, kernel, thickness, orientation = _SERIES[number % len(_SERIES)]
    at = began + datetime.timedelta(minutes=2 * number)
    return _attributes(
        SeriesInstanceUID=_uid(seed, number),
        SeriesNumber=number + 1,
        SeriesDate=f"{at:%Y%m%d}",
        SeriesTime=f"{at:%H%M%S}.437000",
        SeriesDescription=description,
        Modality=modality,
        ProtocolName="Thorax_KM_Routine (Adult)",
        BodyPartExamined="CHEST",
        AnatomicRegionSequence=_code("51185008", "SCT", "Chest"),
        PatientPosition="HFS",
        FrameOfReferenceUID=_uid(seed, "frame of reference"),
        PositionReferenceIndicator=None,
        PerformingPhysicianName="Performer^Example^^Dr. med.",
        OperatorsName=["Operator^Example", "Operator^Second"],
        PerformedProcedureStepStartDate=f"{at:%Y%m%d}",
        PerformedProcedureStepStartTime=f"{at:%H%M%S}.281000",
        PerformedProcedureStepID=f"PPS{seed:06}",
        PerformedProcedureStepDescription="CT Thorax mit KM",
        # the equipment and the acquisition
        Manufacturer="Example Medical Systems",
        ManufacturerModelName="Example CT 128",
        StationName="CT01",
        DeviceSerialNumber="000001",
        SoftwareVersions=["CT VB20A", "1.0"],
        ImageType=image_type,
        KVP=120.0,
        ConvolutionKernel=kernel.split("\\"),
        FilterType="FLAT",
        ScanOptions="SPIRAL",
        DataCollectionDiameter=500.0,
        ReconstructionDiameter=380.0,
        GantryDetectorTilt=0.0,
        TableHeight=143.5,
        RotationDirection="CW",
        SliceThickness=thickness,
        SingleCollimationWidth=0.6,
        TotalCollimationWidth=38.4,
        SpiralPitchFactor=1.2,
        ContrastBolusAgent="Iomeprol 400",
        ContrastBolusRoute="IV",
        # the images
        ImageOrientationPatient=orientation,
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        Rows=512,
        Columns=512,
        PixelSpacing=[0.7421875, 0.7421875],
        BitsAllocated=16,
        BitsStored=12,
        HighBit=11,
        PixelRepresentation=0,
        WindowCenter=[40, -600],
        WindowWidth=[400, 1200],
        RescaleIntercept=-1024,
        RescaleSlope=1,
    )


def _of_instance(
    seed: int, number: int, index: int, sizes: list[int], *, sop_class: str, began: datetime.datetime
) -> dict[str, Json]:
    at = began + datetime.timedelta(minutes=2 * number, milliseconds=37 * index)
    location = round(-812.5 + 0.7 * index, 4)
    dose = 180 + index * 7 % 61
    source = (number - 1) % len(sizes)
    sources = sorted({index % max(sizes[source], 1), (index + 1) % max(sizes[source], 1)})
    return _attributes(
        SOPClassUID=sop_class,
        SOPInstanceUID=_uid(seed, number, index),
        InstanceNumber=index + 1,
        AcquisitionNumber=number + 1,
        InstanceCreationDate=f"{at:%Y%m%d}",
        InstanceCreationTime=f"{at:%H%M%S}.{at.microsecond:06}",
        AcquisitionDate=f"{at:%Y%m%d}",
        AcquisitionTime=f"{at:%H%M%S}.{at.microsecond:06}",
        ContentDate=f"{at:%Y%m%d}",
        ContentTime=f"{at:%H%M%S}.{at.microsecond:06}",
        ImagePositionPatient=[-189.62890625, -346.12890625, location],
        SliceLocation=location,
        ExposureTime=500,
        XRayTubeCurrent=dose,
        Exposure=dose // 2,
        CTDIvol=round(dose / 29, 6),
        IrradiationEventUID=_uid(seed, number, "event"),
        SourceImageSequence=[_reference(sop_class, _uid(seed, source, other)) for other in sources],
    )
