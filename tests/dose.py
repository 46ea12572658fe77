"""Made dose reports: what CT, angiography and nuclear medicine send, by TID 10011, 10001 and 10021 of PS3.16.

A report is a data set with file meta: `hospital.json_of` gives its DICOM JSON, `modality.encoded` its file. The
same arguments give the same report. `items` finds its content items; `leave_out`, `set_number`, `set_unit` and
`in_srt` make it one that is not as it should be: they change the report that they are given, and return it.
"""

from collections.abc import Iterator, Sequence

import pydicom
from pydicom import uid
from pydicom.dataset import FileMetaDataset
from pydicom.sr import _snomed_dict

Dataset = pydicom.Dataset

MEANINGS = {
    "DCM": {
        "110180": "Study Instance UID",
        "111526": "DateTime Started",
        "113014": "Study",
        "113500": "Radiopharmaceutical Radiation Dose Report",
        "113502": "Radiopharmaceutical Administration",
        "113503": "Radiopharmaceutical Administration Event UID",
        "113507": "Administered activity",
        "113508": "Pre-Administration Measured Activity",
        "113509": "Post-Administration Measured Activity",
        "113611": "Stationary Acquisition",
        "113620": "Plane A",
        "113621": "Plane B",
        "113622": "Single Plane",
        "113691": "IEC Body Dosimetry Phantom",
        "113701": "X-Ray Radiation Dose Report",
        "113702": "Accumulated X-Ray Dose Data",
        "113704": "Projection X-Ray",
        "113705": "Scope of Accumulation",
        "113706": "Irradiation Event X-Ray Data",
        "113721": "Irradiation Event Type",
        "113722": "Dose Area Product Total",
        "113725": "Dose (RP) Total",
        "113726": "Fluoro Dose Area Product Total",
        "113727": "Acquisition Dose Area Product Total",
        "113728": "Fluoro Dose (RP) Total",
        "113729": "Acquisition Dose (RP) Total",
        "113730": "Total Fluoro Time",
        "113731": "Total Number of Radiographic Frames",
        "113733": "KVP",
        "113734": "X-Ray Tube Current",
        "113738": "Dose (RP)",
        "113742": "Irradiation Duration",
        "113764": "Acquisition Plane",
        "113769": "Irradiation Event UID",
        "113780": "Reference Point Definition",
        "113805": "Constant Angle Acquisition",
        "113809": "Start of X-Ray Irradiation",
        "113810": "End of X-Ray Irradiation",
        "113811": "CT Accumulated Dose Data",
        "113812": "Total Number of Irradiation Events",
        "113813": "CT Dose Length Product Total",
        "113819": "CT Acquisition",
        "113820": "CT Acquisition Type",
        "113822": "CT Acquisition Parameters",
        "113824": "Exposure Time",
        "113825": "Scanning Length",
        "113826": "Nominal Single Collimation Width",
        "113827": "Nominal Total Collimation Width",
        "113828": "Pitch Factor",
        "113829": "CT Dose",
        "113830": "Mean CTDIvol",
        "113835": "CTDIw Phantom Type",
        "113838": "DLP",
        "113854": "Source of Dose Information",
        "113855": "Total Acquisition Time",
        "113856": "Automated Data Collection",
        "113860": "15cm from Isocenter toward Source",
        "121005": "Observer Type",
        "121007": "Device",
        "121012": "Device Observer UID",
        "121014": "Device Observer Manufacturer",
        "121016": "Device Observer Serial Number",
        "121058": "Procedure reported",
        "122130": "Dose Area Product",
        "123003": "Radiopharmaceutical Start DateTime",
        "123004": "Radiopharmaceutical Stop DateTime",
        "123005": "Radiopharmaceutical Volume",
        "123014": "Target Region",
        "125203": "Acquisition Protocol",
    },
    "SCT": {
        "116152004": "Spiral Acquisition",
        "261004008": "Diagnostic Intent",
        "304283002": "Radionuclide Half Life",
        "349358000": "Radiopharmaceutical agent",
        "35321007": "Fluorodeoxyglucose F^18^",
        "363589002": "Associated Procedure",
        "363703001": "Has Intent",
        "410675002": "Route of administration",
        "416775004": "Chest, Abdomen and Pelvis",
        "443271005": "PET/CT FDG imaging of whole body",
        "44491008": "Fluoroscopy",
        "47625008": "Intravenous route",
        "77004003": "^18^Fluorine",
        "77477000": "Computed Tomography X-Ray",
        "80891009": "Heart",
        "89457008": "Radionuclide",
    },
    "UCUM": {
        "1": "no units",
        "Gy": "Gy",
        "Gy.m2": "Gy.m2",
        "MBq": "MBq",
        "cm3": "cm3",
        "kV": "kV",
        "mA": "mA",
        "mGy": "mGy",
        "mGy.cm": "mGy.cm",
        "mm": "mm",
        "s": "s",
        "{events}": "events",
        "{ratio}": "ratio",
    },
}
"""Code meanings by scheme and code value, in the words of PS3.16."""

_SCHEMES = {code: scheme for scheme, meanings in MEANINGS.items() for code in meanings}
_DAY = "20240305"
_PLANES = {"A": "113620", "B": "113621", "single": "113622"}


def ct(
    study: str,
    *,
    sop: str | None = None,
    events: Sequence[str | None] | None = None,
    scout: str | None = None,
    **values: str,
) -> Dataset:
    """A CT dose report, TID 10011: a spiral acquisition for each event UID (two of them), None for one without.

    A UID may stand there twice: TID 10013 lets one event be split into several acquisitions.
    `scout` is the event UID of a localizer, which comes first and has no CT Dose. `values` by keyword for the data set.
    """
    events = _events(study, 2) if events is None else events
    localizer = [_localizer(scout)] if scout else []
    doses = [("5.25", "157.07"), ("12.5", "350.00"), ("0.80", "4.2")]
    spirals = [_spiral(event, at, *doses[at % 3]) for at, event in enumerate(events)]
    total = sum(float(doses[at % 3][1]) for at in range(len(events)))
    content = [
        _code("HAS CONCEPT MOD", "121058", "77477000", _code("HAS CONCEPT MOD", "363703001", "261004008")),
        *_observer(study),
        _moment("113809", "101500.250", "HAS OBS CONTEXT"),
        _moment("113810", "101742", "HAS OBS CONTEXT"),
        _scope(study),
        _container(
            "113811",
            _number("113812", str(len(localizer) + len(events)), "{events}"),
            _number("113813", f"{total:.2f}", "mGy.cm"),
        ),
        *localizer,
        *spirals,
        _code("CONTAINS", "113854", "113856"),
    ]
    return _report(study, sop, "113701", "10011", content, ManufacturerModelName="Desk CT", **values)


def projection(
    study: str,
    *,
    sop: str | None = None,
    events: Sequence[str | None] | None = None,
    planes: Sequence[str] = ("A", "B"),
    **values: str,
) -> Dataset:
    """A dose report of fluoroscopy and angiography, TID 10001: totals for each plane, which are `single` or A and B.

    The events (two of them) are fluoroscopy and acquisition by turns, on plane after plane.
    """
    events = _events(study, 2) if events is None else events
    content = [
        _code("HAS CONCEPT MOD", "121058", "113704", _code("HAS CONCEPT MOD", "363703001", "261004008")),
        *_observer(study),
        _scope(study),
        *(_plane(plane, at) for at, plane in enumerate(planes)),
        *(_exposure(event, planes[at % len(planes)], at) for at, event in enumerate(events)),
        _code("CONTAINS", "113854", "113856"),
    ]
    return _report(study, sop, "113701", "10001", content, ManufacturerModelName="Desk XA", **values)


def radiopharmaceutical(
    study: str, *, sop: str | None = None, events: Sequence[str | None] | None = None, **values: str
) -> Dataset:
    """A dose report of nuclear medicine, TID 10021: an administration of FDG (the template allows one)."""
    events = _events(study, 1) if events is None else events
    intent = _code("HAS CONCEPT MOD", "363703001", "261004008")
    content = [_code("HAS CONCEPT MOD", "363589002", "443271005", intent), *map(_administration, events)]
    return _report(study, sop, "113500", "10021", content, ManufacturerModelName="Desk NM", **values)


KINDS = {"10011": ct, "10001": projection, "10021": radiopharmaceutical}
"""The kinds of report by template."""


# What is in a report, and what hospitals make of it


def items(report: Dataset, code: str) -> list[Dataset]:
    """The content items of this concept name, at every depth, in the order of the document."""
    return [item for item, _ in _walk(report) if _concept(item) == code]


def leave_out(report: Dataset, code: str, at: int | None = None) -> Dataset:
    """Without the content items of this concept name, or without the one at this place among them."""
    found = [(item, parent) for item, parent in _walk(report) if _concept(item) == code]
    for item, parent in found if at is None else [found[at]]:
        parent.ContentSequence = [one for one in parent.ContentSequence if one is not item]
    return report


def set_number(report: Dataset, code: str, value: str | None, at: int = 0) -> Dataset:
    """Another value; `""` is an empty Numeric Value, None an empty Measured Value Sequence."""
    item = items(report, code)[at]
    if value is None:
        item.MeasuredValueSequence = []
    else:
        item.MeasuredValueSequence[0].NumericValue = value
    return report


def set_unit(report: Dataset, code: str, unit: str, at: int = 0) -> Dataset:
    """Another unit, of UCUM, the value as it was."""
    measured = items(report, code)[at].MeasuredValueSequence[0]
    measured.MeasurementUnitsCodeSequence = [_coded(unit, scheme="UCUM", meaning=unit)]
    return report


def in_srt(report: Dataset) -> Dataset:
    """With SNOMED-RT codes for those of SNOMED CT, as systems have them that are older than 2018 or so."""
    for item in (report, *(item for item, _ in _walk(report))):
        for coded in (item.ConceptNameCodeSequence[0], *(item.get("ConceptCodeSequence") or ())):
            if coded.CodingSchemeDesignator == "SCT":
                coded.CodingSchemeDesignator, coded.CodeValue = "SRT", _snomed_dict.mapping["SCT"][coded.CodeValue]
    return report


def _walk(parent: Dataset) -> Iterator[tuple[Dataset, Dataset]]:
    for item in parent.get("ContentSequence") or ():
        yield item, parent
        yield from _walk(item)


def _concept(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeValue)


# Containers of the templates


def _localizer(event: str) -> Dataset:
    return _container(
        "113819",
        _text("125203", "Topogram"),
        _code("CONTAINS", "123014", "416775004"),
        _code("CONTAINS", "113820", "113805"),
        _uid("CONTAINS", "113769", event),
        _container("113822", _number("113824", "5.1", "s"), _number("113825", "512", "mm")),
    )


def _spiral(event: str | None, at: int, mean: str, product: str) -> Dataset:
    return _container(
        "113819",
        _text("125203", f"Spiral {at + 1}"),
        _code("CONTAINS", "123014", "416775004"),
        _code("CONTAINS", "113820", "116152004"),
        *([_uid("CONTAINS", "113769", event)] if event else []),
        _moment("111526", f"10{16 + at % 40}00"),
        _container(
            "113822",
            _number("113824", "12.4", "s"),
            _number("113825", "299.2", "mm"),
            _number("113826", "0.6", "mm"),
            _number("113827", "38.4", "mm"),
            _number("113828", "0.6", "{ratio}"),
        ),
        _container(
            "113829",
            _number("113830", mean, "mGy"),
            _code("CONTAINS", "113835", "113691"),
            _number("113838", product, "mGy.cm"),
        ),
    )


def _plane(plane: str, at: int) -> Dataset:
    return _container(
        "113702",
        _code("HAS CONCEPT MOD", "113764", _PLANES[plane]),
        _number("113722", ("0.00123", "4.56E-04")[at], "Gy.m2"),
        _number("113725", ("0.212", "0.08")[at], "Gy"),
        _number("113726", ("0.00082", "0.0001")[at], "Gy.m2"),
        _number("113728", ("0.142", "0.03")[at], "Gy"),
        _number("113730", ("450", "61.5")[at], "s"),
        _number("113727", ("0.00041", "0.000356")[at], "Gy.m2"),
        _number("113729", ("0.07", "0.05")[at], "Gy"),
        _number("113855", ("12", "9.25")[at], "s"),
        _number("113731", ("180", "95")[at], "1"),
        _code("CONTAINS", "113780", "113860"),
    )


def _exposure(event: str | None, plane: str, at: int) -> Dataset:
    fluoroscopy = at % 2 == 0
    return _container(
        "113706",
        _code("HAS CONCEPT MOD", "113764", _PLANES[plane]),
        *([_uid("CONTAINS", "113769", event)] if event else []),
        _moment("111526", f"10{16 + at % 40}30"),
        _code("CONTAINS", "113721", "44491008" if fluoroscopy else "113611"),
        _text("125203", "Fluoro low" if fluoroscopy else "Coronary 15 fps"),
        _code("CONTAINS", "123014", "80891009"),
        _number("122130", "1.2E-05" if fluoroscopy else "0.000356", "Gy.m2"),
        _number("113738", "0.0021" if fluoroscopy else "0.05", "Gy"),
        _code("CONTAINS", "113780", "113860"),
        _number("113742", "8.2", "s"),
        _number("113733", "81.5", "kV"),
        _number("113734", "120", "mA"),
    )


def _administration(event: str | None) -> Dataset:
    nuclide = _code("HAS PROPERTIES", "89457008", "77004003")
    half_life = _number("304283002", "6586.2", "s", "HAS PROPERTIES")
    return _container(
        "113502",
        _code("CONTAINS", "349358000", "35321007", nuclide, half_life),
        *([_uid("CONTAINS", "113503", event)] if event else []),
        _moment("123003", "091230"),
        _moment("123004", "091245"),
        _number("113507", "312.5", "MBq"),
        _number("123005", "1.8", "cm3"),
        _number("113508", "320.1", "MBq"),
        _number("113509", "7.6", "MBq"),
        _code("CONTAINS", "410675002", "47625008"),
    )


def _observer(study: str) -> list[Dataset]:
    return [
        _code("HAS OBS CONTEXT", "121005", "121007"),
        _uid("HAS OBS CONTEXT", "121012", f"{study}.8"),
        _text("121014", "Sandbox", "HAS OBS CONTEXT"),
        _text("121016", "SN 4711", "HAS OBS CONTEXT"),
    ]


def _scope(study: str) -> Dataset:
    return _code("HAS OBS CONTEXT", "113705", "113014", _uid("HAS PROPERTIES", "110180", study))


# Content items


def _item(relation: str, kind: str, concept: str, *children: Dataset) -> Dataset:
    item = Dataset()
    item.RelationshipType = relation
    item.ValueType = kind
    item.ConceptNameCodeSequence = [_coded(concept)]
    if children:
        item.ContentSequence = list(children)
    return item


def _coded(code: str, *, scheme: str | None = None, meaning: str | None = None) -> Dataset:
    scheme = scheme or _SCHEMES[code]
    coded = Dataset()
    coded.CodeValue = code
    coded.CodingSchemeDesignator = scheme
    coded.CodeMeaning = meaning or MEANINGS[scheme][code]
    return coded


def _container(concept: str, *children: Dataset) -> Dataset:
    item = _item("CONTAINS", "CONTAINER", concept, *children)
    item.ContinuityOfContent = "SEPARATE"
    return item


def _code(relation: str, concept: str, code: str, *children: Dataset) -> Dataset:
    item = _item(relation, "CODE", concept, *children)
    item.ConceptCodeSequence = [_coded(code)]
    return item


def _number(concept: str, value: str, unit: str, relation: str = "CONTAINS") -> Dataset:
    item = _item(relation, "NUM", concept)
    measured = Dataset()
    measured.NumericValue = value
    measured.MeasurementUnitsCodeSequence = [_coded(unit, scheme="UCUM")]
    item.MeasuredValueSequence = [measured]
    return item


def _text(concept: str, text: str, relation: str = "CONTAINS") -> Dataset:
    item = _item(relation, "TEXT", concept)
    item.TextValue = text
    return item


def _uid(relation: str, concept: str, value: str) -> Dataset:
    item = _item(relation, "UIDREF", concept)
    item.UID = value
    return item


def _moment(concept: str, time: str, relation: str = "CONTAINS") -> Dataset:
    item = _item(relation, "DATETIME", concept)
    item.DateTime = _DAY + time
    return item


# The document


def _events(study: str, count: int) -> list[str]:
    return [f"{study}.9.{at}" for at in range(1, count + 1)]


def _report(
    study: str, sop: str | None, title: str, template: str, content: Sequence[Dataset], **values: str
) -> Dataset:
    nuclear = template == "10021"
    report = Dataset()
    report.SpecificCharacterSet = "ISO_IR 192"
    report.SOPClassUID = uid.RadiopharmaceuticalRadiationDoseSRStorage if nuclear else uid.XRayRadiationDoseSRStorage
    report.SOPInstanceUID = sop or f"{study}.1.1"
    report.StudyDate = report.SeriesDate = report.ContentDate = _DAY
    report.StudyTime = "100000"
    report.SeriesTime = report.ContentTime = "102000"
    report.TimezoneOffsetFromUTC = "+0100"
    report.AccessionNumber = "A0004711"
    report.Modality = "SR"
    report.Manufacturer = "Sandbox"
    report.ReferringPhysicianName = "Okafor^Chidi"
    report.SeriesDescription = "Dose Report"
    report.ReferencedPerformedProcedureStepSequence = []
    report.DeviceSerialNumber = "SN 4711"
    report.SoftwareVersions = "1.0"
    report.PatientName = "Meyer^Anna"
    report.PatientID = "DOSE1"
    report.PatientBirthDate = "19700101"
    report.PatientSex = "F"
    report.StudyInstanceUID = study
    report.SeriesInstanceUID = f"{study}.1"
    report.StudyID = "1"
    report.SeriesNumber = 990
    report.InstanceNumber = 1
    report.PerformedProcedureCodeSequence = []
    report.CompletionFlag = "COMPLETE"
    report.VerificationFlag = "UNVERIFIED"
    report.ValueType = "CONTAINER"
    report.ConceptNameCodeSequence = [_coded(title)]
    report.ContinuityOfContent = "SEPARATE"
    mapping = Dataset()
    mapping.MappingResource = "DCMR"
    mapping.TemplateIdentifier = template
    report.ContentTemplateSequence = [mapping]
    report.ContentSequence = list(content)
    for keyword, value in values.items():
        setattr(report, keyword, value)
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    return report
