"""ImagingStudy with its series and instances (FHIR R4 ImagingStudy, its DICOM mapping)."""

from dicomcast.mapping import Rule, Slice

_ISSUER = "IssuerOfAccessionNumberSequence"
_ACCESSION = (
    f"AccessionNumber, {_ISSUER} > LocalNamespaceEntityID, {_ISSUER} > UniversalEntityID,"
    f" {_ISSUER} > UniversalEntityIDType | accession_identifier"
)
_SCHEMES = "CodingSchemeIdentificationSequence"
_KEYS = ("system", "value")

_UID_SLICE = Slice("identifier", where={"system": "urn:dicom:uid"}, keys=_KEYS)
_ACCESSION_SLICE = Slice(
    "identifier", where={"type.coding.code": "ACSN"}, by="system", default="accession_system", keys=_KEYS
)
_FRAMES = (  # of enhanced multi-frame objects
    "SharedFunctionalGroupsSequence > FrameAnatomySequence",
    "PerFrameFunctionalGroupsSequence[] > FrameAnatomySequence",
)

STUDY = (
    Rule(
        "study.uid",
        "study",
        _UID_SLICE,
        sources=("StudyInstanceUID | study_identifier",),
        required=True,
        missing="uid-missing",
    ),
    Rule("study.accession", "study", _ACCESSION_SLICE, sources=(_ACCESSION,)),
    Rule("study.source", "study", "meta", setting="dicom_url", steps=("meta_source",), owner="once"),
    Rule("study.status", "study", "status", constant="available"),
    Rule("study.modality", "study", "modality", derive="study_modalities"),
    Rule("study.subject", "study", "subject", link="subject"),
    Rule(
        "study.started",
        "study",
        "started",
        sources=("StudyDate, StudyTime, TimezoneOffsetFromUTC | started",),
        policy="earliest",
    ),
    Rule(
        "study.based_on",
        "study",
        "basedOn",
        sources=(f"RequestAttributesSequence, ReferencedRequestSequence, AccessionNumber, {_ISSUER} | based_on",),
        policy="union",
        owner="fill",
    ),
    Rule(
        "study.referrer",
        "study",
        "referrer",
        sources=(f"ReferringPhysicianName, ReferringPhysicianIdentificationSequence, {_SCHEMES} | practitioner",),
        owner="fill",
    ),
    Rule(
        "study.interpreter",
        "study",
        "interpreter",
        sources=(
            "NameOfPhysiciansReadingStudy[], PhysiciansReadingStudyIdentificationSequence[],"
            f" {_SCHEMES} | practitioners",
        ),
        policy="union",
        owner="fill",
    ),
    Rule("study.endpoint", "study", Slice("endpoint", by="reference", keys=("reference",)), link="endpoint"),
    Rule("study.series_count", "study", "numberOfSeries", derive="count_series"),
    Rule("study.instance_count", "study", "numberOfInstances", derive="count_instances"),
    Rule(
        "study.procedure",
        "study",
        "procedureCode",
        sources=(
            "ProcedureCodeSequence, RequestedProcedureCodeSequence, RequestedProcedureDescription,"
            f" {_SCHEMES} | procedures",
        ),
        policy="union",
        owner="fill",
    ),
    Rule(
        "study.reason",
        "study",
        "reasonCode",
        sources=(f"RequestAttributesSequence, ReasonForPerformedProcedureCodeSequence, {_SCHEMES} | reasons",),
        policy="union",
        owner="fill",
    ),
    Rule("study.description", "study", "description", sources=("StudyDescription",)),
)

SERIES = (
    Rule("series.uid", "series", "uid", sources=("SeriesInstanceUID",), required=True, missing="uid-missing"),
    Rule("series.number", "series", "number", sources=("SeriesNumber | unsigned",)),
    Rule(
        "series.modality",
        "series",
        "modality",
        sources=("Modality | modality",),
        default="unknown_modality",
        required=True,
        missing="modality-missing",
    ),
    Rule("series.description", "series", "description", sources=("SeriesDescription",)),
    Rule("series.instance_count", "series", "numberOfInstances", derive="count_instances"),
    Rule(
        "series.body_site",
        "series",
        "bodySite",
        sources=(
            f"AnatomicRegionSequence, {_SCHEMES} | code | coded",
            *(f"{frames} > AnatomicRegionSequence[] | codes | same | coded" for frames in _FRAMES),
            "BodyPartExamined | body_part | coded",
            f"AnatomicRegionSequence, {_SCHEMES} | code",
            "BodyPartExamined | body_part",
        ),
        policy="unanimous",
        owner="fill",
    ),
    Rule(
        "series.laterality",
        "series",
        "laterality",
        sources=(
            "Laterality | laterality",
            "ImageLaterality | laterality",
            *(f"{frames} > FrameLaterality[] | same | laterality" for frames in _FRAMES),
        ),
        policy="unanimous",
    ),
    Rule(
        "series.specimen",
        "series",
        "specimen",
        sources=("SpecimenDescriptionSequence | specimens",),
        policy="union",
        owner="fill",
    ),
    Rule(
        "series.started",
        "series",
        "started",
        sources=(
            "SeriesDate, SeriesTime, TimezoneOffsetFromUTC | started",
            "AcquisitionDateTime, TimezoneOffsetFromUTC | started_at",
            "AcquisitionDate, AcquisitionTime, TimezoneOffsetFromUTC | started",
            "PerformedProcedureStepStartDate, PerformedProcedureStepStartTime, TimezoneOffsetFromUTC | started",
        ),
        policy="earliest",
    ),
    Rule(
        "series.performing_physician",
        "series",
        Slice("performer", where={"function.coding.code": "PRF"}, most=100),
        sources=(
            f'PerformingPhysicianName[], PerformingPhysicianIdentificationSequence[], {_SCHEMES} | performers("PRF")',
        ),
        policy="union",
        owner="fill",
    ),
    Rule(
        "series.operator",
        "series",
        Slice("performer", where={"function.coding.code": "SPRF"}, most=100),
        sources=(f'OperatorsName[], OperatorIdentificationSequence[], {_SCHEMES} | performers("SPRF")',),
        policy="union",
        owner="fill",
    ),
)

INSTANCE = (
    Rule("instance.uid", "instance", "uid", sources=("SOPInstanceUID",), required=True, missing="uid-missing"),
    Rule(
        "instance.sop_class",
        "instance",
        "sopClass",
        sources=("SOPClassUID | sop_class",),
        required=True,
        missing="sop-class-missing",
    ),
    Rule("instance.number", "instance", "number", sources=("InstanceNumber | unsigned",)),
    Rule(
        "instance.title",
        "instance",
        "title",
        sources=("ConceptNameCodeSequence > CodeMeaning", "DocumentTitle", "ContentLabel"),
    ),
)

RULES = (*STUDY, *SERIES, *INSTANCE)
