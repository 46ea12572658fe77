"""Is this valid FHIR R4? fhir.resources decides (its R4B models: no difference for our resources), and what it lets
pass is checked here: codes of required bindings, nulls and empty things, lengths of ids, systems that are no URIs.

fhir.resources takes 0.2 s to import, so that waits until something is checked.
"""

import functools
import importlib
import re
import typing
from collections.abc import Iterator
from typing import NamedTuple

from dicomcast.dicom import values
from dicomcast.dicom.values import Json

_PACKAGE = "fhir.resources.R4B"
_MODELS = {
    "patient": f"{_PACKAGE}.patient.Patient",
    "study": f"{_PACKAGE}.imagingstudy.ImagingStudy",
    "series": f"{_PACKAGE}.imagingstudy.ImagingStudySeries",
    "instance": f"{_PACKAGE}.imagingstudy.ImagingStudySeriesInstance",
    "endpoint": f"{_PACKAGE}.endpoint.Endpoint",
}
# FHIR R4 string: no control characters but tab, line feed, carriage return. A lone surrogate can't be sent at all.
_UNWANTED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
_ABSOLUTE = ("system", "url", "address")  # Reference.type is a uri too, and "Patient" is right there


class Problem(NamedTuple):
    """Where a resource is wrong, as far as its first element (`started`), and how; never with the value."""

    element: str
    reason: str


class _Field(NamedTuple):
    model: str | None  # of a complex type
    kind: str | None  # of a primitive: Uri, Code, Id ...
    codes: frozenset[str]  # of a required binding


def elements(level: str) -> frozenset[str]:
    """The elements that FHIR R4 knows at this level."""
    return frozenset(name for name in _fields(_MODELS[level]) if not name.startswith(("_", "fhir_comments")))


def is_list(level: str, element: str) -> bool:
    """Whether this element repeats."""
    annotations = {field.alias: field.annotation for field in _model(_MODELS[level]).model_fields.values()}
    return "List[" in str(annotations[element])


def problems(level: str, content: Json) -> list[Problem]:
    """What is wrong with a resource or a part of one (a series without its instances, one instance)."""
    found = [Problem(path[0], reason) for path, reason in _check(_MODELS[level], content, ())]
    if not found:
        try:
            _model(_MODELS[level]).model_validate(content)
        except Exception as error:  # KeyError and others come out of it too
            found = list(_refused(error))
    return found


def _refused(error: Exception) -> Iterator[Problem]:
    listed = getattr(error, "errors", None)
    if listed is None:
        yield Problem("", type(error).__name__)
        return
    for item in listed(include_url=False, include_context=False, include_input=False):
        yield Problem(str(item["loc"][0]) if item["loc"] else "", item["type"])


def _check(model: str, content: Json, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if not isinstance(content, dict) or not content:
        yield path or ("",), "empty, or not an object"
        return
    known = _fields(model)
    for name, value in content.items():
        field = known.get(name)
        if field is None or name == "fhir_comments":
            yield (*path, name), "unknown element"
            continue
        for item in value if isinstance(value, list) and value else [value]:
            if field.model is not None:
                yield from _check(field.model, item, (*path, name))
            elif reason := _primitive(field, name, item):
                yield (*path, name), reason


def _primitive(field: _Field, name: str, value: Json) -> str | None:
    if value is None or value in ([], {}, ""):
        return "empty"
    if not isinstance(value, str):
        return None
    wrong = {
        "blank": not value.strip(),
        "control character or broken text": _UNWANTED.search(value),
        "code outside its required binding": field.codes and value not in field.codes,
        "longer than 64 characters": (field.kind == "Id" or name == "uid") and len(value) > 64,
        "not an absolute URI": name in _ABSOLUTE and field.kind in ("Uri", "Url") and not values.is_uri(value),
    }
    return next((reason for reason, holds in wrong.items() if holds), None)


@functools.cache
def _model(name: str) -> typing.Any:
    module, _, model = name.rpartition(".")
    return getattr(importlib.import_module(module), model)


@functools.cache
def _fields(model: str) -> dict[str, _Field]:
    found = {}
    for field in _model(model).model_fields.values():
        types = list(_leaves(field.annotation))
        models = [leaf._model_klass for leaf in types if hasattr(leaf, "_model_klass")]
        kinds = [type(leaf).__name__ for leaf in types if not isinstance(leaf, type)]
        extra = field.json_schema_extra or {}
        codes = frozenset(extra.get("enum_values", ())) if "Code" in kinds else frozenset()
        found[field.alias] = _Field(models[0] if models else None, kinds[0] if kinds else None, codes)
    return found | {"resourceType": _Field(None, None, frozenset())}


def _leaves(annotation: typing.Any) -> Iterator[typing.Any]:
    """The classes in an annotation, and what `Annotated` says about them."""
    if isinstance(annotation, str):
        return
    parts = typing.get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaves(part)
