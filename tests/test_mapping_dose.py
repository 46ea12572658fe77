"""Dose reports as Observations: what each kind of report says, however well it is made."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import dose
import pydicom
import pytest
from hospital import json_of
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomcast import decimals, errors, mapping
from dicomcast.mapping import validation

Json = Any
MODULES = ("patient", "endpoint", "imaging_study", "radiation_dose")
CONTEXT = mapping.Context("urn:p", timezone="Europe/Vienna", dicom_url="https://d.example", endpoint_address="urn:x:d")
MAPPING = mapping.load(MODULES, CONTEXT)
LINKS = {"subject": {"reference": "Patient/1"}, "study": {"reference": "ImagingStudy/1"}}
STUDY, SOP = "1.2.3", "1.2.3.4"


def observed(report: pydicom.Dataset | Json, m: mapping.Mapping = MAPPING) -> list[mapping.Observed]:
    data = json_of(report) if isinstance(report, pydicom.Dataset) else report
    found = m.reports([m.read(data)], **LINKS)
    assert len({one.identifier["value"] for one in found}) == len(found)
    for one in found:
        assert validation.problems("report", one.resource) == []
    return found


def said(one: mapping.Observed) -> list[tuple[str, Json]]:
    """Code and value of each component; a quantity as `value unit`, a concept by its text."""
    values = []
    for component in one.resource.get("component", ()):
        value = next(component[name] for name in component if name.startswith("value"))
        if isinstance(value, dict):
            value = f"{value['value']} {value['code']}" if "value" in value else value["text"]
        values.append((component["code"]["coding"][0]["code"], value))
    return values


def named(found: list[mapping.Observed], name: str) -> list[mapping.Observed]:
    return [one for one in found if one.name == name]


# What each kind of report says


def test_ct() -> None:
    found = observed(dose.ct(STUDY, sop=SOP, scout=f"{STUDY}.50"))
    (summary,) = named(found, "dose_summary")
    assert said(summary) == [("113812", 3), ("113813", "507.07 mGy.cm")]
    assert summary.resource["valueString"] == "CT Dose Length Product Total = 507.07 mGy.cm"
    assert summary.resource["effectiveDateTime"] == "2024-03-05T10:15:00.250+01:00"
    assert summary.resource["focus"] == summary.resource["partOf"] == [LINKS["study"]]
    assert summary.resource["identifier"][1]["value"] == f"urn:oid:{SOP}"
    scout, first, second = named(found, "ct_event")
    assert said(first) == [
        ("113830", "5.25 mGy"),
        ("113838", "157.07 mGy.cm"),
        ("113835", "IEC Body Dosimetry Phantom"),
        ("113820", "Spiral Acquisition"),
        ("125203", "Spiral 1"),
    ]
    assert [code for code, _ in said(scout)] == ["113820", "125203"]
    assert second.resource["bodySite"]["coding"][0]["system"] == "http://snomed.info/sct"
    assert len(found) == 4


def test_planes_of_a_biplane_system_are_told_apart_and_never_added() -> None:
    (summary,) = named(observed(dose.projection(STUDY, sop=SOP)), "dose_summary")
    totals = [one for one in summary.resource["component"] if one["code"]["coding"][0]["code"] == "113722"]
    assert [(one["code"]["text"], one["valueQuantity"]["value"]) for one in totals] == [
        ("Dose Area Product Total (Plane A)", "0.00123"),
        ("Dose Area Product Total (Plane B)", "0.000456"),
    ]
    (alone,) = named(observed(dose.projection(STUDY, sop=SOP, planes=["single"])), "dose_summary")
    assert alone.resource["component"][0]["code"]["text"] == "Dose Area Product Total"


def test_projection_has_an_event_for_each_exposure_and_begins_with_the_first() -> None:
    found = observed(dose.projection(STUDY, sop=SOP))
    events = named(found, "xray_event")
    moments = [one.resource["effectiveDateTime"] for one in events]
    assert len(events) == 2
    assert named(found, "dose_summary")[0].resource["effectiveDateTime"] == min(moments)
    assert dict(said(events[0]))["113764"] == "Plane A"


def test_radiopharmaceutical_with_agent_isotope_and_route() -> None:
    found = observed(dose.radiopharmaceutical(STUDY, sop=SOP))
    (summary,), (event,) = named(found, "dose_summary"), named(found, "administration")
    for one in (summary, event):
        values = dict(said(one))
        assert values["113507"].endswith(" MBq")
        assert {"349358000", "89457008", "410675002"} <= values.keys()
    assert event.resource["identifier"][1]["type"]["coding"][0]["code"] == "irradiation-event-uid"


@pytest.mark.parametrize("kind", sorted(dose.KINDS))
def test_snomed_rt_says_the_same(kind: str) -> None:
    report = dose.KINDS[kind](STUDY, sop=SOP)
    new = [said(one) for one in observed(report)]
    assert [[code for code, _ in one] for one in new] == [
        [code for code, _ in said(one)] for one in observed(dose.in_srt(copy.deepcopy(report)))
    ]
    assert any(new)


def test_small_decimals_are_written_plainly() -> None:
    report = dose.set_number(dose.projection(STUDY, sop=SOP), "113722", "1.23E-7")
    (summary,) = named(observed(report), "dose_summary")
    assert b'"value":0.000000123,' in decimals.dumps(summary.resource)


# Who they are


def test_identity_is_of_report_and_event_and_stays() -> None:
    report = dose.ct(STUDY, sop=SOP)
    first = [one.identifier for one in observed(report)]
    assert [one.identifier for one in observed(dose.set_number(copy.deepcopy(report), "113830", "9"))] == first
    another = [one.identifier for one in observed(dose.ct(STUDY, sop=f"{SOP}.5"))]
    assert not {one["value"] for one in first} & {one["value"] for one in another}


@pytest.mark.parametrize("events", [[None, None], ["1.2.8", "1.2.8"], [None, "1.2.8"]])
def test_events_without_a_uid_or_with_one_of_two_are_told_apart(events: list[str | None]) -> None:
    found = named(observed(dose.ct(STUDY, sop=SOP, events=events)), "ct_event")
    assert len(found) == 2
    uids = [
        [each["value"] for each in one.resource["identifier"] if each["system"] == "urn:dicom:uid"] for one in found
    ]
    assert uids == [[f"urn:oid:{event}"] if event else [] for event in events]


def test_reports_do_not_depend_on_the_order_of_instances() -> None:
    read = [MAPPING.read(json_of(dose.ct(STUDY, sop=f"{SOP}.{n}"))) for n in range(3)]
    found = [one.identifier for one in MAPPING.reports(read, **LINKS)]
    assert [one.identifier for one in MAPPING.reports(read[::-1], **LINKS)] == found


# What is not as it should be


@pytest.mark.parametrize(
    ("spoil", "issues"),
    [
        (lambda report: dose.set_number(report, "113813", ""), 0),
        (lambda report: dose.set_number(report, "113813", None), 0),
        (lambda report: dose.leave_out(report, "113813"), 0),
        (lambda report: dose.leave_out(report, "113811"), 0),
    ],
)
def test_what_a_report_lacks_its_observation_lacks(
    spoil: Callable[[pydicom.Dataset], pydicom.Dataset], issues: int
) -> None:
    report = spoil(dose.ct(STUDY, sop=SOP))
    instance = MAPPING.read(json_of(report))
    (summary,) = named(observed(report), "dose_summary")
    assert "113813" not in dict(said(summary))
    assert len(instance.issues) == issues


def test_a_value_that_is_no_number_is_an_issue() -> None:
    data = json_of(dose.ct(STUDY, sop=SOP))
    accumulated = next(
        one for one in data["0040A730"]["Value"] if one["0040A043"]["Value"][0]["00080100"]["Value"] == ["113811"]
    )
    accumulated["0040A730"]["Value"][1]["0040A300"]["Value"][0]["0040A30A"]["Value"] = ["Q7"]
    (issue,) = {one for one in MAPPING.read(data).issues if one.rule == "dose_summary.component.113813"}
    assert (issue.tag, issue.vr, issue.reason) == ("0040A730", "SQ", "not a number")
    (summary,) = named(observed(data), "dose_summary")
    assert said(summary) == [("113812", 2)]


def test_other_documents_and_images_bring_nothing() -> None:
    data = json_of(dose.ct(STUDY, sop=SOP))
    data["0040A043"]["Value"][0]["00080100"]["Value"] = ["121060"]
    assert observed(data) == []
    del data["0040A043"]
    assert observed(data) == []


def test_without_the_module_there_are_no_observations() -> None:
    assert observed(dose.ct(STUDY, sop=SOP), mapping.load(MODULES[:3], CONTEXT)) == []


REPORTS = [json_of(make(STUDY, sop=SOP)) for make in dose.KINDS.values()]
odd = st.none() | st.integers() | st.text(max_size=5) | st.just([]) | st.just({}) | st.just([{}]) | st.just([None])


def places(value: Json, path: tuple[Json, ...] = ()) -> list[tuple[Json, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for name, one in inner for deeper in places(one, (*path, name)))]


PLACES = [[path for path in places(report["0040A730"]) if path] for report in REPORTS]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2), st.data())
def test_a_spoilt_report_is_read_as_far_as_it_goes(which: int, data: st.DataObject) -> None:
    """Wherever in the content tree something stands that should not: no error but a failed instance, output valid."""
    report = copy.deepcopy(REPORTS[which])
    for path in data.draw(st.lists(st.sampled_from(PLACES[which]), min_size=1, max_size=3)):
        place = report["0040A730"]
        try:
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = data.draw(odd)
        except (KeyError, IndexError, TypeError):
            continue  # what was spoilt before is not there any more
    with contextlib.suppress(errors.InstanceFailed):
        observed(report)


@pytest.mark.parametrize(
    ("code", "unit", "value"),
    [("113813", "mGy  cm", "507.07"), ("113812", "{events}", "99999999999"), ("113813", "mGy.cm", "1e25")],
)
def test_an_odd_value_costs_no_more_than_itself(code: str, unit: str, value: str) -> None:
    report = dose.set_unit(dose.set_number(dose.ct(STUDY, sop=SOP), code, value), code, unit)
    found = observed(report)
    assert (len(named(found, "ct_event")), len(named(found, "dose_summary"))) == (2, 1)
    assert MAPPING.read(json_of(report)).resource["uid"] == SOP


def test_an_odd_item_costs_no_other_report() -> None:
    data = json_of(dose.ct(STUDY, sop=SOP))
    odd_item = {"0040A043": {"Value": [{"00080100": {"Value": [7]}, "00080102": {"Value": ["DCM"]}}]}}
    data["0040A730"]["Value"].insert(0, odd_item)
    assert [one.name for one in observed(data)] == ["dose_summary", "ct_event", "ct_event"]
