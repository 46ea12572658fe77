"""Compiles rules into closures, once, and reads one instance with them: DICOM JSON in, a small `Instance` out.

What instances of a study and of a series say about their patient, study and series is almost always the same. Each
distinct such content is one `Values` object that all of them share, so 50,000 instances cost what differs between them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn, TypeAlias
from weakref import WeakValueDictionary

import orjson

from dicomcast import errors
from dicomcast.dicom import values
from dicomcast.dicom.values import DataSet, Json
from dicomcast.mapping import content as tree
from dicomcast.mapping import notation, rules, steps, validation
from dicomcast.mapping.content import Elements
from dicomcast.mapping.layout import Layout
from dicomcast.mapping.rules import Context, Report, Rule, Slice, Step

PATIENT = "patient.identifier"  # the rule that says who a patient is

_UIDS = {"study": "0020000D", "series": "0020000E", "instance": "00080018"}
_CONCEPT = "0040A043"
_BLOCKS = [f"{block:02X}" for block in range(0x10, 0x100)]  # of private elements
# So much is remembered per level: sets of tags, texts for each, and bytes of a text.
_SHAPES, _REMEMBERED, _LONGEST = 4, 64, 16_384
# What R4 requires around the values of one level, so that they can be judged alone.
_STUBS: Mapping[str, Json] = {
    "patient": {"resourceType": "Patient"},
    "study": {"resourceType": "ImagingStudy", "status": "unknown", "subject": {"reference": "Patient/0"}},
    "series": {"modality": {"code": "OT"}},
}


@dataclass(frozen=True, slots=True)
class Issue:
    """Something that was left out or guessed: rule, tag (8 characters), VR and reason. No value.

    What a step refuses of several attributes read together is told of the first.
    """

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
class Reported:
    """A report that an instance brings with it: kind, the key that tells it from its siblings, values by rule id."""

    name: str
    key: str
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
    reports: tuple[Reported, ...] = ()


Judge: TypeAlias = "Callable[[str, dict[str, Json]], list[validation.Problem]]"
"""Says what is wrong with a part of a resource."""

_Fetch: TypeAlias = Callable[[Elements, list[Issue]], Json]
_Source: TypeAlias = Callable[[Elements, Elements, list[Issue]], Json]


class Reading:
    """One rule, ready to read: data set in, value or None out; issues go to the list that it is given."""

    def __init__(self, rule: Rule, context: Context):
        self.rule = rule
        self.sources = [_source(rule, text, context) for text in rule.sources]
        self._target = rule.target if isinstance(rule.target, Slice) else None
        self._many = self._target is None and validation.is_list(rule.place, rule.element)
        self._when = [(_plain(notation.parse(text).paths[0]), texts) for text, texts in rule.when.items()]
        default = steps.resolve(rule.default) if rule.required and rule.default is not None else None
        self._stands_in = default is not None and default(None, context) is not None

    def __call__(self, dataset: Elements, issues: list[Issue], content: Elements | None = None) -> Json:
        """The value; `content` is where `content(...)` begins, if not at the data set."""
        before = len(issues)
        if self._when and not self.applies(dataset):
            return None
        place = dataset if content is None else content
        value = next((one for source in self.sources if (one := source(dataset, place, issues)) is not None), None)
        if len(issues) > before + 1:
            issues[before:] = dict.fromkeys(issues[before:])  # sources that share an attribute say it once
        if value is None:
            if self.rule.required:
                self._absent(issues, invalid=len(issues) > before)
            return None
        if self._target is not None:
            return self._items(self._target, value)
        return [value] if self._many and not isinstance(value, list) else value

    def _items(self, target: Slice, value: Json) -> list[Json]:
        """The items of a slice. What the slice would not know again as its own would never be replaced."""
        items = target.items(value)
        if target.at is None and not all(map(target.could_be, items)):
            _fail("invalid", "the rule made an item that its target's where leaves out", rule=self.rule.id)
        return items

    def applies(self, dataset: Elements) -> bool:
        """Whether the rule is about this instance."""
        return all(_says(read(dataset, []), texts) for read, texts in self._when)

    def _absent(self, issues: list[Issue], *, invalid: bool) -> None:
        """An instance has no value: an issue where a default stands in, else a failure."""
        rule = self.rule
        tag, vr = rule.origin()
        if not self._stands_in:
            kind = rule.missing
            if invalid:
                kind = "uid-invalid" if kind == "uid-missing" else "value-invalid"
            _fail(kind, f"{values.label_of(tag)}: {issues[-1].reason if invalid else 'missing'}", rule=rule.id, tag=tag)
        if not invalid:
            issues.append(Issue(rule.id, tag, vr, "missing, the default stands in"))


def _source(rule: Rule, text: str, context: Context) -> _Source:
    """A source as a closure; paths that begin with `content(...)` start at its second argument."""
    source = notation.parse(text)
    fetches = [(_in_content(path), _fetch(rule.id, path)) for path in source.paths]
    functions = [(rules.name_of(step), steps.resolve(step)) for step in (*source.steps, *rule.steps)]
    last = source.paths[0][-1]
    blank = Issue(rule.id, last.tag, last.vr, "")

    def read(dataset: Elements, content: Elements, issues: list[Issue]) -> Json:
        if len(fetches) == 1:
            in_content, fetch = fetches[0]
            value = fetch(content if in_content else dataset, issues)
        else:
            value = tuple([fetch(content if in_content else dataset, issues) for in_content, fetch in fetches])
            if not any(one is not None for one in value):
                return None
        for step in functions:
            if value is None:
                break
            value = _stepped(step, value, context, issues, blank)
        return value

    return read


def _in_content(path: notation.Path) -> bool:
    return path[0].attribute.name == "content"


def _plain(path: notation.Path) -> _Fetch:
    return _fetch("", path)


def _says(value: Json, texts: tuple[str, ...]) -> bool:
    return any(str(one) in texts for one in (value if isinstance(value, list) else [value]))


def _fetch(rule: str, path: notation.Path) -> _Fetch:
    """A path as a closure."""
    *through, last = path
    find, read = _finder(last), last.read
    ways = [(_finder(part), None if part.every else 1, Issue(rule, part.tag, part.vr, "")) for part in through]
    many = any(part.every for part in path)
    flat = read in (values.items, values.all_items)
    blank = Issue(rule, last.tag, last.vr, "")

    def value_of(element: Json, issues: list[Issue]) -> Json:
        try:
            return read(element)
        except values.Invalid as error:
            issues.append(replace(blank, reason=error.reason))
            return error.kept

    def elements_of(elements: Elements, issues: list[Issue]) -> list[Json]:
        places, at = [elements], blank
        try:
            for way, most, at in ways:  # noqa: B007 - at is where it goes wrong
                places = [item for place in places for item in (values.items(way(place)) or [])[:most]]
            at = blank
            found = [find(place) for place in places]
            return [one for element in found for one in values.each(element)] if last.every and not flat else found
        except values.Invalid as error:
            issues.append(replace(at, reason=error.reason))
            return []

    def fetch(elements: Elements, issues: list[Issue]) -> Json:
        found = elements_of(elements, issues)
        if not many:
            return value_of(found[0], issues) if found else None
        given = [value_of(element, issues) for element in found]
        if flat:
            return [item for items in given for item in items or ()] or None
        # Of all values of an attribute the empty ones keep their places: others are told apart by theirs.
        some = any(value is not None for value in given)
        return [value for value in given if last.every or value is not None] if some else None

    def fetch_at_once(elements: Elements, issues: list[Issue]) -> Json:
        try:
            element = find(elements)
        except values.Invalid as error:
            issues.append(replace(blank, reason=error.reason))
            return None
        return value_of(element, issues)

    return fetch if through or last.every else fetch_at_once


def _finder(part: notation.Part) -> Callable[[Elements], Json]:
    name, arguments = part.attribute.name, part.attribute.arguments
    if name == "private":
        return lambda elements: _private(elements, arguments[0], part.tag)
    if name == "content":
        return lambda elements: {"Value": tree.children(elements, arguments[:1], *arguments[1:])}
    tag = part.tag
    return lambda elements: elements.get(tag)


def _private(elements: Elements, creator: str, tag: str) -> Json:
    """The element of a private block (PS3.5 7.8.1): where `(gggg,00bb)` holds the creator, it is `(gggg,bbee)`."""
    for block in _BLOCKS:
        reserved = elements.get(f"{tag[:4]}00{block}")
        if isinstance(reserved, dict) and str(next(iter(reserved.get("Value") or ()), "")).strip() == creator:
            return elements.get(f"{tag[:4]}{block}{tag[6:]}")
    return None


class _Touched(Mapping[str, Json]):
    """A data set that notes which tags are asked for. What is read from it is a function of what stands under those."""

    def __init__(self, dataset: DataSet):
        self._dataset = dataset
        self.tags: dict[str, None] = {}

    def __getitem__(self, tag: str) -> Json:
        self.tags[tag] = None
        return self._dataset[tag]

    def __iter__(self) -> Iterator[str]:
        raise TypeError("what is read must be asked for by tag")

    def __len__(self) -> int:
        return len(self._dataset)


_Memory: TypeAlias = dict[tuple[str, ...], dict[bytes | None, tuple[Values, tuple[Issue, ...]]]]
"""By the tags that were read: what was found, by the text that stood under them."""


class Readings:
    """Reads instances by a set of rules. It remembers what it saw last, but no result depends on that."""

    def __init__(self, table: Iterable[Rule], kinds: Iterable[Report], context: Context, layout: Layout, judge: Judge):
        self._strict = context.strict
        self._layout = layout
        self._judge = judge
        self._readings: dict[str, list[Reading]] = {place: [] for place in layout.rules}
        for rule in table:
            if rule.sources:
                self._readings[rule.place].append(Reading(rule, context))
        self._reports = [
            (one, f"report {one.name}", _plain(notation.parse(one.key).paths[0]) if one.key else None) for one in kinds
        ]
        self._memory: dict[str, _Memory] = {level: {} for level in ("patient", "study", "series")}
        self._known: WeakValueDictionary[tuple[str, object, bytes], Values] = WeakValueDictionary()

    def read(self, dataset: Json) -> Instance:
        """One DICOM JSON data set, mapped. Raises `errors.InstanceFailed` if it can't be, whatever it is."""
        try:
            dataset = DataSet.of(dataset)
        except values.Invalid as error:
            _fail("uid-missing", error.reason, rule="study.uid", tag=_UIDS["study"])
        study, study_issues = self._shared("study", dataset)
        series, series_issues = self._shared("series", dataset)
        issues: list[Issue] = []
        items = self._items("instance", dataset, issues) | self._layout.fixed["instance"]
        resource = self._layout.write("instance", {}, items)
        self._validate("instance", resource)
        patient, patient_issues = self._shared("patient", dataset)
        reports = tuple(self._reported(dataset, issues)) if self._reports and _CONCEPT in dataset else ()
        issues = [*patient_issues, *study_issues, *series_issues, *issues]
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
            reports=reports,
        )

    def origins(self, dataset: DataSet) -> Iterator[tuple[Rule, tuple[notation.Path, ...], Json]]:
        """For every rule that is about a data set: itself, the paths that lead to a value, and what it makes."""
        places: list[tuple[str, Elements]] = [(level, dataset) for level in ("patient", *_UIDS)]
        for definition, place, _ in self._reports:
            try:
                places += [(place, content) for content in _contents(definition, dataset)]
            except values.Invalid:
                continue
        for place, content in places:
            for reading in self._readings[place]:
                if not reading.applies(dataset):
                    continue
                tried = zip(reading.rule.sources, reading.sources, strict=True)
                text, value = next(
                    ((text, value) for text, source in tried if (value := source(dataset, content, [])) is not None),
                    ("", None),
                )
                paths = notation.parse(text).paths if text else ()
                told = (path for path in paths if _plain(path)(content if _in_content(path) else dataset, []))
                yield reading.rule, tuple(told), value

    def _shared(self, level: str, dataset: DataSet) -> tuple[Values, tuple[Issue, ...]]:
        """The values of a level that instances share; at once where what was read for them before stands here too."""
        memory = self._memory[level]
        for tags, seen in tuple(memory.items()):
            if (known := seen.get(dataset.text(tags))) is not None:
                return known
        touched = _Touched(dataset)
        uid = _uid(touched, level) if level in _UIDS else None
        issues: list[Issue] = []
        items = self._items(level, touched, issues)
        found = self._interned(level, uid or _who(items), items), tuple(issues)
        tags = tuple(touched.tags)
        text = dataset.text(tags)
        if text is not None and len(text) < _LONGEST:
            if len(memory) > _SHAPES:
                memory.clear()
            seen = memory.setdefault(tags, {})
            if len(seen) > _REMEMBERED:
                seen.clear()
            seen[text] = found
        return found

    def _interned(self, level: str, about: str | tuple[str | None, str], items: dict[str, Json]) -> Values:
        try:
            key = orjson.dumps(items, option=orjson.OPT_SORT_KEYS)
        except TypeError:
            _fail("invalid", "a rule made something that is not JSON", stage="validate", rule=next(iter(items)))
        known = self._known.get((level, about, key))
        if known is None:
            self._validate(level, {**_STUBS[level], **self._layout.write(level, {}, items)})
            known = self._known.setdefault((level, about, key), Values(key, about, items))
        return known

    def _items(
        self, place: str, dataset: Elements, issues: list[Issue], content: Elements | None = None
    ) -> dict[str, Json]:
        items = {}
        for reading in self._readings[place]:
            value = reading(dataset, issues, content)
            if value is not None:
                items[reading.rule.id] = value
        return items

    def _reported(self, dataset: DataSet, issues: list[Issue]) -> Iterator[Reported]:
        """The reports that a document brings with it; one that lacks what it needs is an issue and left out."""
        for definition, place, key_of in self._reports:
            try:
                contents = _contents(definition, dataset)
            except values.Invalid as error:
                issues.append(Issue(place, tree.CONTENT, "SQ", error.reason))
                continue
            keys: dict[str, int] = {}
            for index, item in enumerate(contents):
                try:
                    items = self._items(place, dataset, issues, item)
                    content = self._layout.write(place, {}, items | self._layout.fixed[place])
                    self._validate(place, {"resourceType": "Observation", **content})
                except errors.InstanceFailed as failed:
                    reason = f"the report is left out: {failed.kind}"
                    issues.append(Issue(failed.rule or place, failed.tag or "", "", reason))
                    continue
                found = key_of(item, []) if key_of is not None else None
                key = "" if not definition.items else str(index if found is None else found)
                keys[key] = keys.get(key, 0) + 1
                yield Reported(definition.name, key if keys[key] == 1 else f"{key} {keys[key]}", items)

    def _validate(self, place: str, content: dict[str, Json]) -> None:
        for problem in self._judge(place, content):
            rule = self._layout.rule_of(place, problem.element)
            _fail("invalid", f"{place} {problem.element}: {problem.reason}", stage="validate", rule=rule)


def _contents(definition: Report, dataset: DataSet) -> list[Elements]:
    """Where the reports of that kind are in a document: itself, or content items; nowhere in one of another title."""
    if not tree.named(dataset, definition.titles):
        return []
    return [*tree.within(dataset, definition.items)] if definition.items else [dataset]


def _fail(kind: str, message: str, *, stage: str = "map", rule: str | None, tag: str | None = None) -> NoReturn:
    raise errors.InstanceFailed(kind, message, stage=stage, rule=rule, tag=tag)


def _uid(dataset: Elements, level: str) -> str:
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


def _stepped(step: tuple[str, Step], value: Json, context: Context, issues: list[Issue], blank: Issue) -> Json:
    name, function = step
    try:
        return function(value, context)
    except values.Invalid as error:
        reason = error.reason if not _tells(error.reason, value) else f"refused by step {name}"
        issues.append(replace(blank, reason=reason))
        return error.kept
    except Exception as error:  # a site's own step; its text may repeat the value
        issues.append(replace(blank, reason=f"step {name} raised {type(error).__name__}"))
        return None


def _tells(reason: str, value: Json) -> bool:
    """Whether a reason repeats what it is about, against the rule that none does."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(_tells(reason, one) for one in value)
    return value is not None and len(str(value)) > 1 and str(value) in reason
