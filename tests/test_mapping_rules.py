"""The rules: what each shipped one makes of its attributes, and what a site may and may not declare."""

import dataclasses
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomcast import errors, mapping
from dicomcast.dicom import values
from dicomcast.mapping import Rule, Slice, validation

Json = Any
SHIPPED = ("patient", "endpoint", "imaging_study")
CONTEXT = mapping.Context(
    "urn:example:patients", dicom_url="https://dicom.example/v1", endpoint_address="https://x.example"
)
SOP = {"system": "urn:ietf:rfc:3986", "code": "urn:oid:1.2.840.10008.5.1.4.1.1.2"}
LINKS = {"subject": {"reference": "Patient/p1"}, "endpoint": {"reference": "Endpoint/e1"}}


def item(**keywords: Json) -> dict[str, Json]:
    out = {}
    for keyword, value in keywords.items():
        tag = values.tag_of(keyword)
        if value is not None:
            out[tag] = {"vr": values.vr_of(tag), "Value": value if isinstance(value, list) else [value]}
    return out


def image(sop: str = "1.2.3.1.1", **keywords: Json) -> dict[str, Json]:
    uids = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.1", "SOPInstanceUID": sop}
    return item(**{**uids, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "PatientID": "P1", "Modality": "CT", **keywords})


def mapped(context: mapping.Context = CONTEXT, **keywords: Json) -> tuple[Json, Json, list[tuple[str, str]]]:
    """Patient, ImagingStudy, and the rule and tag of every issue, of one image."""
    m = mapping.load(SHIPPED, context)
    instance = m.read(image(**keywords))
    issues = [(issue.rule, issue.tag) for issue in instance.issues]
    return m.patient([instance]).resource, m.study([instance], **LINKS).resource, issues


# What each rule makes of its attributes


@pytest.mark.parametrize(
    ("time", "offset", "zone", "started"),
    [
        (None, None, None, "2024-07-01"),
        ("101530", None, None, "2024-07-01"),
        ("101530", "+0200", None, "2024-07-01T10:15:30+02:00"),
        ("101530", "+0000", "Europe/Vilnius", "2024-07-01T10:15:30+00:00"),
        ("1015", "-0330", None, "2024-07-01T10:15:00-03:30"),
        ("10", "+0200", None, "2024-07-01"),
        ("101530.1", "+0200", None, "2024-07-01T10:15:30.100+02:00"),
        ("101530.1239", "+0200", None, "2024-07-01T10:15:30.123+02:00"),
        ("101530", None, "Europe/Vilnius", "2024-07-01T10:15:30+03:00"),
        ("101530", None, "Asia/Kolkata", "2024-07-01T10:15:30+05:30"),
        ("235960", "+0000", None, "2024-07-01T23:59:60+00:00"),
    ],
)
def test_started_never_claims_more_than_dicom_says(
    time: str | None, offset: str | None, zone: str | None, started: str
) -> None:
    context = dataclasses.replace(CONTEXT, timezone=zone)
    _, study, issues = mapped(context, StudyDate="20240701", StudyTime=time, TimezoneOffsetFromUTC=offset)
    assert (study["started"], issues) == (started, [])


def test_started_follows_daylight_saving_and_history() -> None:
    context = dataclasses.replace(CONTEXT, timezone="Europe/Vilnius")
    for date, started in (("20240101", "2024-01-01T10:15:30+02:00"), ("18700101", "1870-01-01")):
        assert mapped(context, StudyDate=date, StudyTime="101530")[1]["started"] == started


@pytest.mark.parametrize(
    ("keywords", "started", "tag"),
    [
        ({"StudyTime": "noon", "TimezoneOffsetFromUTC": "+0100"}, "2024-07-01", "00080030"),
        ({"StudyTime": "1015", "TimezoneOffsetFromUTC": "CET"}, "2024-07-01", "00080201"),
        ({"StudyDate": "202407"}, None, "00080020"),
    ],
)
def test_invalid_parts_shorten_started_and_are_issues(keywords: Json, started: str | None, tag: str) -> None:
    _, study, issues = mapped(**{"StudyDate": "20240701", **keywords})
    assert study.get("started") == started
    assert [issue for issue in issues if issue[0] == "study.started"] == [("study.started", tag)]


def test_earliest_is_by_date_as_written_then_timed_then_instant() -> None:
    m = mapping.load(SHIPPED, CONTEXT)

    def started(*moments: tuple[str, str | None, str | None]) -> str:
        read = [
            m.read(image(f"1.2.{i}", StudyDate=date, StudyTime=time, TimezoneOffsetFromUTC=offset))
            for i, (date, time, offset) in enumerate(moments)
        ]
        return str(m.study(read, **LINKS).resource["started"])

    assert started(("20240702", "0100", "+1400"), ("20240701", None, None)) == "2024-07-01"
    assert started(("20240701", None, None), ("20240701", "2359", "-1200")) == "2024-07-01T23:59:00-12:00"
    assert started(("20240701", "1000", "+0000"), ("20240701", "1030", "+0200")) == "2024-07-01T10:30:00+02:00"
    assert started(("20240701", "1000", "+0000"), ("20240701", "1100", "+0100")) == "2024-07-01T10:00:00+00:00"


ISSUERS = {"HOSP": "https://hospital.example/id", "1.2.99": "https://known.example/id"}


@pytest.mark.parametrize(
    ("local", "universal", "kind", "system"),
    [
        (None, None, None, None),
        ("HOSP", None, None, ISSUERS["HOSP"]),
        ("elsewhere", None, None, None),
        ("HOSP", "1.2.40", "ISO", "urn:oid:1.2.40"),
        ("HOSP", "1.2.99", "ISO", ISSUERS["1.2.99"]),
        (None, "1.2.40", None, None),
        (None, "no oid", "ISO", None),
        ("HOSP", "no oid", "ISO", ISSUERS["HOSP"]),
        (None, "550E8400-E29B-41D4-A716-446655440000", "UUID", "urn:uuid:550e8400-e29b-41d4-a716-446655440000"),
        (None, "no uuid", "UUID", None),
        (None, "https://issuer.example/mrn", "URI", "https://issuer.example/mrn"),
        (None, "relative", "URI", None),
        (None, "dns.example", "DNS", None),
    ],
)
@pytest.mark.parametrize("default", [None, "urn:example:default"])
def test_identifier_systems_come_from_the_issuer_else_the_site(
    local: str | None, universal: str | None, kind: str | None, system: str | None, default: str | None
) -> None:
    context = mapping.Context(default, accession_system=default, issuers=ISSUERS)
    issuer = item(LocalNamespaceEntityID=local, UniversalEntityID=universal, UniversalEntityIDType=kind)
    qualifiers = item(UniversalEntityID=universal, UniversalEntityIDType=kind)
    patient, study, _ = mapped(
        context,
        IssuerOfPatientID=local,
        IssuerOfPatientIDQualifiersSequence=[qualifiers],
        AccessionNumber="A7",
        IssuerOfAccessionNumberSequence=[issuer],
    )
    expected = system or default
    for identifier, code, value in ((patient["identifier"][0], "MR", "P1"), (study["identifier"][1], "ACSN", "A7")):
        assert identifier["type"]["coding"] == [
            {"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": code}
        ]
        assert identifier["value"] == value
        assert identifier.get("system") == expected
        assert "system" in identifier or expected is None
    assert mapping.load(SHIPPED, context).read(image(PatientID=" P1 ")).patient_key[1] == "P1"


@pytest.mark.parametrize(
    ("sex", "gender"), [("M", "male"), ("F", "female"), ("O", "other"), ("", None), ("f", None), ("U", None)]
)
def test_gender(sex: str, gender: str | None) -> None:
    patient, _, issues = mapped(PatientSex=sex)
    assert patient.get("gender") == gender
    assert issues == ([("patient.gender", "00100040")] if sex in ("f", "U") else [])


def test_a_name_with_too_many_components_keeps_the_five_and_is_an_issue() -> None:
    patient, _, issues = mapped(PatientName={"Alphabetic": "F^G^M^P^S^?"})
    assert patient["name"] == [{"use": "usual", "family": "F", "given": ["G", "M"], "prefix": ["P"], "suffix": ["S"]}]
    assert issues == [("patient.name", "00100010")]


def test_codes_have_systems_that_are_uris_and_survive() -> None:
    _, study, _ = mapped(Modality="CT")
    series = study["series"][0]
    assert series["modality"]["system"] == "http://dicom.nema.org/resources/ontology/DCM"
    assert series["instance"][0]["sopClass"] == {
        "system": "urn:ietf:rfc:3986",
        "code": "urn:oid:1.2.840.10008.5.1.4.1.1.2",
    }
    assert mapped(Modality="XYZ")[1]["modality"] == [
        {"system": "http://dicom.nema.org/resources/ontology/DCM", "code": "XYZ"}
    ]


def test_a_modality_that_is_no_code_gives_way_to_the_default_or_fails() -> None:
    _, study, issues = mapped(Modality="C\tT")
    assert (study["modality"][0]["code"], issues) == ("OT", [("series.modality", "00080060")])
    with pytest.raises(errors.InstanceFailed) as caught:
        mapped(dataclasses.replace(CONTEXT, missing_modality="fail"), Modality="C\tT")
    assert caught.value.kind == "value-invalid"


def test_study_modality_is_what_acquired_never_modalities_in_study() -> None:
    m = mapping.load(SHIPPED, CONTEXT)
    made = [("1.2.3.1", "SR"), ("1.2.3.2", "PT"), ("1.2.3.3", "CT"), ("1.2.3.4", "CT"), ("1.2.3.5", "SEG")]
    read = [
        m.read(image(f"{uid}.1", SeriesInstanceUID=uid, Modality=code, ModalitiesInStudy=["US"])) for uid, code in made
    ]
    assert [coding["code"] for coding in m.study(read, **LINKS).resource["modality"]] == ["CT", "PT"]
    assert [coding["code"] for coding in m.study(read[:1], **LINKS).resource["modality"]] == ["SR"]


def test_series_and_instances_are_in_order_of_number_then_uid() -> None:
    m = mapping.load(SHIPPED, CONTEXT)
    made = [("1.9", None, None), ("1.10", None, 2), ("1.2", 10, 10), ("1.1", 9, 9), ("1.3", 9, None)]
    read = [
        m.read(image(f"{uid}.{i}", SeriesInstanceUID=uid, SeriesNumber=number, InstanceNumber=i))
        for uid, number, _ in made
        for i in (10, 9)
    ]
    series = m.study(read, **LINKS).resource["series"]
    assert [part["uid"] for part in series] == ["1.1", "1.3", "1.2", "1.10", "1.9"]
    assert all([each["number"] for each in part["instance"]] == [9, 10] for part in series)


def test_description_is_a_description_and_no_note() -> None:
    _, study, _ = mapped(StudyDescription=" Chest ", SeriesDescription="Lung")
    assert (study["description"], study["series"][0]["description"]) == ("Chest", "Lung")
    assert "note" not in study


def test_title_takes_the_first_source_that_has_one() -> None:
    concept = item(CodeMeaning="Report")
    title: Json = {"ConceptNameCodeSequence": [concept], "DocumentTitle": "Doc", "ContentLabel": "LABEL"}
    for expected in ("Report", "Doc", "LABEL"):
        assert mapped(**title)[1]["series"][0]["instance"][0]["title"] == expected
        title.pop(next(iter(title)))


# Modules of a site


@pytest.fixture
def site() -> Iterator[Callable[..., list[str]]]:
    """Makes a site's module of rules importable and gives the names to load."""

    def make(*table: Json, name: str = "site_rules.own") -> list[str]:
        module = types.ModuleType(name)
        module.RULES = table  # type: ignore[attr-defined]
        sys.modules[name] = module
        return [*SHIPPED, name]

    sys.modules["site_rules"] = types.ModuleType("site_rules")
    yield make
    for name in [name for name in sys.modules if name.startswith("site_rules")]:
        del sys.modules[name]


def problems(names: list[str], context: mapping.Context = CONTEXT) -> tuple[str, ...]:
    with pytest.raises(errors.Misconfigured) as caught:
        mapping.load(names, context)
    return caught.value.problems


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (Rule("x", "study", "location", sources=("StudyDescripton",)), "unknown keyword .*StudyDescripton"),
        (Rule("x", "study", "location", sources=("PixelData",)), "PixelData"),
        (Rule("x", "study", "location", sources=("PatientID > StudyID",)), "PatientID is not a sequence"),
        (Rule("x", "study", "location", sources=("StudyID",), steps=("shout",)), "unknown step shout"),
        (Rule("x", "studies", "location", constant={}), "unknown level studies"),
        (Rule("x", "study", "colour", constant="red"), "unknown target element colour"),
        (Rule("x", "series", "subject", constant="red"), "unknown target element subject"),
        (Rule("x", "study", Slice("location"), constant={}), "location is one element and no list"),
        (Rule("x", "study", "location", sources=("StudyID",), policy="newest"), "unknown policy newest"),
        (Rule("x", "study", "location", sources=("StudyID",), policy="union"), "union needs a list"),
        (Rule("x", "study", "location", constant={}, owner="theirs"), "unknown owner theirs"),
        (Rule("x", "study", "location", setting="colour"), "unknown setting colour"),
        (Rule("x", "study", Slice("note", default="colour"), constant={}), "unknown setting colour"),
        (Rule("x", "study", "location", link="patient"), "study has no link patient"),
        (Rule("x", "series", "endpoint", link="subject"), "series has no link subject"),
        (Rule("x", "study", "location", derive="shout"), "unknown step shout"),
        (Rule("x", "patient", "active", derive="count_series"), "derive is for study and series"),
        (Rule("x", "study", "location"), "exactly one"),
        (Rule("x", "study", "location", constant={}, link="subject"), "exactly one"),
        (Rule("x", "study", "location", sources="StudyID"), "must be tuples"),  # type: ignore[arg-type]
        (Rule("x", "study", "description", constant="Chest"), "study.description owns study description too"),
    ],
)  # fmt: skip
def test_wrong_rules_are_named_when_they_are_loaded(site: Callable[..., list[str]], rule: Rule, problem: str) -> None:
    found = problems(site(rule))
    assert any(re.search(rf"^site_rules\.own:\d+: rule x: .*{problem}", one) for one in found), found


def test_every_problem_is_listed_at_once(site: Callable[..., list[str]]) -> None:
    names = site(Rule("a", "study", "colour", constant=1), Rule("a", "study", "note", link="x"), Rule("b", "x", "y"))
    context = mapping.Context("no uri", timezone="Mars/Base", missing_modality="x", issuers={"H": "relative"})
    found = "\n".join(problems([*names, "absent", "site_rules.absent"], context))
    for part in ("patient_system", "timezone", "missing_modality", "issuers", "a stands there twice", "rule b",
                 "module absent: not found", "module site_rules.absent: not found"):  # fmt: skip
        assert part in found


def test_a_mapping_without_its_keys_or_a_module_without_rules_is_refused(site: Callable[..., list[str]]) -> None:
    assert [problem.split()[-1] for problem in problems(["endpoint"])] == [
        "patient.identifier",
        "study.uid",
        "series.uid",
        "instance.uid",
    ]
    assert "has no RULES" in problems(site("no rule"))[0]
    assert "has no RULES" in problems([*SHIPPED, "os.path"])[0]


def shout(value: Json, context: mapping.Context) -> Json:
    return f"{value}!"


def broken(value: Json, context: mapping.Context) -> Json:
    raise RuntimeError(value)


def load(names: list[str]) -> mapping.Mapping:
    return mapping.load(names, CONTEXT)


def test_a_site_adds_and_replaces_rules(site: Callable[..., list[str]]) -> None:
    m = load(
        site(
            Rule("study.description", "study", "description", sources=("StudyID", "StudyDescription"), steps=(shout,)),
            Rule("site.active", "patient", "active", constant=True),
            Rule("site.text", "instance", "extension", constant=[{"url": "urn:x", "valueString": "y"}]),
        )
    )
    instance = m.read(image(StudyDescription="Chest"))
    study = m.study([instance], **LINKS).resource
    assert study["description"] == "Chest!"
    assert study["series"][0]["instance"][0]["extension"] == [{"url": "urn:x", "valueString": "y"}]
    assert m.patient([instance]).resource["active"] is True


def test_a_step_that_breaks_is_an_issue_without_the_value(site: Callable[..., list[str]]) -> None:
    m = load(site(Rule("study.description", "study", "description", sources=("StudyDescription",), steps=(broken,))))
    instance = m.read(image(StudyDescription="Secret"))
    assert [issue.reason for issue in instance.issues] == ["step test_mapping_rules:broken raised RuntimeError"]
    assert "description" not in m.study([instance], **LINKS).resource


@pytest.mark.parametrize(
    "content", [{"display": ""}, {"x": 1}, {"display": 5}, [], "text", {"reference": None}, {1, 2}]
)
def test_a_rule_that_makes_what_is_not_fhir_fails_the_instance(site: Callable[..., list[str]], content: Json) -> None:
    def odd(value: Json, context: mapping.Context) -> Json:
        return content

    m = load(site(Rule("site.where", "study", "location", sources=("InstitutionName",), steps=(odd,))))
    assert m.read(image()).issues == ()
    with pytest.raises(errors.InstanceFailed) as caught:
        m.read(image(InstitutionName="Secret"))
    assert (caught.value.kind, caught.value.stage) == ("invalid", "validate")
    assert "Secret" not in str(caught.value)


def coded(value: Json, context: mapping.Context) -> Json:
    return {"text": value}


def series_of(m: mapping.Mapping, *keywords: Json) -> list[mapping.Instance]:
    return [m.read(image(f"1.2.{i}", **more)) for i, more in enumerate(keywords)]


def test_union_collects_sorts_and_folds(site: Callable[..., list[str]]) -> None:
    rule = Rule(
        "site.note", "study", Slice("note", by="text", most=9), sources=("StudyID",), steps=(coded,), policy="union"
    )
    m = load(site(rule))
    read = series_of(m, {"StudyID": "b"}, {"StudyID": "a"}, {}, {"StudyID": "b"})
    whole = m.study(read, **LINKS)
    assert whole.resource["note"] == [{"text": "a"}, {"text": "b"}]
    assert whole.issues == ()
    base = m.study(read[:1], **LINKS).resource
    assert m.extend(base, read[1:], **LINKS) == whole


def test_unanimous_is_absent_where_instances_disagree(site: Callable[..., list[str]]) -> None:
    rule = Rule(
        "series.laterality", "series", "laterality", sources=("StudyID",), steps=(site_side,), policy="unanimous"
    )
    m = load(site(rule))
    read = series_of(m, {"StudyID": "L"}, {"StudyID": "R"}, {}, {"StudyID": "L"})

    def side(*instances: mapping.Instance) -> Json:
        built = m.study(instances, **LINKS)
        return built.resource["series"][0].get("laterality"), [issue.rule for issue in built.issues]

    assert side(*read) == (None, ["series.laterality"])
    assert side(read[0], read[2], read[3]) == ({"code": "L"}, [])
    unknown = m.study(read[:2], **LINKS).resource
    with pytest.raises(errors.Disagreement):
        m.extend(unknown, [read[3]], **LINKS)
    assert m.extend(unknown, [read[2]], **LINKS).resource == m.study(read[:3], **LINKS).resource


def site_side(value: Json, context: mapping.Context) -> Json:
    return {"code": value}


def test_an_extension_of_ours_lives_beside_foreign_ones(site: Callable[..., list[str]]) -> None:
    def note(value: Json, context: mapping.Context) -> Json:
        return {"url": "urn:site:x", "valueString": value}

    target = Slice("extension", where={"url": "urn:site:x"})
    m = load(site(Rule("site.x", "series", target, sources=("StudyID",), steps=(note,))))
    wanted = m.study([m.read(image(StudyID="1"))], **LINKS).resource
    server = json.loads(json.dumps(wanted))
    foreign = {"url": "urn:other", "valueString": "z"}
    server["series"][0]["extension"] = [foreign, {"url": "urn:site:x", "valueString": "old"}]
    merged = m.merge(server, wanted)
    assert merged["series"][0]["extension"] == [*wanted["series"][0]["extension"], foreign]
    assert not m.foreign(wanted)
    assert m.foreign(server)


# Digest, table, validation


def test_digest_follows_what_decides_the_content(site: Callable[..., list[str]]) -> None:
    digest = load(list(SHIPPED)).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert mapping.load(SHIPPED, dataclasses.replace(CONTEXT, endpoint_address="https://new.example")).digest == digest
    others = [
        dataclasses.replace(CONTEXT, **change)
        for change in (
            {"patient_system": "urn:other"},
            {"timezone": "UTC"},
            {"strict": True},
            {"issuers": {"H": "urn:h"}},
        )
    ]
    found = {mapping.load(SHIPPED, context).digest for context in others}
    for rule in (
        Rule("site.active", "patient", "active", constant=True),
        Rule("instance.title", "instance", "title", sources=("StudyID",)),
        Rule("instance.title", "instance", "title", sources=("StudyID",), steps=(shout,)),
    ):
        found.add(load(site(rule)).digest)
    assert len(found | {digest}) == 8


def test_rules_are_data_that_can_be_shown() -> None:
    rows = [rule.row() for rule in load(list(SHIPPED)).rules]
    assert json.loads(json.dumps(rows)) == json.loads(json.dumps(rows))
    assert rows[0].keys() == {"id", "level", "target", "sources", "required", "missing"}
    assert len({row["id"] for row in rows}) == len(rows)


PATIENT = {"resourceType": "Patient", "gender": "male", "identifier": [{"system": "urn:x", "value": "1"}]}


@pytest.mark.parametrize(
    ("level", "content", "element"),
    [
        ("patient", {**PATIENT, "gender": "M"}, "gender"),
        ("patient", {**PATIENT, "identifier": [{"use": "mine", "value": "1"}]}, "identifier"),
        ("patient", {**PATIENT, "identifier": [{"system": "relative", "value": "1"}]}, "identifier"),
        ("patient", {**PATIENT, "identifier": []}, "identifier"),
        ("patient", {**PATIENT, "identifier": [{}]}, "identifier"),
        ("patient", {**PATIENT, "name": [{"given": [None]}]}, "name"),
        ("patient", {**PATIENT, "name": [{"family": " "}]}, "name"),
        ("patient", {**PATIENT, "name": [{"family": "a\0"}]}, "name"),
        ("patient", {**PATIENT, "name": [{"family": "a\ud800"}]}, "name"),
        ("patient", {**PATIENT, "birthDate": "2024-02-30"}, "birthDate"),
        ("patient", {**PATIENT, "fhir_comments": "x"}, "fhir_comments"),
        ("patient", {**PATIENT, "contained": [{"resourceType": "Nothing"}]}, ""),
        ("instance", {"uid": "1" * 65, "sopClass": {"code": "x"}}, "uid"),
        ("instance", {"uid": "1.2", "sopClass": None}, "sopClass"),
        ("instance", {"uid": "1.2", "sopClass": {}}, "sopClass"),
        ("instance", {"uid": "1.2"}, "sopClass"),
        ("instance", {"uid": "1.2", "sopClass": {"code": "x"}, "number": -1}, "number"),
        ("study", {"resourceType": "ImagingStudy", "status": "bogus", "subject": {"reference": "Patient/1"}}, "status"),
        ("study", {"resourceType": "ImagingStudy", "status": "available", "subject": None}, "subject"),
        ("series", {"uid": "1.2"}, "modality"),
        ("endpoint", {}, ""),
    ],
)
def test_validation_sees_what_fhir_resources_lets_pass(level: str, content: Json, element: str) -> None:
    found = validation.problems(level, content)
    assert found
    if element:
        assert found[0].element == element


def test_validation_accepts_what_is_right() -> None:
    assert validation.problems("patient", PATIENT) == []
    assert validation.problems("study", {
        "resourceType": "ImagingStudy", "status": "available", "subject": {"reference": "Patient/1", "type": "Patient"},
    }) == []  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "uid": st.sampled_from(["1.2.3", "1" * 64, "1" * 65, "", "no uid!", None, 7, "a\0"]),
            "sopClass": st.just(SOP),
        },
        optional={
            "number": st.integers(-1, 2**31) | st.sampled_from(["7", None, 1.5, True, "x"]),
            "title": st.text(st.characters(), max_size=5) | st.sampled_from([None, 3, " ", "x\ud800"]),
            "colour": st.just("red"),
        },
    )
)
def test_instances_of_a_known_shape_are_judged_as_strictly_as_the_first(content: Json) -> None:
    """What the fields of the model say one by one is what the whole model says."""
    shape = {name: {"uid": "1.2", "sopClass": SOP, "number": 1, "title": "x"}.get(name) for name in content}
    assert validation.problems("instance", shape) == [] or "colour" in content
    fast = validation.problems("instance", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "_accepted", set())
        assert fast == validation.problems("instance", content)
