"""Patient: who the study is of, as far as DICOM says. The hospital's own records know more and are left alone."""

from dicomcast.mapping import Rule, Slice

_QUALIFIERS = "IssuerOfPatientIDQualifiersSequence"

_ID = (
    f"PatientID, IssuerOfPatientID, {_QUALIFIERS} > UniversalEntityID,"
    f" {_QUALIFIERS} > UniversalEntityIDType | patient_identifier"
)
_ID_SLICE = Slice(
    "identifier", where={"type.coding.code": "MR"}, by="system", default="patient_system", keys=("system", "value")
)
_NAME_SLICE = Slice("name", where={"use": "usual"}, most=3)

RULES = (
    Rule(
        "patient.identifier",
        "patient",
        _ID_SLICE,
        sources=(_ID,),
        required=True,
        missing="patient-id-missing",
    ),
    Rule("patient.name", "patient", _NAME_SLICE, sources=("PatientName | human_names",)),
    Rule("patient.gender", "patient", "gender", sources=("PatientSex | gender",)),
    Rule("patient.birth_date", "patient", "birthDate", sources=("PatientBirthDate",)),
)
