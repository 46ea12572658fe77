"""What a site changes without a fork: overlays, modules by file, private elements, conditions; and what is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_mapping_rules import CONTEXT, LINKS, SHIPPED, image, item

from dicomcast import decimals, errors, mapping

Json = Any
WARD = "https://hospital.example/fhir/ward"


@pytest.fixture
def overlay(tmp_path: Path) -> Callable[[str], str]:
    """A file with that text; its path."""

    def written(text: str, name: str = "site.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return written


def load(*more: str) -> mapping.Mapping:
    return mapping.load([*SHIPPED, *more], CONTEXT)


def study(m: mapping.Mapping, data: Json) -> Json:
    return m.study([m.read(data)], **LINKS).resource


def problems(*more: str) -> list[str]:
    with pytest.raises(errors.Misconfigured) as caught:
        load(*more)
    return list(caught.value.problems)


# Sources and targets


def private(creator: str, block: str, value: Json, *, vr: str = "LO") -> Json:
    return {
        f"002900{block}": {"vr": "LO", "Value": [creator]},
        f"0029{block}10": {"vr": vr, "Value": [value]},
    }


@pytest.mark.parametrize("block", ["10", "11", "FF"])
def test_a_private_element_is_found_in_the_block_of_its_creator(overlay: Callable[[str], str], block: str) -> None:
    m = load(
        overlay(
            f"""
rules:
  - id: site.ward
    level: study
    target: {{element: extension, where: {{url: "{WARD}"}}, at: valueString}}
    source: private("ACME 1.0", 0029, 10) | trim
"""
        )
    )
    ours = private("ACME 1.0", block, " Ward 7 ")
    theirs = private("OTHER", "20", "nothing of ours")
    assert study(m, {**image(), **ours, **theirs})["extension"] == [{"url": WARD, "valueString": "Ward 7"}]
    assert "extension" not in study(m, {**image(), **theirs})
    assert "extension" not in study(m, image())


def test_what_was_read_of_private_blocks_is_not_remembered_for_others(overlay: Callable[[str], str]) -> None:
    m = load(
        overlay(
            """
rules:
  - {id: study.description, level: study, target: description, source: 'private("ACME 1.0", 0029, 10)'}
"""
        )
    )
    data = [{**image(f"1.2.{n}"), **private("ACME 1.0", block, f"in {block}")} for n, block in enumerate(("10", "11"))]
    assert [study(m, one)["description"] for one in (*data, *data)] == ["in 10", "in 11", "in 10", "in 11"]


def test_all_items_of_a_path(overlay: Callable[[str], str]) -> None:
    m = load(
        overlay(
            """
rules:
  - id: study.procedure
    level: study
    target: procedureCode
    policy: union
    source: RequestAttributesSequence[] > RequestedProcedureCodeSequence[] | concepts
"""
        )
    )
    requests = [
        item(RequestedProcedureCodeSequence=[item(CodeValue=code, CodingSchemeDesignator="99X", CodeMeaning=code)])
        for code in ("A", "B")
    ]
    shown = study(m, image(RequestAttributesSequence=requests))
    assert [one["text"] for one in shown["procedureCode"]] == ["A (A, 99X)", "B (B, 99X)"]


@pytest.fixture
def conditional(overlay: Callable[[str], str]) -> mapping.Mapping:
    return load(
        overlay(
            """
rules:
  - id: site.title
    level: instance
    target: title
    when: {Modality: [CT, PT], "ImageType[]": AXIAL}
    source: SeriesDescription
  - id: instance.title
    level: instance
    target: title
    source: ContentLabel
disable:
  - instance.title
"""
        )
    )


@pytest.mark.parametrize(
    ("keywords", "title"),
    [
        ({"Modality": "CT", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}, "thin"),
        ({"Modality": "PT", "ImageType": ["AXIAL"]}, "thin"),
        ({"Modality": "MR", "ImageType": ["AXIAL"]}, None),
        ({"Modality": "CT", "ImageType": ["LOCALIZER"]}, None),
        ({"Modality": "CT"}, None),
    ],
)
def test_a_rule_is_only_about_instances_that_meet_its_condition(
    conditional: mapping.Mapping, keywords: Json, title: str | None
) -> None:
    instance = conditional.read(image(SeriesDescription="thin", ContentLabel="no", **keywords))
    assert (instance.resource.get("title"), instance.issues) == (title, ())


def test_a_rule_replaces_the_one_with_its_id_and_can_be_disabled(overlay: Callable[[str], str]) -> None:
    m = load(
        overlay(
            """
rules:
  - {id: study.description, level: study, target: description, source: [StudyID, StudyDescription]}
disable: [series.description]
"""
        )
    )
    shown = study(m, image(StudyID="S7", StudyDescription="Chest", SeriesDescription="thin"))
    assert (shown["description"], shown["series"][0].get("description")) == ("S7", None)
    assert load().digest != m.digest


@pytest.mark.parametrize(
    ("target", "source", "keywords", "expected"),
    [
        ("{element: extension, where: {url: 'urn:x:dose'}, at: valueQuantity}", 'KVP | quantity("kV")', {"KVP": 120.5},
         [{"url": "urn:x:dose", "valueQuantity":
             {"value": "120.5", "unit": "kV", "system": "http://unitsofmeasure.org", "code": "kV"}}]),
        ("{element: extension, where: {url: 'urn:x:burned'}, at: valueBoolean}", "BurnedInAnnotation | yes_no",
         {"BurnedInAnnotation": "NO"}, [{"url": "urn:x:burned", "valueBoolean": False}]),
        ("{element: extension, where: {url: 'urn:x:frames'}, at: valueInteger}", "NumberOfFrames",
         {"NumberOfFrames": 7}, [{"url": "urn:x:frames", "valueInteger": 7}]),
        ("{element: extension, where: {url: 'urn:x:day'}, at: valueDate}", "AcquisitionDate",
         {"AcquisitionDate": "20240701"}, [{"url": "urn:x:day", "valueDate": "2024-07-01"}]),
        ("{element: extension, where: {url: 'urn:x:side'}, at: valueCode}", 'PatientPosition | lookup("HFS", "head")',
         {"PatientPosition": "HFS"}, [{"url": "urn:x:side", "valueCode": "head"}]),
        ("{element: extension, where: {url: 'urn:x:site'}, at: valueCoding}", "AnatomicRegionSequence | code",
         {"AnatomicRegionSequence": [item(CodeValue="816094009", CodingSchemeDesignator="SCT", CodeMeaning="Chest")]},
         [{"url": "urn:x:site",
           "valueCoding": {"system": "http://snomed.info/sct", "code": "816094009", "display": "Chest"}}]),
        ("{element: extension, where: {url: 'urn:x:uid'}, at: valueUri}", "FrameOfReferenceUID | uid_uri",
         {"FrameOfReferenceUID": "1.2.9"}, [{"url": "urn:x:uid", "valueUri": "urn:oid:1.2.9"}]),
    ],
)  # fmt: skip
def test_extensions_of_every_kind(
    overlay: Callable[[str], str], target: str, source: str, keywords: Json, expected: Json
) -> None:
    m = load(overlay(f"rules:\n  - {{id: site.x, level: series, target: {target}, source: '{source}'}}\n"))
    shown = study(m, image(**keywords))
    assert shown["series"][0]["extension"] == expected


def test_an_identifier_of_the_hospitals_own(overlay: Callable[[str], str]) -> None:
    m = load(
        overlay(
            """
rules:
  - id: study.study_id
    level: study
    target: {element: identifier, where: {system: "https://hospital.example/study"}}
    source: StudyID | identifier("https://hospital.example/study")
"""
        )
    )
    assert study(m, image(StudyID="S7"))["identifier"][-1] == {
        "system": "https://hospital.example/study",
        "value": "S7",
    }


# Modules by file


def test_a_module_by_file_brings_steps_of_its_own(overlay: Callable[..., str]) -> None:
    path = overlay(
        """
from dicomcast.mapping import Invalid, Rule

def shouted(text, _context):
    if text == "whisper":
        raise Invalid("too quiet")
    return text.upper()

RULES = (Rule("study.description", "study", "description", sources=("StudyDescription",), steps=(shouted,)),)
""",
        "site.py",
    )
    m = load(path)
    assert study(m, image(StudyDescription="chest"))["description"] == "CHEST"
    (issue,) = m.read(image(StudyDescription="whisper")).issues
    assert (issue.rule, issue.tag, issue.vr, issue.reason) == ("study.description", "00081030", "LO", "too quiet")


# What is refused, with file, line and rule


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{id: x, level: study, target: location, source: StudyDescripton}", "unknown keyword"),
        ("{id: x, level: study, target: location, source: StudyID | shout}", "unknown step shout"),
        ("{id: x, level: study, target: location, source: StudyID | display(1)}", "step display takes 0 arguments"),
        ("{id: x, level: study, target: location, source: StudyID | identifier}", "step identifier takes 1 arguments"),
        ("{id: x, level: study, target: colour, source: StudyID}", "unknown target element colour"),
        ("{id: x, level: study, target: description, source: SeriesNumber}",
         "SeriesNumber gives integer, and description is String"),
        ("{id: x, level: study, target: location, source: StudyID}", "StudyID gives text, and location is Reference"),
        ("{id: x, level: study, target: location, source: 'SeriesNumber | display'}",
         "step display takes text, and SeriesNumber | display gives integer"),
        ("{id: x, level: series, target: bodySite, source: AnatomicRegionSequence | codes}",
         "gives several values, and bodySite is one"),
        ("{id: x, level: study, target: location, source: 'StudyID |'}", "a name is missing at its end"),
        ("{id: x, level: study, target: location, source: 'StudyID > > X'}", "a name is missing before >"),
        ("{id: x, level: study, target: location, source: 'private(ACME, 0028, 10)'}", "odd group"),
        ("{id: x, level: study, target: location, source: 'StudyID + StudyDate'}", "can't read it from"),
        ("{id: x, level: study, target: location, source: 'StudyID(3)'}", "StudyID takes no arguments"),
        ("{id: x, level: study, target: location, source: StudyID, colour: 3}", "colour: Unexpected"),
        ("{id: x, level: study, target: location, source: 7}", "sources: Input should be"),
        ("{id: x, level: study, target: {element: note, at: x}, source: StudyID}", "note has no element x"),
        ("{id: x, level: report, target: note, source: StudyID}", "level report names its report"),
        ("{id: x, level: report, report: nothing, target: note, source: StudyID}", "unknown report nothing"),
        ("{level: study, target: location, source: StudyID}", "id: Field required"),
    ],
)  # fmt: skip
def test_a_wrong_overlay_is_refused_with_file_line_and_rule(
    overlay: Callable[[str], str], line: str, problem: str
) -> None:
    path = overlay(f"# a site's rules\nrules:\n  - {line}\n")
    found = problems(path)
    assert any(one.startswith(f"{path}:3: rule x: ") or "rule None" in one for one in found)
    assert any(re.search(problem, one) for one in found), found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rules: {}", "rules: Input should be a valid list"),
        ("rules:\n  - id: x\n bad", "site.yaml:3"),
        ("colours: []", "colours: Extra inputs are not permitted"),
        ("disable: [nothing]", "site.yaml:1: rule nothing: there is none to disable"),
        ("just text", "Input should be"),
    ],
)
def test_what_is_no_overlay_is_refused(overlay: Callable[[str], str], text: str, problem: str) -> None:
    assert any(problem in one for one in problems(overlay(text)))


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    for name in ("absent.yaml", "absent.py"):
        (found,) = problems(str(tmp_path / name))
        assert str(tmp_path / name) in found
        assert "o such file" in found or "not found" in found


def test_an_empty_overlay_changes_nothing(overlay: Callable[[str], str]) -> None:
    assert load(overlay("# nothing yet\n")).digest == load().digest


# Settings


def test_settings_name_systems_and_body_parts() -> None:
    context = mapping.Context(
        "urn:p",
        endpoint_address="https://x.example",
        dicom_url="https://x.example",
        coding_schemes={"99HOSP": "https://hospital.example/codes"},
        body_parts={"ARM": "40983000", "THX": "CHEST"},
    )
    m = mapping.load(SHIPPED, context)
    procedure = [item(CodeValue="P1", CodingSchemeDesignator="99HOSP", CodeMeaning="Arm")]
    shown = study(m, image(ProcedureCodeSequence=procedure, BodyPartExamined="ARM"))
    assert shown["procedureCode"][0]["coding"][0]["system"] == "https://hospital.example/codes"
    assert shown["series"][0]["bodySite"] == {
        "system": "http://snomed.info/sct",
        "code": "40983000",
        "display": "Upper arm",
    }
    assert study(m, image(BodyPartExamined="THX"))["series"][0]["bodySite"]["code"] == "816094009"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"coding_schemes": {"99H": "no uri"}}, "coding_schemes"),
        ({"body_parts": {"ARM": "UPPER ARM OF SORTS"}}, "body_parts"),
    ],
)
def test_wrong_tables_are_named(settings: Json, problem: str) -> None:
    with pytest.raises(errors.Misconfigured, match=problem):
        mapping.load(SHIPPED, mapping.Context("urn:p", **settings))


# What the README shows


def readme(language: str) -> str:
    """The first fenced block of that language."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_the_overlay_of_the_readme_does_what_it_says(overlay: Callable[[str], str]) -> None:
    m = load(overlay(readme("yaml")))
    data = image(Modality="MR", StudyID="S7", MagneticFieldStrength=1.5, OperatorsName=[{"Alphabetic": "Doe^Jane"}])
    shown = study(m, {**data, **private("NORTH RIS 1.0", "10", "W3")})
    assert shown["identifier"][-1] == {"system": "https://north.example/study", "value": "S7"}
    assert shown["extension"] == [{"url": "https://north.example/fhir/ward", "valueString": "W3"}]
    (series,) = shown["series"]
    assert series["extension"][0]["valueQuantity"] == {
        "value": "1.5", "unit": "T", "system": "http://unitsofmeasure.org", "code": "T",
    }  # fmt: skip
    assert "performer" not in series


def test_the_module_of_the_readme_does_what_it_says(overlay: Callable[..., str]) -> None:
    m = load(overlay(readme("python"), "site.py"))
    assert study(m, image(StudyDescription="W3-chest"))["description"] == "W3"
    assert [issue.reason for issue in m.read(image(StudyDescription="chest")).issues] == ["no ward in it"]


# Mistakes that are easily made


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("target: {element: description}, source: StudyID", "is one element and no list: write `target: description`"),
        ("target: {element: identifier}, source: 'StudyID | identifier(\"urn:x:y\")'", "would own all of identifier"),
        ("target: {element: identifier, where: {sytem: 'urn:x:y'}}, source: 'StudyID | identifier(\"urn:x:y\")'",
         "identifier has no element sytem"),
        ("target: description, constant: 5", "its constant does not fit description"),
        ("target: description, constant: [a]", "its constant does not fit description"),
        ("target: status, constant: avialable", "its constant does not fit status: code outside its required binding"),
        ("target: location, source: StudyDescripton | display", "is it StudyDescription?"),
        ("target: location, source: StudyID | dispaly", "is it display?"),
        ("target: locaton, source: StudyID | display", "is it location?"),
        ("target: location, source: 'StudyID | lookup(\"a\")'", "lookup needs pairs"),
        ("target: location, source: 'private(\"A\", 0029, 1001)'", "the last two digits of the element"),
        ("target: description, source: StudyID", "replace it by its id, or disable study.description"),
        ("target: location, source: StudyID | display, when: {PatientSex: NO}", "when.PatientSex.0: Input should be"),
        ("target: {element: note, were: 1}, source: StudyID", "were: Unexpected keyword argument"),
    ],
)  # fmt: skip
def test_easy_mistakes_are_told_with_their_mend(overlay: Callable[[str], str], lines: str, problem: str) -> None:
    path = overlay(f"rules:\n  - {{id: x, level: study, {lines}}}\n")
    assert any(one.startswith(f"{path}:2: rule x: ") and problem in one for one in problems(path)), problems(path)


def test_an_id_stands_once_and_keys_stay(overlay: Callable[[str], str]) -> None:
    twice = "  - {id: x, level: study, target: location, source: StudyID | display}\n"
    path = overlay(f"rules:\n{twice}{twice}disable: [study.uid, series.oprator]\n")
    assert problems(path) == [
        f"{path}:3: rule x: stands there twice",
        f"{path}:4: rule study.uid: nothing works without it; replace it instead",
        f"{path}:4: rule series.oprator: there is none to disable; is it series.operator?",
    ]


def test_an_item_that_its_rule_would_not_know_again_is_never_written(overlay: Callable[[str], str]) -> None:
    """It could not be replaced or removed later."""
    m = load(
        overlay(
            """
rules:
  - id: study.study_id
    level: study
    target: {element: identifier, where: {system: "urn:x:one"}}
    source: StudyID | identifier("urn:x:another")
"""
        )
    )
    with pytest.raises(errors.InstanceFailed) as caught:
        m.read(image(StudyID="S7"))
    assert (caught.value.kind, caught.value.rule) == ("invalid", "study.study_id")


def test_numbers_in_a_condition_need_no_quotes(overlay: Callable[[str], str]) -> None:
    path = overlay(
        "rules:\n  - {id: x, level: series, target: {element: extension, where: {url: 'urn:x:y'}, at: valueString},"
        " source: StudyID, when: {SeriesNumber: 3}}\n"
    )
    m = load(path)
    shown = [study(m, image(StudyID="S7", SeriesNumber=number))["series"][0] for number in (3, 4)]
    assert ["extension" in one for one in shown] == [True, False]


def test_what_a_site_says_of_a_value_never_repeats_it(overlay: Callable[..., str]) -> None:
    path = overlay(
        """
from dicomcast.mapping import Invalid, Rule

def telling(text, context):
    raise Invalid(f"bad value {text}")

RULES = (Rule("study.description", "study", "description", sources=("StudyDescription",), steps=(telling,)),)
""",
        "site.py",
    )
    (issue,) = load(path).read(image(StudyDescription="Secret")).issues
    assert issue.reason == "refused by step dicomcast_site_site:telling"


def test_the_digest_knows_what_a_step_leans_on(overlay: Callable[..., str]) -> None:
    text = """
from dicomcast.mapping import Rule

WARDS = {"a": "ward %s"}

def ward(text, context):
    return WARDS.get(text)

RULES = (Rule("study.description", "study", "description", sources=("StudyDescription",), steps=(ward,)),)
"""
    one, other = (load(overlay(text % number, f"site{number}.py")) for number in (1, 2))
    assert one.digest != other.digest
    assert one.digest == load(overlay(text % 1, "site1.py")).digest


def test_decimals_of_a_site_are_written_as_a_server_gives_them_back(overlay: Callable[..., str]) -> None:
    path = overlay(
        """
from dicomcast.mapping import Rule, Slice

def half(number, context):
    return float(number) / 2

URL = "urn:x:half"
RULES = (
    Rule("x", "series", Slice("extension", where={"url": URL}, at="valueDecimal"), sources=("KVP",), steps=(half,)),
    Rule("y", "study", Slice("extension", where={"url": URL}, at="valueDecimal"), constant=1.5),
)
""",
        "site.py",
    )
    shown = study(load(path), image(KVP=2.5))
    text = decimals.dumps(shown)
    assert b'"valueDecimal":1.25' in text
    assert b'"valueDecimal":1.5' in text
    assert load(path).merge(decimals.loads(text), shown) == decimals.loads(text)


def test_instances_of_one_content_stay_with_their_studies(overlay: Callable[[str], str]) -> None:
    path = overlay(
        "rules:\n  - {id: study.uid, level: study, target: {element: identifier, where: {system: 'urn:x:y'}},"
        " source: 'PatientID | identifier(\"urn:x:y\")', required: true}\n"
    )
    m = load(path)
    uids = [m.read(image(StudyInstanceUID=uid)).study_uid for uid in ("1.2", "1.7")]
    assert uids == ["1.2", "1.7"]


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ('Rule("x", "study", "location", sources=("StudyID | display",), when={"Modality": "ACTION"})',
         "needs a tuple"),
        ('Rule("x", "study", "location", sources=("StudyID | display",), when={"Modality, StudyID": ("CT",)})',
         "about one attribute"),
        ('Rule("x", "study", "location", sources=("StudyID | display",), when={"Modality": ("CT",)}, required=True)',
         "has no condition"),
        ('Rule("x", "study", Slice("note", where={"authorString": "x"}, at="text"), constant="y", owner="once")',
         "owner once is for whole elements"),
        ('Rule("x", "study", "started", constant=__import__("datetime").date(2020, 1, 1))', "constant is not JSON"),
    ],
)  # fmt: skip
def test_what_a_module_gets_wrong_is_told_too(overlay: Callable[..., str], rule: str, problem: str) -> None:
    path = overlay(f"from dicomcast.mapping import Rule, Slice\n\nRULES = ({rule},)\n", "site.py")
    assert any(problem in one and one.startswith(f"{path}:3: rule x: ") for one in problems(path)), problems(path)


def test_a_report_says_who_and_what_it_is_about(overlay: Callable[..., str]) -> None:
    path = overlay(
        "from dicomcast.mapping import Report\n\nRULES = ()\n"
        'REPORTS = (Report("x", titles=("113701",)), Report("y", "113701"))\n',
        "site.py",
    )
    found = problems(path)
    assert "report x: no rule has the link identifier, study, subject" in found
    assert "report x: no rule for code, status" in found
    assert "report y: titles and items must be tuples" in found


def test_private_blocks_that_are_spoilt_hide_no_other(overlay: Callable[[str], str]) -> None:
    m = load(
        overlay(
            "rules:\n  - {id: study.description, level: study, target: description,"
            " source: 'private(\"ACME\", 0029, 10)'}\n"
        )
    )
    spoilt = {"00290010": {"vr": "LO", "Value": [7]}, "00290011": {"vr": "LO"}, "00290012": {"Value": "ACME"}}
    assert study(m, {**image(), **spoilt, **private("ACME", "13", "found")})["description"] == "found"
