"""The content tree of structured reports (PS3.3 C.17.3), and steps for what stands in it.

An item has a concept name, a value by its type, and items of its own. They are found by code whatever relationship ties
them: editions of PS3.16 differ in that. Names in SNOMED-RT count as the SNOMED CT concepts that they became.
"""

from collections.abc import Mapping

from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping import concepts, identifiers, tables
from dicomcast.mapping.rules import Context

Elements = Mapping[str, Json]
"""A data set or an item of a sequence."""

CONTENT = "0040A730"
_NAME = "0040A043"
_DOSE_IDENTIFIER = "http://hl7.org/fhir/uv/radiation-dose-summary/CodeSystem/dicom-identifier-type"


def children(elements: Elements, codes: tuple[str, ...], scheme: str = "DCM") -> list[dict[str, Json]]:
    """The items right below whose concept name is one of these codes."""
    return [item for item in values.items(elements.get(CONTENT)) or () if named(item, codes, scheme)]


def within(elements: Elements, codes: tuple[str, ...]) -> list[dict[str, Json]]:
    """Such items at any depth, in the document's order."""
    found, waiting = [], [*reversed(values.items(elements.get(CONTENT)) or [])]
    while waiting:
        item = waiting.pop()
        if named(item, codes):
            found.append(item)
        waiting += reversed(values.items(item.get(CONTENT)) or [])
    return found


def named(elements: Elements, codes: tuple[str, ...], scheme: str = "DCM") -> bool:
    """Whether the concept name is one of these codes."""
    try:
        name = values.item(elements.get(_NAME)) or {}
        code, found = values.text(name.get("00080100")), (values.text(name.get("00080102")) or "").upper()
    except values.Invalid:
        return False
    if scheme == "SCT" and found in concepts.LEGACY and code is not None:
        code, found = tables.snomed(code), scheme
    return found == scheme and code in codes


# Steps ----------------------------------------------------------------------------------------------------------------


def components(read: Json, context: Context, *codes: str) -> Json:
    """Content items, or those right below with such codes (DCM), as Observation.component, one for each.

    Where there are several containers (the planes of a biplane system), and where an item has modifiers (the side of a
    breast), the code's text says which one it is: totals of this kind are not to be added.
    """
    places = read if isinstance(read, list) else [read]
    problems: list[str] = []
    found = []
    for place in places:
        about = _modifiers(place) if codes and len(places) > 1 else []
        for item in children(place, codes) if codes else [place]:
            if (value := concepts.attempt(lambda one: _value(one, context), item, problems)) is not None:
                found.append({"code": _labelled(item, [*about, *_modifiers(item)], context), **value})
    return concepts.settled(found or None, problems)


def summarised(read: tuple[Json, ...], context: Context, *codes: str) -> Json:
    """What components of these codes say, in words: `CT Dose Length Product Total = 203.12 mGy.cm`."""
    said = []
    for places in read:
        for component in components(places, context, *codes) or () if places else ():
            quantity = component.get("valueQuantity") or {"value": component.get("valueInteger")}
            if quantity["value"] is not None:
                code = component["code"]
                name = code.get("text") or code["coding"][0].get("display") or code["coding"][0]["code"]
                said.append(f"{name} = {quantity['value']} {quantity.get('unit', '')}".rstrip())
    return "; ".join(said) or None


def uid_identifier(uid: str, _context: Context, kind: str) -> Json:
    """A UID as Identifier, with its type in the terms of the Radiation Dose Summary guide."""
    coded = {"coding": [{"system": _DOSE_IDENTIFIER, "code": kind}]}
    return {"type": coded, "system": identifiers.DICOM_UID, "value": f"urn:oid:{uid}"}


def uid_reference(uid: str, _context: Context, kind: str) -> Json:
    """A UID as logical Reference to a resource of that type."""
    return {"type": kind, "identifier": {"system": identifiers.DICOM_UID, "value": f"urn:oid:{uid}"}}


def _labelled(item: dict[str, Json], about: list[str], context: Context) -> Json:
    name = concepts.concept(values.items(item.get(_NAME)), context)
    return {**name, "text": f"{name['text']} ({', '.join(about)})"} if about and "text" in name else name


def _modifiers(item: dict[str, Json]) -> list[str]:
    """The meanings of what modifies an item's concept."""
    found = []
    for child in values.items(item.get(CONTENT)) or ():
        if values.text(child.get("0040A010")) == "HAS CONCEPT MOD" and (code := values.item(child.get("0040A168"))):
            found.append(values.text(code.get("00080104")) or values.text(code.get("00080100")))
    return [text for text in found if text]


def _value(item: dict[str, Json], context: Context) -> Json:
    """The value of an item, by its type, as a component's value[x]; None where it is empty."""
    if (measured := values.item(item.get("0040A300"))) is not None:
        return _measured(measured)
    if (coded := values.item(item.get("0040A168"))) is not None:
        concept = concepts.concept([coded], context)
        return concept and {"valueCodeableConcept": concept}
    text = values.text(item.get("0040A160"))
    return text and {"valueString": text}


def _measured(measured: dict[str, Json]) -> Json:
    """A number with its unit; a count is an integer. No unit is converted, and none guessed."""
    number = values.number(measured.get("0040A30A"))
    unit = values.item(measured.get("004008EA")) or {}
    code, scheme = values.text(unit.get("00080100")), values.text(unit.get("00080102"))
    if number is None:
        return None
    if isinstance(number, int) and abs(number) < 2**31 and code is not None and (code == "1" or code.startswith("{")):
        return {"valueInteger": number}
    name = code or values.text(unit.get("00080104"))
    coded = {"system": tables.UCUM, "code": code} if scheme == "UCUM" and code and " " not in code else {}
    return {"valueQuantity": {"value": number} | ({"unit": name} if name else {}) | coded}
