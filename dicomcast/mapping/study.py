"""Many instances into one resource. No result depends on the order of instances, nor on how they came in groups."""

import dataclasses
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import orjson

from dicomcast import errors
from dicomcast.dicom.values import Json
from dicomcast.mapping import identifiers, steps, times, validation
from dicomcast.mapping.engine import PATIENT, Instance, Issue, Values
from dicomcast.mapping.layout import Layout, by_uid, in_order
from dicomcast.mapping.rules import Context, Rule, Slice

Counts: TypeAlias = "Mapping[Values, int]"  # how many instances say this
Links: TypeAlias = "Mapping[str, Json]"  # what the caller hands in, by name


@dataclass(frozen=True, slots=True)
class Built:
    """A resource, and what had to be settled between instances to make it. Instances' own issues are not repeated."""

    resource: dict[str, Json]
    issues: tuple[Issue, ...] = ()


@dataclass(frozen=True, slots=True)
class Observed:
    """An Observation that an instance of a study brings with it: its report's name, and what finds it again."""

    name: str
    identifier: dict[str, str]
    resource: dict[str, Json]


class _Vote(NamedTuple):
    value: Json
    weight: int


class _Verdict(NamedTuple):
    value: Json
    agreed: bool


def build(layout: Layout, context: Context, base: Json, instances: Iterable[Instance], links: Links) -> Built:
    """The ImagingStudy of these instances alone, or, with `base`, of those in it and these."""
    return _Build(layout, context, links).study(base, _distinct(instances))


def patient_key(instances: Iterable[Instance]) -> tuple[str | None, str]:
    """The identity that most instances carry, the smallest of equals: identifier system (or None) and PatientID."""
    counts = Counter(instance.patient_key for instance in _distinct(instances))
    return min(counts, key=lambda key: (-counts[key], key[0] or "", key[1]))


def patient(layout: Layout, context: Context, instances: Iterable[Instance]) -> Built:
    """The Patient of these instances; other identities among them are an issue, and their demographics don't count."""
    distinct = _distinct(instances)
    key = patient_key(distinct)
    counts = Counter(instance.patient for instance in distinct if instance.patient_key == key)
    issues: list[Issue] = []
    if sum(counts.values()) < len(distinct):
        (rule,) = (rule for rule in layout.rules["patient"] if rule.id == PATIENT)
        issues.append(Issue(rule.id, *rule.origin(), "instances name several patients"))
    items = _Build(layout, context, {}).combined("patient", counts, None, issues)
    items |= layout.fixed["patient"]
    resource = {"resourceType": "Patient", **layout.write("patient", {}, items)}
    _judge(layout, "patient", resource)
    return Built(resource, tuple(issues))


def reports(layout: Layout, instances: list[Instance], links: Links) -> list[Observed]:
    """The Observations of these instances, each identified by SOP Instance UID, kind and key: the same ever after."""
    found: list[Observed] = []
    if not any(instance.reports for instance in instances):
        return found  # most studies, however large
    for instance in sorted(_distinct(instances), key=lambda one: one.sop_uid):
        for reported in instance.reports:
            place = f"report {reported.name}"
            name = uuid.uuid5(uuid.NAMESPACE_OID, f"{instance.sop_uid} {reported.name} {reported.key}")
            identifier = {"system": identifiers.URI, "value": f"urn:uuid:{name}"}
            given = _linked(layout.rules[place], {**links, "identifier": identifier}) | layout.fixed[place]
            resource = {"resourceType": "Observation", **layout.write(place, {}, {**reported.items, **given})}
            _judge(layout, place, resource)
            found.append(Observed(reported.name, identifier, resource))
    return found


def _linked(table: Iterable[Rule], links: Links) -> dict[str, Json]:
    """The values that the caller hands in, by rule id."""
    given = {}
    for rule in table:
        if rule.link is not None:
            link = links[rule.link]
            many = validation.is_list(rule.place, rule.element)
            given[rule.id] = rule.target.items(link) if isinstance(rule.target, Slice) else [link] if many else link
    return given


def _distinct(instances: Iterable[Instance]) -> list[Instance]:
    """Each SOP instance once; of several with one UID the one whose content comes first, wherever it stood."""
    found: dict[tuple[str, str, str], Instance] = {}
    for instance in instances:
        uids = instance.study_uid, instance.series_uid, instance.sop_uid
        other = found.setdefault(uids, instance)
        if other is not instance:
            found[uids] = min(other, instance, key=_content)
    return list(found.values())


def _content(instance: Instance) -> tuple[bytes, ...]:
    reports = orjson.dumps([(one.name, one.key, one.items) for one in instance.reports], option=orjson.OPT_SORT_KEYS)
    levels = instance.patient.key, instance.study.key, instance.series.key
    return orjson.dumps(instance.resource), *levels, reports


def _judge(layout: Layout, level: str, content: dict[str, Json]) -> None:
    for problem in validation.problems(level, content):
        rule = layout.rule_of(level, problem.element)
        message = f"{level} {problem.element}: {problem.reason}"
        raise errors.StudyFailed("invalid", message, stage="validate", rule=rule)


class _Build:
    """One ImagingStudy in the making."""

    def __init__(self, layout: Layout, context: Context, links: Links):
        self._layout = layout
        self._context = context
        self._links = links
        self._issues: list[Issue] = []

    def study(self, base: Json, instances: list[Instance]) -> Built:
        """The study of `instances` alone if `base` is None, else of those in `base` and these."""
        if len({instance.study_uid for instance in instances}) != 1:
            raise ValueError("instances of several studies, or none")
        known = by_uid(base.get("series")) if base else {}
        groups: dict[str, list[Instance]] = {}
        for instance in instances:
            groups.setdefault(instance.series_uid, []).append(instance)
        series = known | {uid: self._series(known.get(uid), group) for uid, group in groups.items()}
        counts = Counter(instance.study for instance in instances)
        items = self.combined("study", counts, base, self._issues)
        content = {"series": in_order(series.values())}
        items = self._completed("study", items, content, base)
        shell = self._layout.write("study", {}, items)
        _judge(self._layout, "study", {"resourceType": "ImagingStudy", **shell})
        resource = self._layout.write("study", base, items) if base else shell
        issues = tuple(sorted(self._issues, key=dataclasses.astuple))
        return Built({"resourceType": "ImagingStudy", **resource, **content}, issues)

    def _series(self, old: dict[str, Json] | None, group: list[Instance]) -> dict[str, Json]:
        known = by_uid(old.get("instance")) if old else {}
        new = {instance.sop_uid: instance.resource for instance in group}
        if known.keys() & new.keys():
            raise errors.Disagreement("instance.uid")
        content = {"instance": in_order([*known.values(), *new.values()])}
        items = self.combined("series", Counter(instance.series for instance in group), old, self._issues)
        items = self._completed("series", items, content, old)
        shell = self._layout.write("series", {}, items)
        _judge(self._layout, "series", shell)
        return (self._layout.write("series", old, items) if old else shell) | content

    def combined(self, level: str, counts: Counts, old: Json, issues: list[Issue]) -> dict[str, Json]:
        """The values that rules read from instances, by rule id; with `old`, of those in it too."""
        items = {}
        for rule in self._layout.rules[level]:
            if not rule.sources:
                continue
            votes = _votes(rule, counts)
            if old is None:
                value, agreed = _POLICIES[rule.policy](votes)
                if not agreed:
                    issues.append(Issue(rule.id, *rule.origin(), "instances disagree"))
            else:
                wanted = [item for vote in votes for item in vote.value] if isinstance(rule.target, Slice) else []
                value = _folded(rule, self._layout.prior(rule, old, wanted), votes)
            if value is None and rule.default is not None:
                value = steps.resolve(rule.default)(None, self._context)
            if value is not None:
                items[rule.id] = value
        return items

    def _completed(self, level: str, items: dict[str, Json], content: Json, old: Json) -> dict[str, Json]:
        """With the values that don't come from instances: constants, settings, links, what is counted."""
        table = self._layout.rules[level]
        given = self._layout.fixed[level] | _linked(table, self._links)
        for rule in table:
            if rule.link is not None:
                if old and isinstance(rule.target, str) and _differs(old.get(rule.element), given[rule.id]):
                    raise errors.Disagreement(rule.id)
            elif rule.derive is not None:
                given[rule.id] = steps.resolve(rule.derive)(content, self._context)
        return items | given


def _differs(old: Json, new: Json) -> bool:
    """Whether two references mean something else: by `reference` where both have one."""
    if isinstance(old, dict) and "reference" in old and "reference" in new:
        return bool(old["reference"] != new["reference"])
    return bool(old != new)


def _votes(rule: Rule, counts: Counts) -> list[_Vote]:
    """What instances say for one rule and how many say it, smallest value first. One without a value has no vote."""
    found: dict[bytes, _Vote] = {}
    for values, count in counts.items():
        value = values.items.get(rule.id)
        if value is not None:
            key = _canonical(value)
            found[key] = _Vote(value, count + (found[key].weight if key in found else 0))
    return sorted(found.values(), key=lambda vote: _rank(vote.value))


def _canonical(value: Json) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _rank(value: Json) -> tuple[float, bytes]:
    """Numbers by size, all else by its canonical JSON."""
    return (value, b"") if isinstance(value, int) else (0, _canonical(value))


def _agree(votes: list[_Vote]) -> _Verdict:
    return _Verdict(max(votes, key=lambda vote: vote.weight).value if votes else None, len(votes) < 2)


def _unanimous(votes: list[_Vote]) -> _Verdict:
    return _Verdict(votes[0].value if len(votes) == 1 else None, len(votes) < 2)


def _union(votes: list[_Vote]) -> _Verdict:
    items = {_canonical(item): item for vote in votes for item in vote.value}
    return _Verdict([items[key] for key in sorted(items)] or None, agreed=True)


def _earliest(votes: list[_Vote]) -> _Verdict:
    return _Verdict(min((vote.value for vote in votes), key=times.moment_of, default=None), agreed=True)


_POLICIES = {"agree": _agree, "unanimous": _unanimous, "union": _union, "earliest": _earliest}


def _folded(rule: Rule, prior: Json, votes: list[_Vote]) -> Json:
    """The value after `votes`, from what was so far: only where that is what all instances together would give."""
    if not votes:
        return prior
    if prior and isinstance(rule.target, Slice) and rule.policy == "union":
        new = [item for vote in votes for item in vote.value]
        prior = [item for item in prior if not any(rule.target.alike(item, one) for one in new)] or None
    if rule.policy in ("earliest", "union"):
        return _POLICIES[rule.policy]([*votes, _Vote(prior, 1)] if prior else votes).value
    value = votes[0].value
    # No value so far may mean that earlier instances were not unanimous.
    if len(votes) > 1 or (prior is None and rule.policy == "unanimous"):
        raise errors.Disagreement(rule.id)
    if prior is not None and not _same(rule, prior, value):
        raise errors.Disagreement(rule.id)
    return value


def _same(rule: Rule, prior: Json, value: Json) -> bool:
    target = rule.target
    if isinstance(target, str):
        return bool(prior == value)
    return len(prior) == len(value) and all(target.alike(old, new) for old, new in zip(prior, value, strict=True))
