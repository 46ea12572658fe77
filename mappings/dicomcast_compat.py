"""What readers of Microsoft's DicomCast found elsewhere: for sites that move over, after the other modules.

StudyDescription stands in `note` too, SOP classes are bare UIDs of no system, and the Endpoint has DicomCast's name.
Its modality system `DCM` is not offered, since FHIR wants a URI there.
"""

from dicomcast.mapping import Context, Json, Rule, Slice


def bare(uid: str, _context: Context) -> Json:
    """A UID as a code of no system."""
    return {"code": uid}


def endpoint_name(url: str, _context: Context) -> Json:
    """The name that DicomCast searched its Endpoint by."""
    return f"DICOM WADO-RS endpoint {url}"


RULES = (
    Rule(
        "study.note",
        "study",
        Slice("note", where={"authorString": "StudyDescription"}, at="text"),
        sources=("StudyDescription",),
    ),
    Rule(
        "instance.sop_class",
        "instance",
        "sopClass",
        sources=("SOPClassUID",),
        steps=(bare,),
        required=True,
        missing="sop-class-missing",
    ),
    Rule("endpoint.name", "endpoint", "name", setting="dicom_url", steps=(endpoint_name,)),
)
