"""Steps for dates and times, and their order."""

import datetime
import re
from zoneinfo import ZoneInfo

from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping.rules import Context

_DATE_TIME = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d):(\d\d):(\d\d(?:\.\d+)?)(?:Z|([+-])(\d\d):(\d\d))")


def started(read: tuple[str | None, values.Time | None, str | None], context: Context) -> Json:
    """Date, time and offset as dateTime: FHIR R4 has no time of day without seconds and zone, so the date alone else.

    A zone is never guessed, and no precision invented but the seconds that the type demands.
    """
    day, time, offset = read
    if day is None or time is None or time.minute is None:
        return day
    if offset is None and context.timezone is not None:
        offset = _site_offset(day, time, context.timezone)
    if offset is None:
        return day
    fraction = f".{time.fraction[:3]:0<3}" if time.fraction else ""
    return f"{day}T{time.hour:02}:{time.minute:02}:{time.second or 0:02}{fraction}{offset}"


def started_at(read: tuple[values.DateTime | None, str | None], context: Context) -> Json:
    """A DT and the data set's offset as dateTime, by the same rules; the DT's own offset counts first."""
    moment, offset = read
    return moment and started((moment.date, moment.time, moment.offset or offset), context)


def _site_offset(day: str, time: values.Time, zone: str) -> str | None:
    """+HH:MM of that zone then; None for the local mean times of long ago, which have seconds."""
    clock = datetime.time(time.hour, time.minute or 0, min(time.second or 0, 59))
    then = datetime.datetime.combine(datetime.date.fromisoformat(day), clock, ZoneInfo(zone))
    seconds = int((then.utcoffset() or datetime.timedelta()).total_seconds())
    hours, rest = divmod(abs(seconds), 3600)
    return None if rest % 60 else f"{'-' if seconds < 0 else '+'}{hours:02}:{rest // 60:02}"


def earliest_at(read: tuple[list[values.DateTime] | None, str | None], context: Context) -> Json:
    """The earliest of several DTs, with the data set's offset for those that have none."""
    moments, offset = read
    return min((started_at((moment, offset), context) for moment in moments or ()), key=moment_of, default=None)


def moment_of(text: str) -> tuple[str, bool, float, str]:
    """Order of FHIR dateTimes from different instances: date as written, timed before date-only, instant, text."""
    match = _DATE_TIME.fullmatch(text)
    if not match:
        return text, True, 0.0, text
    day, hour, minute, second, sign, hours, minutes = match.groups()
    east = (int(hours) * 60 + int(minutes)) * (-60 if sign == "-" else 60) if sign else 0
    days = datetime.date.fromisoformat(day).toordinal()
    return day, False, days * 86400 + int(hour) * 3600 + int(minute) * 60 + float(second) - east, text
