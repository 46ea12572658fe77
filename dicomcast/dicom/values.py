"""Readers for the elements of a DICOM JSON data set (PS3.18 annex F), one per kind of value.

A reader takes an element (`{"vr": ..., "Value": [...]}`, or None where the data set has none) and gives a plain value,
None where the element is absent or empty, or raises `Invalid`. An `Invalid` says what is wrong and never repeats the
value: its text goes to logs, failure rows and people who may not see patient data.
"""

import datetime
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import msgspec
import orjson
from pydicom import datadict

from dicomcast.decimals import Decimal, plain

Json: TypeAlias = Any  # a JSON value, as json or orjson reads it
Buffer: TypeAlias = bytes | bytearray | memoryview | msgspec.Raw

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_TAG = re.compile(r"[0-9A-F]{8}")
# FHIR R4 string: nothing below U+0020 but tab, line feed and carriage return; a lone surrogate is not Unicode text.
_UNWANTED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
_DATE = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})|([0-9]{4})\.([0-9]{2})\.([0-9]{2})")  # the second is ACR-NEMA's
_TIME = re.compile(r"([0-9]{2})(?::?([0-9]{2})(?::?([0-9]{2})(?:\.([0-9]{1,6}))?)?)?")
_OFFSET = re.compile(r"([+-])([0-9]{2})([0-9]{2})")
_DATE_TIME = re.compile(r"([0-9]{4})([0-9]{2})?([0-9]{2})?([0-9]{2}[0-9.]*)?([+-][0-9]{4})?")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s<>\"]+")
_NUMBER = re.compile(r"[+-]?([0-9]{1,15}(\.[0-9]{0,15})?|\.[0-9]{1,15})([eE][+-]?[0-9]{1,2})?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,12}")
_ABSENT = itertools.repeat(b"")
_SHALLOW = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Invalid(ValueError):
    """Content that breaks its value representation; `kept` is what can be used of it all the same, or None."""

    def __init__(self, reason: str, *, kept: Json = None):
        super().__init__(reason)
        self.reason = reason
        self.kept = kept


class Time(NamedTuple):
    """A TM value as precise as it was written; `fraction` is the fraction of the second as 1 to 6 digits."""

    hour: int
    minute: int | None = None
    second: int | None = None
    fraction: str | None = None


class DateTime(NamedTuple):
    """A DT value as precise as it was written: date in FHIR's form (YYYY, YYYY-MM or YYYY-MM-DD), offset as +HH:MM."""

    date: str
    time: Time | None = None
    offset: str | None = None


class PersonName(NamedTuple):
    """The component groups of a PN (PS3.5 6.2.1.2), each with its carets."""

    alphabetic: str | None = None
    ideographic: str | None = None
    phonetic: str | None = None


class DataSet(Mapping[str, Json]):
    """A DICOM JSON data set by tag (8 upper-case hex digits) whose elements stay JSON text until they are asked for.

    Most attributes of an instance are read by nobody, and most of the others say what the last instance said.
    """

    __slots__ = ("_elements", "_parsed", "_text")
    _text: Buffer

    def __init__(self, elements: dict[str, Json]):
        self._elements = elements
        self._parsed: dict[str, Json] = {}

    @classmethod
    def of(cls, dataset: Json) -> "DataSet":
        """A data set from parsed JSON. Raises `Invalid` for what is no object, also where that was put off till now."""
        if isinstance(dataset, cls):
            _ = dataset._elements
            return dataset
        if not isinstance(dataset, dict):
            raise Invalid("data set is not an object")
        return cls(dataset)

    @classmethod
    def parse(cls, text: Buffer) -> "DataSet":
        """A data set from JSON text. Raises `ValueError`."""
        return cls(_SHALLOW.decode(text))

    @classmethod
    def later(cls, text: Buffer) -> "DataSet":
        """One that stays text until it is asked for anything: a page of them would be cold when their turn comes."""
        dataset = cls.__new__(cls)
        dataset._parsed, dataset._text = {}, text
        return dataset

    def __getattr__(self, name: str) -> dict[str, Json]:
        if name != "_elements":
            raise AttributeError(name)
        try:
            self._elements = _SHALLOW.decode(self._text)
        except ValueError:
            raise Invalid("data set is not an object") from None
        return self._elements

    def __contains__(self, tag: object) -> bool:
        return tag in self._elements

    def __iter__(self) -> Iterator[str]:
        return iter(self._elements)

    def __len__(self) -> int:
        return len(self._elements)

    def __getitem__(self, tag: str) -> Json:
        """The element under a tag. Raises `Invalid` for text that is not JSON after all."""
        found = self._parsed.get(tag)
        if found is None:
            found = self._elements[tag]
            if isinstance(found, msgspec.Raw):
                try:
                    found = self._parsed[tag] = orjson.loads(memoryview(found))
                except ValueError:
                    raise Invalid("control character or broken text") from None
        return found

    def get(self, tag: str, default: Json = None) -> Json:
        """As of a dict; most tags that are asked for are not there."""
        return self[tag] if tag in self._elements else default

    def text(self, tags: tuple[str, ...]) -> bytes | None:
        """The JSON text of the elements under these tags, to compare it; None where that can't be told."""
        elements = self._elements
        try:
            return b"\n".join(map(elements.get, tags, _ABSENT))
        except TypeError:
            pass  # they are parsed already
        try:
            text = orjson.dumps({tag: elements[tag] for tag in tags if tag in elements})
        except TypeError:  # JSON that orjson does not write: huge integers, lone surrogates, endless nesting
            return None
        return None if b"null" in text else text  # which is also what NaN looks like


def tag_of(name: str) -> str:
    """8 upper-case hex digits for a keyword of the DICOM dictionary, or for such a tag itself; else KeyError."""
    if _TAG.fullmatch(name):
        return name
    tag = datadict.tag_for_keyword(name)
    if tag is None:
        raise KeyError(name)
    return f"{tag:08X}"


def keywords() -> list[str]:
    """All keywords of the dictionary."""
    return list(datadict.keyword_dict)


def vr_of(tag: str) -> str:
    """The VR that the dictionary gives a tag of 8 hex digits, the first where it allows several; else KeyError."""
    return datadict.dictionary_VR(int(tag, 16)).split(" or ")[0]


def label_of(tag: str) -> str:
    """A tag for people: `PatientID (0010,0020)`, `(0029,xx10)` for a private element."""
    keyword = "" if "x" in tag else datadict.keyword_for_tag(int(tag, 16))
    return f"{keyword} ({tag[:4]},{tag[4:]})".strip()


def _values(element: Json) -> list[Json]:
    if element is None:
        return []
    if not isinstance(element, dict):
        raise Invalid("element is not an object")
    found = element.get("Value")
    if found is None:
        return []
    if not isinstance(found, list):
        raise Invalid("Value is not an array")
    return found


def first(element: Json) -> Json:
    """The first value, or None: what an attribute of multiplicity 1 has."""
    found = _values(element)
    if not found or (isinstance(found[0], float) and not math.isfinite(found[0])):
        return None  # JSON has no NaN; parsers that write one elsewhere write null
    return found[0]


def _clean(value: Json) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise Invalid("not text")
    text = value.strip("\0 ").strip()
    if _UNWANTED.search(text):
        raise Invalid("control character or broken text")
    return text or None


def text(element: Json) -> str | None:
    """Any text (LO, SH, ST, CS, AE ...) without the padding and the blanks around it (PS3.5 6.2)."""
    return _clean(first(element))


def uid(element: Json) -> str | None:
    """A UID (PS3.5 9.1): at most 64 digits and dots. Padding is not part of it and goes."""
    value = _clean(first(element))
    if value is not None and not is_uid(value):
        raise Invalid("not a UID")
    return value


def uid_in(dataset: Json, tag: str) -> str | None:
    """The UID under a tag of what may be no data set at all; None for anything that is no UID."""
    try:
        return uid(DataSet.of(dataset).get(tag))
    except Invalid:
        return None


@functools.lru_cache(maxsize=10_000)
def is_uid(value: str) -> bool:
    """Whether this text is a UID. Each comes several times: in a feed entry, in its metadata, with its siblings."""
    return len(value) <= 64 and _UID.fullmatch(value) is not None


def is_uri(value: str) -> bool:
    """Whether this text is an absolute URI: a scheme, then no blanks."""
    return _URI.fullmatch(value) is not None


def integer(element: Json) -> int | None:
    """A whole number (IS, US, SL ...); also as text, or as a float that is whole."""
    value = first(element)
    if isinstance(value, str):
        digits = _clean(value)
        if digits is None:
            return None
        if not _INTEGER.fullmatch(digits):
            raise Invalid("not a whole number")
        return int(digits)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise Invalid("not a whole number")


def date(element: Json) -> str | None:
    """DA as YYYY-MM-DD. A DA is a whole day (PS3.5 6.2), so a part of one is invalid."""
    value = text(element)
    return None if value is None else _date(value)


def _date(value: str) -> str:
    match = _DATE.fullmatch(value)
    if not match:
        raise Invalid("not a date")
    year, month, day = (int(part) for part in match.groups() if part is not None)
    try:
        return datetime.date(year, month, day).isoformat()
    except ValueError:
        raise Invalid("no such day") from None


def time(element: Json) -> Time | None:
    """TM, as precise as it is; colons as ACR-NEMA had them are taken too."""
    value = text(element)
    return None if value is None else _time(value)


def _time(value: str) -> Time:
    match = _TIME.fullmatch(value)
    if not match:
        raise Invalid("not a time")
    hour, minute, second = (None if part is None else int(part) for part in match.groups()[:3])
    assert hour is not None
    if hour > 23 or (minute or 0) > 59 or (second or 0) > 60:  # 60 is a leap second
        raise Invalid("no such time")
    return Time(hour, minute, second, match[4])


def offset(element: Json) -> str | None:
    """Timezone Offset From UTC (0008,0201), `&ZZXX`, as +HH:MM (PS3.3 C.12.1.1.8: -1200 to +1400, never -0000)."""
    value = text(element)
    return None if value is None else _offset(value)


def _offset(value: str) -> str:
    match = _OFFSET.fullmatch(value)
    if not match:
        raise Invalid("not a UTC offset")
    minutes = int(match[2]) * 60 + int(match[3])
    if int(match[3]) > 59 or minutes > (14 if match[1] == "+" else 12) * 60 or value == "-0000":
        raise Invalid("no such UTC offset")
    return f"{match[1]}{match[2]}:{match[3]}"


def date_time(element: Json) -> DateTime | None:
    """DT, as precise as it is."""
    value = text(element)
    if value is None:
        return None
    match = _DATE_TIME.fullmatch(value)
    if not match or (match[4] and not match[3]):
        raise Invalid("not a date and time")
    _date(match[1] + (match[2] or "01") + (match[3] or "01"))
    day = "-".join(part for part in match.groups()[:3] if part)
    try:
        return DateTime(day, _time(match[4]) if match[4] else None, _offset(match[5]) if match[5] else None)
    except Invalid as error:
        raise Invalid(error.reason, kept=DateTime(day)) from None


def person_name(element: Json) -> PersonName | None:
    """PN, from DICOM JSON's object or from the text `alphabetic=ideographic=phonetic`; an empty group is None."""
    value = first(element)
    if isinstance(value, str):
        groups: list[Json] = [*value.split("=")]
    elif isinstance(value, dict):
        groups = [value.get("Alphabetic"), value.get("Ideographic"), value.get("Phonetic")]
        if isinstance(groups[0], str) and "=" in groups[0] and groups[1:] == [None, None]:
            groups = groups[0].split("=")  # seen from converters that copy the DICOM text into one group
    elif value is None:
        return None
    else:
        raise Invalid("not a person name")
    problem = "more than three component groups" if len(groups) > 3 else ""
    cleaned: list[str | None] = []
    for group in groups[:3]:
        try:
            found = _clean(group)
        except Invalid as error:
            found, problem = None, error.reason
        cleaned.append(found if found and found.strip("^ ") else None)
    name = PersonName(*cleaned) if any(cleaned) else None
    if problem:
        raise Invalid(problem, kept=name)
    return name


def components(group: str) -> tuple[str, str, str, str, str]:
    """Family, given, middle, prefix and suffix of one component group (PS3.5 6.2.1.1); more than five are `Invalid`."""
    family, given, middle, prefix, suffix, *more = [part.strip() for part in group.split("^")] + [""] * 4
    five = family, given, middle, prefix, suffix
    if any(more):
        raise Invalid("more than five name components", kept=five)
    return five


def items(element: Json) -> list[dict[str, Json]] | None:
    """The items of a sequence that have content; None where there are none."""
    found = _values(element)
    if any(item is not None and not isinstance(item, dict) for item in found):
        raise Invalid("sequence item is not an object")
    return [item for item in found if item] or None


def all_items(element: Json) -> list[dict[str, Json]] | None:
    """The items of a sequence, empty ones too: where their places count. None where there are none."""
    items(element)
    return [item or {} for item in _values(element)] or None


def item(element: Json) -> dict[str, Json] | None:
    """The first item of a sequence that has content."""
    found = items(element)
    return found[0] if found else None


def each(element: Json) -> list[Json]:
    """One element per value."""
    return [{**element, "Value": [value]} for value in _values(element)]


def anything(element: Json) -> Json:
    """The value of an element that the dictionary does not know, by the VR that it says it has."""
    vr = element.get("vr") if isinstance(element, dict) else None
    return _BY_VR.get(vr, text)(element) if isinstance(vr, str) else first(element)


def number(element: Json) -> int | Decimal | None:
    """A number (DS, FL, FD) up to 15 digits before and after the point, as a JSON number or as text; no exponent."""
    value = first(element)
    if isinstance(value, str):
        digits = _clean(value)
        if digits is None:
            return None
        if not _NUMBER.fullmatch(digits):
            raise Invalid("not a number")
        value = float(digits)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Invalid("not a number")
    if not (value == 0 or 1e-15 <= abs(value) < 1e15):
        raise Invalid("out of range")
    return plain(value)


Reader: TypeAlias = Callable[[Json], Json]

_BY_VR: dict[str, Reader] = {
    **dict.fromkeys(("AE", "AS", "CS", "LO", "LT", "SH", "ST", "UC", "UR", "UT"), text),
    **dict.fromkeys(("IS", "SL", "SS", "SV", "UL", "US", "UV"), integer),
    **dict.fromkeys(("DS", "FD", "FL"), number),
    "DA": date,
    "DT": date_time,
    "PN": person_name,
    "SQ": items,
    "TM": time,
    "UI": uid,
}
_BY_TAG: dict[str, Reader] = {"00080201": offset}


def reader(tag: str) -> Reader:
    """The reader for a tag of 8 hex digits, by the dictionary's VR; KeyError where none reads such values."""
    return _BY_TAG.get(tag) or _BY_VR[vr_of(tag)]
