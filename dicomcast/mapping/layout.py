"""Owned and foreign: where the values of rules stand in a resource, and how they get there without touching the rest.

Arguments are never changed; results may share parts with them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from dicomcast.dicom.values import Json
from dicomcast.mapping import steps
from dicomcast.mapping.rules import LEVELS, Context, Rule, Slice

Items: TypeAlias = "Mapping[str, Json]"  # values by rule id; the value of a slice is a list of items

RESOURCES = {"ImagingStudy": "study", "Patient": "patient", "Endpoint": "endpoint"}
_CHILDREN = {"study": ("series", "series"), "series": ("instance", "instance")}  # level: element, level of its items


def objects(value: Json) -> list[dict[str, Json]]:
    """The objects in a list; nothing if it is none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def by_uid(parts: Json) -> dict[str, dict[str, Json]]:
    """Series or instances by their uid; those without one are left out, of several with one uid the first counts."""
    found: dict[str, dict[str, Json]] = {}
    for part in objects(parts):
        if isinstance(uid := part.get("uid"), str):
            found.setdefault(uid, part)
    return found


def in_order(parts: Iterable[dict[str, Json]]) -> list[dict[str, Json]]:
    """Series or instances by number, those without one last, then by uid."""
    return sorted(parts, key=lambda part: (part.get("number") is None, part.get("number") or 0, part["uid"]))


class Layout:
    """The elements of every level, and of every kind of report, that rules own."""

    def __init__(self, table: Iterable[Rule], context: Context):
        self._context = context
        self.rules: dict[str, list[Rule]] = {level: [] for level in LEVELS if level != "report"}
        self._elements: dict[str, dict[str, list[Rule]]] = {level: {} for level in self.rules}
        for rule in table:
            self.rules.setdefault(rule.place, []).append(rule)
            self._elements.setdefault(rule.place, {}).setdefault(rule.element, []).append(rule)
        self.fixed = {place: steps.fixed(owned, context) for place, owned in self.rules.items()}
        """By place: the values of rules that say the same for every instance, by rule id. Don't change them."""

    def rule_of(self, level: str, element: str) -> str | None:
        """The id of the (first) rule for an element."""
        found = self._elements[level].get(element.lstrip("_"))
        return found[0].id if found else None

    def write(
        self, level: str, old: Mapping[str, Json], values: Items, *, fills: frozenset[str] | None = None
    ) -> dict[str, Json]:
        """`old` with what our rules own set to `values`, and removed where there is none. Children stay as they are.

        An element of the owner `fill` that is there and not among `fills` (`study.referrer`; None: all are) stays as it
        is, since somebody else may have set it; but where it is a part of what we want, it was ours, and grows.
        """
        new = dict(old)
        for element, owners in self._elements[level].items():
            rule = owners[0]
            theirs = rule.owner == "fill" and element in old and fills is not None and f"{level}.{element}" not in fills
            if theirs and not _part_of(old[element], [values.get(one.id) for one in owners]):
                continue
            if isinstance(rule.target, Slice):
                value = self._list(new.get(element), owners, values) or None
            elif rule.owner == "once" and old:
                continue
            else:
                value = values.get(rule.id)
            _set(new, element, value)
        return new

    def _list(self, old: Json, owners: list[Rule], values: Items) -> list[Json]:
        """Our items of a list element, then the foreign ones; as it was where ours need no change."""
        mine: list[Json] = []
        foreign: list[Json] = []
        slices = [(rule.target, values.get(rule.id) or []) for rule in owners if isinstance(rule.target, Slice)]
        for item in old if isinstance(old, list) else []:
            owned = any(target.ours(item, wanted, self._context) for target, wanted in slices)
            (mine if owned else foreign).append(item)
        new = [_enriched(target, mine, item) for target, wanted in slices for item in wanted]
        return old if new == mine and old else new + foreign

    def read(self, level: str, content: Mapping[str, Json]) -> dict[str, Json]:
        """The values in what `write` made of nothing."""
        found: dict[str, Json] = {}
        for element, owners in self._elements[level].items():
            value = content.get(element)
            if not isinstance(owners[0].target, Slice):
                found[owners[0].id] = value
                continue
            for item in value or ():
                owner = next((rule for rule in owners if _could_be(rule, item)), None)
                if owner is not None:
                    found.setdefault(owner.id, []).append(item)
        return found

    def prior(self, rule: Rule, content: Mapping[str, Json], wanted: list[Json]) -> Json:
        """What an existing part holds for that rule, None for nothing: ours beside `wanted`, else what may be ours."""
        value = content.get(rule.element)
        target = rule.target
        if not isinstance(target, Slice):
            return value
        items = objects(value)
        ours = [item for item in items if target.ours(item, wanted, self._context)]
        return ours or [item for item in items if target.could_be(item)] or None

    def merge(
        self, existing: Mapping[str, Json], wanted: Mapping[str, Json], level: str, *, fills: frozenset[str] | None
    ) -> dict[str, Json]:
        """What we own as in `wanted`, the rest as in `existing`, for a part and its children."""
        new = self.write(level, existing, self.read(level, wanted), fills=fills)
        if level in _CHILDREN:
            element, child = _CHILDREN[level]
            known = by_uid(existing.get(element))
            merged = [
                self._child(known.get(part["uid"]), part, child, fills=fills) for part in wanted.get(element) or ()
            ]
            _set(new, element, merged or None)
        return new

    def _child(
        self, old: dict[str, Json] | None, part: dict[str, Json], level: str, *, fills: frozenset[str] | None
    ) -> dict[str, Json]:
        if old is None or old == part:
            return part
        return self.merge(old, part, level, fills=fills)

    def foreign(self, content: Mapping[str, Json], level: str) -> Iterator[str]:
        """The elements in a part and its children that hold something that no rule of ours can have written."""
        element, child = _CHILDREN.get(level, ("", ""))
        for name, value in content.items():
            owners = self._elements[level].get(name)
            if name == element:
                for part in value if isinstance(value, list) else [value]:
                    yield from self.foreign(part, child) if isinstance(part, dict) else (name,)
            elif owners is None or not _all_ours(owners, value):
                yield name


def _all_ours(owners: list[Rule], value: Json) -> bool:
    if not isinstance(owners[0].target, Slice):
        return True
    if not isinstance(value, list):
        return False
    counts = dict.fromkeys((rule.id for rule in owners), 0)
    for item in value:
        owner = next((rule for rule in owners if _could_be(rule, item)), None)
        if owner is None:
            return False
        counts[owner.id] += 1
    bounded = (rule for rule in owners if rule.policy != "union" and isinstance(rule.target, Slice))
    return all(counts[rule.id] <= rule.target.most for rule in bounded)  # type: ignore[union-attr]


def _part_of(old: Json, wanted: list[Json]) -> bool:
    """Whether a list holds nothing but items that we want."""
    items = [item for value in wanted if isinstance(value, list) for item in value]
    return isinstance(old, list) and all(item in items for item in old)


def _could_be(rule: Rule, item: Json) -> bool:
    return isinstance(rule.target, Slice) and rule.target.could_be(item)


def _enriched(target: Slice, mine: list[Json], item: Json) -> Json:
    """Our item, with what others added to the same one."""
    if not target.keys:
        return item
    return next((old | item for old in mine if target.alike(old, item)), item)


def _set(content: dict[str, Json], element: str, value: Json) -> None:
    """Sets or removes an element. What `_element` says of a primitive goes with the value that it was said of."""
    if value is None:
        content.pop(element, None)
        content.pop(f"_{element}", None)
    elif element not in content or content[element] != value:
        content[element] = value
        content.pop(f"_{element}", None)
