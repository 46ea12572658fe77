"""Compiles rules into closures, once, and reads one instance with them: DICOM JSON in, a small `Instance` out.

What instances of a study and of a series say about their patient, study and series is almost always the same. Each
distinct such content is one `Values` object that all of them share, so 50,000 instances cost what differs between them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, TypeAlias
from weakref import WeakValueDictionary

import orjson

from dicomcast import errors
from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping import rules, steps, validation
from dicomcast.mapping.layout import Layout
from dicomcast.mapping.rules import Context, Rule, Slice, Step

PATIENT = "patient.identifier"  # the rule that says who a patient is

_UIDS = {"study": "0020000D", "series": "0020000E", "instance": "00080018"}
# What R4 requires around the values of one level, so that they can be judged alone.
_STUBS: Mapping[str, Json] = {
    "patient": {"resourceType": "Patient"},
    "study": {"resourceType": "ImagingStudy", "status": "unknown", "subject": {"reference": "Patient/0"}},
    "series": {"modality": {"code": "OT"}},
}


@dataclass(frozen=True, slots=True)
class Issue:
    """Something about an attribute that was left out or guessed: rule, tag (8 hex digits), VR and reason. No value."""

    rule: str
    tag: str
    vr: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Values:
    """What one instance says at one level: FHIR values by rule id. Equal content is one object, so compare with `is`.

    `key` is the content as canonical JSON, `about` the UID, or the patient's identifier system (or None) and PatientID.
    Don't change what `items` holds.
    """

    key: bytes
    about: str | tuple[str | None, str]
    items: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance, mapped: where it belongs, what it says of its patient, study and series, and its FHIR form.

    `patient_key` is identifier system (or None) and PatientID; `resource` an ImagingStudy.series.instance.
    """

    study_uid: str
    series_uid: str
    sop_uid: str
    patient_key: tuple[str | None, str]
    patient: Values
    study: Values
    series: Values
    resource: dict[str, Json]
    issues: tuple[Issue, ...]


_Reading: TypeAlias = "Callable[[dict[str, Json], list[Issue]], Json]"


class Readings:
    """Reads instances by a fixed set of rules. It remembers what it saw last, but no result depends on that."""

    def __init__(self, table: Iterable[Rule], context: Context, layout: Layout):
        self._strict = context.strict
        self._layout = layout
        self._readings: dict[str, tuple[tuple[str, _Reading], ...]] = {}
        self._tags: dict[str, tuple[str, ...]] = {}
        for level in rules.LEVELS:
            found = [rule for rule in table if rule.level == level and rule.sources]
            self._readings[level] = tuple((rule.id, _reading(rule, context)) for rule in found)
            self._tags[level] = tuple(sorted({origin.top for rule in found for origin in _origins(rule)}))
        self._fixed = steps.fixed((rule for rule in table if rule.level == "instance"), context)
        self._last: dict[str, tuple[bytes, Values, tuple[Issue, ...]]] = {}
        self._known: WeakValueDictionary[tuple[str, bytes], Values] = WeakValueDictionary()

    def read(self, dataset: Json) -> Instance:
        """One DICOM JSON data set, mapped. Raises `errors.InstanceFailed` if it can't be, whatever it is."""
        if not isinstance(dataset, dict):
            _fail("uid-missing", "data set is not an object", rule="study.uid", tag=_UIDS["study"])
        uids = {level: _uid(dataset, level) for level in _UIDS}
        patient, patient_issues = self._shared("patient", dataset, None)
        study, study_issues = self._shared("study", dataset, uids["study"])
        series, series_issues = self._shared("series", dataset, uids["series"])
        issues: list[Issue] = [*patient_issues, *study_issues, *series_issues]
        items = self._items("instance", dataset, issues) | self._fixed
        resource = self._layout.write("instance", {}, items)
        self._validate("instance", resource)
        if issues and self._strict:
            _fail("value-invalid", f"strict: {issues[0].reason}", rule=issues[0].rule, tag=issues[0].tag)
        return Instance(
            study_uid=study.about,  # type: ignore[arg-type]  # by level
            series_uid=series.about,  # type: ignore[arg-type]
            sop_uid=resource["uid"],
            patient_key=patient.about,  # type: ignore[arg-type]
            patient=patient,
            study=study,
            series=series,
            resource=resource,
            issues=tuple(issues),
        )

    def _shared(self, level: str, dataset: dict[str, Json], uid: str | None) -> tuple[Values, tuple[Issue, ...]]:
        """The values of a level that instances share; at once where this data set says what the last one said."""
        try:
            raw = orjson.dumps({tag: dataset[tag] for tag in self._tags[level] if tag in dataset})
        except TypeError:  # JSON that orjson does not write: huge integers, lone surrogates, endless nesting
            raw = b""
        last = self._last.get(level)
        if last is not None and last[0] == raw:
            return last[1], last[2]
        issues: list[Issue] = []
        items = self._items(level, dataset, issues)
        found = self._interned(level, uid or _who(items), items)
        if raw and b"null" not in raw:  # which is also what NaN looks like
            self._last[level] = (raw, found, tuple(issues))
        return found, tuple(issues)

    def _interned(self, level: str, about: str | tuple[str | None, str], items: dict[str, Json]) -> Values:
        try:
            key = orjson.dumps(items, option=orjson.OPT_SORT_KEYS)
        except TypeError:
            _fail("invalid", "a rule made something that is not JSON", stage="validate", rule=next(iter(items)))
        known = self._known.get((level, key))
        if known is None:
            self._validate(level, {**_STUBS[level], **self._layout.write(level, {}, items)})
            known = self._known.setdefault((level, key), Values(key, about, items))
        return known

    def _items(self, level: str, dataset: dict[str, Json], issues: list[Issue]) -> dict[str, Json]:
        items = {}
        for rule, reading in self._readings[level]:
            value = reading(dataset, issues)
            if value is not None:
                items[rule] = value
        return items

    def _validate(self, level: str, content: dict[str, Json]) -> None:
        for problem in validation.problems(level, content):
            rule = self._layout.rule_of(level, problem.element)
            _fail("invalid", f"{level} {problem.element}: {problem.reason}", stage="validate", rule=rule)


def _fail(kind: str, message: str, *, stage: str = "map", rule: str | None, tag: str | None = None) -> NoReturn:
    raise errors.InstanceFailed(kind, message, stage=stage, rule=rule, tag=tag)


def _uid(dataset: dict[str, Json], level: str) -> str:
    tag = _UIDS[level]
    try:
        uid = values.uid(dataset.get(tag))
    except values.Invalid as error:
        _fail("uid-invalid", f"{values.label_of(tag)}: {error.reason}", rule=f"{level}.uid", tag=tag)
    return uid or _fail("uid-missing", f"{values.label_of(tag)}: missing", rule=f"{level}.uid", tag=tag)


def _who(items: Mapping[str, Json]) -> tuple[str | None, str]:
    """Identifier system (or None) and PatientID."""
    for identifier in items.get(PATIENT) or ():
        if isinstance(identifier, dict) and isinstance(identifier.get("value"), str):
            return identifier.get("system"), identifier["value"]
    _fail("value-invalid", "the rule gives no identifier with a value", rule=PATIENT)


class _Origin(NamedTuple):
    """One attribute to read: the tags of the sequences that lead to it, itself, and how."""

    path: tuple[str, ...]
    tag: str
    vr: str
    read: values.Reader

    @property
    def top(self) -> str:
        return (*self.path, self.tag)[0]


def _origin(source: str) -> _Origin:
    *path, tag = (values.tag_of(name) for name in rules.path_of(source))
    return _Origin(tuple(path), tag, values.vr_of(tag), values.reader(tag))


def _origins(rule: Rule) -> Iterable[_Origin]:
    for source in rule.sources:
        yield from map(_origin, (source,) if isinstance(source, str) else source)


def _reading(rule: Rule, context: Context) -> _Reading:
    """A rule as a closure: data set in, value or None out; issues go to the list that it is given."""
    sources = [_source(rule.id, source) for source in rule.sources]
    functions = [steps.resolve(step) for step in rule.steps]
    many = isinstance(rule.target, Slice)
    tag, vr = rule.origin()
    absent = _absence(rule, context)

    def read(dataset: dict[str, Json], issues: list[Issue]) -> Json:
        before = len(issues)
        for source in sources:
            value = source(dataset, issues)
            for function in functions:
                if value is None:
                    break
                value = _stepped(function, value, context, issues, Issue(rule.id, tag, vr, ""))
            if value is not None:
                return [value] if many and not isinstance(value, list) else value
        if absent is not None:
            absent(issues, len(issues) > before)
        return None

    return read


def _source(rule: str, source: rules.Source) -> _Reading:
    """Reads one attribute, or several together: then a tuple, None if the first has no value."""
    if isinstance(source, str):
        origin = _origin(source)
        return lambda dataset, issues: _taken(origin, dataset, issues, rule)
    head, *rest = map(_origin, source)

    def read(dataset: dict[str, Json], issues: list[Issue]) -> Json:
        value = _taken(head, dataset, issues, rule)
        if value is None:
            return None
        return (value, *(_taken(origin, dataset, issues, rule) for origin in rest))

    return read


def _taken(origin: _Origin, dataset: dict[str, Json], issues: list[Issue], rule: str) -> Json:
    try:
        for tag in origin.path:
            found = values.items(dataset.get(tag))
            if found is None:
                return None
            dataset = found[0]
        return origin.read(dataset.get(origin.tag))
    except values.Invalid as error:
        issues.append(Issue(rule, origin.tag, origin.vr, error.reason))
        return error.kept


def _stepped(function: Step, value: Json, context: Context, issues: list[Issue], blank: Issue) -> Json:
    try:
        return function(value, context)
    except values.Invalid as error:
        issues.append(Issue(blank.rule, blank.tag, blank.vr, error.reason))
        return error.kept
    except Exception as error:  # a site's own step; its text may repeat the value
        issues.append(Issue(blank.rule, blank.tag, blank.vr, f"step raised {type(error).__name__}"))
        return None


def _absence(rule: Rule, context: Context) -> Callable[[list[Issue], bool], None] | None:
    """What to do when an instance has no value: nothing, an issue where a default stands in, a failure."""
    if not rule.required:
        return None
    tag, vr = rule.origin()
    stands_in = rule.default is not None and steps.resolve(rule.default)(None, context) is not None

    def absent(issues: list[Issue], invalid: bool) -> None:
        if not stands_in:
            kind, reason = ("value-invalid", issues[-1].reason) if invalid else (rule.missing, "missing")
            _fail(kind, f"{values.label_of(tag)}: {reason}", rule=rule.id, tag=tag)
        if not invalid:
            issues.append(Issue(rule.id, tag, vr, "missing, the default stands in"))

    return absent
