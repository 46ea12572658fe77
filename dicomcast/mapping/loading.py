"""From the names of modules and overlays to a `Mapping`: loads rule tables, checks them, compiles them."""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Dictionary
from pathlib import Path
from types import ModuleType

import orjson
import pydantic
import yaml

from dicomcast import errors
from dicomcast.dicom.values import DataSet, Json
from dicomcast.mapping import checking, engine, notation, rules, tables, validation
from dicomcast.mapping import study as combining
from dicomcast.mapping.engine import Instance
from dicomcast.mapping.layout import RESOURCES, Layout, by_uid
from dicomcast.mapping.rules import Context, Report, Rule, Slice
from dicomcast.mapping.study import Built, Observed

SHIPPED = "dicomcast_mappings"
REVISION = 2  # raise it when the same rules give other content than before: it is part of the digest

_REQUIRED = ("patient.identifier", "study.uid", "series.uid", "instance.uid", "endpoint.identifier")
# They change the Endpoint alone, or, as meta.source, only what is yet to be created.
_NOT_HASHED = ("dicom_url", "endpoint_address", "endpoint_name")


def load(names: Sequence[str], context: Context, *, validated: bool = True) -> "Mapping":
    """The mapping made of these, in order: shipped modules by name, a site's own by dotted name or file (`.py`), each
    with `RULES` and perhaps `REPORTS`, and overlays (`.yaml`). A later rule replaces the one with its id.

    Raises `errors.Misconfigured` with every problem. `validated=False` leaves fhir.resources out, for measurements.
    """
    draft = Draft()
    for name in names:
        draft.add(name)
    if problems := [*context.problems(), *draft.problems()]:
        raise errors.Misconfigured(problems)
    return Mapping(tuple(draft.rules.values()), tuple(draft.reports.values()), context, validated=validated)


class Draft:
    """Rules and reports as they are gathered, where each is from (file and line), and what went wrong on the way."""

    def __init__(self) -> None:
        self.rules: dict[str, Rule] = {}
        self.reports: dict[str, Report] = {}
        self.places: dict[str, str] = {}
        self._unloaded: list[str] = []

    def add(self, name: str) -> None:
        """Add a module or an overlay."""
        if name.endswith((".yaml", ".yml")):
            self._overlay(name)
        else:
            self._module(name)

    def problems(self) -> Iterator[str]:
        """What could not be loaded, and what is wrong with what was."""
        yield from self._unloaded
        for report in self.reports.values():
            yield from checking.of_report(report, self.rules.values())
        for rule in self.rules.values():
            for problem in checking.problems(rule, self.reports):
                yield f"{self.places[rule.id]}: {problem}"
        for rule, problem in checking.mixed(self.rules.values()):
            yield f"{self.places[rule.id]}: {problem}"
        if not self._unloaded:
            yield from (f"mapping: no rule {id}" for id in _REQUIRED if id not in self.rules)

    def _module(self, name: str) -> None:
        try:
            module = _from_file(name) if name.endswith(".py") else _imported(name)
        except Exception as error:  # whatever a site's module may raise
            absent = isinstance(error, FileNotFoundError | ModuleNotFoundError) and _is(error, name)
            why = "not found" if absent else f"{type(error).__name__} when it was loaded: {error}"
            self._unloaded.append(f"mapping module {name}: {why}")
            return
        found = getattr(module, "RULES", None)
        if not isinstance(found, tuple) or not all(isinstance(rule, Rule) for rule in found):
            self._unloaded.append(f"mapping module {name}: has no RULES, a tuple of Rule")
            return
        ids = [rule.id for rule in found]
        self._unloaded += [
            f"mapping module {name}: {id} stands there twice" for id in sorted({*ids}) if ids.count(id) > 1
        ]
        for rule in found:
            self._put(rule, f"{name}:{_line(module, rule.id)}")
        self.reports |= {report.name: report for report in getattr(module, "REPORTS", ())}

    def _overlay(self, name: str) -> None:
        """`rules`, each like a `Rule`, with `source` for its sources; `disable`, a list of ids."""
        try:
            loader = yaml.SafeLoader(Path(name).read_text(encoding="utf-8"))
            root = loader.get_single_node()
            overlay = _Overlay.model_validate({} if root is None else loader.construct_document(root))
        except pydantic.ValidationError as error:
            self._unloaded += [f"mapping overlay {name}: {_told(one)}" for one in error.errors()]
            return
        except (OSError, ValueError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            why = getattr(error, "strerror", None) or getattr(error, "problem", None) or "not text"
            place = f":{mark.line + 1}" if mark else ""
            self._unloaded.append(f"mapping overlay {Path(name).absolute()}{place}: {why}")
            return
        lines = _lines(root)
        seen: set[str] = set()
        for row, line in zip(overlay.rules, lines.get("rules", ()), strict=True):
            try:
                rule = _RULE.validate_python(_spelled(row))
            except pydantic.ValidationError as error:
                self._unloaded += [f"{name}:{line}: rule {row.get('id')}: {_told(one)}" for one in error.errors()]
                continue
            if rule.id in seen:
                self._unloaded.append(f"{name}:{line}: rule {rule.id}: stands there twice")
            seen.add(rule.id)
            self._put(rule, f"{name}:{line}")
        for id, line in zip(overlay.disable, lines.get("disable", ()), strict=True):
            if id not in self.rules:
                near = checking.near(id, self.rules)
                self._unloaded.append(f"{name}:{line}: rule {id}: there is none to disable{near}")
            elif id in _REQUIRED:
                self._unloaded.append(f"{name}:{line}: rule {id}: nothing works without it; replace it instead")
            self.rules.pop(id, None)

    def _put(self, rule: Rule, place: str) -> None:
        self.rules[rule.id] = rule
        self.places[rule.id] = place


class _Overlay(pydantic.BaseModel, extra="forbid"):
    rules: list[dict[str, Json]] = []
    disable: list[str] = []


_RULE, _SLICE = pydantic.TypeAdapter(Rule), pydantic.TypeAdapter(Slice)


def _spelled(row: dict[str, Json]) -> dict[str, Json]:
    """A rule of an overlay as `Rule` has it: there, one `source` or one text of `when` need no list."""
    rule = {name: value for name, value in row.items() if name != "source"}
    if "source" in row:
        rule["sources"] = [row["source"]] if isinstance(row["source"], str) else row["source"]
    if isinstance(when := row.get("when"), dict):
        lists = {source: texts if isinstance(texts, list) else [texts] for source, texts in when.items()}
        # YAML makes a number of 1; what it makes of NO must be quoted.
        rule["when"] = {source: [str(one) if type(one) is int else one for one in lists[source]] for source in lists}
    if isinstance(row.get("target"), dict):
        rule["target"] = _SLICE.validate_python(row["target"])
    return rule


def _told(error: Json) -> str:
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}"


def _lines(root: yaml.Node | None) -> dict[str, list[int]]:
    """The lines of the items of every list in a YAML mapping, by its key."""
    pairs = root.value if isinstance(root, yaml.MappingNode) else ()
    return {key.value: [item.start_mark.line + 1 for item in found.value] for key, found in pairs}


def _imported(name: str) -> ModuleType:
    return importlib.import_module(name if "." in name else f"{SHIPPED}.{name}")


def _from_file(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"dicomcast_site_{Path(name).stem}", name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _is(missing: FileNotFoundError | ModuleNotFoundError, name: str) -> bool:
    """Whether the module itself is what was not found, or something that it asked for."""
    if isinstance(missing, ModuleNotFoundError):
        path = name if "." in name else f"{SHIPPED}.{name}"
        return missing.name is not None and f"{path}.".startswith(f"{missing.name}.")
    return bool(missing.filename == str(Path(name).resolve()) or missing.filename == name)


def _line(module: ModuleType, id: str) -> int:
    """The line of a module on which a rule's id stands; its first one where it is put together."""
    try:
        lines = inspect.getsource(module).splitlines()
    except (OSError, TypeError):
        return 1
    return next((number for number, line in enumerate(lines, 1) if f'"{id}"' in line or f"'{id}'" in line), 1)


class Mapping:
    """A compiled set of rules: everything between DICOM JSON and FHIR JSON. Pure; safe to use from several threads."""

    def __init__(self, table: tuple[Rule, ...], kinds: tuple[Report, ...], context: Context, *, validated: bool = True):
        self.context = context
        self.rules = table
        self.kinds = kinds
        self.digest = _digest(table, kinds, context)
        self.fills = frozenset(f"{rule.level}.{rule.element}" for rule in table if rule.owner == "fill")
        """The elements of an ImagingStudy that our rules only fill: `study.referrer`, `series.bodySite`."""
        # A rule whose setting is not set neither writes nor owns its element.
        active = [rule for rule in table if rule.setting is None or getattr(context, rule.setting)]
        self._layout = Layout(active, context)
        self._reader = engine.Readings(
            active, kinds, context, self._layout, functools.partial(validation.problems, models=validated)
        )

    def read(self, dataset: DataSet | Json) -> Instance:
        """One instance (DICOM JSON object), mapped and validated. Raises `errors.InstanceFailed`, nothing else."""
        return self._reader.read(dataset)

    def explain(self, dataset: DataSet | Json) -> Iterator[tuple[Rule, tuple[notation.Path, ...], Json]]:
        """What each rule makes of one instance: rule, the paths that lead to a value, FHIR value (None for nothing)."""
        yield from self._reader.origins(DataSet.of(dataset))

    def study(self, instances: Iterable[Instance], *, subject: Json, endpoint: Json) -> Built:
        """The ImagingStudy of a complete set of instances, with these references. Raises `errors.StudyFailed`."""
        return combining.build(self._layout, self.context, None, instances, {"subject": subject, "endpoint": endpoint})

    def extend(self, base: Json, instances: Iterable[Instance], *, subject: Json, endpoint: Json) -> Built:
        """An ImagingStudy that we wrote and instances that are not in it: what `study` gives for all, and the foreign.

        Raises `errors.Disagreement` where only the whole study can tell, `errors.StudyFailed` as `study` does.
        """
        return combining.build(self._layout, self.context, base, instances, {"subject": subject, "endpoint": endpoint})

    def patient(self, instances: Iterable[Instance]) -> Built:
        """The Patient of a study's instances, at least one. Raises `errors.StudyFailed`."""
        return combining.patient(self._layout, self.context, instances)

    def reports(self, instances: Iterable[Instance], *, subject: Json, study: Json) -> list[Observed]:
        """The Observations that these instances bring with them, with these references. Raises `errors.StudyFailed`."""
        return combining.reports(self._layout, [*instances], {"subject": subject, "study": study})

    def patient_key(self, instances: Iterable[Instance]) -> tuple[str | None, str]:
        """Identifier system (or None) and PatientID of the patient whom most of these instances name."""
        return combining.patient_key(instances)

    def endpoint(self) -> dict[str, Json]:
        """The Endpoint. Raises `errors.Misconfigured` where the context lacks what one needs."""
        return {**self._endpoint}

    @functools.cached_property
    def _endpoint(self) -> dict[str, Json]:
        resource = {"resourceType": "Endpoint", **self._layout.write("endpoint", {}, self._layout.fixed["endpoint"])}
        found = [
            f"endpoint {problem.element}: {problem.reason}" for problem in validation.problems("endpoint", resource)
        ]
        if found:
            raise errors.Misconfigured(found)
        return resource

    def merge(
        self, existing: Json, wanted: Json, *, report: str | None = None, fills: frozenset[str] | None = None
    ) -> dict[str, Json]:
        """What our rules own as in `wanted`, everything else as in `existing` (None: nothing there yet).

        `report` is the kind of an Observation. Of the elements that our rules only fill, those outside of `fills` stay
        where they are; None means that all are ours.
        """
        if existing is None:
            return dict(wanted)
        if existing.get("resourceType") != wanted["resourceType"]:
            raise ValueError("resources of different types")
        place = f"report {report}" if report else RESOURCES[wanted["resourceType"]]
        return self._layout.merge(existing, wanted, place, fills=fills)

    def foreign(self, resource: Json) -> bool:
        """Whether a resource holds anything that our rules can't have written (generated narrative aside)."""
        content = {name: value for name, value in resource.items() if name not in ("resourceType", "id", "meta")}
        text = content.get("text")
        if isinstance(text, dict) and text.get("status") in ("generated", "empty"):
            del content["text"]
        return any(True for _ in self._layout.foreign(content, RESOURCES[resource["resourceType"]]))

    def same(self, one: Json, other: Json) -> bool:
        """Whether two resources are equal but for `id` and `meta`."""
        return _content(one) == _content(other)

    def instance_uids(self, resource: Json) -> set[tuple[str, str]]:
        """Series UID and SOP Instance UID of every instance that an ImagingStudy lists."""
        series = by_uid(resource.get("series"))
        return {(uid, sop) for uid, part in series.items() for sop in by_uid(part.get("instance"))}


def _content(resource: Dictionary[str, Json]) -> dict[str, Json]:
    return {name: value for name, value in resource.items() if name not in ("id", "meta")}


def _digest(table: Iterable[Rule], kinds: Iterable[Report], context: Context) -> str:
    """SHA-256, in hex, of all that decides what instances become."""
    settings = {name: getattr(context, name) for name in Context.__dataclass_fields__ if name not in _NOT_HASHED}
    settings |= {name: dict(value) for name, value in settings.items() if isinstance(value, Dictionary)}
    named = [step for rule in table for step in (*rule.steps, rule.derive, rule.default)]
    custom = [_source(step) for step in named if step is not None and not isinstance(step, str)]
    rows = [rule.row() for rule in table]
    content = [REVISION, rows, list(map(dataclasses.astuple, kinds)), settings, custom, tables.content()]
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


@functools.cache
def _source(step: rules.Step) -> str:
    """The text of the module that a step is from: its helpers and tables count as well. Of a partial, its arguments."""
    arguments = ""
    while isinstance(step, functools.partial):
        arguments += repr((step.args, sorted(step.keywords.items())))
        step = step.func
    module = inspect.getmodule(step)
    try:
        return (inspect.getsource(module) if module is not None else "") + arguments
    except (OSError, TypeError):
        return arguments
