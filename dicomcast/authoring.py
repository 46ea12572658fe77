"""What authors of mappings use: map, explain, list, show, check, test. Needs no service and no database.

A module or an overlay goes by its name: a shipped module's, a dotted one, or a file's (`.py`, `.yaml`).
"""

import ast
import importlib
import inspect
import itertools
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from dicomcast import app, decimals, errors, mapping, settings
from dicomcast.dicom import values
from dicomcast.fhir import resources
from dicomcast.mapping import loading, notation, steps
from dicomcast.mapping.rules import LEVELS, Rule, Slice, name_of

Json = Any

_TYPES = "Patient ImagingStudy ImagingStudy.series ImagingStudy.series.instance Observation Endpoint"
_ELEMENTS = dict(zip(LEVELS, _TYPES.split(), strict=True))
_COMBINED = ("patient", "study", "series")  # where several instances become one value
_YAML = (".yaml", ".yml")
_FILES = (".py", *_YAML)
_ELSE = " / else "
_CODE = ("id", "element", "source", "steps", "when")  # shown as code
_OVERLAYS = (
    "A file such as this one, named in `mapping.overlays`, adds, replaces and disables rules. Its rules have the fields"
    " named above; `dicomcast mappings check` says what is wrong with them, `dicomcast map --explain` what they find,"
    " and `dicomcast mappings test` whether they still give what they gave."
)
_OVERLAY = """\
rules:
  - id: series.protocol            # a rule of this id is replaced, a new one added
    level: series
    target: {element: extension, where: {url: "https://hospital.example/protocol"}, at: valueString}
    source: ProtocolName
    when: {Modality: [CT, MR]}     # only for these; a value such as "NO" needs quotes
    policy: unanimous              # all instances must agree, else there is no element
  - id: series.description
    level: series
    target: description            # an element that does not repeat is its name
    source: [SeriesDescription, ProtocolName]   # the first that gives a value wins
  - id: study.location
    level: study
    target: location
    constant: {display: North Clinic}
disable: [study.referrer]          # rules by id, of whatever was loaded before
"""


def rules(options: settings.Settings, more: Sequence[str] = ()) -> mapping.Mapping:
    """What the settings name, and then these. Raises `Misconfigured` with every problem, each with file and line."""
    names = {"modules": tuple(named(options, more)), "overlays": ()}
    return app.rules(options.model_copy(update={"mapping": options.mapping.model_copy(update=names)}))


def named(options: settings.Settings, more: Sequence[str] = ()) -> list[str]:
    """Modules and overlays that the settings name, in order, and then those of these that they don't."""
    found: dict[str, str] = {}
    for name in (*options.mapping.modules, *options.mapping.overlays, *more):
        found.setdefault(_key(name), name)
    return list(found.values())


def _key(name: str) -> str:
    """What tells modules and overlays apart: a file may be written in several ways."""
    return str(Path(name).resolve()) if name.endswith(_FILES) else name


# map ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unmapped:
    """Something that could not be mapped: where it came from, UIDs, rule and tag."""

    source: str
    message: str
    kind: str
    study_uid: str | None = None
    sop_uid: str | None = None
    rule: str | None = None
    tag: str | None = None


def map_paths(compiled: mapping.Mapping, paths: Sequence[str]) -> tuple[Json, list[Unmapped]]:
    """The FHIR resources of DICOM files, folders, DICOM JSON and change feed pages, as a `collection` Bundle."""
    unmapped: list[Unmapped] = []
    studies: dict[str, list[mapping.Instance]] = {}
    for source, dataset in _datasets(paths, unmapped):
        if (one := _read(compiled, source, dataset, unmapped)) is not None:
            studies.setdefault(one.study_uid, []).append(one)
    entries: dict[str, Json] = {}
    for study_uid in sorted(studies):
        try:
            entries |= _resources(compiled, study_uid, studies[study_uid])
        except errors.StudyFailed as failed:
            unmapped.append(Unmapped("", str(failed), failed.kind, study_uid, None, failed.rule, failed.tag))
    bundle: dict[str, Json] = {"resourceType": "Bundle", "type": "collection"}
    if entries:
        bundle["entry"] = [{"fullUrl": url, "resource": resource} for url, resource in entries.items()]
    return bundle, unmapped


def printed(bundle: Json) -> bytes:
    """A Bundle as `map` prints it."""
    return decimals.dumps(bundle, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _read(compiled: mapping.Mapping, source: str, dataset: Json, unmapped: list[Unmapped]) -> mapping.Instance | None:
    try:
        return compiled.read(dataset)
    except errors.InstanceFailed as failed:
        study_uid, sop_uid = (values.uid_in(dataset, tag) for tag in ("0020000D", "00080018"))
        unmapped.append(Unmapped(source, str(failed), failed.kind, study_uid, sop_uid, failed.rule, failed.tag))
        return None


def _resources(compiled: mapping.Mapping, study_uid: str, instances: list[mapping.Instance]) -> dict[str, Json]:
    """Endpoint, Patient, ImagingStudy and Observations of one study, by full URL."""
    endpoint, patient = compiled.endpoint(), compiled.patient(instances).resource
    identity = "|".join(str(part) for part in compiled.patient_key(instances))
    about = (
        ("Endpoint", endpoint["identifier"][0]["value"]),
        ("Patient", identity),
        ("ImagingStudy", f"urn:oid:{study_uid}"),
    )
    urls = [_url(kind, what) for kind, what in about]
    to_endpoint, subject, to_study = ({"reference": url} for url in urls)
    study = compiled.study(instances, subject=subject, endpoint=to_endpoint).resource
    observed = compiled.reports(instances, subject=subject, study=to_study)
    observations = {_url("Observation", one.identifier["value"]): one.resource for one in observed}
    return dict(zip(urls, (endpoint, patient, study), strict=True)) | observations


def _url(kind: str, identity: str) -> str:
    return f"urn:uuid:{resources.assigned_id(kind, identity)}"


def _datasets(paths: Sequence[str], unmapped: list[Unmapped]) -> Iterator[tuple[str, Json]]:
    """DICOM JSON of everything that was named; what can't be read goes to `unmapped`."""
    from dicomcast.dicom import files

    for path, is_named in _files(paths):
        form = "JSON" if path == "-" or path.endswith(".json") else "DICOM"
        try:
            found = _in_json(path) if form == "JSON" else [files.metadata(files.read(Path(path)))]
            yield from ((path, dataset) for dataset in found)
        except (OSError, ValueError) as unreadable:
            if form == "DICOM" and not is_named and isinstance(unreadable, ValueError):
                continue  # a folder may hold more than DICOM
            unmapped.append(Unmapped(path, f"can't be read as {form} ({type(unreadable).__name__})", "unreadable"))


def _files(paths: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Every file, and whether it was named itself; a folder's DICOMDIR is its index, not an instance."""
    for path in paths:
        if path != "-" and Path(path).is_dir():
            found = sorted(one for one in Path(path).rglob("*") if one.is_file() and one.name != "DICOMDIR")
            yield from ((str(one), False) for one in found)
        else:
            yield path, True


def _in_json(path: str) -> Iterator[Json]:
    """One DICOM JSON object, an array of them, or a change feed page (or entry) that carries them as `metadata`."""
    value = orjson.loads(sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes())
    for one in value if isinstance(value, list) else [value]:
        fields = {str(name).lower(): content for name, content in one.items()} if isinstance(one, dict) else {}
        if "sequence" not in fields:
            yield one
        elif fields.get("metadata"):
            yield fields["metadata"]


# explain --------------------------------------------------------------------------------------------------------------


class Explained(NamedTuple):
    """What rules find in instances, which find nothing, what is left out or guessed, and what can't be mapped."""

    found: list[dict[str, Json]]
    nothing: list[tuple[str | None, str]]
    issues: list[tuple[str | None, mapping.Issue]]
    unmapped: list[Unmapped]


def explain(compiled: mapping.Mapping, paths: Sequence[str], *, show_values: bool = False) -> Explained:
    """A row for each instance and each rule that finds something in it; its FHIR value only with `show_values`."""
    told = Explained([], [], [], [])
    for source, dataset in _datasets(paths, told.unmapped):
        sop_uid = values.uid_in(dataset, "00080018")
        if (one := _read(compiled, source, dataset, told.unmapped)) is not None:
            told.issues.extend((sop_uid, issue) for issue in one.issues)
        try:
            for rule, read, value in compiled.explain(dataset):
                if value is None:
                    told.nothing.append((sop_uid, rule.id))
                    continue
                tag = read[0][0].tag if read else ""
                row = {
                    "sop_instance_uid": sop_uid,
                    "element": f"{_ELEMENTS[rule.level]}.{target(rule)}",
                    "rule": rule.id,
                    "tag": tag,
                    "vr": _vr(dataset, tag) if tag else "",
                    "source": ", ".join(" > ".join(map(str, path)) for path in read),
                }
                told.found.append(row | ({"value": value} if show_values else {}))
        except values.Invalid:
            pass  # what is no data set is among the unmapped
    return told


def _vr(dataset: Json, tag: str) -> str:
    """The VR that the data set says; the dictionary's where it says none."""
    pattern = re.compile(tag.replace("xx", "[0-9A-F]{2}"))
    found = {
        str(dataset[key].get("vr")) for key in dataset if pattern.fullmatch(key) and isinstance(dataset[key], dict)
    }
    said = found.pop() if len(found) == 1 else ""
    return said if re.fullmatch("[A-Z]{2}", said) else "UN" if "x" in tag else values.vr_of(tag)


# list, show, check ----------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """What one module or overlay holds."""

    name: str
    rules: list[Rule]
    reports: list[mapping.Report]

    @property
    def about(self) -> str:
        """Its docstring, or the comment that an overlay begins with."""
        text = (path := _path(self.name)).read_text(encoding="utf-8")
        if path.suffix not in _YAML:
            return ast.get_docstring(ast.parse(text)) or ""
        return "\n".join(
            line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
        )


def shipped() -> list[str]:
    """The modules that come with dicomcast: first those that are in use by default, then the others by name."""
    package = importlib.import_module(loading.SHIPPED)
    first = settings.MappingOptions().modules
    found = [name for _, name, _ in pkgutil.iter_modules(package.__path__) if _has_rules(name)]
    return sorted(found, key=lambda name: (first.index(name) if name in first else len(first), name))


def _has_rules(name: str) -> bool:
    return hasattr(importlib.import_module(f"{loading.SHIPPED}.{name}"), "RULES")


def sections(options: settings.Settings, names: Sequence[str] = (), *, checked: bool = True) -> list[Section]:
    """What each of these holds, loaded after what the settings name; without `names`, the rules in effect.

    Raises `Misconfigured` with every problem of all that is loaded, unless told not to check.
    """
    draft = loading.Draft()
    loaded = {}
    for name in named(options, names):
        draft.add(name)
        loaded[_key(name)] = _section(draft, name)
    if checked and (problems := list(draft.problems())):
        raise errors.Misconfigured(problems)
    return [loaded[_key(name)] for name in names] or [_section(draft, one.name) for one in loaded.values()]


def _section(draft: loading.Draft, name: str) -> Section:
    held = [rule for rule in draft.rules.values() if draft.places[rule.id].rpartition(":")[0] == name]
    used = {rule.report for rule in held}
    return Section(name, held, [report for report in draft.reports.values() if report.name in used])


def _path(name: str) -> Path:
    """The file of a module or an overlay."""
    if name.endswith(_FILES):
        return Path(name)
    module = importlib.import_module(name if "." in name else f"{loading.SHIPPED}.{name}")
    return Path(inspect.getfile(module))


def listed(options: settings.Settings) -> list[dict[str, Json]]:
    """A row for each shipped module and for whatever else the settings name. Raises `Misconfigured` as loading does."""
    used = [one.name for one in sections(options)]
    rest = [name for name in shipped() if name not in used]
    return [
        {
            "name": one.name,
            "kind": "overlay" if one.name.endswith(_YAML) else "module" if "." in one.name else "shipped",
            "in_use": one.name in used,
            "position": used.index(one.name) + 1 if one.name in used else None,
            "rules": len(one.rules),
            "about": one.about.partition("\n")[0],
        }
        for one in sections(options, [*used, *rest], checked=False)
    ]


def target(rule: Rule) -> str:
    """What a rule writes: `status`, `identifier[system=urn:dicom:uid]`, `extension[url=https://...].valueString`."""
    part = rule.target
    if not isinstance(part, Slice):
        return part
    which = ", ".join(f"{path}={text}" for path, text in part.where.items()) or (f"by {part.by}" if part.by else "")
    return f"{part.element}[{which}]" + (f".{part.at}" if part.at else "")


def row(rule: Rule) -> dict[str, str]:
    """A rule in words; what says nothing about it is empty."""
    constant = None if rule.constant is None else decimals.dumps(rule.constant).decode()
    derived = name_of(rule.derive) if rule.derive else None
    origins = (("constant", constant), ("setting", rule.setting), ("derive", derived), ("link", rule.link))
    default = f", else {name_of(rule.default)}" if rule.default else ""
    return {
        "id": rule.id,
        "level": rule.place,
        "element": target(rule),
        "source": _ELSE.join(rule.sources) or next(f"{kind} {text}" for kind, text in origins if text),
        "steps": " | ".join(map(name_of, rule.steps)),
        "policy": rule.policy if rule.sources and rule.level in _COMBINED else "",
        "owner": rule.owner,
        "required": f"yes{default}" if rule.required else default[2:],
        "when": "; ".join(f"{source} = {' or '.join(texts)}" for source, texts in rule.when.items()),
    }


COLUMNS = ("id", "level", "element", "source", "steps", "policy", "owner", "required", "when")


def check(options: settings.Settings, names: Sequence[str]) -> dict[str, Json]:
    """What comes of the settings and these: `modules`, `rules` (how many), `digest`. Raises `Misconfigured`."""
    compiled = rules(options, names)
    return {"modules": named(options, names), "rules": len(compiled.rules), "digest": compiled.digest}


# Documentation --------------------------------------------------------------------------------------------------------


def markdown(found: Sequence[Section], command: str) -> str:
    """These modules and overlays as a page: their rules by level, and all that one needs to write an overlay."""
    parts = [f"<!-- Generated by `{command}`: change the rules, not this page. -->", "# Mapping rules"]
    for section in found:
        parts += [f"## {section.name}", section.about, *_levels(section)]
    parts += ["## How a rule is written", inspect.getdoc(Rule) or "", "A slice of a list element:"]
    parts += [inspect.getdoc(Slice) or "", "A report:", inspect.getdoc(mapping.Report) or ""]
    parts += ["## How a source is written", inspect.getdoc(notation) or ""]
    parts += ["## Steps", inspect.getdoc(steps.Registered) or ""]
    parts += [_table(("step", "takes", "gives", "what it does"), map(_step, steps.STEPS.items()))]
    parts += ["## Overlays", _OVERLAYS, f"```yaml\n{_OVERLAY}```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def _levels(section: Section) -> Iterator[str]:
    reports = {f"report {one.name}": one for one in section.reports}
    for place in (*LEVELS, *reports):
        rows = [row(rule) for rule in section.rules if rule.place == place]
        if not rows:
            continue
        level, _, _ = place.partition(" ")
        yield f"### {place} ({_ELEMENTS[level]})"
        if place in reports:
            one = reports[place]
            items = f", one for each content item {' or '.join(one.items)} in it" if one.items else ""
            yield f"Of a document whose title is {' or '.join(one.titles)} (DCM){items}."
        names = [name for name in COLUMNS if name != "level" and any(one[name] for one in rows)]
        yield _table(names, ([_code(one[name]) if name in _CODE else one[name] for name in names] for one in rows))


def _code(text: str) -> str:
    return f"`{text.replace(_ELSE, f'`{_ELSE}`')}`" if text else ""


def _step(known: tuple[str, steps.Registered]) -> list[str]:
    name, step = known
    arguments = ", ".join(map(str, list(inspect.signature(step.function).parameters.values())[2:]))
    about = (inspect.getdoc(step.function) or "").partition("\n\n")[0].replace("\n", " ")
    called = f"{name}({arguments})".replace("()", "").replace(": str", "")
    return [_code(called), _code(step.takes), _code(step.gives), about]


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in cells] for cells in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# test -----------------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A place (`ImagingStudy.series[0].bodySite`) that is `missing`, `unexpected` or `differs`, or the golden file."""

    place: str
    what: str
    wanted: Json = None
    found: Json = None


class Case(NamedTuple):
    """A golden case: `pass`, `fail`, or what was done to what it expects, `new` or `updated`."""

    name: str
    verdict: str
    differences: list[Difference]
    unmapped: list[Unmapped]


def cases(options: settings.Settings, name: str, *, update: bool = False) -> list[Case]:
    """Try the cases beside a module or an overlay: whether `map` gives NAME.fhir.json for NAME.dicom.json, or NAME.dcm.

    With `update`, write what it gives where that is new or differs. Raises `Misconfigured`, also where there are none.
    """
    compiled = rules(options, [name])
    folder = _path(name).with_suffix(".cases")
    given = sorted((*folder.glob("*.dicom.json"), *folder.glob("*.dcm")))
    if not given:
        raise errors.Misconfigured([f"{folder}: has no cases: put DICOM there, as NAME.dicom.json or NAME.dcm"])
    try:
        return [_tried(compiled, one, update=update) for one in given]
    except OSError as refused:
        raise errors.Misconfigured([f"{refused.filename}: {refused.strerror}"]) from None


def _tried(compiled: mapping.Mapping, given: Path, *, update: bool) -> Case:
    name = given.name.removesuffix(".dcm").removesuffix(".dicom.json")
    golden = given.with_name(f"{name}.fhir.json")
    bundle, unmapped = map_paths(compiled, [str(given)])
    if any(one.kind == "unreadable" for one in unmapped):
        return Case(name, "fail", [Difference(given.name, "unreadable")], unmapped)
    content = printed(bundle)
    try:
        differences = list(_differing("", _parts(golden.read_bytes()), _parts(content)))
    except FileNotFoundError:
        differences = [Difference(golden.name, "missing")]
    except (ValueError, TypeError, KeyError, AttributeError):
        differences = [Difference(golden.name, "unreadable")]
    if not (update and differences):
        return Case(name, "fail" if differences else "pass", differences, unmapped)
    verdict = "updated" if golden.exists() else "new"
    golden.write_bytes(content)
    return Case(name, verdict, [], unmapped)


def _parts(content: bytes) -> dict[str, Json]:
    """A Bundle by what is in it: `Patient`, `ImagingStudy`, `ImagingStudy[1]`; `Bundle` is its shell."""
    bundle = decimals.loads(content)
    found: dict[str, Json] = {"Bundle": {name: value for name, value in bundle.items() if name != "entry"}}
    counts: Counter[str] = Counter()
    for entry in bundle.get("entry", ()):
        resource = entry["resource"]
        kind = resource["resourceType"]
        found[f"{kind}[{counts[kind]}]" if counts[kind] else kind] = {"fullUrl": entry["fullUrl"], **resource}
        counts[kind] += 1
    return found


def _differing(place: str, wanted: Json, found: Json) -> Iterator[Difference]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for name in {**wanted, **found}:
            yield from _differing(f"{place}.{name}" if place else name, wanted.get(name), found.get(name))
    elif isinstance(wanted, list) and isinstance(found, list):
        for index, (one, other) in enumerate(itertools.zip_longest(wanted, found)):
            yield from _differing(f"{place}[{index}]", one, other)
    elif type(wanted) is not type(found) or wanted != found:
        what = "unexpected" if wanted is None else "missing" if found is None else "differs"
        yield Difference(place, what, wanted, found)
