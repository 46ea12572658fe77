"""Observations from radiation dose reports: one summary for each report, and one for each irradiation event in it.

CT and projection X-ray (PS3.16 TID 10011 and 10001) and radiopharmaceuticals (TID 10021), in the shape of the HL7
Radiation Dose Summary guide. Each is identified by its report and event: a repeat updates it, and it goes with its
report alone. Units are the report's own.
"""

from collections.abc import Iterable, Iterator

from dicomcast.mapping import Json, Report, Rule, Slice

DCM = "http://dicom.nema.org/resources/ontology/DCM"
X_RAY, NUCLEAR = "113701", "113500"  # titles
_EVENT_UID, _ADMINISTRATION_UID = "content(113769) > UID", "content(113503) > UID"

REPORTS = (
    Report("dose_summary", titles=(X_RAY, NUCLEAR)),
    Report("ct_event", titles=(X_RAY,), items=("113819",), key=_EVENT_UID),
    Report("xray_event", titles=(X_RAY,), items=("113706",), key=_EVENT_UID),
    Report("administration", titles=(NUCLEAR,), items=("113502",), key=_ADMINISTRATION_UID),
)

_LOINC_DOSE = {
    "system": "http://loinc.org",
    "code": "73569-6",
    "display": "Radiation exposure and protection information [Description] Document Diagnostic imaging",
}
_IMAGING = {"system": "http://terminology.hl7.org/CodeSystem/observation-category", "code": "imaging"}
_ZONE = "TimezoneOffsetFromUTC"
_ORDER = "RequestAttributesSequence, ReferencedRequestSequence, AccessionNumber, IssuerOfAccessionNumberSequence"
_KEYS = ("system", "value")

_AGENTS = ("content(349358000, SCT)", "content(F-61FDB, SRT)")  # the second is what TID 10022 had before
_ISOTOPE, _ROUTE = "content(89457008, SCT)", "content(410675002, SCT)"
_GIVEN = "content(113502)[]"

_Component = tuple[str, tuple[str, ...]]  # code of its concept, sources


def _below(holder: str, *codes: str) -> Iterator[_Component]:
    """Components from the content items of these codes (DCM) in what `holder` leads to."""
    for code in codes:
        yield code, (f'{holder} | components("{code}")',)


def _here(*codes: str) -> Iterator[_Component]:
    """Components from the content items of these codes (DCM) in the event itself."""
    for code in codes:
        yield code, (f"content({code})[] | components",)


def _rules(
    report: str,
    code: Json,
    uid: str,
    started: Iterable[str],
    components: Iterable[_Component],
    *more: Rule,
) -> Iterator[Rule]:
    """What all reports have in common, and their components."""

    def rule(name: str, target: str | Slice, *sources: str, constant: Json = None, link: str | None = None) -> Rule:
        id = f"{report}.{name}"
        return Rule(id, "report", target, sources=sources, constant=constant, link=link, report=report)

    yield rule("identity", Slice("identifier", where={"system": "urn:ietf:rfc:3986"}, keys=_KEYS), link="identifier")
    yield rule("uid", Slice("identifier", where={"system": "urn:dicom:uid"}, keys=_KEYS), uid)
    yield rule("status", "status", constant="final")
    yield rule("category", "category", constant=[{"coding": [_IMAGING]}])
    yield rule("code", "code", constant={"coding": [code]})
    yield rule("subject", "subject", link="subject")
    yield rule("study", "partOf", link="study")
    yield rule("based_on", "basedOn", f"{_ORDER} | based_on")
    yield rule(
        "effective",
        "effectiveDateTime",
        *started,
        f"ContentDate, ContentTime, {_ZONE} | started",
    )
    yield rule("device", "device", 'content(121012) > UID | uid_reference("Device")')
    for concept, sources in components:
        yield rule(f"component.{concept}", Slice("component", where={"code.coding.code": concept}, most=100), *sources)
    yield from more


def _body_site(report: str) -> Rule:
    source = "content(123014) > ConceptCodeSequence | concept"
    return Rule(f"{report}.body_site", "report", "bodySite", sources=(source,), report=report)


_EVENT = {"system": DCM, "code": "113852", "display": "Irradiation Event"}

RULES = (
    *_rules(
        "dose_summary",
        _LOINC_DOSE,
        'SOPInstanceUID | uid_identifier("sop-instance-uid")',
        (
            f"content(113809) > DateTime, {_ZONE} | started_at",
            f"content(113706)[] > content(111526) > DateTime, {_ZONE} | earliest_at",
            f"content(113502) > content(123003) > DateTime, {_ZONE} | started_at",
        ),
        (
            # CT: number of events, DLP total, effective dose total.
            *_below("content(113811)[]", "113812", "113813", "113814"),
            # Per plane: DAP, Dose (RP), glandular dose; of fluoroscopy DAP, Dose (RP), time; of acquisition; frames.
            *_below("content(113702)[]", "113722", "113725", "111637", "113726", "113728", "113730", "113727"),
            *_below("content(113702)[]", "113729", "113731"),
            # Administered activity and volume; agent, isotope and route.
            *_below(_GIVEN, "113507", "123005"),
            ("349358000", tuple(f"{_GIVEN} > {agent}[] | components" for agent in _AGENTS)),
            ("89457008", tuple(f"{_GIVEN} > {agent}[] > {_ISOTOPE}[] | components" for agent in _AGENTS)),
            ("410675002", (f"{_GIVEN} > {_ROUTE}[] | components",)),
        ),
        Rule("dose_summary.focus", "report", "focus", link="study", report="dose_summary"),
        Rule(
            "dose_summary.text",
            "report",
            "valueString",
            sources=(
                "content(113811)[], content(113702)[], content(113502)[]"
                ' | summarised("113813", "113722", "113725", "111637", "113507")',
            ),
            report="dose_summary",
        ),
    ),
    *_rules(
        "ct_event",
        _EVENT,
        f'{_EVENT_UID} | uid_identifier("irradiation-event-uid")',
        (f"content(111526) > DateTime, {_ZONE} | started_at",),
        (
            # CTDIvol, DLP, effective dose, phantom; acquisition type, protocol.
            *_below("content(113829)[]", "113830", "113838", "113839", "113835"),
            *_here("113820", "125203"),
        ),
        _body_site("ct_event"),
    ),
    *_rules(
        "xray_event",
        _EVENT,
        f'{_EVENT_UID} | uid_identifier("irradiation-event-uid")',
        (f"content(111526) > DateTime, {_ZONE} | started_at",),
        # DAP, Dose (RP), glandular dose, duration, type, plane, protocol.
        _here("122130", "113738", "111631", "113742", "113721", "113764", "125203"),
        _body_site("xray_event"),
    ),
    *_rules(
        "administration",
        {"system": DCM, "code": "113502", "display": "Radiopharmaceutical Administration"},
        f'{_ADMINISTRATION_UID} | uid_identifier("irradiation-event-uid")',
        (f"content(123003) > DateTime, {_ZONE} | started_at",),
        (
            # Activity: administered, measured before and after; volume; agent, isotope and route.
            *_here("113507", "113508", "113509", "123005"),
            ("349358000", tuple(f"{agent}[] | components" for agent in _AGENTS)),
            ("89457008", tuple(f"{agent}[] > {_ISOTOPE}[] | components" for agent in _AGENTS)),
            ("410675002", (f"{_ROUTE}[] | components",)),
        ),
    ),
)
