"""Steps for identifiers, and the systems that issuers of them stand for."""

import uuid

from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping.rules import Context

URI = "urn:ietf:rfc:3986"
DICOM_UID = "urn:dicom:uid"
IDENTIFIER_TYPE = "http://terminology.hl7.org/CodeSystem/v2-0203"


def endpoint_identifier(url: str, _context: Context) -> Json:
    """The identifier that an Endpoint is searched by: the service that it belongs to."""
    return {"system": URI, "value": url}


def study_identifier(uid: str, _context: Context) -> Json:
    """The identifier that a study is searched by (FHIR R4 ImagingStudy notes)."""
    return {"use": "official", "system": DICOM_UID, "value": f"urn:oid:{uid}"}


def patient_identifier(read: tuple[str | None, ...], context: Context) -> Json:
    """PatientID, IssuerOfPatientID, its qualifiers' UniversalEntityID and type: an identifier of type MR."""
    value, issuer, universal, kind = read
    system = system_of(universal, kind, issuer, context) or context.patient_system
    return value and typed("MR", system, value)


def accession_identifier(read: tuple[str | None, ...], context: Context) -> Json:
    """AccessionNumber, its issuer's LocalNamespaceEntityID, UniversalEntityID and type: an identifier of type ACSN."""
    value, local, universal, kind = read
    system = system_of(universal, kind, local, context) or context.accession_system
    return value and typed("ACSN", system, value)


def typed(kind: str, system: str | None, value: str) -> Json:
    """An Identifier with a code of HL7 v2 table 0203."""
    named = {"system": system} if system else {}
    return {"type": {"coding": [{"system": IDENTIFIER_TYPE, "code": kind}]}, **named, "value": value}


def system_of(universal: str | None, kind: str | None, local: str | None, context: Context) -> str | None:
    """The URI of an issuer (PS3.3 10.14): what it says of itself, or the site's table for either of its names."""
    if universal is not None:
        system = context.issuers.get(universal) or _universal_uri(universal, kind)
        if system:
            return system
    return context.issuers.get(local) if local is not None else None


def _universal_uri(universal: str, kind: str | None) -> str | None:
    if kind == "ISO" and values.is_uid(universal):
        return f"urn:oid:{universal}"
    if kind == "UUID":
        try:
            return f"urn:uuid:{uuid.UUID(universal)}"
        except ValueError:
            return None
    return universal if kind == "URI" and values.is_uri(universal) else None
