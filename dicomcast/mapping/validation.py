"""Is this valid FHIR R4? fhir.resources decides (its R4B models: no difference for our resources), and what it lets
pass is checked here: codes of required bindings, nulls and empty things, lengths of ids, systems that are no URIs.

fhir.resources takes 0.2 s to import, so that waits until something is checked.
"""

import functools
import importlib
import re
import typing
from collections.abc import Callable, Iterator
from typing import NamedTuple

import orjson
import pydantic

from dicomcast.dicom import values
from dicomcast.dicom.values import Json

_PACKAGE = "fhir.resources.R4B"
_MODELS = {
    "patient": f"{_PACKAGE}.patient.Patient",
    "study": f"{_PACKAGE}.imagingstudy.ImagingStudy",
    "series": f"{_PACKAGE}.imagingstudy.ImagingStudySeries",
    "instance": f"{_PACKAGE}.imagingstudy.ImagingStudySeriesInstance",
    "endpoint": f"{_PACKAGE}.endpoint.Endpoint",
    "report": f"{_PACKAGE}.observation.Observation",
}
# FHIR R4 string: no control characters but tab, line feed, carriage return. A lone surrogate can't be sent at all.
_HARMLESS = re.compile("[!-~][ -~]{0,63}")
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


def _model_of(place: str) -> str:
    return _MODELS[place.partition(" ")[0]]  # a kind of report is called `report`, and its name


def elements(place: str) -> frozenset[str]:
    """The elements that FHIR R4 knows at this level."""
    return frozenset(name for name in _fields(_model_of(place)) if not name.startswith(("_", "fhir_comments")))


@functools.cache
def is_list(place: str, element: str) -> bool:
    """Whether this element repeats."""
    annotations = {field.alias: field.annotation for field in _model(_model_of(place)).model_fields.values()}
    return "List[" in str(annotations[element])


def type_of(place: str, element: str, inner: str | None = None) -> str | None:
    """The FHIR type of an element, or of one in it (`UnsignedInt`, `Coding`); None where there is none."""
    field = _fields(_model_of(place)).get(element)
    if field is not None and inner is not None:
        field = _fields(field.model).get(inner) if field.model else None
    if field is None:
        return None
    return field.model.rpartition(".")[2] if field.model else field.kind or "Boolean"


def misfit(place: str, element: str, value: Json) -> str | None:
    """Why a value can't stand in an element, None if it can."""
    model = _model_of(place)
    if found := next(_check(model, {element: value}, ()), None):
        return found[1]
    try:
        _validators(model)[element](value)
    except Exception as error:
        return next((problem.reason for problem in _refused(error)), "invalid")
    return None


def problems(place: str, content: Json, *, models: bool = True) -> list[Problem]:
    """What is wrong with a resource or a part of one (a series without its instances, one instance).

    `models=False` leaves fhir.resources out, for measurements.
    """
    model = _model_of(place)
    shape = _shape(model, content) if place in ("series", "instance") and isinstance(content, dict) else None
    if shape in _accepted and all(_passes(model, name, value, models=models) for name, value in content.items()):
        return []
    found = [Problem(path[0], reason) for path, reason in _check(model, content, ())]
    if not found and models:
        try:
            _model(model).model_validate(content)
        except Exception as error:  # KeyError and others come out of it too
            found = list(_refused(error))
    if shape is not None and not found and models and len(_accepted) < _SHAPES:
        _accepted.add(shape)
    return found


# Series and instances are many and alike. Where the model has accepted one with the same elements and the same complex
# values, it is left to the model's fields to judge the primitive ones: a fiftieth of the time, and the same verdict.
_accepted: set[tuple[str | bytes, ...]] = set()
_SHAPES = 1_000


def _shape(model: str, content: dict[str, Json]) -> tuple[str | bytes, ...] | None:
    try:
        return model, *(
            orjson.dumps((name, value)) if isinstance(value, dict | list) else name for name, value in content.items()
        )
    except TypeError:
        return None


def _passes(model: str, name: str, value: Json, *, models: bool) -> bool:
    if isinstance(value, dict | list):
        return True  # it is part of the shape
    if _primitive(_fields(model)[name], name, value) is not None:
        return False
    try:
        _ = models and _validators(model)[name](value)
    except pydantic.ValidationError:
        return False
    return True


@functools.cache
def _validators(model: str) -> dict[str, Callable[[Json], Json]]:
    """The judge of each field's value; their models keep all constraints in the annotation."""
    fields = _model(model).model_fields.values()
    return {field.alias: pydantic.TypeAdapter(field.annotation).validate_python for field in fields}


def _refused(error: Exception) -> Iterator[Problem]:
    listed = getattr(error, "errors", None)
    if listed is None:
        yield Problem("", type(error).__name__)
        return
    for item in listed(include_url=False, include_context=False, include_input=False):
        reason = re.sub(r"^(.*)_type$", r"not of type \1", item["type"])
        yield Problem(str(item["loc"][0]) if item["loc"] else "", reason)


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
    if _HARMLESS.fullmatch(value) and not field.codes and name not in _ABSOLUTE:
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
