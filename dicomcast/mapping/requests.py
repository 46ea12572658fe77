"""Steps for who asked for a study, why and what, who made it, and of which specimens.

They give logical references (FHIR R4 2.3.0.2): what DICOM says identifies somebody or something, and no more. Nothing
is identified without a system. Like `concepts`, they keep what is good beside what is not.
"""

from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping import concepts, identifiers
from dicomcast.mapping.concepts import attempt, distinct, listed, settled, together
from dicomcast.mapping.rules import Context

PARTICIPATION = "http://terminology.hl7.org/CodeSystem/v3-ParticipationType"
FUNCTIONS = {
    "CON": "consultant",
    "PRF": "performer",
    "REF": "referrer",
    "SPRF": "secondary performer",
    "VRF": "verifier",
}

# Number and issuer in an item of a request (PS3.3 table 10-9, C.4.11), the best first.
_NUMBERS = (("ACSN", "00080050", "00080051"), ("PLAC", "00402016", "00400026"), ("FILL", "00402017", "00400027"))


def practitioner(read: Json, context: Context) -> Json:
    """A PN, or a PN and the items of its identification sequence (PS3.3 table 10-1), as Reference.

    Here and below: a third member are the items of CodingSchemeIdentificationSequence.
    """
    problems: list[str] = []
    found = _people(read, context, problems)
    return settled(found[0] if found else None, problems)


def practitioners(read: Json, context: Context) -> Json:
    """All values of a PN and the items of its identification sequence as References.

    A name and an item are one person where there are as many of both; else each stands for itself.
    """
    problems: list[str] = []
    return settled(distinct(_people(read, context, problems)), problems)


def performers(read: Json, context: Context, function: str) -> Json:
    """The same as ImagingStudy.series.performer with that v3 participation type."""
    problems: list[str] = []
    display = {"display": FUNCTIONS[function]} if function in FUNCTIONS else {}
    role = {"coding": [{"system": PARTICIPATION, "code": function, **display}]}
    actors = _people(read, context, problems)
    return settled(distinct({"function": role, "actor": actor} for actor in actors), problems)


def based_on(read: Json, context: Context) -> Json:
    """RequestAttributesSequence, ReferencedRequestSequence, AccessionNumber, the items of its issuer: References.

    One for each request by its accession number, else by the placer's or the filler's, whichever has a system; where
    none has, one by the study's accession number. Where a request says that number again without an issuer, it has the
    study's.
    """
    problems: list[str] = []
    requested, referenced, accession, issuer = together(read, 4)
    study = {"00080050": {"Value": [accession]}, "00080051": {"Value": issuer}}
    items = [*listed(requested, problems), *listed(referenced, problems)]
    found = distinct(order for item in items if (order := _order(item, study, context, problems)))
    if found is None and (order := _order(study, study, context, problems)):
        found = [order]
    return settled(found, problems)


def procedures(read: Json, context: Context) -> Json:
    """ProcedureCodeSequence, else RequestedProcedureCodeSequence, else RequestedProcedureDescription: CodeableConcepts.

    Read together with these: CodingSchemeIdentificationSequence.
    """
    problems: list[str] = []
    performed, requested, description, schemes = together(read, 4)
    for items in (performed, requested):
        if found := concepts.every(items, schemes, context, problems):
            return settled(distinct(found), problems)
    text = attempt(values.text, {"Value": [description]}, problems)
    return settled([{"text": text}] if text else None, problems)


def reasons(read: Json, context: Context) -> Json:
    """RequestAttributesSequence, ReasonForPerformedProcedureCodeSequence, CodingSchemeIdentificationSequence.

    CodeableConcepts for the coded reasons; what a request says in words is one more, unless a code means the same.
    """
    problems: list[str] = []
    requested, performed, schemes = together(read, 3)
    found, words = concepts.every(performed, schemes, context, problems), []
    for item in listed(requested, problems):
        found += concepts.every(attempt(values.items, item.get("0040100A"), problems), schemes, context, problems)
        words.append(attempt(values.text, item.get("00401002"), problems))
    meanings = {one.get("text") for one in found}
    return settled(distinct([*found, *({"text": text} for text in words if text and text not in meanings)]), problems)


def specimens(read: Json, context: Context) -> Json:
    """The items of SpecimenDescriptionSequence (PS3.3 C.7.6.22) as References.

    By identifier where its issuer has a system, else by UID; the identifier is the display.
    """
    problems: list[str] = []
    found = []
    for item in listed(read, problems):
        value = attempt(values.text, item.get("00400551"), problems)
        system = _issuer(item.get("00400562"), context, problems)
        uid = attempt(values.uid, item.get("00400554"), problems)
        identifier = None
        if value and system:
            identifier = {"system": system, "value": value}
        elif uid:
            identifier = {"system": identifiers.URI, "value": f"urn:oid:{uid}"}
        found.append(_reference("Specimen", identifier, value))
    return settled(distinct(one for one in found if one), problems)


def _reference(kind: str, identifier: Json, display: str | None) -> Json:
    said = ({"identifier": identifier} if identifier else {}) | ({"display": display} if display else {})
    return {"type": kind, **said} if said else None


def _issuer(element: Json, context: Context, problems: list[str]) -> str | None:
    """The system of an issuer's first item (PS3.3 10.14)."""
    for item in (attempt(values.items, element, problems) or [])[:1]:
        local, universal, kind = (
            attempt(values.text, item.get(tag), problems) for tag in ("00400031", "00400032", "00400033")
        )
        return identifiers.system_of(universal, kind, local, context)
    return None


def _order(item: dict[str, Json], study: dict[str, Json], context: Context, problems: list[str]) -> Json:
    """A ServiceRequest by the first number that has a system."""
    for kind, number, issuer in _NUMBERS:
        value = attempt(values.text, item.get(number), problems)
        if value is None:
            continue
        system = _issuer(item.get(issuer), context, problems)
        if system is None and kind == "ACSN":
            same = not item.get(issuer) and study[number] == {"Value": [value]}
            system = (_issuer(study[issuer], context, problems) if same else None) or context.accession_system
        if system:
            return _reference("ServiceRequest", identifiers.typed(kind, system, value), None)
    return None


def _people(read: Json, context: Context, problems: list[str]) -> list[Json]:
    """References to practitioners: those with a name first."""
    names, items, schemes = together(read, 3)
    named = [] if names is None else names if type(names) is list else [names]
    known = [] if items is None else items if isinstance(items, list) else [items]
    displays = [_display(name, problems) for name in named]
    persons = [_person(item, schemes, context, problems) for item in known]
    if not named:
        people = persons
    elif len(named) == len(known):
        people = [(identifier, display or own) for display, (identifier, own) in zip(displays, persons, strict=True)]
    else:
        people = [(None, display) for display in displays] + [(identifier, None) for identifier, _ in persons]
    return [one for person in people if (one := _reference("Practitioner", *person))]


def _display(name: Json, problems: list[str]) -> str | None:
    """A PN as people read it: prefix, given, middle, family, suffix; ideographs and syllables keep the family first."""
    if name is None:
        return None
    if not isinstance(name, values.PersonName):
        problems.append("not a person name")
        return None
    group = next((group for group in name if group), "")
    family, given, middle, prefix, suffix = attempt(values.components, group, problems)
    parts = (given, middle, family) if name.alphabetic else (family, given, middle)
    return " ".join(part for part in (prefix, *parts, suffix) if part) or None


def _person(item: Json, schemes: Json, context: Context, problems: list[str]) -> tuple[Json, str | None]:
    """Identifier and display from an item's PersonIdentificationCodeSequence: the first code whose scheme is known."""
    shown = None
    entries = [attempt(values.items, one.get("00401101"), problems) for one in listed([item], problems)]
    for entry in entries[0] or () if entries else ():
        system, said = concepts.resolved(entry, schemes, context, problems)
        if said.meaning and shown is None:  # may be a PN (PS3.3 table 10-1)
            shown = _display(values.PersonName(said.meaning), problems)
        if system:
            return {"system": system, "value": said.value}, shown
    return None, shown
