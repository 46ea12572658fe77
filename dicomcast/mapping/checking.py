"""What is wrong with a rule, found at start: names, arguments, types and cardinality, before any data set is read."""

import difflib
import json
from collections.abc import Iterable, Iterator

from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping import notation, rules, steps, validation
from dicomcast.mapping.rules import Context, Report, Rule, Slice

_TEXTS = frozenset(("String", "Code", "Uri", "Url", "Canonical", "Oid", "Id", "Markdown"))
# Which FHIR primitives a value fits as it is read, by the name of its reader; all others need a step.
_FITS = {
    "text": _TEXTS,
    "uid": _TEXTS,
    "date": frozenset(("Date", "DateTime")),
    "integer": frozenset(("Integer", "UnsignedInt", "PositiveInt", "Decimal")),
    "number": frozenset(("Decimal",)),
}


def near(name: str, known: Iterable[str]) -> str:
    """What may have been meant."""
    found = difflib.get_close_matches(name, [*known], n=1)
    return f"; is it {found[0]}?" if found else ""


def problems(rule: Rule, reports: dict[str, Report]) -> Iterator[str]:
    """Everything that is wrong with one rule, each with its id."""
    found = [*_of_origin(rule), *_of_place(rule, reports)]
    for problem in found or _of_types(rule):
        yield f"rule {rule.id}: {problem}"


def of_report(report: Report, table: Iterable[Rule]) -> Iterator[str]:
    """What is wrong with a kind of report, whose rules are in the table."""
    if not isinstance(report.titles, tuple) or not isinstance(report.items, tuple):
        yield f"report {report.name}: titles and items must be tuples"
    own = [rule for rule in table if rule.report == report.name]
    if lacking := {"identifier", "subject", "study"} - {rule.link for rule in own if rule.link}:
        yield f"report {report.name}: no rule has the link {', '.join(sorted(lacking))}"
    if lacking := {"status", "code"} - {rule.element for rule in own}:
        yield f"report {report.name}: no rule for {', '.join(sorted(lacking))}"
    if report.key is not None:
        for problem in _of_source(report.key):
            yield f"report {report.name}: {problem}"


def mixed(table: Iterable[Rule]) -> Iterator[tuple[Rule, str]]:
    """Two rules of one element must own slices of it, and in the same way."""
    owners: dict[tuple[str, str], Rule] = {}
    for rule in table:
        other = owners.setdefault((rule.place, rule.element), rule)
        if other is rule:
            continue
        if not (isinstance(rule.target, Slice) and isinstance(other.target, Slice)):
            mend = f"replace it by its id, or disable {other.id}"
            yield rule, f"rule {rule.id}: {other.id} owns {rule.place} {rule.element} too: {mend}"
        elif rule.owner != other.owner:
            yield rule, f"rule {rule.id}: {other.id} is of owner {other.owner}, and {rule.element} is one element"


def _of_origin(rule: Rule) -> Iterator[str]:
    if len(rule.id) > 64:
        yield "its id is longer than 64 characters"
    if not isinstance(rule.sources, tuple) or not isinstance(rule.steps, tuple):
        yield "sources and steps must be tuples"
        return
    origins = (rule.sources or None, rule.constant, rule.setting, rule.derive, rule.link)
    if sum(origin is not None for origin in origins) != 1:
        yield "needs exactly one of sources, constant, setting, derive, link"
    try:
        json.dumps(rule.constant)
    except TypeError:
        yield "constant is not JSON; a date in YAML needs quotes"
    for text in (*rule.sources, *rule.when):
        yield from _of_source(text)
    yield from _of_condition(rule)
    for step in (*rule.steps, rule.derive, rule.default):
        if isinstance(step, str):
            yield from _of_step(step)
        elif step is not None and not callable(step):
            yield f"{step!r} is no step"
    if rule.derive is not None and rule.level not in ("study", "series"):
        yield "derive is for study and series"
    if rule.setting is not None and rule.setting not in Context.__dataclass_fields__:
        yield f"unknown setting {rule.setting}"
    if rule.link is not None and rule.link not in rules.LINKS.get(rule.level, ()):
        yield f"{rule.level} has no link {rule.link}"


def _of_condition(rule: Rule) -> Iterator[str]:
    for text, texts in rule.when.items():
        if not isinstance(texts, tuple) or not all(isinstance(one, str) for one in texts):
            yield f"when {text}: needs a tuple of texts"
        try:
            source = notation.parse(text)
        except notation.Unreadable:
            continue  # said already
        if len(source.paths) > 1 or source.steps:
            yield f"when {text}: is about one attribute, without steps"
    if rule.when and rule.required:
        yield "what is required of every instance has no condition"


def _of_source(text: str) -> Iterator[str]:
    try:
        source = notation.parse(text)
    except notation.Unreadable as error:
        yield f"source {text}: {error}"
        return
    for path in source.paths:
        for problem in notation.problems(path):
            word = problem.rpartition(" ")[2]
            yield problem + (near(word, values.keywords()) if problem.startswith("unknown") else "")
    for step in source.steps:
        yield from _of_call(step)


def _of_step(text: str) -> Iterator[str]:
    try:
        yield from _of_call(notation.call(text))
    except notation.Unreadable as error:
        yield f"step {text}: {error}"


def _of_call(call: notation.Call) -> Iterator[str]:
    known = steps.STEPS.get(call.name)
    if known is None:
        yield f"unknown step {call.name}{near(call.name, steps.STEPS)}"
        return
    least, most = known.arguments()
    if not least <= len(call.arguments) <= most:
        yield f"step {call.name} takes {least if least == most else f'{least} or more'} arguments"
    if call.name == "lookup" and len(call.arguments) % 2:
        yield "step lookup needs pairs"
    if call.name in ("identifier", "coding") and call.arguments and not values.is_uri(call.arguments[0]):
        yield f"step {call.name} needs an absolute URI"


def _of_place(rule: Rule, reports: dict[str, Report]) -> Iterator[str]:
    for value, allowed, what in (
        (rule.level, rules.LEVELS, "level"),
        (rule.policy, rules.POLICIES, "policy"),
        (rule.owner, rules.OWNERS, "owner"),
    ):
        if value not in allowed:
            yield f"unknown {what} {value}"
    if rule.level not in rules.LEVELS:
        return
    if (rule.level == "report") != (rule.report is not None) or (rule.report and rule.report not in reports):
        yield f"unknown report {rule.report}" if rule.report else "a rule of level report names its report"
        return
    target = rule.target
    known = validation.elements(rule.place)
    if rule.element not in known:
        yield f"unknown target element {rule.element}{near(rule.element, known)}"
    elif isinstance(target, Slice) and not validation.is_list(rule.place, rule.element):
        yield f"{rule.element} is one element and no list: write `target: {rule.element}`"
    elif rule.policy == "union" and not validation.is_list(rule.place, rule.element):
        yield f"policy union needs a list, and {rule.element} is one element"
    elif isinstance(target, Slice):
        yield from _of_slice(rule.place, target)
        if rule.owner == "once":
            yield "owner once is for whole elements"
    if rule.constant is not None and (reason := validation.misfit(rule.place, rule.element, _constant(rule))):
        yield f"its constant does not fit {rule.element}: {reason}"


def _constant(rule: Rule) -> Json:
    return rule.target.items(rule.constant) if isinstance(rule.target, Slice) else rule.constant


def _of_slice(place: str, target: Slice) -> Iterator[str]:
    if target.default not in (None, *Context.__dataclass_fields__):
        yield f"unknown setting {target.default}"
    if not target.where and target.by is None:
        yield f"its target would own all of {target.element}: say which items are its own, by where"
    for path in (*target.where, *([] if target.at is None else [target.at])):
        if validation.type_of(place, target.element, path.partition(".")[0]) is None:
            yield f"{target.element} has no element {path.partition('.')[0]}"
    if target.at is not None and any("." in path for path in target.where):
        yield "with at, where names elements of the item itself"


def _of_types(rule: Rule) -> Iterator[str]:
    """Whether what a source gives is what its steps take, and what comes out is of the element's type."""
    at = rule.target.at if isinstance(rule.target, Slice) else None
    wanted = validation.type_of(rule.place, rule.element, at)
    for text in rule.sources:
        source = notation.parse(text)
        kind = _kind(source)
        for step in (*source.steps, *rule.steps):
            if not isinstance(step, str | notation.Call):
                kind = "any"
                continue
            call = notation.call(step) if isinstance(step, str) else step
            known = steps.STEPS[call.name]
            if not _takes(known.takes, kind):
                yield f"step {call.name} takes {known.takes}, and {text} gives {kind}"
                return
            kind = known.gives
        given, many = kind.removesuffix("*"), kind.endswith("*")
        if given not in ("any", wanted) and not (wanted in _FITS.get(given, ()) or {given, wanted or ""} <= _TEXTS):
            yield f"{text} gives {given}, and {rule.element}{f'.{at}' if at else ''} is {wanted}"
        elif many and not validation.is_list(rule.place, rule.element):
            yield f"{text} gives several values, and {rule.element} is one"


def _kind(source: notation.Source) -> str:
    if len(source.paths) > 1:
        return "several"
    (path,) = source.paths
    kind = path[-1].read.__name__
    many = any(part.every for part in path) and kind not in ("items", "all_items")
    return {"anything": "any", "all_items": "items"}.get(kind, kind) + "*" * many


def _takes(wanted: str, kind: str) -> bool:
    return kind == "any" or any(one in ("any", kind) or (one == "text" and kind in _TEXTS) for one in wanted.split("|"))
