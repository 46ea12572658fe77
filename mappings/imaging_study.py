"""ImagingStudy with its series and instances (FHIR R4 ImagingStudy, its DICOM mapping)."""

from dicomcast.mapping import Rule, Slice

_ISSUER = "IssuerOfAccessionNumberSequence"
_ACCESSION = (
    "AccessionNumber",
    f"{_ISSUER} > LocalNamespaceEntityID",
    f"{_ISSUER} > UniversalEntityID",
    f"{_ISSUER} > UniversalEntityIDType",
)
_KEYS = ("system", "value")

_UID_SLICE = Slice("identifier", where={"system": "urn:dicom:uid"}, keys=_KEYS)
_ACCESSION_SLICE = Slice(
    "identifier", where={"type.coding.code": "ACSN"}, by="system", default="accession_system", keys=_KEYS
)

STUDY = (
    Rule(
        "study.uid",
        "study",
        _UID_SLICE,
        sources=("StudyInstanceUID",),
        steps=("study_identifier",),
        required=True,
        missing="uid-missing",
    ),
    Rule("study.accession", "study", _ACCESSION_SLICE, sources=(_ACCESSION,), steps=("accession_identifier",)),
    Rule("study.source", "study", "meta", setting="dicom_url", steps=("meta_source",), owner="once"),
    Rule("study.status", "study", "status", constant="available"),
    Rule("study.modality", "study", "modality", derive="study_modalities"),
    Rule("study.subject", "study", "subject", link="subject"),
    Rule(
        "study.started",
        "study",
        "started",
        sources=(("StudyDate", "StudyTime", "TimezoneOffsetFromUTC"),),
        steps=("started",),
        policy="earliest",
    ),
    Rule("study.endpoint", "study", Slice("endpoint", by="reference", keys=("reference",)), link="endpoint"),
    Rule("study.series_count", "study", "numberOfSeries", derive="count_series"),
    Rule("study.instance_count", "study", "numberOfInstances", derive="count_instances"),
    Rule("study.description", "study", "description", sources=("StudyDescription",)),
)

SERIES = (
    Rule("series.uid", "series", "uid", sources=("SeriesInstanceUID",), required=True, missing="uid-missing"),
    Rule("series.number", "series", "number", sources=("SeriesNumber",), steps=("unsigned",)),
    Rule(
        "series.modality",
        "series",
        "modality",
        sources=("Modality",),
        steps=("modality",),
        default="unknown_modality",
        required=True,
        missing="modality-missing",
    ),
    Rule("series.description", "series", "description", sources=("SeriesDescription",)),
    Rule("series.instance_count", "series", "numberOfInstances", derive="count_instances"),
)

INSTANCE = (
    Rule("instance.uid", "instance", "uid", sources=("SOPInstanceUID",), required=True, missing="uid-missing"),
    Rule(
        "instance.sop_class",
        "instance",
        "sopClass",
        sources=("SOPClassUID",),
        steps=("sop_class",),
        required=True,
        missing="sop-class-missing",
    ),
    Rule("instance.number", "instance", "number", sources=("InstanceNumber",), steps=("unsigned",)),
    Rule(
        "instance.title",
        "instance",
        "title",
        sources=("ConceptNameCodeSequence > CodeMeaning", "DocumentTitle", "ContentLabel"),
    ),
)

RULES = (*STUDY, *SERIES, *INSTANCE)
