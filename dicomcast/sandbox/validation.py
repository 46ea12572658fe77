"""The value rules of PS3.5 6.2 that the DICOM service applies when it stores an instance."""

import re
from collections.abc import Sequence
from datetime import datetime

_LONGEST = {"AE": 16, "LO": 64, "LT": 10240, "SH": 16, "ST": 1024}
_DATE_TIME = r"\d{4}(\d\d(\d\d(\d\d(\d\d([0-5]\d|60)?(\.\d{1,6})?)?)?)?)?([+-]\d{4})?"
_PATTERNS = {
    "AS": r"\d{3}[DWMY]",
    "CS": r"[A-Z0-9 _]{0,16}",
    "DS": r" *[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)? *",
    "DT": _DATE_TIME,
    "IS": r" *[+-]?\d{1,12} *",
    "TM": r"([01]\d|2[0-3])([0-5]\d([0-5]\d|60)?(\.\d{1,6})?)? *",
    "UI": r"(0|[1-9]\d*)(\.(0|[1-9]\d*))*",
}
_RULES = {vr: re.compile(pattern, re.ASCII) for vr, pattern in _PATTERNS.items()}
_IDENTITY = re.compile(r"[0-9.]{0,63}[0-9]")


def identity(uid: str) -> bool:
    """Whether the service takes this for a study, series, instance or class UID: leading zeros are tolerated."""
    return _IDENTITY.fullmatch(uid.rstrip(" ")) is not None


def problem(vr: str, texts: Sequence[str] | None) -> str | None:
    """Why an element is not valid under its VR, in the service's words; None when it is."""
    if texts is None:
        return f"Content does not validate VR {vr}: value length is not expected"
    for text in texts:
        reason = _problem(vr, text) if text else None
        if reason:
            return f'Content "{text}" does not validate VR {vr}: {reason}'
    return None


def _problem(vr: str, text: str) -> str | None:  # noqa: PLR0911 - a list of rules
    if vr == "DA":
        return None if _is_date(text) else "one of the date values does not match the pattern YYYYMMDD"
    if vr in _LONGEST and len(text) > _LONGEST[vr]:
        return f"value exceeds maximum length of {_LONGEST[vr]} characters"
    if vr == "PN":
        groups = text.split("=")
        long = any(len(group) > 64 or group.count("^") > 4 for group in groups)
        return "value has too many or too long component groups" if len(groups) > 3 or long else None
    if vr in _RULES and not _RULES[vr].fullmatch(text):
        return "value does not match the pattern"
    if (vr == "DS" and len(text) > 16) or (vr == "UI" and len(text) > 64):
        return "value exceeds maximum length"
    if vr == "IS" and not -(2**31) <= int(text) < 2**31:
        return "value is out of range"
    if vr in {"LO", "SH"} and any(ord(char) < 32 and char != "\x1b" for char in text):
        return "value contains control characters"
    return None


def _is_date(text: str) -> bool:
    if not re.fullmatch(r"\d{8}", text, re.ASCII):
        return False
    try:
        datetime.strptime(text, "%Y%m%d")
    except ValueError:
        return False
    return True
