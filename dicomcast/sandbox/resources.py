"""FHIR R4 resources of the sandbox as JSON: reading, validation, search index and search conditions, references."""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import orjson

Json = Any  # a JSON value
Token = tuple[str, str, str]  # parameter, system, value

_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}", re.ASCII)
_RELATIVE = re.compile(r"([A-Z][A-Za-z]+/[A-Za-z0-9\-.]{1,64})(/_history/.+)?", re.ASCII)
_NAME_USES = {"usual", "official", "temp", "nickname", "anonymous", "old", "maiden"}
_IDENTIFIER_USES = {"usual", "official", "temp", "secondary", "old"}
# Required bindings of R4, which fhir.resources does not check: element by parent (a type, or the key above).
_CODES = {
    ("ImagingStudy", "status"): {"registered", "available", "cancelled", "entered-in-error", "unknown"},
    ("Patient", "gender"): {"male", "female", "other", "unknown"},
    ("Endpoint", "status"): {"active", "suspended", "error", "off", "entered-in-error", "test"},
    ("Observation", "status"): {
        *("registered", "preliminary", "final", "amended"),
        *("corrected", "cancelled", "entered-in-error", "unknown"),
    },
    ("identifier", "use"): _IDENTIFIER_USES,
    ("name", "use"): _NAME_USES,
    ("address", "use"): {"home", "work", "temp", "old", "billing"},
    ("telecom", "use"): {"home", "work", "temp", "old", "mobile"},
    ("telecom", "system"): {"phone", "fax", "email", "pager", "url", "sms", "other"},
    ("link", "type"): {"replaced-by", "replaces", "refer", "seealso"},
}
_SUBJECTS = {"ImagingStudy": ("Patient", "Device", "Group")}
_COMMON = {"_id": ("token", "id"), "identifier": ("token", "identifier")}
_SUBJECT = {"patient": ("reference", "subject"), "subject": ("reference", "subject")}
# Search parameters by type: form and path.
PARAMETERS: dict[str, dict[str, tuple[str, str]]] = {
    "Patient": {
        **_COMMON,
        "name": ("string", "name"),
        "family": ("string", "name.family"),
        "given": ("string", "name.given"),
        "gender": ("token", "gender"),
        "birthdate": ("token", "birthDate"),
    },
    "ImagingStudy": {
        **_COMMON,
        **_SUBJECT,
        "status": ("token", "status"),
        "modality": ("token", "series.modality"),
        "series": ("token", "series.uid"),
        "endpoint": ("reference", "endpoint"),
    },
    "Endpoint": {
        **_COMMON,
        "name": ("string", "name"),
        "status": ("token", "status"),
        "connection-type": ("token", "connectionType"),
    },
    "Observation": {
        **_COMMON,
        **_SUBJECT,
        "status": ("token", "status"),
        "code": ("token", "code"),
        "part-of": ("reference", "partOf"),
    },
}


class Invalid(Exception):
    """A refusal as an OperationOutcome; without a status of its own it is invalid content."""

    def __init__(self, code: str, text: str, *, status: int | None = None):
        super().__init__(text)
        self.code = code
        self.status = status

    def body(self) -> bytes:
        """The OperationOutcome."""
        issue = {"severity": "error", "code": self.code, "diagnostics": str(self)}
        return orjson.dumps({"resourceType": "OperationOutcome", "issue": [issue]})


def parse(body: bytes) -> Json:
    """A JSON body whose decimals keep their digits (FHIR R4 datatypes: decimal precision is significant)."""
    try:
        return json.loads(body, parse_float=orjson.Fragment, parse_int=_integer, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise Invalid("structure", "the body is not JSON", status=400) from error


def _integer(text: str) -> int | orjson.Fragment:
    return int(text) if len(text) < 19 else orjson.Fragment(text)  # orjson writes no more than 64 bits


def _constant(text: str) -> None:
    raise ValueError(text)


@functools.cache
def _model(kind: str) -> Any:
    from fhir.resources.R4B import get_fhir_model_class

    try:
        return get_fhir_model_class(kind)
    except ValueError:
        return None


def known(kind: str) -> bool:
    """Whether R4 has such a resource type, as far as the models go."""
    return kind in PARAMETERS or (kind not in {"Resource", "DomainResource"} and _model(kind) is not None)


def digest(resource: Mapping[str, Json]) -> str:
    """A hash of the content without what the service itself puts into it."""
    meta = {name: value for name, value in (resource.get("meta") or {}).items() if name not in _OURS}
    kept = {name: value for name, value in resource.items() if name not in ("id", "meta")}
    data = orjson.dumps({**kept, **({"meta": meta} if meta else {})}, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(data).hexdigest()


_OURS = ("versionId", "lastUpdated")


def with_tags_of(resource: Mapping[str, Json], before: Mapping[str, Json]) -> dict[str, Json]:
    """The resource with the tags of the version that it replaces, and its own."""
    meta = resource.get("meta") or {}
    old, new = ((one.get("meta") or {}).get("tag") or [] for one in (before, resource))
    known = {(tag.get("system"), tag.get("code")) for tag in old}
    tags = [*old, *(tag for tag in new if (tag.get("system"), tag.get("code")) not in known)]
    return {**resource, "meta": {**meta, "tag": tags}} if tags else dict(resource)


def check(kind: str, resource: Json) -> None:
    """Raise Invalid for what R4 does not allow: structure, cardinality, types, ids and required codes."""
    if not isinstance(resource, dict) or resource.get("resourceType") != kind:
        raise Invalid("structure", f"the body is no {kind}", status=400)
    _check_codes(kind, resource, kind)
    import pydantic

    try:
        _model(kind).model_validate(orjson.loads(orjson.dumps(resource)))
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in (kind, *first["loc"]))
        raise Invalid("invalid", f"{place}: {first['msg']}") from error
    for series in resource.get("series") or [] if kind == "ImagingStudy" else []:
        for part in (series, *(series.get("instance") or [])):
            if not _ID.fullmatch(part["uid"]):
                raise Invalid("value", "ImagingStudy: a uid is 1 to 64 of A-Z a-z 0-9 - .")
    subject = (resource.get("subject") or {}).get("reference", "") if kind in _SUBJECTS else ""
    if _RELATIVE.fullmatch(subject) and subject.partition("/")[0] not in _SUBJECTS[kind]:
        raise Invalid("value", f"{kind}.subject must be one of {', '.join(_SUBJECTS[kind])}")


def _check_codes(parent: str, value: Json, place: str) -> None:
    """Required bindings, and no empty value anywhere (R4 JSON: no null, no empty string, array or object)."""
    for name, inner in value.items():
        where = f"{place}.{name}"
        if inner is None or inner in ("", [], {}):
            raise Invalid("structure", f"{where} is empty")
        allowed = _CODES.get((parent, name))
        if allowed and (not isinstance(inner, str) or inner not in allowed):
            raise Invalid("code-invalid", f"{where}: not a code of the required value set")
        for one in inner if isinstance(inner, list) else [inner]:
            if isinstance(one, dict):
                _check_codes(name, one, where)


# The search index


def index(kind: str, resource: Mapping[str, Json], base: str) -> Iterator[Token]:
    """What a resource is found by; ` reference` lists all that it refers to."""
    for name, (form, path) in PARAMETERS.get(kind, _COMMON).items():
        for value in _values(resource, path.split(".")):
            for system, text in _FORMS[form](value, base):
                yield name, system, text
            if form == "reference" and isinstance(value.get("identifier"), dict):
                for system, text in _tokens(value["identifier"], base):
                    yield f"{name}:identifier", system, text
    for target in _references(resource):
        relative = _RELATIVE.fullmatch(target.removeprefix(base + "/"))
        if relative:
            yield " reference", "", relative[1]


def _values(value: Json, path: Sequence[str]) -> Iterator[Json]:
    if isinstance(value, list):
        for one in value:
            yield from _values(one, path)
    elif not path:
        yield value
    elif isinstance(value, dict) and path[0] in value:
        yield from _values(value[path[0]], path[1:])


def _tokens(value: Json, _base: str) -> Iterator[tuple[str, str]]:
    """System and code of a code, Coding, CodeableConcept or Identifier."""
    if isinstance(value, str):
        yield "", value
    elif isinstance(value, dict):
        for coding in value.get("coding", ()):
            yield from _tokens(coding, _base)
        text = value.get("code", value.get("value"))
        if isinstance(text, str):
            yield str(value.get("system", "")), text


def _targets(value: Json, base: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and isinstance(value.get("reference"), str):
        reference = value["reference"].removeprefix(base + "/")
        relative = _RELATIVE.fullmatch(reference)
        yield "", relative[1] if relative else reference


def _strings(value: Json, _base: str) -> Iterator[tuple[str, str]]:
    """The words of a string or a HumanName, without case and accents."""
    if isinstance(value, str):
        yield "", _plain(value)
    elif isinstance(value, dict):
        for name in ("text", "family", "given", "prefix", "suffix"):
            for part in _values(value, [name]):
                yield from _strings(part, _base)


_FORMS: dict[str, Callable[[Json, str], Iterator[tuple[str, str]]]] = {
    "token": _tokens,
    "reference": _targets,
    "string": _strings,
}


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(char for char in decomposed if not unicodedata.combining(char)).casefold()


def subset(body: bytes, elements: str | None) -> bytes:
    """The body with no more than these elements (`_elements`), and what every resource has; whole for None."""
    if elements is None:
        return body
    wanted = {"resourceType", "id", "meta", *elements.split(",")}
    return orjson.dumps({name: value for name, value in parse(body).items() if name in wanted})


def condition(kind: str, name: str, text: str, base: str) -> tuple[str, list[str]]:
    """SQL for one search parameter, with its values; Invalid for one that is not known."""
    known_here = PARAMETERS.get(kind, _COMMON)
    plain, _, modifier = name.partition(":")
    form = known_here.get(plain, ("", ""))[0]
    if not form or (modifier and (form, modifier) != ("reference", "identifier")):
        raise Invalid("not-supported", f"no search parameter {name[:64]} of {kind}", status=400)
    wanted = [one for one in _split(text, ",") if one]
    if not wanted:
        raise Invalid("invalid", f"{name} has no value", status=400)
    if name == "_id":
        return f"id IN ({', '.join('?' * len(wanted))})", [_unescaped(one) for one in wanted]
    if form == "string":
        clauses = " OR ".join("substr(value, 1, length(?)) = ?" for _ in wanted)
        values = [part for one in wanted for part in [_plain(_unescaped(one))] * 2]
    elif form == "reference" and not modifier:
        clauses, values = _reference_clauses(plain, wanted, base)
    else:
        clauses, values = _token_clauses(wanted)
    inner = f"SELECT id FROM token WHERE type = ? AND parameter = ? AND ({clauses})"  # noqa: S608 - placeholders only
    return f"id IN ({inner})", [kind, name, *values]


def _reference_clauses(name: str, wanted: Sequence[str], base: str) -> tuple[str, list[str]]:
    """`Type/id`, an address or a bare id; by the thousand, as tokens are."""
    targets = [_unescaped(one).removeprefix(base + "/") for one in wanted]
    targets = [one if "/" in one or name != "patient" else f"Patient/{one}" for one in targets]
    bare = [one for one in targets if "/" not in one and ":" not in one]
    exact = [one for one in targets if "/" in one or ":" in one]
    clauses = [*["value LIKE '%/' || ?"] * len(bare), f"value IN ({', '.join('?' * len(exact))})"]
    return " OR ".join(clauses), [*bare, *exact]


def _token_clauses(wanted: Sequence[str]) -> tuple[str, list[str]]:
    """`value`, `system|value`, `|value` and `system|`; by the thousand, so in lists and not as a chain of OR."""
    pairs: list[str] = []
    codes: list[str] = []
    systems: list[str] = []
    for one in wanted:
        system, *code = [_unescaped(part) for part in _split(one, "|")]
        if not code:
            codes.append(system)
        elif code[0]:
            pairs += [system, code[0]]
        else:
            systems.append(system)
    clauses = []
    if pairs:
        clauses.append(f"(system, value) IN (VALUES {', '.join(['(?, ?)'] * (len(pairs) // 2))})")
    if codes:
        clauses.append(f"value IN ({', '.join('?' * len(codes))})")
    if systems:
        clauses.append(f"system IN ({', '.join('?' * len(systems))})")
    return " OR ".join(clauses), [*pairs, *codes, *systems]


def _split(text: str, separator: str) -> list[str]:
    """Split at separators that no backslash escapes (R4 search 3.1.1.4.6); the escapes stay."""
    parts = [""]
    characters = iter(text)
    for char in characters:
        if char == separator:
            parts.append("")
        else:
            parts[-1] += char + next(characters, "") if char == "\\" else char
    return parts


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


# References


def _references(value: Json) -> Iterator[str]:
    """Every Reference.reference of a resource."""
    if isinstance(value, list):
        for one in value:
            yield from _references(one)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name == "reference" and isinstance(inner, str):
                yield inner
            else:
                yield from _references(inner)


def linked(value: Json, places: Mapping[str, str], resolve: Callable[[str], str]) -> Json:
    """A resource with full URLs of other entries replaced, wherever they stand, and conditional references resolved."""
    if isinstance(value, list):
        return [linked(one, places, resolve) for one in value]
    if not isinstance(value, dict):
        return places.get(value, value) if isinstance(value, str) else value
    result = {name: linked(inner, places, resolve) for name, inner in value.items()}
    reference = result.get("reference")
    if isinstance(reference, str):
        if reference.startswith("urn:uuid:"):
            raise Invalid("invalid", "a reference to an entry that is not in the bundle", status=400)
        if re.match(r"[A-Z][A-Za-z]+\?", reference):
            result["reference"] = resolve(reference)
    return result
