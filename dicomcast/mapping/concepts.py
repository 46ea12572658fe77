"""Steps for coded items (PS3.3 section 8) and the body parts that DICOM codes by a term.

The system comes from the coding scheme designator: the site's table, ours, then what the data set says of the scheme
(PS3.3 C.12.1.1). Where none of them knows it there is no system, and no code: `text` or `display` say what was said.
SNOMED-RT codes (SRT, SNM3, 99SDM) become SNOMED CT. A bad item or attribute costs what it says, not the rest.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import orjson

from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping import tables
from dicomcast.mapping.identifiers import URI
from dicomcast.mapping.rules import Context

LEGACY = ("SRT", "SNM3", "99SDM")

_TAGS = ("00080100", "00080119", "00080120", "00080102", "00080103", "00080104")
_CODE = re.compile(r"\S+( \S+)*")  # FHIR R4 code, without its control characters
_LATERALITY = {  # PS3.16 CID 244
    "R": ("24028007", "Right"),
    "L": ("7771000", "Left"),
    "B": ("51440002", "Bilateral"),
    "U": ("66459002", "Unilateral"),
}
_LATERALITY_R4 = {
    "R": ("419465000", "Unilateral right"),
    "L": ("419161000", "Unilateral left"),
    "B": ("51440002", "Bilateral"),
    "U": None,
}


class Code(NamedTuple):
    """One item of a code sequence (PS3.3 section 8): value, coding scheme designator and version, meaning."""

    value: str | None
    scheme: str | None
    version: str | None
    meaning: str | None


_Make: TypeAlias = Callable[[str | None, Code], Json]


def code(read: Json, context: Context) -> Json:
    """The first item of a code sequence that says anything as Coding; without a known scheme it has a display only.

    Here and below: such items, or a pair of them and those of CodingSchemeIdentificationSequence (0008,0110).
    """
    problems: list[str] = []
    return settled(next(_made(_coding, read, context, problems), None), problems)


def codes(read: Json, context: Context) -> Json:
    """Every item as Coding."""
    problems: list[str] = []
    return settled(distinct(_made(_coding, read, context, problems)), problems)


def concept(read: Json, context: Context) -> Json:
    """The first item of a code sequence that says anything as CodeableConcept: its meaning is the text."""
    problems: list[str] = []
    return settled(next(_made(_concept, read, context, problems), None), problems)


def concepts(read: Json, context: Context) -> Json:
    """Every item as CodeableConcept."""
    problems: list[str] = []
    return settled(distinct(_made(_concept, read, context, problems)), problems)


def body_part(term: str, context: Context) -> Json:
    """BodyPartExamined (0018,0015) as Coding of PS3.16 Annex L, or of what the site says it means; in any case."""
    problems: list[str] = []
    said = attempt(values.text, {"Value": [term]}, problems)
    if said is None:
        return settled(None, problems)
    meant = _named(context.body_parts, said) or ""
    if meant.isascii() and meant.isdigit():
        part = tables.regions().get(meant)
        return {"system": tables.SCT, "code": meant, "display": part.display if part else said}
    part = tables.body_parts().get((meant or said).upper())
    return {"system": tables.SCT, "code": part.code, "display": part.display} if part else {"display": said}


def laterality(side: str, _context: Context) -> Json:
    """R, L, B, U as Coding of PS3.16 CID 244."""
    return _side(_LATERALITY, side)


def laterality_r4(side: str, _context: Context) -> Json:
    """R, L, B as Coding of the example set that FHIR R4 binds laterality to; it has nothing for U."""
    return _side(_LATERALITY_R4, side)


def _side(table: Mapping[str, tuple[str, str] | None], side: str) -> Json:
    if not isinstance(side, str) or side not in table:
        raise values.Invalid("none of R, L, B, U")
    found = table[side]
    return found and {"system": tables.SCT, "code": found[0], "display": found[1]}


# What was read, made and left out -------------------------------------------------------------------------------------


def together(read: Json, count: int) -> tuple[Json, ...]:
    """So many members of what was read together; one attribute alone is the first of them."""
    members = read if type(read) is tuple else (read,)
    return (*members, *(None,) * count)[:count]


def listed(read: Json, problems: list[str]) -> list[dict[str, Json]]:
    """The items of a sequence that are some."""
    found = [] if read is None else read
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        problems.append("sequence item is not an object")
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def attempt(reader: values.Reader, element: Json, problems: list[str]) -> Json:
    """What a reader gives, or keeps of what breaks its rules; why goes to `problems`."""
    try:
        return reader(element)
    except values.Invalid as error:
        problems.append(error.reason)
        return error.kept


def settled(value: Json, problems: list[str]) -> Json:
    """The value, or `Invalid` that keeps it where something was left out."""
    if problems:
        raise values.Invalid(problems[0], kept=value)
    return value


def distinct(made: Iterable[Json]) -> list[Json] | None:
    """Without repeats, in the order of their canonical JSON: that of items in these sequences means nothing."""
    found = {orjson.dumps(one, option=orjson.OPT_SORT_KEYS): one for one in made}
    return [found[text] for text in sorted(found)] or None


def every(items: Json, schemes: Json, context: Context, problems: list[str]) -> list[Json]:
    """CodeableConcepts of the items of a sequence, in their order."""
    return list(_made(_concept, (items, schemes), context, problems))


# One item -------------------------------------------------------------------------------------------------------------


def _made(make: _Make, read: Json, context: Context, problems: list[str]) -> Iterator[Json]:
    items, schemes = together(read, 2)
    for item in listed(items, problems):
        one = make(*resolved(item, schemes, context, problems))
        if one is not None:
            yield one


def resolved(item: dict[str, Json], schemes: Json, context: Context, problems: list[str]) -> tuple[str | None, Code]:
    """System, or None, and content of an item; code and version are those of the system, where there is one."""
    value, long, urn, scheme, version, meaning = (attempt(values.text, item.get(tag), problems) for tag in _TAGS)
    code, system = value or long, None
    if code and scheme:
        system, code = _current(_system(scheme, schemes, context, problems), scheme, code)
    elif urn and not code:
        code, system, version = urn, URI if values.is_uri(urn) else None, None
    if system == tables.SCT and version and not values.is_uri(version):
        version = None  # FHIR wants the URI of an edition; a date alone does not say whose
    if system and not _CODE.fullmatch(code):
        problems.append("not a code")
        system = None
    return system, Code(code, scheme, version, meaning)


def _current(system: str | None, scheme: str, code: str) -> tuple[str | None, str]:
    """SNOMED-RT as SNOMED CT, also where the designator says that it is that already; else as it is."""
    legacy = code[0].isalpha() if system == tables.SCT else system is None and scheme.upper() in LEGACY
    if not legacy:
        return system, code
    converted = tables.snomed(code)
    return (tables.SCT, converted) if converted else (None, code)


def _system(designator: str, schemes: Json, context: Context, problems: list[str]) -> str | None:
    known = _named(context.coding_schemes, designator) or _named(tables.coding_schemes(), designator)
    if known or designator.upper() in LEGACY:
        return known
    for item in listed(schemes, problems):
        if attempt(values.text, item.get("00080102"), problems) == designator:
            url = attempt(values.text, item.get("0008010E"), problems)
            uid = attempt(values.uid, item.get("0008010C"), problems)
            if url and values.is_uri(url):
                return str(url)
            if uid:
                return f"urn:oid:{uid}"
    return None


def _named(table: Mapping[str, str], name: str) -> str | None:
    """What a table has for a name as it is written, else in any case."""
    if name in table:
        return table[name]
    return next((table[key] for key in sorted(table) if key.casefold() == name.casefold()), None)


def _coding(system: str | None, said: Code) -> Json:
    version = {"version": said.version} if said.version else {}
    coded = {"system": system, **version, "code": said.value} if system else {}
    return coded | ({"display": said.meaning} if said.meaning else {}) or None


def _concept(system: str | None, said: Code) -> Json:
    if system:
        return {"coding": [_coding(system, said)]} | ({"text": said.meaning} if said.meaning else {})
    local = ", ".join(part for part in (said.value, said.scheme) if part) if said.value else None
    text = f"{said.meaning} ({local})" if said.meaning and local else said.meaning or local
    return {"text": text} if text else None
