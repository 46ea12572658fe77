"""Mistakes that mappings from DICOM to FHIR have been seen to make: one test each, which fails if we made it too."""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import dose
import pytest
from test_mapping import CONTEXT, DATA, LINKS, MAPPING, SHIPPED, assert_nothing_empty, dataset
from test_mapping_concepts import coded, item
from test_mapping_dose import named, observed, said
from test_mapping_study import RULES, mapping_of, whole

from dicomcast import errors, mapping
from dicomcast.dicom import files
from dicomcast.mapping import tables, validation
from dicomcast.mapping.concepts import LEGACY

Json = Any
ALL = mapping.load((*SHIPPED, "radiation_dose"), CONTEXT).rules


def made(m: mapping.Mapping = MAPPING, **keywords: Json) -> tuple[Json, Json]:
    """Patient and ImagingStudy of one image."""
    instance = m.read(dataset(**keywords))
    return m.patient([instance]).resource, m.study([instance], **LINKS).resource


@functools.cache
def everything() -> list[Json]:
    """Every resource of every golden case."""
    made = [MAPPING.endpoint()]
    for param in RULES:
        case = whole(param.values[0])
        m, read = mapping_of(case), []
        for data in case["instances"]:
            with contextlib.suppress(errors.InstanceFailed):
                read.append(m.read(data))
        made += [m.patient(read).resource, m.study(read, **LINKS).resource]
    return made


def found(content: Json, name: str) -> Iterator[Json]:
    """All values of that name in a resource, at any depth."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if key == name:
            yield value
        if isinstance(value, dict | list):
            yield from found(value, name)


def test_person_name_is_an_object_in_dicom_json() -> None:
    patient, study = made(
        PatientName={"Alphabetic": "Adams^John"},
        ReferringPhysicianName={"Alphabetic": "Wong^Mei"},
        NameOfPhysiciansReadingStudy=[{"Alphabetic": "Lee^Ann"}, {"Ideographic": "山田^太郎"}],
        OperatorsName=[{"Alphabetic": "Kim^Bo"}],
    )
    assert patient["name"] == [{"use": "usual", "family": "Adams", "given": ["John"]}]
    assert study["referrer"]["display"] == "Mei Wong"
    assert [each["display"] for each in study["interpreter"]] == ["Ann Lee", "山田 太郎"]
    assert study["series"][0]["performer"][0]["actor"]["display"] == "Bo Kim"


def test_study_uid_is_always_an_identifier() -> None:
    cases = [resource for resource in everything() if resource["resourceType"] == "ImagingStudy"]
    assert len(cases) > 100
    for study in cases:
        uids = [each["value"] for each in study["identifier"] if each.get("system") == "urn:dicom:uid"]
        assert len(uids) == 1
        assert re.fullmatch(r"urn:oid:[0-9.]+", uids[0])


@pytest.mark.parametrize("keyword", ["CodeValue", "LongCodeValue", "URNCodeValue"])
def test_code_values_survive(keyword: str) -> None:
    value = "urn:oid:1.2.840.99" if keyword == "URNCodeValue" else "24627-2"
    code = item(CodingSchemeDesignator="LN", CodeMeaning="CT Chest", **{keyword: value})
    _, study = made(
        ProcedureCodeSequence=[code],
        ReasonForPerformedProcedureCodeSequence=[code],
        AnatomicRegionSequence=[code],
    )
    concepts = [*study["procedureCode"], *study["reasonCode"], {"coding": [study["series"][0]["bodySite"]]}]
    assert [each["coding"][0]["code"] for each in concepts] == [value] * 3
    local = coded(None, "99UNKNOWN", "CT Chest") | {tag: code[tag] for tag in code if tag in item(**{keyword: value})}
    assert value in json.dumps(made(ProcedureCodeSequence=[local])[1]["procedureCode"])


def test_code_systems_are_uris() -> None:
    systems = {system for resource in everything() for system in found(resource, "system")}
    assert {tables.DCM, tables.SCT, "http://loinc.org", "urn:ietf:rfc:3986"} <= systems
    assert all(re.fullmatch(r"(https?://|urn:)[^\s]+", system) for system in systems)
    assert not systems & {"DCM", "SCT", "SRT", "LN", "99ACME"}


@pytest.mark.parametrize("term", ["ARM", "LEG", "WHOLE BODY", "Thorax/Abdomen", "T-D3000", "51185008"])
def test_unknown_body_part_never_claims_snomed(term: str) -> None:
    assert made(BodyPartExamined=term)[1]["series"][0]["bodySite"] == {"display": term}
    region = coded("T-99999", "SRT", term)
    assert made(AnatomicRegionSequence=[region])[1]["series"][0]["bodySite"] == {"display": term}


@pytest.mark.parametrize(
    "said",
    [
        {"BodyPartExamined": "CHEST"},
        {"BodyPartExamined": "THORAX"},
        {"AnatomicRegionSequence": [coded("T-D3000", "SRT", "Chest")]},
        {"AnatomicRegionSequence": [coded("T-D3000", "SNM3", "Chest")]},
        {"AnatomicRegionSequence": [coded("816094009", "SCT", "Chest")]},
    ],
    ids=str,
)
def test_body_parts_have_the_present_codes_of_annex_l(said: Json) -> None:
    assert made(**said)[1]["series"][0]["bodySite"]["code"] == "816094009"  # neither 51185008 nor 43799004


MOMENTS: Json = {
    "StudyDate": "20240701",
    "StudyTime": "101530",
    "SeriesDate": "20240701",
    "SeriesTime": "101530",
}


@pytest.mark.parametrize(
    "keywords",
    [
        MOMENTS,
        MOMENTS | {"SeriesDate": None, "AcquisitionDateTime": "20240701101530"},
        MOMENTS | {"TimezoneOffsetFromUTC": " "},
        MOMENTS | {"TimezoneOffsetFromUTC": "UTC"},
    ],
    ids=str,
)
def test_time_without_a_zone_never_becomes_utc(keywords: Json) -> None:
    _, study = made(**keywords)
    assert (study["started"], study["series"][0]["started"]) == ("2024-07-01", "2024-07-01")
    text = json.dumps(study)
    assert "Z" not in study["started"]
    assert "+00:00" not in text


def test_zone_of_the_site_is_not_utc_either() -> None:
    m = mapping.load(SHIPPED, dataclasses.replace(CONTEXT, timezone="Europe/Vilnius"))
    _, study = made(m, **MOMENTS)
    assert (study["started"], study["series"][0]["started"]) == ("2024-07-01T10:15:30+03:00",) * 2


def test_precision_is_not_invented() -> None:
    zoned = {"TimezoneOffsetFromUTC": "+0200"}
    assert made(StudyDate="20240701", StudyTime="10", **zoned)[1]["started"] == "2024-07-01"
    assert made(StudyDate="20240701", **zoned)[1]["started"] == "2024-07-01"
    for text, started in (("2024", "2024"), ("202407", "2024-07"), ("20240701", "2024-07-01")):
        assert made(AcquisitionDateTime=text, **zoned)[1]["series"][0]["started"] == started
    assert made(AcquisitionDateTime="2024070110", **zoned)[1]["series"][0]["started"] == "2024-07-01"
    for text in ("2024", "202407"):
        assert "birthDate" not in made(PatientBirthDate=text)[0]
        assert "started" not in made(StudyDate=text)[1]


def test_two_studies_never_meet_in_one_resource() -> None:
    one, other = (MAPPING.read(dataset(study=uid, sop=f"{uid}.1.1")) for uid in ("1.2.3", "1.2.4"))
    with pytest.raises(ValueError, match="several studies"):
        MAPPING.study([one, other], **LINKS)
    with pytest.raises(errors.Disagreement):
        MAPPING.extend(MAPPING.study([one], **LINKS).resource, [other], **LINKS)


def test_nothing_is_empty_anywhere() -> None:
    for resource in everything():
        assert_nothing_empty(resource)
        assert not re.search(r'"\s*"', json.dumps(resource))
    optional = dict(rule.origin() for rule in MAPPING.rules if rule.sources and not rule.required)
    for text, sequence in zip(([], [None], [""], [" "], ["\0"]), itertools.cycle(([], [None], [{}])), strict=False):
        blank = {tag: {"vr": vr, "Value": sequence if vr == "SQ" else text} for tag, vr in optional.items()}
        instance = MAPPING.read(blank | dataset())
        assert instance.issues == ()
        assert MAPPING.study([instance], **LINKS).resource == made()[1]
        assert MAPPING.patient([instance]).resource == made()[0]
    (payload,) = MAPPING.endpoint()["payloadType"]
    assert payload["coding"] == [
        {"system": "http://terminology.hl7.org/CodeSystem/endpoint-payload-type", "code": "none"}
    ]


@pytest.mark.parametrize("designator", ["SCT", "Sct", "sct"])
def test_case_of_a_designator_does_not_matter(designator: str) -> None:
    knee = coded("72696002", designator, "Knee")
    _, study = made(AnatomicRegionSequence=[knee], ProcedureCodeSequence=[knee])
    assert study["series"][0]["bodySite"] == {"system": tables.SCT, "code": "72696002", "display": "Knee"}
    assert study["procedureCode"][0]["coding"][0]["system"] == tables.SCT
    asked = re.findall(r"content\([^)]*, *([^)]+)\)", " ".join(source for rule in ALL for source in rule.sources))
    assert set(asked) <= {*tables.coding_schemes(), *LEGACY}


@pytest.mark.parametrize("unit", ["Bq", "MBq", "mCi"])
def test_activity_in_bq_is_not_called_mbq(unit: str) -> None:
    """PET in Bq called MBq is a million times too much: no unit is assumed or converted."""
    report = dose.set_unit(
        dose.set_number(dose.radiopharmaceutical("1.2.3", sop="1.2.3.4"), "113507", "370000000"), "113507", unit
    )
    (event,) = named(observed(report), "administration")
    assert dict(said(event))["113507"] == f"370000000 {unit}"


def test_body_height_is_not_claimed_in_metres() -> None:
    """PatientSize is in metres, and body height must be in cm or inches: no module of ours maps it."""
    instance = MAPPING.read(dataset(PatientSize=1.75, PatientWeight=70, Modality="SR"))
    assert instance == dataclasses.replace(
        MAPPING.read(dataset(Modality="SR")), issues=instance.issues, reports=instance.reports
    )
    assert MAPPING.reports([instance], subject=LINKS["subject"], study={"reference": "ImagingStudy/1"}) == []
    assert not re.search("8302-2|29463-7|PatientSize|PatientWeight", json.dumps([rule.row() for rule in ALL]))


def test_order_of_series_is_not_that_of_the_files() -> None:
    read = [
        MAPPING.read(dataset(series=f"1.2.3.{uid}", sop=f"1.2.3.{uid}.{i}", SeriesNumber=number, InstanceNumber=i))
        for uid, number in (("7", 10), ("8", 9), ("9", None), ("10", 2))
        for i in (2, 10)
    ]
    expected = MAPPING.study(read, **LINKS).resource
    assert [each["uid"] for each in expected["series"]] == ["1.2.3.10", "1.2.3.8", "1.2.3.7", "1.2.3.9"]
    assert [each["number"] for each in expected["series"][0]["instance"]] == [2, 10]
    for order in itertools.islice(itertools.permutations(read), 0, 40320, 1009):
        assert json.dumps(MAPPING.study(order, **LINKS).resource) == json.dumps(expected)


def test_order_of_real_files_does_not_matter() -> None:
    paths = [path for path in (DATA / "test_files/dicomdirtests/98892003").rglob("*") if path.is_file()]
    read = [MAPPING.read(files.metadata(files.read(path))) for path in sorted(paths)]
    read = [each for each in read if each.study_uid == read[-1].study_uid]
    study = MAPPING.study(read, **LINKS).resource
    assert json.dumps(MAPPING.study(read[::-1], **LINKS).resource) == json.dumps(study)
    assert len(study["series"]) == 3
    assert validation.problems("study", study) == []
