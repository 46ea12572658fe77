"""The mapping as the sync engine uses it: read, study, extend, merge, foreign, patient, endpoint."""

import contextlib
import copy
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import orjson
import pydicom.data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomcast import errors, mapping
from dicomcast.dicom import files, values
from dicomcast.mapping import notation

Json = Any
SHIPPED = ("patient", "endpoint", "imaging_study")
CONTEXT = mapping.Context(
    "urn:example:patients",
    dicom_url="https://dicom.example/v1",
    endpoint_address="https://public.example/v1",
)
SUBJECT = {"reference": "Patient/p1"}
ENDPOINT = {"reference": "Endpoint/e1"}
LINKS = {"subject": SUBJECT, "endpoint": ENDPOINT}
MAPPING = mapping.load(SHIPPED, CONTEXT)
DATA = Path(pydicom.data.__file__).parent  # what the wheel holds; nothing is fetched
GOLDEN = sorted((Path(__file__).parent / "golden").glob("mapping-*.json"))


def dataset(sop: str = "1.2.3.1.1", series: str = "1.2.3.1", study: str = "1.2.3", **keywords: Json) -> dict[str, Json]:
    """DICOM JSON of one CT image; a keyword set to None is left out, `_` stands for `>` and a list for several."""
    found = {
        "StudyInstanceUID": study,
        "SeriesInstanceUID": series,
        "SOPInstanceUID": sop,
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "PatientID": "P1",
        "Modality": "CT",
        **keywords,
    }
    out = {}
    for keyword, value in found.items():
        tag = values.tag_of(keyword)
        if value is not None:
            out[tag] = {"vr": values.vr_of(tag), "Value": value if isinstance(value, list) else [value]}
    return dict(sorted(out.items()))


def read(**keywords: Json) -> mapping.Instance:
    return MAPPING.read(dataset(**keywords))


def study(*instances: mapping.Instance) -> Json:
    return MAPPING.study(instances, **LINKS).resource


# Whole cases as data


def _golden(case: Json) -> Json:
    m = mapping.load(SHIPPED, mapping.Context(**{"patient_system": "urn:example:patients", **case["context"]}))
    read, failed = [], []
    for data in case["instances"]:
        try:
            read.append(m.read(data))
        except errors.InstanceFailed as error:
            failed.append({"kind": error.kind, "rule": error.rule, "tag": error.tag})
    found = {(issue.rule, issue.tag, issue.vr, issue.reason) for instance in read for issue in instance.issues}
    built, patient = m.study(read, **LINKS), m.patient(read)
    found |= {(issue.rule, issue.tag, issue.vr, issue.reason) for issue in (*built.issues, *patient.issues)}
    return {
        "failed": failed,
        "issues": [list(issue) for issue in sorted(found)],
        "patient": patient.resource,
        "study": built.resource,
    }


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    assert _golden(case) == case["expected"]


def test_golden_cases_are_there() -> None:
    assert len(GOLDEN) >= 4


# Real files


def _real() -> dict[str, list[mapping.Instance]]:
    studies: dict[str, list[mapping.Instance]] = {}
    for path in sorted(DATA.rglob("*.dcm")):
        try:
            data = files.metadata(files.read(path))
            instance = MAPPING.read(data)
        except (errors.InstanceFailed, ValueError):
            continue
        studies.setdefault(instance.study_uid, []).append(instance)
    return studies


def test_real_files_make_valid_resources() -> None:
    studies = _real()
    assert len(studies) > 25
    for uid, instances in studies.items():
        resource = study(*instances)
        assert resource["identifier"][0]["value"] == f"urn:oid:{uid}"
        assert MAPPING.instance_uids(resource) == {(each.series_uid, each.sop_uid) for each in instances}
        assert MAPPING.patient(instances).resource["identifier"][0]["value"] == MAPPING.patient_key(instances)[1]
        assert not MAPPING.foreign(resource)
        assert_nothing_empty(resource)


def test_names_in_many_scripts_arrive_whole() -> None:
    found = {}
    for path in (DATA / "charset_files").glob("*.dcm"):
        data = files.metadata(files.read(path))
        try:
            found[path.stem] = MAPPING.patient([MAPPING.read(data)]).resource["name"]
        except errors.InstanceFailed:
            assert "SQEncoding" in path.name  # these have no UIDs
    assert found["chrH31"][1]["family"] == "山田"
    assert found["chrH31"][2]["given"] == ["たろう"]
    assert found["chrX1"][1]["extension"][0]["valueCode"] == "IDE"
    assert found["chrArab"] == [{"use": "usual", "family": "قباني", "given": ["لنزار"]}]
    assert found["chrGreek"] == [{"use": "usual", "family": "Διονυσιος"}]


def assert_nothing_empty(content: Json) -> None:
    assert content not in (None, "", [], {})
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        assert_nothing_empty(part)


# Read: an instance or a failure


@pytest.mark.parametrize(
    ("keywords", "kind", "rule", "tag"),
    [
        ({"study": None}, "uid-missing", "study.uid", "0020000D"),
        ({"series": " "}, "uid-missing", "series.uid", "0020000E"),
        ({"sop": "1..2"}, "uid-invalid", "instance.uid", "00080018"),
        ({"sop": "1" * 65}, "uid-invalid", "instance.uid", "00080018"),
        ({"SOPClassUID": None}, "sop-class-missing", "instance.sop_class", "00080016"),
        ({"SOPClassUID": "CT"}, "value-invalid", "instance.sop_class", "00080016"),
        ({"PatientID": None}, "patient-id-missing", "patient.identifier", "00100020"),
        ({"PatientID": "  "}, "patient-id-missing", "patient.identifier", "00100020"),
        ({"PatientID": 7}, "value-invalid", "patient.identifier", "00100020"),
    ],
)
def test_what_fails_an_instance(keywords: Json, kind: str, rule: str, tag: str) -> None:
    with pytest.raises(errors.InstanceFailed) as caught:
        read(**keywords)
    assert (caught.value.kind, caught.value.rule, caught.value.tag) == (kind, rule, tag)
    assert caught.value.stage == "map"


def test_a_missing_modality_is_other_or_a_failure() -> None:
    instance = read(Modality=None)
    assert study(instance)["series"][0]["modality"]["code"] == "OT"
    assert [(issue.rule, issue.tag, issue.vr) for issue in instance.issues] == [("series.modality", "00080060", "CS")]
    strict = mapping.load(SHIPPED, mapping.Context("urn:example:patients", missing_modality="fail"))
    with pytest.raises(errors.InstanceFailed) as caught:
        strict.read(dataset(Modality=None))
    assert caught.value.kind == "modality-missing"


def test_a_modality_that_others_carry_wins_over_the_default() -> None:
    assert study(read(Modality=None), read(sop="1.2.3.1.2"))["series"][0]["modality"]["code"] == "CT"


def test_strict_makes_every_issue_a_failure() -> None:
    strict = mapping.load(SHIPPED, mapping.Context("urn:example:patients", strict=True))
    assert not strict.read(dataset()).issues
    with pytest.raises(errors.InstanceFailed) as caught:
        strict.read(dataset(PatientBirthDate="1970"))
    assert (caught.value.kind, caught.value.rule) == ("value-invalid", "patient.birth_date")


KINDS = {"uid-missing", "uid-invalid", "sop-class-missing", "patient-id-missing", "value-invalid", "invalid"}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(dataset())), inner, max_size=3),
    max_leaves=6,
)
PATHS = [path for rule in MAPPING.rules for source in rule.sources for path in notation.parse(source).paths]
TAGS = sorted({part.tag for path in PATHS for part in path})
elements = json_values | st.fixed_dictionaries(
    {}, optional={"vr": st.sampled_from(["LO", "SQ", "PN"]), "Value": json_values}
)
plausible = st.sampled_from(
    [
        "1.2.3", "20240101", "101530.5", "+0100", "CT", "A^B^C=D=E", "M", "17", "-3", "2147483648", "x\ud800", "\x07",
        {"Alphabetic": "A^B"}, {"Alphabetic": 3}, 2**70, 1e400, -1, True,
    ]
)  # fmt: skip
datasets = st.dictionaries(
    st.sampled_from(TAGS),
    elements | plausible.map(lambda value: {"vr": "LO", "Value": [value]}),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(datasets, st.booleans())
def test_anything_is_an_instance_or_a_failed_one(data: Json, whole: bool) -> None:
    data = {**dataset(), **data} if whole else data
    try:
        instance = MAPPING.read(data)
    except errors.InstanceFailed as error:
        kind = error.kind
    else:
        orjson.dumps(study(instance))
        orjson.dumps(MAPPING.patient([instance]).resource)
        return
    assert kind in KINDS


@settings(max_examples=50, deadline=None)
@given(st.lists(datasets.map(lambda data: {**dataset(), **data}), max_size=6))
def test_reading_has_no_memory(history: list[Json]) -> None:
    def outcome(m: mapping.Mapping, data: Json) -> Json:
        try:
            found = m.read(data)
        except errors.InstanceFailed as error:
            return error.kind, str(error)
        return found.resource, found.issues, found.patient.key, found.study.key, found.series.key

    fresh = [outcome(mapping.load(SHIPPED, CONTEXT), data) for data in history]
    assert [outcome(MAPPING, data) for data in history] == fresh


@pytest.mark.parametrize("broken", [None, [], "x", 3, {}, {"00100020": 5}])
def test_what_is_no_data_set_fails_alone(broken: Json) -> None:
    with pytest.raises(errors.InstanceFailed):
        MAPPING.read(broken)


def test_no_message_and_no_issue_holds_a_value() -> None:
    secret = "Secret\x01"
    keywords = {rule.id: rule for rule in MAPPING.rules if rule.sources}
    tags = {values.tag_of(name) for name in ("PatientName", "PatientSex", "PatientBirthDate", "StudyDescription")}
    data = {**dataset(), **{tag: {"vr": "LO", "Value": [secret]} for tag in tags}}
    instance = MAPPING.read(data)
    assert len(instance.issues) == len(tags)
    assert keywords
    assert "Secret" not in repr(instance.issues)
    for tag in dataset():
        with pytest.raises(errors.InstanceFailed) as caught:
            mapping.load(SHIPPED, mapping.Context("urn:p", strict=True)).read({**data, tag: {"Value": [secret]}})
        assert "Secret" not in f"{caught.value} {caught.value.__dict__}"


def test_instances_share_what_is_equal_and_are_small() -> None:
    data = dataset(PatientName={"Alphabetic": "A^B"}, StudyDate="20240101", StudyDescription="CT", SeriesNumber=1)
    raw = [orjson.dumps({**data, **dataset(sop=f"1.2.826.0.1.3680043.8.498.{10**30 + i}")}) for i in range(500)]
    MAPPING.read(data)
    tracemalloc.start()
    instances = [MAPPING.read(orjson.loads(each)) for each in raw]
    size = tracemalloc.get_traced_memory()[0] / len(instances)
    tracemalloc.stop()
    assert size < 700
    assert len({id(each.study) for each in instances}) == 1
    assert len({id(each.series_uid) for each in instances}) == 1
    assert len({id(each.resource["sopClass"]) for each in instances}) == 1


# Study and extend: functions of the set


def contents(**optional: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({}, optional=optional)


some = contents(
    StudyDate=st.sampled_from(["20240101", "20240102"]),
    StudyTime=st.sampled_from(["10", "1015", "101530.25", "235959"]),
    TimezoneOffsetFromUTC=st.sampled_from(["+0100", "-0500", "+0000"]),
    StudyDescription=st.sampled_from(["A", "B"]),
    SeriesDescription=st.sampled_from(["A", "B"]),
    SeriesNumber=st.sampled_from([9, 10, -1]),
    InstanceNumber=st.integers(1, 3),
    AccessionNumber=st.sampled_from(["7", "8"]),
    IssuerOfAccessionNumberSequence=st.sampled_from(
        [{"00400032": {"Value": ["1.2.3"]}, "00400033": {"Value": ["ISO"]}}, {"00400031": {"Value": ["RIS"]}}]
    ),
    Modality=st.sampled_from(["CT", "SR", None]),
    PatientID=st.sampled_from(["P1", "P2"]),
    PatientName=st.sampled_from(["A^B", "C"]),
)
parts = st.lists(st.tuples(st.integers(1, 3), some), min_size=1, max_size=6)


def instances_of(made: list[tuple[int, Json]]) -> list[mapping.Instance]:
    return [read(series=f"1.2.3.{i}", sop=f"1.2.3.{i}.{n}", **more) for n, (i, more) in enumerate(made)]


@settings(max_examples=150, deadline=None)
@given(parts, st.randoms(use_true_random=False))
def test_study_and_patient_do_not_depend_on_order(made: list[tuple[int, Json]], chance: random.Random) -> None:
    instances = instances_of(made)
    shuffled = chance.sample(instances, len(instances))
    assert MAPPING.study(instances, **LINKS) == MAPPING.study(shuffled, **LINKS)
    assert MAPPING.patient(instances) == MAPPING.patient(shuffled)
    assert study(*instances, *shuffled) == study(*instances)


@settings(max_examples=300, deadline=None)
@given(parts, st.integers(1, 5))
def test_extend_equals_study_of_all_unless_it_disagrees(made: list[tuple[int, Json]], cut: int) -> None:
    instances = instances_of(made)
    if not instances[cut:]:
        return
    base = orjson.loads(orjson.dumps(study(*instances[:cut])))
    before = copy.deepcopy(base)
    with contextlib.suppress(errors.Disagreement):
        assert MAPPING.extend(base, instances[cut:], **LINKS).resource == study(*instances)
    assert base == before


def test_extend_takes_what_agrees_and_new_series() -> None:
    one = read(StudyDescription="Chest", SeriesNumber=2)
    two = read(sop="1.2.3.1.2", SeriesNumber=2, StudyDescription="Chest")
    new = read(sop="1.2.3.2.1", series="1.2.3.2", SeriesNumber=1, Modality="SR")
    extended = MAPPING.extend(study(one), [two, new], **LINKS)
    assert extended.resource == study(one, two, new)
    assert extended.issues == ()
    assert [part["number"] for part in extended.resource["series"]] == [1, 2]


@pytest.mark.parametrize(
    ("keywords", "rule"),
    [
        ({"StudyDescription": "B"}, "study.description"),
        ({"AccessionNumber": "8"}, "study.accession"),
        ({"Modality": "MR"}, "series.modality"),
        ({"study": "1.2.4"}, "study.uid"),
        ({"sop": "1.2.3.1.1"}, "instance.uid"),
    ],
)
def test_extend_disagrees(keywords: Json, rule: str) -> None:
    base = study(read(StudyDescription="A", AccessionNumber="7"))
    with pytest.raises(errors.Disagreement) as caught:
        MAPPING.extend(base, [read(**{"sop": "1.2.3.1.2", **keywords})], **LINKS)
    assert caught.value.rule == rule


def test_extend_disagrees_about_another_subject_and_not_about_its_display() -> None:
    base = study(read())
    with pytest.raises(errors.Disagreement) as caught:
        MAPPING.extend(base, [read(sop="1.2.9")], subject={"reference": "Patient/p2"}, endpoint=ENDPOINT)
    assert caught.value.rule == "study.subject"
    base["subject"] = {**SUBJECT, "display": "somebody"}
    assert len(MAPPING.instance_uids(MAPPING.extend(base, [read(sop="1.2.9")], **LINKS).resource)) == 2


def test_extend_keeps_what_others_added() -> None:
    base = study(read(AccessionNumber="7"))
    base["note"] = [{"text": "seen"}]
    base["identifier"].insert(0, {"system": "urn:other", "value": "1"})
    base["series"][0]["bodySite"] = {"display": "Chest"}
    base["series"][0]["instance"][0]["title"] = "kept"
    base["series"][0]["instance"][0]["extension"] = [{"url": "urn:x", "valueString": "y"}]
    extended = MAPPING.extend(base, [read(sop="1.2.3.1.2", AccessionNumber="7")], **LINKS).resource
    assert extended["note"] == base["note"]
    assert extended["identifier"] == base["identifier"]
    assert extended["series"][0]["bodySite"] == {"display": "Chest"}
    assert extended["series"][0]["instance"][0] == base["series"][0]["instance"][0]
    assert extended["numberOfInstances"] == extended["series"][0]["numberOfInstances"] == 2


def test_instances_that_disagree_are_settled_by_number_then_size() -> None:
    found = [read(sop=f"1.2.3.1.{i}", StudyDescription=text) for i, text in enumerate(["B", "A", "B"])]
    built = MAPPING.study(found, **LINKS)
    assert built.resource["description"] == "B"
    assert [(issue.rule, issue.tag, issue.vr) for issue in built.issues] == [("study.description", "00081030", "LO")]
    assert study(*found[:2])["description"] == "A"
    numbers = [read(sop=f"1.2.3.1.{i}", SeriesNumber=number) for i, number in enumerate((10, 9))]
    assert study(*numbers)["series"][0]["number"] == 9


def test_two_studies_never_meet_in_one_resource() -> None:
    with pytest.raises(ValueError, match="several studies"):
        MAPPING.study([read(), read(study="1.2.4")], **LINKS)
    with pytest.raises(ValueError, match="none"):
        MAPPING.study([], **LINKS)


def test_patient_is_the_one_that_most_instances_name() -> None:
    several = [
        read(sop=f"1.2.3.1.{i}", PatientID=id, PatientSex=sex)
        for i, (id, sex) in enumerate([("B", "M"), ("A", "F"), ("B", "M")])
    ]
    built = MAPPING.patient(several)
    assert MAPPING.patient_key(several) == ("urn:example:patients", "B")
    assert (built.resource["identifier"][0]["value"], built.resource["gender"]) == ("B", "male")
    assert [issue.reason for issue in built.issues] == ["instances name several patients"]
    assert MAPPING.patient_key(several[:2]) == ("urn:example:patients", "A")


# Merge: ours and foreign


@settings(max_examples=100, deadline=None)
@given(parts, parts)
def test_merge_leaves_nothing_of_ours_behind(before: list[tuple[int, Json]], after: list[tuple[int, Json]]) -> None:
    # An accession number of another issuer can't be told from one that others gave: it stays.
    was, now = [
        study(*instances_of([(i, {**more, "IssuerOfAccessionNumberSequence": None}) for i, more in made]))
        for made in (before, after)
    ]
    was["note"] = [{"text": "n"}]
    merged = MAPPING.merge(was, now)
    assert merged == {**now, "note": was["note"]}
    assert MAPPING.merge(merged, now) == merged


def test_merge_of_what_is_there_changes_nothing() -> None:
    resource = study(read(AccessionNumber="7"), read(sop="1.2.3.2.1", series="1.2.3.2"))
    server = {**orjson.loads(orjson.dumps(resource)), "id": "x", "meta": {"versionId": "3", "source": "#abc"}}
    server["endpoint"] = [{"reference": "Endpoint/other"}, ENDPOINT]
    server["text"] = {"status": "generated", "div": "<div/>"}
    merged = MAPPING.merge(server, resource)
    assert merged == server
    assert MAPPING.same(merged, {**server, "id": "y", "meta": {}})
    assert not MAPPING.same(merged, {**server, "status": "cancelled"})
    assert MAPPING.merge(None, resource) == resource


def test_merge_keeps_the_foreign_and_removes_what_is_ours_and_unwanted() -> None:
    old = study(
        read(AccessionNumber="7", StudyDescription="old", SeriesDescription="old", InstanceNumber=1),
        read(sop="1.2.3.2.1", series="1.2.3.2"),
    )
    foreign = {
        "note": [{"text": "n"}],
        "_description": {"extension": [{"url": "urn:x", "valueString": "of the old text"}]},
        "extension": [{"url": "urn:x", "valueString": "y"}],
        "contained": [{"resourceType": "Basic"}],
    }
    server = {**old, **foreign, "id": "x", "meta": {"source": "elsewhere"}}
    server["identifier"] = [*old["identifier"], {"system": "urn:other", "value": "1"}]
    server["series"][0]["endpoint"] = [ENDPOINT]
    server["series"][0]["instance"][0]["title"] = "old"
    server["series"][0]["instance"][0]["extension"] = foreign["extension"]
    before = copy.deepcopy(server)
    merged = MAPPING.merge(server, study(read()))
    assert server == before
    assert merged["identifier"] == [old["identifier"][0], {"system": "urn:other", "value": "1"}]
    assert "description" not in merged
    assert "_description" not in merged
    assert merged["meta"] == {"source": "elsewhere"}
    assert {name: merged[name] for name in ("note", "extension", "contained", "id")} == {
        **{name: foreign[name] for name in ("note", "extension", "contained")},
        "id": "x",
    }
    (series,) = merged["series"]
    assert series["endpoint"] == [ENDPOINT]
    assert "description" not in series
    (instance,) = series["instance"]
    assert instance["extension"] == foreign["extension"]
    assert "number" not in instance
    assert "title" not in instance
    assert MAPPING.merge(merged, study(read())) == merged


def test_what_dicomcast_left_becomes_ours_and_its_note_stays() -> None:
    left = {
        "resourceType": "ImagingStudy",
        "id": "x",
        "meta": {"source": "https://dicom.example/", "versionId": "2"},
        "identifier": [
            {"type": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}]},
             "value": "7"},
            {"use": "usual", "system": "urn:dicom:uid", "value": "urn:oid:1.2.3"},
        ],
        "status": "available",
        "modality": [{"system": "DCM", "code": "CT"}],
        "subject": SUBJECT,
        "endpoint": [ENDPOINT],
        "note": [{"text": "Chest"}],
        "series": [
            {"uid": "1.2.3.1", "modality": {"system": "DCM", "code": "CT"}, "instance": [
                {"uid": "1.2.3.1.1", "sopClass": {"code": "1.2.840.10008.5.1.4.1.1.2"}, "number": 1}]},
        ],
    }  # fmt: skip
    ours = mapping.load(SHIPPED, mapping.Context("urn:p", accession_system="urn:example:accession"))
    wanted = ours.study([ours.read(dataset(AccessionNumber="7", StudyDescription="Chest", InstanceNumber=1))], **LINKS)
    merged = ours.merge(left, wanted.resource)
    assert merged == {**wanted.resource, "id": "x", "meta": left["meta"], "note": left["note"]}
    assert ours.foreign(left)
    del merged["note"]
    assert not ours.foreign(merged)


def test_accession_numbers_of_others_stay() -> None:
    other = {"type": {"coding": [{"code": "ACSN"}]}, "system": "urn:other", "value": "7"}
    resource = study(read(AccessionNumber="8"))
    server = {**resource, "identifier": [*resource["identifier"], other]}
    assert MAPPING.merge(server, study(read()))["identifier"] == [resource["identifier"][0], other]
    assert MAPPING.foreign(server)


@pytest.mark.parametrize(
    "change",
    [
        {"note": [{"text": "n"}]},
        {"_status": {"id": "x"}},
        {"text": {"status": "additional", "div": "<div/>"}},
        {"identifier": [{"system": "urn:other", "value": "1"}]},
        {"endpoint": [ENDPOINT, {"reference": "Endpoint/2"}]},
        {"series": [{"uid": "1.2", "endpoint": [ENDPOINT]}]},
        {"series": [{"uid": "1.2", "instance": [{"uid": "1.3", "id": "x"}]}]},
        {"series": ["odd"]},
        {"identifier": "odd"},
    ],
)
def test_foreign_content_is_seen(change: Json) -> None:
    resource = study(read(AccessionNumber="7"))
    assert not MAPPING.foreign({**resource, "id": "x", "text": {"status": "generated", "div": "<div/>"}})
    assert MAPPING.foreign({**resource, **change})


def test_merge_of_a_patient_keeps_what_the_hospital_knows() -> None:
    wanted = MAPPING.patient([read(PatientName="New^Name", PatientSex="F")]).resource
    known: Json = {
        "resourceType": "Patient",
        "id": "p1",
        "identifier": [
            {"system": "urn:mrn", "value": "9"},
            {"use": "official", "system": "urn:example:patients", "value": "P1", "assigner": {"display": "H"}},
        ],
        "name": [{"use": "official", "family": "Kept"}, {"use": "usual", "family": "Old"}],
        "birthDate": "1970-01-01",
        "telecom": [{"system": "phone", "value": "1"}],
    }
    merged = MAPPING.merge(known, wanted)
    assert merged["identifier"] == [
        {**known["identifier"][1], "type": wanted["identifier"][0]["type"]},
        known["identifier"][0],
    ]
    assert merged["name"] == [*wanted["name"], known["name"][0]]
    assert merged["telecom"] == known["telecom"]
    assert "birthDate" not in merged
    assert MAPPING.merge(merged, wanted) == merged


def test_endpoint_of_dicomcast_is_completed() -> None:
    left = {
        "resourceType": "Endpoint",
        "id": "e1",
        "status": "active",
        "connectionType": MAPPING.endpoint()["connectionType"],
        "name": "DICOM WADO-RS endpoint https://dicom.example/",
        "payloadType": [{"coding": [{"system": "", "code": ""}], "text": "DICOM WADO-RS"}],
        "payloadMimeType": ["application/dicom"],
        "address": "https://dicom.example/",
        "managingOrganization": {"reference": "Organization/1"},
    }  # fmt: skip
    merged = MAPPING.merge(left, MAPPING.endpoint())
    assert merged == {**MAPPING.endpoint(), **{name: left[name] for name in ("id", "name", "managingOrganization")}}


def test_merge_survives_odd_servers() -> None:
    wanted = study(read())
    odd = {"resourceType": "ImagingStudy", "series": [None, {"uid": 5}, {"uid": "1.2.3.1", "instance": "x"}],
           "identifier": {"a": 1}, "endpoint": [None, 3]}  # fmt: skip
    merged = MAPPING.merge(odd, wanted)
    assert merged["series"] == wanted["series"]
    assert merged["endpoint"] == [ENDPOINT, None, 3]
    with pytest.raises(ValueError, match="types"):
        MAPPING.merge({"resourceType": "Patient"}, wanted)


# Endpoint, validation, cost


def test_endpoint() -> None:
    resource = MAPPING.endpoint()
    assert resource["identifier"] == [{"system": "urn:ietf:rfc:3986", "value": "https://dicom.example/v1"}]
    assert resource["address"] == "https://public.example/v1"
    assert_nothing_empty(resource)
    with pytest.raises(errors.Misconfigured, match="address"):
        mapping.load(SHIPPED, mapping.Context("urn:p")).endpoint()


def test_an_invalid_study_is_refused_with_its_rule() -> None:
    with pytest.raises(errors.StudyFailed) as caught:
        MAPPING.study([read()], subject={}, endpoint=ENDPOINT)
    assert (caught.value.kind, caught.value.stage, caught.value.rule) == ("invalid", "validate", "study.subject")


def test_import_leaves_fhir_resources_for_later() -> None:
    import subprocess
    import sys

    code = "import sys, dicomcast.mapping; print(any(name.startswith('fhir') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_real_ct_is_mapped_whole() -> None:
    data = files.metadata(files.read(DATA / "test_files" / "CT_small.dcm"))
    resource = study(MAPPING.read(data))
    assert resource["started"] == "2004-01-19T07:27:30-05:00"
    assert resource["modality"] == [
        {
            "system": "http://dicom.nema.org/resources/ontology/DCM",
            "code": "CT",
            "display": "Computed Tomography",
        }
    ]
