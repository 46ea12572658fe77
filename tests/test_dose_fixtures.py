"""The made dose reports are what they say: templates, value types, codes, and files that a DICOM service takes."""

from collections.abc import Iterator

import dose
import hospital
import httpx
import pytest
from pydicom import Dataset
from pydicom.sr import _concepts_dict

from dicomcast import sandbox
from dicomcast.dicom import files
from dicomcast.sandbox import modality

STUDY = "2.25.4711"
VALUES = {
    "CODE": {"ConceptCodeSequence"},
    "CONTAINER": {"ContinuityOfContent"},
    "DATETIME": {"DateTime"},
    "NUM": {"MeasuredValueSequence"},
    "TEXT": {"TextValue"},
    "UIDREF": {"UID"},
}
OUR_UNITS = {"Gy.m2", "mGy", "mGy.cm", "mA", "{events}", "{ratio}"}
"""Units that the templates ask for and pydicom's dictionary lacks."""


def everything(item: Dataset) -> Iterator[Dataset]:
    for child in item.get("ContentSequence") or ():
        yield child
        yield from everything(child)


def metadata_of(url: str, study: str) -> list[hospital.Json]:
    answer = httpx.get(f"{url}/v2/studies/{study}/metadata", headers={"Accept": "application/dicom+json"})
    return list(answer.raise_for_status().json())


@pytest.fixture(params=dose.KINDS)
def report(request: pytest.FixtureRequest) -> Dataset:
    return dose.KINDS[request.param](STUDY)


@pytest.mark.parametrize(
    ("template", "title", "sop_class", "event", "event_uid"),
    [
        ("10011", "113701", "1.2.840.10008.5.1.4.1.1.88.67", "113819", "113769"),
        ("10001", "113701", "1.2.840.10008.5.1.4.1.1.88.67", "113706", "113769"),
        ("10021", "113500", "1.2.840.10008.5.1.4.1.1.88.68", "113502", "113503"),
    ],
)
def test_report_names_its_template_and_has_its_events(
    template: str, title: str, sop_class: str, event: str, event_uid: str
) -> None:
    report = dose.KINDS[template](STUDY)

    assert (report.SOPClassUID, report.ConceptNameCodeSequence[0].CodeValue) == (sop_class, title)
    (named,) = report.ContentTemplateSequence
    assert (named.MappingResource, named.TemplateIdentifier) == ("DCMR", template)
    found = dose.items(report, event)
    assert len(found) == (1 if template == "10021" else 2)
    uids = [item.UID for one in found for item in dose.items(one, event_uid)]
    assert uids == [f"{STUDY}.9.{at}" for at in range(1, len(found) + 1)]


def test_every_item_has_the_value_of_its_type_and_no_other(report: Dataset) -> None:
    for item in everything(report):
        assert {name for names in VALUES.values() for name in names if name in item} == VALUES[item.ValueType]
        assert item.RelationshipType in {"CONTAINS", "HAS CONCEPT MOD", "HAS OBS CONTEXT", "HAS PROPERTIES"}
    for item in everything(report):
        if item.ValueType == "NUM":
            (measured,) = item.MeasuredValueSequence
            (unit,) = measured.MeasurementUnitsCodeSequence
            assert (unit.CodingSchemeDesignator, measured["NumericValue"].VR) == ("UCUM", "DS")


def test_codes_are_those_of_the_standard(report: Dataset) -> None:
    known = {
        scheme: {code for meanings in _concepts_dict.concepts[scheme].values() for code in meanings}
        for scheme in dose.MEANINGS
    }
    known["UCUM"] |= OUR_UNITS
    used = {
        (one.CodingSchemeDesignator, one.CodeValue)
        for item in everything(report)
        for one in (item.ConceptNameCodeSequence[0], *(item.get("ConceptCodeSequence") or ()))
    }

    assert [one for one in used if one[1] not in known[one[0]]] == []


def test_meanings_of_dicom_codes_are_the_dictionary_s() -> None:
    known = {
        code: meaning
        for meanings in _concepts_dict.concepts["DCM"].values()
        for code, (meaning, *_) in meanings.items()
    }

    assert {code: known[code] for code in dose.MEANINGS["DCM"]} == dose.MEANINGS["DCM"]


def test_totals_are_the_sums_of_the_events() -> None:
    report = dose.ct(STUDY, events=["1.2.3", "1.2.4", "1.2.5"], scout="1.2.6")

    def numbers(code: str) -> list[float]:
        return [float(item.MeasuredValueSequence[0].NumericValue) for item in dose.items(report, code)]

    assert numbers("113813") == [pytest.approx(sum(numbers("113838")))]
    assert numbers("113812") == [len(dose.items(report, "113819"))] == [4]
    assert [len(dose.items(event, "113829")) for event in dose.items(report, "113819")] == [0, 1, 1, 1]


def test_biplane_system_has_its_totals_for_each_plane() -> None:
    both, single = dose.projection(STUDY), dose.projection(STUDY, planes=["single"])

    planes = [item.ConceptCodeSequence[0].CodeValue for item in dose.items(both, "113764")]
    assert planes == ["113620", "113621"] * 2
    assert [len(dose.items(one, "113722")) for one in (both, single)] == [2, 1]


def test_same_arguments_give_the_same_bytes_and_other_uids_another_report(report: Dataset) -> None:
    kind = dose.KINDS[report.ContentTemplateSequence[0].TemplateIdentifier]

    again, other = kind(STUDY), kind(STUDY, sop="1.2.3", events=["1.2.4"], PatientID="P7")

    assert modality.encoded(report) == modality.encoded(again)
    assert (other.SOPInstanceUID, other.PatientID) == ("1.2.3", "P7")
    assert [item.UID for code in ("113769", "113503") for item in dose.items(other, code)] == ["1.2.4"]


def test_file_and_json_say_the_same(report: Dataset) -> None:
    shown = hospital.json_of(report)

    read = files.read(modality.encoded(report))

    assert files.metadata(read) == shown
    assert [item.ValueType for item in everything(read)] == [item.ValueType for item in everything(report)]


def test_dicom_service_takes_reports_and_gives_their_content_back(sandbox: sandbox.Sandbox) -> None:
    sender = modality.Modality(sandbox.dicom_url)
    reports = [kind(f"{STUDY}.{template}") for template, kind in dose.KINDS.items()]
    results = sender.send(reports)
    sender.close()

    assert [(one.failure, one.warning) for one in results] == [(None, None)] * 3
    for report in reports:
        (shown,) = metadata_of(sandbox.dicom_url, report.StudyInstanceUID)
        assert shown["0040A730"] == hospital.json_of(report)["0040A730"]


# Reports that are not as they should be


def test_event_may_lack_its_uid() -> None:
    absent = dose.ct(STUDY, events=["1.2.3", None])
    left_out = dose.leave_out(dose.ct(STUDY, events=["1.2.3", "1.2.4"]), "113769", at=1)

    for report in (absent, left_out):
        assert [len(dose.items(event, "113769")) for event in dose.items(report, "113819")] == [1, 0]
    assert dose.items(dose.leave_out(left_out, "113819"), "113819") == []


def test_number_may_have_another_unit_an_empty_value_or_none() -> None:
    def shown(report: Dataset) -> hospital.Json:
        (item,) = dose.items(report, "113813")
        return hospital.json_of(item)["0040A300"]

    (measured,) = shown(dose.set_unit(dose.ct(STUDY), "113813", "Gy.cm"))["Value"]
    assert measured["004008EA"]["Value"][0]["00080100"]["Value"] == ["Gy.cm"]
    (empty,) = shown(dose.set_number(dose.ct(STUDY), "113813", ""))["Value"]
    assert empty["0040A30A"] == {"vr": "DS"}
    assert shown(dose.set_number(dose.ct(STUDY), "113813", None)) == {"vr": "SQ"}
    (other,) = shown(dose.set_number(dose.ct(STUDY), "113813", "1.20E+02"))["Value"]
    assert other["0040A30A"]["Value"] == [120]


def test_codes_may_be_those_of_snomed_rt(report: Dataset) -> None:
    old = dose.in_srt(report)

    schemes = {item.ConceptNameCodeSequence[0].CodingSchemeDesignator for item in everything(old)}
    assert schemes == {"DCM", "SRT"}
    assert dose.items(old, "G-C0E8")
    assert dose.items(old, "363703001") == []
