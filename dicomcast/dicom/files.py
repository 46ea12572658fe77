"""DICOM files, and their data sets as the DICOM JSON that the DICOM service serves in its feed and as metadata.

A value that its VR does not allow is kept as text where it is text, and left out where it is not: nothing here fails
for one bad element. Elements are decoded from the bytes as read, since pydicom's converted values raise or coerce.
"""

import contextlib
import io
import math
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom import charset, datadict, dataelem
from pydicom import tag as tags

Json = Any  # a JSON value
Check = Callable[[str, str, Sequence[str] | None], bool]

# What the service leaves out of its metadata at every depth.
_BULK = {"OB", "OD", "OF", "OL", "OV", "OW", "UN"}
_SINGLE = {"LT", "ST", "UR", "UT"}  # a backslash is text here (PS3.5 6.2)
_TEXT = {"AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"}
_ENCODED = {"LO", "LT", "PN", "SH", "ST", "UC", "UT"}  # the VRs that Specific Character Set governs (PS3.5 6.1.2.3)
# Where a value falls back to its first character set: PS3.5 6.1.2.5.3.
_NAME_RESETS = set(b"\\^=")
_TEXT_RESETS = set(b"\\\r\n\t\f")
_BINARY = {"FD": "d", "FL": "f", "SL": "i", "SS": "h", "SV": "q", "UL": "I", "US": "H", "UV": "Q"}
_INTEGER = re.compile(r"[+-]?\d{1,12}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_PERSON_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
_QUIET = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's warnings on odd values; under a lock, since warning filters belong to the whole process."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read(source: Path | bytes) -> pydicom.Dataset:
    """The data set of a DICOM file (PS3.10), also without preamble or file meta; ValueError for anything else.

    OSError where the path can't be read. Values are not looked at yet.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        with quiet():
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    except Exception as error:  # a broken file makes pydicom stumble over whatever it meets
        raise ValueError(f"not a DICOM file: {type(error).__name__}") from error
    # Without a preamble pydicom reads any bytes at all; a data set has UIDs or at least something of group 0008.
    if data[128:132] != b"DICM" and not any(tag.group == 0x0008 for tag in dataset.keys()):  # noqa: SIM118
        raise ValueError("not a DICOM file: no preamble and no element of group 0008")
    return dataset


def metadata(dataset: pydicom.Dataset, *, check: Check | None = None) -> dict[str, Json]:
    """The DICOM JSON object (PS3.18 F.2) of a data set, as the DICOM service would serve it; odd values never raise.

    Without bulk data and UN at any depth, group 0002 and group lengths; keys sorted, 8 uppercase hex digits.
    `check` is asked for each element with its tag, its VR and its texts (None where the bytes do not fit the VR; not
    asked for sequences and sound binary numbers); an element that it answers False for is left out.
    """
    with quiet():
        return _object(dataset, ["iso8859"], None, check)


def _object(
    dataset: pydicom.Dataset, encodings: list[str], signed: bool | None, check: Check | None
) -> dict[str, Json]:
    raw_charset = _bytes_of(dataset, 0x00080005)
    if raw_charset:
        names = raw_charset.decode("ascii", "replace").rstrip(" \0").split("\\")
        with contextlib.suppress(ValueError, LookupError):  # an unknown character set leaves the outer one in force
            encodings = charset.convert_encodings([name.strip() for name in names])
    representation = _bytes_of(dataset, 0x00280103)
    if representation:
        signed = any(representation)
    result: dict[str, Json] = {}
    for tag in sorted(dataset.keys()):
        if tag.group == 0x0002 or tag.element == 0:
            continue
        item = _item(dataset, tag)
        vr = _vr(dataset, item, signed) if item else "UN"
        if vr in _BULK or not (vr in _TEXT or vr in _BINARY or vr in {"AT", "SQ"}):
            continue
        name = f"{int(tag):08X}"
        values: list[Json] | None
        if vr == "SQ":
            values = [_object(nested, encodings, signed, check) for nested in _items(dataset, tag)]
        elif vr in _TEXT:
            texts = _texts(item, vr, encodings)
            if check and not check(name, vr, texts):
                continue
            values = _text_values(vr, texts)
        else:
            values = _numbers(item, vr)
            if values is None and check and not check(name, vr, None):
                continue
        result[name] = {"vr": vr, "Value": values} if values else {"vr": vr}
    return result


def _bytes_of(dataset: pydicom.Dataset, tag: int) -> bytes | None:
    """The bytes of an element, also of one that was set from Python."""
    item = _item(dataset, tag) if tag in dataset else None
    value = item.value if item else None
    if isinstance(value, bytes) or value is None:
        return value
    if isinstance(value, int):
        return bytes([value & 0xFF])
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return "\\".join(str(part) for part in (value if several else [value])).encode()


def _item(dataset: pydicom.Dataset, tag: Any) -> Any:
    """An element as read, or as set from Python; None where pydicom can't even name it."""
    try:
        return dataset.get_item(tag)
    except Exception:  # an element cut off by the end of the file is converted at once, and may fail in any way
        return None


def _vr(dataset: pydicom.Dataset, item: Any, signed: bool | None) -> str:
    """The VR of an element: as written, else from the dictionaries; UN where nobody knows (PS3.5 6.2.2)."""
    vr: str | None = item.VR
    tag = item.tag
    if vr is None or vr == "UN":
        if tag.is_private:
            vr = _private_vr(dataset, tag)
        else:
            with contextlib.suppress(KeyError):
                vr = datadict.dictionary_VR(tag)
    if vr is None:
        return "UN"
    if " or " not in vr:
        return vr
    if "O" in vr:  # OB or OW, US or OW, US or SS or OW: bulk data either way
        return "OW"
    return "SS" if signed else "US"


def _private_vr(dataset: pydicom.Dataset, tag: Any) -> str:
    if tag.is_private_creator:
        return "LO"
    creator = _bytes_of(dataset, tags.Tag(tag.group, tag.element >> 8))
    try:
        return datadict.private_dictionary_VR(tag, (creator or b"").decode("latin-1").strip(" \0"))
    except KeyError:
        return "UN"


def _items(dataset: pydicom.Dataset, tag: Any) -> list[pydicom.Dataset]:
    try:
        value = dataset[tag].value
    except Exception:  # pydicom raises whatever a broken sequence makes it stumble over
        return []
    return [item for item in value or [] if isinstance(item, pydicom.Dataset)]


def _texts(item: Any, vr: str, encodings: list[str]) -> list[str]:
    """The values of a text element without padding; [] when it is empty."""
    value = item.value
    if value is None:
        return []
    if isinstance(value, bytes):
        text = _decoded(value, vr, encodings)
        parts = [text] if vr in _SINGLE else text.split("\\")
    elif isinstance(item, dataelem.RawDataElement) or isinstance(value, str):
        parts = [value] if vr in _SINGLE else str(value).split("\\")
    else:
        several = not hasattr(value, "components") and isinstance(value, Sequence)
        parts = [_original(part) for part in (value if several else [value])]
    parts = [part.rstrip(" \0") for part in parts]
    return parts if len(parts) > 1 or parts[0] else []


def _original(value: Any) -> str:
    """A converted value as it was written: pydicom keeps the text of IS and DS beside the number."""
    original = getattr(value, "original_string", None)  # bytes of a name that was saved: in which script, is not said
    return "" if value is None else original if original and isinstance(original, str) else str(value)


def _decoded(value: bytes, vr: str, encodings: list[str]) -> str:
    if vr not in _ENCODED:
        return value.decode("latin-1")
    try:
        return charset.decode_bytes(value, encodings, _NAME_RESETS if vr == "PN" else _TEXT_RESETS)
    except (LookupError, UnicodeError):
        return value.decode("latin-1")


def _text_values(vr: str, texts: Sequence[str]) -> list[Json]:
    if vr == "PN":
        return [_person(text) for text in texts]
    if vr in {"IS", "DS"}:
        return _parsed(vr, texts)
    return [text or None for text in texts]


def _person(text: str) -> dict[str, str] | None:
    """A person name by component groups (PS3.18 F.2.2); groups that are not there are left out."""
    groups = {name: group.rstrip(" ") for name, group in zip(_PERSON_GROUPS, text.split("="), strict=False)}
    return {name: group for name, group in groups.items() if group} or None


def _parsed(vr: str, texts: Sequence[str]) -> list[Json]:
    """Numbers; all the texts as they are if a single one is no number, as the service does."""
    pattern = _INTEGER if vr == "IS" else _DECIMAL
    values: list[Json] = []
    for text in texts:
        stripped = text.strip()
        if not stripped:
            values.append(None)
        elif not pattern.fullmatch(stripped):
            return [text or None for text in texts]
        elif _INTEGER.fullmatch(stripped):
            values.append(int(stripped))
        elif math.isinf(number := float(stripped)):
            return [text or None for text in texts]
        else:
            values.append(number)
    return values


def _numbers(item: Any, vr: str) -> list[Json] | None:
    """The values of a binary element; None when its length does not fit its VR."""
    value = item.value
    if value is None or value == b"":
        return []
    if not isinstance(value, bytes):
        several = isinstance(value, Sequence) and not isinstance(value, str)
        listed = list(value) if several else [value]
        return [f"{int(one):08X}" if vr == "AT" else _number(one, vr) for one in listed]
    code = "HH" if vr == "AT" else _BINARY[vr]
    # UN is always little endian (PS3.5 6.2.2).
    order = "<" if item.is_little_endian or item.VR == "UN" else ">"
    try:
        unpacked = list(struct.iter_unpack(order + code, value))
    except struct.error:
        return None
    if vr == "AT":
        return [f"{group:04X}{element:04X}" for group, element in unpacked]
    return [_number(one, vr) for (one,) in unpacked]


def _number(value: Any, vr: str) -> Json:
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return _shortest(value) if vr == "FL" else value


def _shortest(value: float) -> float:
    """The shortest decimal that is the same single-precision number: 0.1, not 0.10000000149011612."""
    try:
        wanted = struct.pack("<f", value)
    except OverflowError:
        return value
    for digits in (6, 7, 8):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == wanted:
            return candidate
    return float(f"{value:.9g}")
