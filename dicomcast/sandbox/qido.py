"""QIDO-RS of the sandbox: which attributes may be searched where, how they match, and what is returned.

Exact matches, ranges of dates and fuzzy person names only: `*` and `?` are characters like others, as in the service.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pydicom import datadict

from dicomcast.sandbox import archive, validation

Json = Any  # a JSON value

_LEVELS = ("study", "series", "instance")
_STUDY, _SERIES, _SOP = "0020000D", "0020000E", "00080018"
_MODALITIES, _STUDY_INSTANCES, _SERIES_INSTANCES = "00080061", "00201208", "00201209"
_COMPUTED = (_MODALITIES, _STUDY_INSTANCES, _SERIES_INSTANCES)
_COLUMNS = {
    _STUDY: (0, "s.study"),
    **{tag: (0, f's."{tag}"') for tag in archive.STUDY_TAGS},
    _MODALITIES: (0, ""),
    _SERIES: (1, "r.series"),
    # 00081090 is ManufacturerModelName, 00400244 PerformedProcedureStepStartDate.
    **{tag: (1, f'r."{tag}"') for tag in archive.SERIES_TAGS},
    _SOP: (2, "i.sop"),
}
_INDEXED = {_STUDY, _SERIES, _SOP, *archive.STUDY_TAGS, *archive.SERIES_TAGS}


def tags(text: str) -> list[str]:
    """Tags as written in tables: 8 hex digits each, with spaces between."""
    return text.split()


_V1 = (
    tags(
        "00080005 00080020 00080030 00080050 00080056 00080090 00080201 00100010 00100020 00100030 00100040 0020000D "
        "00200010"
    ),
    tags("00080005 00080060 00080201 0008103E 0020000E 00400244 00400245 00400275"),
    tags("00080005 00080016 00080018 00080056 00080201 00200013 00280008 00280010 00280011 00280100"),
)
_V2 = (
    tags("00080020 00080050 00080090 00081030 00100010 00100020 00100030 0020000D"),
    tags("00080060 00081090 0020000E 00400244"),
    ["00080018"],
)
_ALL: tuple[list[str], ...] = (
    tags("00080063 00081030 00081032 00081060 00081080 00081110 00101010 00101020 00101030 00102180 001021B0"),
    tags("00080021 00080031 00200011 00200060"),
    [],
)


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed search: SQL conditions over the index with their values, and the tags to return."""

    level: str
    conditions: Sequence[str]
    values: Sequence[str]
    tags: frozenset[str]
    limit: int
    offset: int


def parse(
    pairs: Iterable[tuple[str, str]], level: str, *, version: int, study: str | None, series: str | None
) -> Query:
    """The query of a request; ValueError says what the service would not take."""
    given = [(name, value.strip()) for name, value in pairs]
    options = {name.lower(): value for name, value in given if name.lower() in ("limit", "offset", "fuzzymatching")}
    fields = [part.strip() for name, value in given if name.lower() == "includefield" for part in value.split(",")]
    fuzzy = options.get("fuzzymatching", "false").lower()
    if fuzzy not in ("true", "false"):
        raise ValueError("fuzzymatching must be true or false")
    first = 0 if study is None else 1 if series is None else 2
    conditions, values, matched = (
        ["s.study = ?"] if study else [],
        [study] if study else [],
        {_STUDY} if study else set(),
    )
    if series:
        conditions, values, matched = [*conditions, "r.series = ?"], [*values, series], {*matched, _SERIES}
    for name, value in given:
        if name.lower() in ("limit", "offset", "fuzzymatching", "includefield"):
            continue
        tag = _searchable(name, first, _LEVELS.index(level))
        if tag in matched or not value:
            raise ValueError(f"The attribute {name} is given twice, or has no value.")
        matched.add(tag)
        condition, wanted = _condition(tag, value, fuzzy=fuzzy == "true")
        conditions.append(condition)
        values.extend(wanted)
    return Query(
        level,
        conditions,
        values,
        frozenset(matched | _returned(fields, first, _LEVELS.index(level), version)),
        _bounded(options, "limit", 100, 1, 200),
        _bounded(options, "offset", 0, 0, 2**31),
    )


def _bounded(options: dict[str, str], name: str, usual: int, least: int, most: int) -> int:
    text = options.get(name, str(usual))
    if not re.fullmatch(r"-?\d{1,12}", text, re.ASCII) or not least <= int(text) <= most:
        raise ValueError(f"The query parameter '{name}' must be between {least} and {most}.")
    return int(text)


def _tag(name: str) -> str:
    """The 8 hex digits of an attribute given as tag or keyword; keywords are case-sensitive."""
    if re.fullmatch(r"[0-9A-Fa-f]{8}", name):
        return name.upper()
    tag = datadict.tag_for_keyword(name)
    if tag is None:
        raise ValueError(f"The attribute {name[:64]} is not known.")
    return f"{tag:08X}"


def _searchable(name: str, first: int, last: int) -> str:
    tag = _tag(name)
    level, _ = _COLUMNS.get(tag, (-1, ""))
    if not first <= level <= last:
        raise ValueError(f"The attribute {name[:64]} can't be searched for on this resource.")
    return tag


def _condition(tag: str, value: str, *, fuzzy: bool) -> tuple[str, list[str]]:
    column = _COLUMNS[tag][1]
    if tag in (_STUDY, _SERIES, _SOP):
        if not validation.identity(value):
            raise ValueError("The UID is not valid.")
        return f"{column} = ?", [value]
    vr = datadict.dictionary_VR(int(tag, 16))
    if vr == "DA":
        return _dates(column, value)
    sought = archive.folded(value, name=vr == "PN")
    if tag == _MODALITIES:
        inner = 'SELECT 1 FROM series m WHERE m.partition = s.partition AND m.study = s.study AND m."00080060" = ?'
        return f"EXISTS ({inner})", [sought]
    if vr == "PN" and fuzzy:
        if '"' in value:
            raise ValueError("A quotation mark can't be searched for.")
        return f"fuzzy({column}, ?)", [sought]
    return f"{column} = ?", [sought]


def _dates(column: str, value: str) -> tuple[str, list[str]]:
    """One date, or an inclusive range that may be open on one side."""
    low, dash, high = value.partition("-")
    if any(date and validation.problem("DA", [date]) for date in (low, high)) or not (low or high):
        raise ValueError("A date is YYYYMMDD, a range has at least one of its ends.")
    if not dash:
        return f"{column} = ?", [low]
    if low and high and low > high:
        raise ValueError("The range of dates is reversed.")
    bounds = [(f"{column} >= ?", low), (f"{column} <= ?", high)]
    kept = [(condition, date) for condition, date in bounds if date]
    return f"({' AND '.join(condition for condition, _ in kept)})", [date for _, date in kept]


def _returned(fields: Sequence[str], first: int, last: int, version: int) -> set[str]:
    levels = range(first, last + 1)
    if "all" in fields:
        if len(fields) > 1:
            raise ValueError("includefield all can't be mixed with others.")
        return {tag for level in levels for tag in (*_V1[level], *_ALL[level])}
    defaults = {tag for level in levels for tag in (_V1 if version == 1 else _V2)[level]}
    return defaults | {_tag(field) for field in fields if field}


def run(store: archive.Archive, query: Query, partition: str) -> list[dict[str, Json]]:
    """The matching data sets, newest first."""
    alias = {"study": "s", "series": "r", "instance": "i"}[query.level]
    rows = store.search(
        query.level,
        [f"{alias}.partition = ?", *query.conditions],
        [partition, *query.values],
        limit=query.limit,
        offset=query.offset,
    )
    found = []
    for row in rows:
        known = dict(row)
        study, series = known["study"], known.get("series")
        if query.tags <= _INDEXED | set(_COMPUTED):
            source = {**_elements(known.get("study_elements")), **_elements(known.get("series_elements"))}
        elif query.level == "instance":
            source = _elements(known["metadata"])
        else:
            source = store.newest(partition, study, series)
        uids = {_STUDY: study, _SERIES: series, _SOP: known.get("sop")}
        source.update({tag: {"vr": "UI", "Value": [uid]} for tag, uid in uids.items() if uid})
        source.update(_computed(store, query.tags, partition, study, series))
        found.append({tag: source[tag] for tag in sorted(query.tags) if tag in source})
    return found


def _elements(data: bytes | None) -> dict[str, Json]:
    return dict(orjson.loads(data)) if data else {}


def _computed(
    store: archive.Archive, tags: frozenset[str], partition: str, study: str, series: str | None
) -> dict[str, Json]:
    values: dict[str, Json] = {}
    if _MODALITIES in tags:
        values[_MODALITIES] = {"vr": "CS", "Value": store.modalities(partition, study)}
    if _STUDY_INSTANCES in tags:
        values[_STUDY_INSTANCES] = {"vr": "IS", "Value": [store.count(partition, study)]}
    if _SERIES_INSTANCES in tags and series:
        values[_SERIES_INSTANCES] = {"vr": "IS", "Value": [store.count(partition, study, series)]}
    return values
