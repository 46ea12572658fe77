"""From module names to a `Mapping`: loads rule tables, checks them, compiles them."""

import functools
import hashlib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Dictionary

import orjson

from dicomcast import errors
from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping import engine, rules, steps, study, tables, validation
from dicomcast.mapping.engine import Instance
from dicomcast.mapping.layout import RESOURCES, Layout, by_uid
from dicomcast.mapping.rules import Context, Rule, Slice
from dicomcast.mapping.study import Built

SHIPPED = "dicomcast_mappings"
REVISION = 1  # raise it when the same rules give other content than before: it is part of the digest

_REQUIRED = ("patient.identifier", "study.uid", "series.uid", "instance.uid")
# They change the Endpoint alone, or, as meta.source, only what is yet to be created.
_NOT_HASHED = ("dicom_url", "endpoint_address", "endpoint_name")


def load(names: Sequence[str], context: Context) -> "Mapping":
    """The mapping made of these modules: names of shipped ones, or dotted names of a site's own, each with `RULES`.

    A rule replaces the one with its id in a module before. Raises `errors.Misconfigured` with every problem.
    """
    problems = list(context.problems())
    table: dict[str, Rule] = {}
    for name in names:
        found = list(_module_rules(name, problems))
        ids = [rule.id for rule in found]
        problems += [f"mapping module {name}: {id} stands there twice" for id in sorted({*ids}) if ids.count(id) > 1]
        table.update({rule.id: rule for rule in found})
    problems += [problem for rule in table.values() for problem in _problems(rule)]
    problems += [f"mapping: no rule {id}" for id in _REQUIRED if id not in table]
    problems += _mixed(table.values())
    if problems:
        raise errors.Misconfigured(problems)
    return Mapping(tuple(table.values()), context)


def _module_rules(name: str, problems: list[str]) -> Iterator[Rule]:
    path = name if "." in name else f"{SHIPPED}.{name}"
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever a site's module may raise
        absent = isinstance(error, ModuleNotFoundError) and error.name is not None and path.startswith(error.name)
        why = "not found" if absent else f"{type(error).__name__} when it was loaded: {error}"
        problems.append(f"mapping module {name}: {why}")
        return
    found = getattr(module, "RULES", None)
    if not isinstance(found, tuple) or not all(isinstance(rule, Rule) for rule in found):
        problems.append(f"mapping module {name}: has no RULES, a tuple of Rule")
        return
    yield from found


def _problems(rule: Rule) -> Iterator[str]:
    for problem in (*_of_origin(rule), *_of_target(rule)):
        yield f"rule {rule.id}: {problem}"


def _of_origin(rule: Rule) -> Iterator[str]:
    if not isinstance(rule.sources, tuple) or not isinstance(rule.steps, tuple):
        yield "sources and steps must be tuples"
        return
    origins = (rule.sources or None, rule.constant, rule.setting, rule.derive, rule.link)
    if sum(origin is not None for origin in origins) != 1:
        yield "needs exactly one of sources, constant, setting, derive, link"
    try:
        orjson.dumps(rule.constant)
    except TypeError:
        yield "constant is not JSON"
    for source in rule.sources:
        for path in (source,) if isinstance(source, str) else source:
            yield from _of_path(rules.path_of(path))
    for step in (*rule.steps, rule.derive, rule.default):
        if step is not None and not callable(step) and step not in steps.STEPS:
            yield f"unknown step {step}"
    if (rule.derive is not None and rule.level not in ("study", "series")) or (rule.link and rule.level != "study"):
        yield "derive is for study and series, link for study"
    if rule.setting is not None and rule.setting not in Context.__dataclass_fields__:
        yield f"unknown setting {rule.setting}"
    if rule.link is not None and rule.link not in rules.LINKS:
        yield f"unknown link {rule.link}"


def _of_path(path: list[str]) -> Iterator[str]:
    for index, name in enumerate(path):
        try:
            tag = values.tag_of(name)
            values.reader(tag)
            vr = values.vr_of(tag)
        except KeyError:
            yield f"unknown keyword or tag, or one that can't be mapped: {name}"
            continue
        if index < len(path) - 1 and vr != "SQ":
            yield f"{name} is not a sequence"


def _of_target(rule: Rule) -> Iterator[str]:
    for value, known, what in (
        (rule.level, rules.LEVELS, "level"),
        (rule.policy, rules.POLICIES, "policy"),
        (rule.owner, rules.OWNERS, "owner"),
    ):
        if value not in known:
            yield f"unknown {what} {value}"
    if rule.level not in rules.LEVELS:
        return
    if isinstance(rule.target, Slice) and rule.target.default not in (None, *Context.__dataclass_fields__):
        yield f"unknown setting {rule.target.default}"
    if rule.element not in validation.elements(rule.level):
        yield f"unknown target element {rule.element}"
    elif isinstance(rule.target, Slice) and not validation.is_list(rule.level, rule.element):
        yield f"target element {rule.element} is not a list"
    elif rule.policy == "union" and not validation.is_list(rule.level, rule.element):
        yield f"policy union needs a list, and {rule.element} is none"


def _mixed(table: Iterable[Rule]) -> Iterator[str]:
    """Two rules of one element must both own slices of it."""
    owners: dict[tuple[str, str], Rule] = {}
    for rule in table:
        other = owners.setdefault((rule.level, rule.element), rule)
        if other is not rule and not (isinstance(rule.target, Slice) and isinstance(other.target, Slice)):
            yield f"rule {rule.id}: {other.id} owns {rule.level} {rule.element} too"


class Mapping:
    """A compiled set of rules: everything between DICOM JSON and FHIR JSON. Pure; safe to use from several threads."""

    def __init__(self, table: tuple[Rule, ...], context: Context):
        self.context = context
        self.rules = table
        self.digest = _digest(table, context)
        # A rule whose setting is not set neither writes nor owns its element.
        active = [rule for rule in table if rule.setting is None or getattr(context, rule.setting)]
        self._layout = Layout(active, context)
        self._reader = engine.Readings(active, context, self._layout)

    def read(self, dataset: Json) -> Instance:
        """One instance (DICOM JSON object), mapped and validated. Raises `errors.InstanceFailed`, nothing else."""
        return self._reader.read(dataset)

    def study(self, instances: Iterable[Instance], *, subject: Json, endpoint: Json) -> Built:
        """The ImagingStudy of a complete set of instances, with these references. Raises `errors.StudyFailed`."""
        return study.build(self._layout, self.context, None, instances, {"subject": subject, "endpoint": endpoint})

    def extend(self, base: Json, instances: Iterable[Instance], *, subject: Json, endpoint: Json) -> Built:
        """An ImagingStudy that we wrote and instances that are not in it: what `study` gives for all, and the foreign.

        Raises `errors.Disagreement` where only the whole study can tell, `errors.StudyFailed` as `study` does.
        """
        return study.build(self._layout, self.context, base, instances, {"subject": subject, "endpoint": endpoint})

    def patient(self, instances: Iterable[Instance]) -> Built:
        """The Patient of a study's instances, at least one. Raises `errors.StudyFailed`."""
        return study.patient(self._layout, self.context, instances)

    def patient_key(self, instances: Iterable[Instance]) -> tuple[str | None, str]:
        """Identifier system (or None) and PatientID of the patient whom most of these instances name."""
        return study.patient_key(instances)

    def endpoint(self) -> dict[str, Json]:
        """The Endpoint. Raises `errors.Misconfigured` where the context lacks what one needs."""
        items = steps.fixed(self._layout.rules["endpoint"], self.context)
        resource = {"resourceType": "Endpoint", **self._layout.write("endpoint", {}, items)}
        found = [
            f"endpoint {problem.element}: {problem.reason}" for problem in validation.problems("endpoint", resource)
        ]
        if found:
            raise errors.Misconfigured(found)
        return resource

    def merge(self, existing: Json, wanted: Json) -> dict[str, Json]:
        """What our rules own as in `wanted`, everything else as in `existing` (None: nothing there yet)."""
        if existing is None:
            return dict(wanted)
        if existing.get("resourceType") != wanted["resourceType"]:
            raise ValueError("resources of different types")
        return self._layout.merge(existing, wanted, RESOURCES[wanted["resourceType"]])

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


def _digest(table: Iterable[Rule], context: Context) -> str:
    """SHA-256, in hex, of all that decides what instances become."""
    settings = {name: getattr(context, name) for name in Context.__dataclass_fields__ if name not in _NOT_HASHED}
    settings["issuers"] = dict(context.issuers)
    named = [step for rule in table for step in (*rule.steps, rule.derive, rule.default)]
    custom = [_source(step) for step in named if step is not None and not isinstance(step, str)]
    terms = sorted(map(list, tables.modalities().values()))
    content = [REVISION, [rule.row() for rule in table], settings, custom, terms]
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


@functools.cache
def _source(step: rules.Step) -> str:
    try:
        return inspect.getsource(step)
    except (OSError, TypeError):
        return ""
