"""The named steps of rules: plain values in, FHIR R4 values out.

A step takes a value and the context and gives a value, None to say "nothing", or raises `values.Invalid`. A rule that
reads several attributes together hands its first step a tuple of them.
"""

import datetime
import functools
import re
import uuid
from collections.abc import Iterable
from zoneinfo import ZoneInfo

from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping import tables
from dicomcast.mapping.rules import Context, Rule, Slice, Step

URI = "urn:ietf:rfc:3986"
DICOM_UID = "urn:dicom:uid"
IDENTIFIER_TYPE = "http://terminology.hl7.org/CodeSystem/v2-0203"
REPRESENTATION = "http://hl7.org/fhir/StructureDefinition/iso21090-EN-representation"
GENDERS = {"M": "male", "F": "female", "O": "other"}

_CODE = re.compile(r"[A-Za-z0-9_]+( [A-Za-z0-9_]+)*")


def study_identifier(uid: str, _context: Context) -> Json:
    """The identifier that a study is searched by (FHIR R4 ImagingStudy notes)."""
    return {"use": "official", "system": DICOM_UID, "value": f"urn:oid:{uid}"}


def patient_identifier(read: tuple[str, str | None, str | None, str | None], context: Context) -> Json:
    """PatientID, IssuerOfPatientID, its qualifiers' UniversalEntityID and type: an identifier of type MR."""
    value, issuer, universal, kind = read
    system = _system(universal, kind, issuer, context) or context.patient_system
    return _identifier("MR", system, value)


def accession_identifier(read: tuple[str, str | None, str | None, str | None], context: Context) -> Json:
    """AccessionNumber, its issuer's LocalNamespaceEntityID, UniversalEntityID and type: an identifier of type ACSN."""
    value, local, universal, kind = read
    system = _system(universal, kind, local, context) or context.accession_system
    return _identifier("ACSN", system, value)


def _identifier(kind: str, system: str | None, value: str) -> Json:
    named = {"system": system} if system else {}
    return {"type": {"coding": [{"system": IDENTIFIER_TYPE, "code": kind}]}, **named, "value": value}


def _system(universal: str | None, kind: str | None, local: str | None, context: Context) -> str | None:
    """The URI of an issuer (PS3.3 10.14): what it says of itself, or the site's table for either of its names."""
    if universal is not None:
        system = context.issuers.get(universal) or _universal_uri(universal, kind)
        if system:
            return system
    return context.issuers.get(local) if local is not None else None


def _universal_uri(universal: str, kind: str | None) -> str | None:
    if kind == "ISO" and values.is_uid(universal):
        return f"urn:oid:{universal}"
    if kind == "UUID":
        try:
            return f"urn:uuid:{uuid.UUID(universal)}"
        except ValueError:
            return None
    return universal if kind == "URI" and values.is_uri(universal) else None


def human_names(name: values.PersonName, _context: Context) -> Json:
    """One HumanName per representation that has content: alphabetic, ideographic, phonetic."""
    found, problem = [], None
    for code, group in zip(("ABC", "IDE", "SYL"), name, strict=True):
        if group is None:
            continue
        try:
            parts = values.components(group)
        except values.Invalid as error:
            parts, problem = error.kept, error
        found.append(_human_name(parts, code))
    if problem is not None:
        raise values.Invalid(problem.reason, kept=found)
    return found


def _human_name(parts: tuple[str, str, str, str, str], representation: str) -> Json:
    family, given, middle, prefix, suffix = parts
    name: dict[str, Json] = {"use": "usual"}
    if representation != "ABC":
        name["extension"] = [{"url": REPRESENTATION, "valueCode": representation}]
    lists = {"given": _words(given) + _words(middle), "prefix": _words(prefix), "suffix": _words(suffix)}
    return name | ({"family": family} if family else {}) | {key: words for key, words in lists.items() if words}


def _words(component: str) -> list[str]:
    """The names in one component: between commas if it has one, else between blanks (PS3.5 6.2.1.1)."""
    words = component.split(",") if "," in component else component.split()
    return [word.strip() for word in words if word.strip()]


def gender(sex: str, _context: Context) -> Json:
    """PatientSex as administrative gender."""
    if sex not in GENDERS:
        raise values.Invalid("none of M, F, O")
    return GENDERS[sex]


def modality(code: str, _context: Context) -> Json:
    """A Modality as Coding, with the meaning that CID 33 gives it."""
    if len(code) > 16 or not _CODE.fullmatch(code):
        raise values.Invalid("not a code")
    known = tables.modalities().get(code)
    return {"system": tables.DCM, "code": code} | ({"display": known.display} if known else {})


def unknown_modality(_none: None, context: Context) -> Json:
    """What stands for a Modality that is not there: R4 requires one. Nothing, where the site wants a failure."""
    return modality(context.missing_modality, context) if context.missing_modality != "fail" else None


@functools.lru_cache(maxsize=1024)
def _sop_class(uid: str) -> Json:
    return {"system": URI, "code": f"urn:oid:{uid}"}


def sop_class(uid: str, _context: Context) -> Json:
    """A SOP class as Coding: one object for all instances of a class, so that many instances take little memory."""
    return _sop_class(uid)


def unsigned(number: int, _context: Context) -> Json:
    """FHIR's unsignedInt."""
    if not 0 <= number <= 2**31 - 1:
        raise values.Invalid("outside 0 to 2147483647")
    return number


def started(read: tuple[str, values.Time | None, str | None], context: Context) -> Json:
    """Date, time and offset as dateTime: FHIR R4 has no time of day without seconds and zone, so the date alone else.

    A zone is never guessed, and no precision invented but the seconds that the type demands.
    """
    day, time, offset = read
    if time is None or time.minute is None:
        return day
    if offset is None and context.timezone is not None:
        offset = _site_offset(day, time, context.timezone)
    if offset is None:
        return day
    fraction = f".{time.fraction[:3]:0<3}" if time.fraction else ""
    return f"{day}T{time.hour:02}:{time.minute:02}:{time.second or 0:02}{fraction}{offset}"


def _site_offset(day: str, time: values.Time, zone: str) -> str | None:
    """+HH:MM of that zone then; None for the local mean times of long ago, which have seconds."""
    clock = datetime.time(time.hour, time.minute or 0, min(time.second or 0, 59))
    then = datetime.datetime.combine(datetime.date.fromisoformat(day), clock, ZoneInfo(zone))
    seconds = int((then.utcoffset() or datetime.timedelta()).total_seconds())
    hours, rest = divmod(abs(seconds), 3600)
    return None if rest % 60 else f"{'-' if seconds < 0 else '+'}{hours:02}:{rest // 60:02}"


def endpoint_identifier(url: str, _context: Context) -> Json:
    """The identifier that an Endpoint is searched by: the service that it belongs to."""
    return {"system": URI, "value": url}


def meta_source(url: str, _context: Context) -> Json:
    """Where a resource comes from."""
    return {"source": url}


def study_modalities(study: Json, context: Context) -> Json:
    """The acquisition modalities (CID 29) among the series, sorted; the series' own where there are none of those."""
    codes = {series["modality"]["code"] for series in study.get("series", ()) if "modality" in series}
    acquired = {code for code in codes if (known := tables.modalities().get(code)) and known.acquisition}
    return [modality(code, context) for code in sorted(acquired or codes)] or None


def count_series(study: Json, _context: Context) -> Json:
    """How many series a study has."""
    return len(study.get("series", ()))


def count_instances(part: Json, _context: Context) -> Json:
    """How many instances a study or a series has."""
    return len(part.get("instance", ())) + sum(len(series.get("instance", ())) for series in part.get("series", ()))


_ALL: tuple[Step, ...] = (
    study_identifier, patient_identifier, accession_identifier, human_names, gender, modality, unknown_modality,
    sop_class, unsigned, started, endpoint_identifier, meta_source, study_modalities, count_series, count_instances,
)  # fmt: skip
STEPS = {step.__name__: step for step in _ALL}


def resolve(step: str | Step) -> Step:
    """The function of a step: registered under that name, or given as it is."""
    return STEPS[step] if isinstance(step, str) else step


def fixed(table: Iterable[Rule], context: Context) -> dict[str, Json]:
    """The values of those rules that say the same for every instance (constants and settings), by rule id."""
    given = {}
    for rule in table:
        value = rule.constant if rule.setting is None else getattr(context, rule.setting)
        for step in () if value is None or rule.setting is None else rule.steps:
            value = resolve(step)(value, context)
        if value is not None:
            given[rule.id] = [value] if isinstance(rule.target, Slice) and not isinstance(value, list) else value
    return given
