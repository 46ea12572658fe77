"""The named steps of rules: plain values in, FHIR R4 values out.

A step takes a value, the context, and the texts in its parentheses, and gives a value, None to say "nothing", or raises
`values.Invalid`. A source that reads several attributes together hands its first step a tuple of them, with None for
those that have no value, and nothing at all if none has.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from dicomcast.decimals import Decimal, exact
from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping import concepts, content, identifiers, notation, requests, tables, times
from dicomcast.mapping.identifiers import URI
from dicomcast.mapping.rules import Context, Rule, Slice, Step

REPRESENTATION = "http://hl7.org/fhir/StructureDefinition/iso21090-EN-representation"
GENDERS = {"M": "male", "F": "female", "O": "other"}

_CODE = re.compile(r"[A-Za-z0-9_]+( [A-Za-z0-9_]+)*")


def human_names(name: values.PersonName, _context: Context) -> Json:
    """One HumanName per representation that has content: alphabetic, ideographic, phonetic."""
    found, problem = [], None
    for code, group in zip(("ABC", "IDE", "SYL"), name, strict=True):
        if group is None:
            continue
        try:
            parts = values.components(group)
        except values.Invalid as error:
            parts, problem = error.kept, error
        found.append(_human_name(parts, code))
    if problem is not None:
        raise values.Invalid(problem.reason, kept=found)
    return found


def _human_name(parts: tuple[str, str, str, str, str], representation: str) -> Json:
    family, given, middle, prefix, suffix = parts
    name: dict[str, Json] = {"use": "usual"}
    if representation != "ABC":
        name["extension"] = [{"url": REPRESENTATION, "valueCode": representation}]
    lists = {"given": _words(given) + _words(middle), "prefix": _words(prefix), "suffix": _words(suffix)}
    return name | ({"family": family} if family else {}) | {key: words for key, words in lists.items() if words}


def _words(component: str) -> list[str]:
    """The names in one component: between commas if it has one, else between blanks (PS3.5 6.2.1.1)."""
    words = component.split(",") if "," in component else component.split()
    return [word.strip() for word in words if word.strip()]


def gender(sex: str, _context: Context) -> Json:
    """PatientSex as administrative gender."""
    if sex not in GENDERS:
        raise values.Invalid("none of M, F, O")
    return GENDERS[sex]


def modality(code: str, _context: Context) -> Json:
    """A Modality as Coding, with the meaning that CID 33 gives it."""
    if len(code) > 16 or not _CODE.fullmatch(code):
        raise values.Invalid("not a code")
    known = tables.modalities().get(code)
    return {"system": tables.DCM, "code": code} | ({"display": known.display} if known else {})


def unknown_modality(_none: None, context: Context) -> Json:
    """What stands for a Modality that is not there: R4 requires one. Nothing, where the site wants a failure."""
    return modality(context.missing_modality, context) if context.missing_modality != "fail" else None


@functools.lru_cache(maxsize=1024)
def _sop_class(uid: str) -> Json:
    return {"system": URI, "code": f"urn:oid:{uid}"}


def sop_class(uid: str, _context: Context) -> Json:
    """A SOP class as Coding: one object for all instances of a class, so that many instances take little memory."""
    return _sop_class(uid)


def unsigned(number: int, _context: Context) -> Json:
    """FHIR's unsignedInt."""
    if not 0 <= number <= 2**31 - 1:
        raise values.Invalid("outside 0 to 2147483647")
    return number


def meta_source(url: str, _context: Context) -> Json:
    """Where a resource comes from."""
    return {"source": url}


def study_modalities(study: Json, context: Context) -> Json:
    """The acquisition modalities (CID 29) among the series, sorted; the series' own where there are none of those."""
    codes = {series["modality"]["code"] for series in study.get("series", ()) if "modality" in series}
    acquired = {code for code in codes if (known := tables.modalities().get(code)) and known.acquisition}
    return [modality(code, context) for code in sorted(acquired or codes)] or None


def count_series(study: Json, _context: Context) -> Json:
    """How many series a study has."""
    return len(study.get("series", ()))


def count_instances(part: Json, _context: Context) -> Json:
    """How many instances a study or a series has."""
    return len(part.get("instance", ())) + sum(len(series.get("instance", ())) for series in part.get("series", ()))


# What overlays need ---------------------------------------------------------------------------------------------------


def trim(value: Json, _context: Context) -> Json:
    """Text without the blanks around it; a number as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise values.Invalid("not text")
    return str(value).strip() or None


def same(found: list[Json], _context: Context) -> Json:
    """What several values say, if they all say it; empty ones say nothing."""
    said = [one for one in found if one is not None]
    if any(one != said[0] for one in said):
        raise values.Invalid("its values disagree")
    return said[0]


def coded(value: dict[str, Json], _context: Context) -> Json:
    """A Coding if it has a code."""
    return value if "code" in value else None


def yes_no(value: str, _context: Context) -> Json:
    """YES or Y, NO or N (any case) as boolean."""
    if value.upper() not in ("YES", "Y", "NO", "N"):
        raise values.Invalid("neither YES nor NO")
    return value.upper().startswith("Y")


def lookup(value: str, _context: Context, *pairs: str) -> Json:
    """The text that stands for this one in `lookup("A", "for A", "B", "for B")`."""
    table = dict(zip(pairs[::2], pairs[1::2], strict=False))
    if value not in table:
        raise values.Invalid("not in the rule's table")
    return table[value]


def uid_uri(uid: str, _context: Context) -> Json:
    """A UID as `urn:oid:`."""
    return f"urn:oid:{uid}"


def identifier(value: str, _context: Context, system: str) -> Json:
    """A text as Identifier of that system."""
    return {"system": system, "value": value}


def coding(code: str, _context: Context, system: str) -> Json:
    """A text as the code of a Coding of that system."""
    return {"system": system, "code": code}


def quantity(value: int | Decimal, _context: Context, unit: str) -> Json:
    """A number as Quantity with that UCUM unit."""
    return {"value": value, "unit": unit, "system": tables.UCUM, "code": unit}


def text_concept(text: str, _context: Context) -> Json:
    """A text as CodeableConcept without a code."""
    return {"text": text}


def display(text: str, _context: Context) -> Json:
    """A text as Reference that says no more."""
    return {"display": text}


def annotation(text: str, _context: Context) -> Json:
    """A text as Annotation."""
    return {"text": text}


# The registry ---------------------------------------------------------------------------------------------------------


class Registered(NamedTuple):
    """A step by name: what it takes (readers of `values` by name, or `several` read together) and the FHIR type that it
    gives; a `*` is a list of such, `any` anything."""

    function: Callable[..., Json]
    takes: str
    gives: str

    def arguments(self) -> tuple[int, float]:
        """How many texts it takes in parentheses, at least and at most."""
        parameters = list(inspect.signature(self.function).parameters.values())[2:]
        many = any(one.kind is one.VAR_POSITIONAL for one in parameters)
        return len(parameters) - many, float("inf") if many else len(parameters)


_TABLE: dict[Callable[..., Json], str] = {
    identifiers.study_identifier: "uid Identifier",
    identifiers.patient_identifier: "several Identifier",
    identifiers.accession_identifier: "several Identifier",
    identifiers.endpoint_identifier: "text Identifier",
    human_names: "person_name HumanName*",
    gender: "text Code",
    modality: "text Coding",
    unknown_modality: "any Coding",
    sop_class: "uid Coding",
    unsigned: "integer UnsignedInt",
    times.started: "several DateTime",
    times.started_at: "several DateTime",
    times.earliest_at: "several DateTime",
    meta_source: "text Meta",
    study_modalities: "any Coding*",
    count_series: "any UnsignedInt",
    count_instances: "any UnsignedInt",
    concepts.code: "items|several Coding",
    concepts.codes: "items|several Coding*",
    concepts.concept: "items|several CodeableConcept",
    concepts.concepts: "items|several CodeableConcept*",
    concepts.body_part: "text Coding",
    concepts.laterality: "text Coding",
    concepts.laterality_r4: "text Coding",
    requests.practitioner: "person_name|several Reference",
    requests.practitioners: "person_name*|several Reference*",
    requests.performers: "person_name*|several ImagingStudySeriesPerformer*",
    requests.based_on: "several Reference*",
    requests.procedures: "several CodeableConcept*",
    requests.reasons: "several CodeableConcept*",
    requests.specimens: "items Reference*",
    content.components: "item|item* ObservationComponent*",
    content.summarised: "several String",
    content.uid_identifier: "uid Identifier",
    content.uid_reference: "uid Reference",
    trim: "any String",
    same: "any any",
    coded: "Coding Coding",
    yes_no: "text Boolean",
    lookup: "text String",
    uid_uri: "uid Uri",
    identifier: "text Identifier",
    coding: "text Coding",
    quantity: "number|integer Quantity",
    text_concept: "text CodeableConcept",
    display: "text Reference",
    annotation: "text Annotation",
}
STEPS = {function.__name__: Registered(function, *kinds.split()) for function, kinds in _TABLE.items()}


def resolve(step: str | notation.Call | Step) -> Step:
    """The function of a step: registered under that name, with its arguments, or given as it is."""
    if callable(step):
        own = step
        return lambda value, context: exact(own(value, context))
    call = notation.call(step) if isinstance(step, str) else step
    function = STEPS[call.name].function
    return (lambda value, context: function(value, context, *call.arguments)) if call.arguments else function


def fixed(table: Iterable[Rule], context: Context) -> dict[str, Json]:
    """The values of those rules that say the same for every instance (constants and settings), by rule id."""
    given = {}
    for rule in table:
        value = exact(rule.constant) if rule.setting is None else getattr(context, rule.setting)
        for step in () if value is None or rule.setting is None else rule.steps:
            value = resolve(step)(value, context)
        if value is not None:
            given[rule.id] = rule.target.items(value) if isinstance(rule.target, Slice) else value
    return given
