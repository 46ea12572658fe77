"""What authors of mappings use, as they use it: map --explain, mappings list, show, check, test."""

import contextlib
import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import dose
import pydicom.data
import pytest
from hospital import a_study, json_of

from dicomcast import cli
from dicomcast.mapping import steps
from dicomcast.sandbox import modality

Json = Any
PAGE = Path(__file__).parent.parent / "docs" / "mapping.md"
STUDY = "1.2.3.4.5"
CT = str(pydicom.data.get_testdata_file("CT_small.dcm"))
SITE = """\
# What our hospital adds.
# In two lines.
rules:
  - id: site.pitch
    level: series
    target: {element: extension, where: {url: "https://hospital.example/pitch"}, at: valueString}
    source: 'private("GEMS_IDEN_01", 0009, 02)'
  - id: site.mr
    level: series
    target: description
    source: StudyDescription
    when: {Modality: MR}
disable: [series.description]
"""
WRONG = """\
rules:
  - id: site.typo
    level: series
    target: description
    source: SeriesDescriptoin
  - {id: site.step, level: series, target: number, source: SeriesNumber | nostep}
  - {id: site.level, level: serie, target: number, source: SeriesNumber}
  - {id: site.key, level: series, target: number, sauce: SeriesNumber}
disable:
  - site.nothing
"""


def run(*arguments: str | Path, **more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, in this process: a start takes most of a second. No setting but these."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for name in [name for name in os.environ if name.startswith("DICOMCAST_")]:
            patch.delenv(name)
        for name, value in more.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["dicomcast", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    assert "Traceback" not in texts[1], texts[1]
    assert "Internal error" not in texts[1], texts[1]
    return int(ended.value.code or 0), texts[0], texts[1]


def said(*arguments: str | Path, code: int = 0, **more: str) -> Json:
    """The one JSON document on stdout."""
    returned, out, err = run(*arguments, "--format", "json", **more)
    assert returned == code, err
    return json.loads(out)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """An overlay that can be used."""
    path = tmp_path / "site.yaml"
    path.write_text(SITE, encoding="utf-8")
    return path


# list


def test_list_knows_what_is_shipped_and_what_is_in_use(site: Path) -> None:
    (site.parent / "own.py").write_text('"""Our own.\n\nMore."""\nRULES = ()\n', encoding="utf-8")
    more = {"DICOMCAST_MAPPING__MODULES": "patient,endpoint,imaging_study,own.py"}
    rows = said("mappings", "list", **more, DICOMCAST_MAPPING__OVERLAYS=str(site))

    used = [row for row in rows if row["in_use"]]
    assert [(row["name"], row["kind"], row["position"], row["rules"], row["about"]) for row in used[3:]] == [
        ("own.py", "module", 4, 0, "Our own."),
        (str(site), "overlay", 5, 2, "What our hospital adds."),
    ]
    assert [row["name"] for row in used[:3]] == ["patient", "endpoint", "imaging_study"]
    assert {row["name"] for row in rows if row["kind"] == "shipped"} == {
        path.stem for path in (PAGE.parent.parent / "mappings").glob("[!_]*.py")
    }
    assert all(row["position"] is None and row["rules"] for row in rows if not row["in_use"])


def test_the_table_of_modules_says_the_same() -> None:
    code, out, _ = run("mappings", "list")

    assert code == 0
    for text in ("in use", "imaging_study", "shipped", "yes"):
        assert text in out


# show


def test_show_tells_rules_in_words(site: Path) -> None:
    pitch, mr = said("mappings", "show", site)
    imaging_study = {row["id"]: row for row in said("mappings", "show", "imaging_study")}

    assert pitch == {
        "id": "site.pitch",
        "level": "series",
        "element": "extension[url=https://hospital.example/pitch].valueString",
        "source": 'private("GEMS_IDEN_01", 0009, 02)',
        "steps": "",
        "policy": "agree",
        "owner": "ours",
        "required": "",
        "when": "",
    }
    assert mr["when"] == "Modality = MR"
    assert imaging_study["study.uid"]["element"] == "identifier[system=urn:dicom:uid]"
    assert imaging_study["study.uid"]["required"] == "yes"
    assert imaging_study["study.status"]["source"] == 'constant "available"'
    assert imaging_study["study.modality"]["source"] == "derive study_modalities"
    assert imaging_study["study.subject"]["source"] == "link subject"
    assert imaging_study["study.source"]["source"] == "setting dicom_url"
    assert " / else " in imaging_study["series.started"]["source"]


def test_show_without_names_is_what_is_in_effect(site: Path) -> None:
    before = {row["id"] for row in said("mappings", "show")}
    after = {row["id"] for row in said("mappings", "show", DICOMCAST_MAPPING__OVERLAYS=str(site))}

    assert before - after == {"series.description"}
    assert after - before == {"site.pitch", "site.mr"}


def test_an_overlay_in_use_can_be_shown_under_another_spelling_of_its_path(site: Path) -> None:
    code, out, _ = run("mappings", "show", "./site.yaml", "--format", "csv", DICOMCAST_MAPPING__OVERLAYS=str(site))

    assert code == 0
    assert [row["id"] for row in csv.DictReader(io.StringIO(out))] == ["site.pitch", "site.mr"]


def test_the_table_of_rules_shows_brackets_and_no_empty_column() -> None:
    code, out, _ = run("mappings", "show", "patient")

    assert code == 0
    assert "name[use=usual]" in out
    assert "when" not in out


def test_names_that_are_nothing_are_named() -> None:
    names = ["nothing", "no.thing", "nothing.py", "nothing.yaml"]

    code, out, err = run("mappings", "show", *names)

    assert (code, out) == (2, "")
    assert [name for name in names if f"{name}: " not in err] == []


# The page


def test_the_page_on_the_mapping_is_current() -> None:
    command = "dicomcast mappings show --all --format markdown"
    _, out, _ = run(*command.split()[1:])

    assert PAGE.read_text(encoding="utf-8") == out, f"run `{command} > docs/mapping.md`"
    assert command in out.splitlines()[0]


def test_the_page_has_all_that_an_overlay_needs(site: Path) -> None:
    _, out, _ = run("mappings", "show", site, "radiation_dose", "--format", "markdown")

    assert "What our hospital adds.\nIn two lines." in out
    assert "`Modality = MR`" in out
    assert "Of a document whose title is 113701 or 113500 (DCM)." in out
    assert [name for name in steps.STEPS if f"| `{name}" not in out] == []
    assert r"\| " in out
    for line in (line for line in out.splitlines() if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", line)) in (5, 6, 7, 8, 9)


def test_the_overlay_on_the_page_can_be_used(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "page.yaml").write_text(block, encoding="utf-8")

    assert said("mappings", "check", "page.yaml")["modules"][-1] == "page.yaml"


# check


def test_check_says_what_can_be_used(site: Path) -> None:
    alone, more = said("mappings", "check"), said("mappings", "check", site)

    assert alone["modules"] == ["patient", "endpoint", "imaging_study"]
    assert more["modules"] == [*alone["modules"], str(site)]
    assert more["rules"] == alone["rules"] + 1
    assert alone["digest"] != more["digest"]
    assert re.fullmatch("[0-9a-f]{64}", more["digest"])


def test_check_names_every_problem_with_file_line_and_rule(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(WRONG, encoding="utf-8")
    (tmp_path / "broken.py").write_text("RULES = 1 / 0", encoding="utf-8")

    code, out, err = run("mappings", "check", "wrong.yaml", "broken.py")

    assert (code, out) == (2, "")
    told = {(2, "site.typo"), (6, "site.step"), (7, "site.level"), (8, "site.key"), (10, "site.nothing")}
    for line, rule in told:
        assert f"wrong.yaml:{line}: rule {rule}: " in err
    assert "broken.py: ZeroDivisionError" in err


def test_check_is_about_the_settings_too() -> None:
    code, _, err = run("mappings", "check", DICOMCAST_MAPPING__OVERLAYS="gone.yaml", DICOMCAST_NO__SUCH="1")
    assert (code, "DICOMCAST_NO__SUCH" in err) == (2, True)

    code, _, err = run("mappings", "check", DICOMCAST_MAPPING__OVERLAYS="gone.yaml")
    assert (code, "gone.yaml" in err) == (2, True)


# map and its --explain


def test_explain_tells_where_elements_come_from(site: Path) -> None:
    rows = said("map", CT, "--explain", DICOMCAST_MAPPING__OVERLAYS=str(site))
    found = {row.pop("rule"): row for row in rows}

    data = pydicom.dcmread(CT)
    assert {row["sop_instance_uid"] for row in rows} == {data.SOPInstanceUID}
    assert found["patient.name"] == {
        "sop_instance_uid": data.SOPInstanceUID,
        "element": "Patient.name[use=usual]",
        "tag": "00100010",
        "vr": "PN",
        "source": "PatientName",
    }
    assert found["series.number"]["element"] == "ImagingStudy.series.number"
    private = found["site.pitch"]
    assert (private["tag"], private["source"], private["vr"]) == ("0009xx02", "private(GEMS_IDEN_01, 0009, 02)", "SH")
    assert (found["study.started"]["tag"], found["study.started"]["source"]) == (
        "00080020",
        "StudyDate, StudyTime, TimezoneOffsetFromUTC",
    )
    assert private["element"] == "ImagingStudy.series.extension[url=https://hospital.example/pitch].valueString"


def test_explain_says_which_rules_found_nothing(site: Path) -> None:
    _, _, err = run("map", CT, "--explain", DICOMCAST_MAPPING__OVERLAYS=str(site))
    (line,) = (line for line in err.splitlines() if "nothing for" in line)

    assert line.startswith(f"instance {pydicom.dcmread(CT).SOPInstanceUID}: nothing for ")
    named = line.partition(" nothing for ")[2].split(", ")
    assert "series.laterality" in named
    assert not {"site.pitch", "site.mr", "study.started"} & set(named)


def test_explain_leaves_out_rules_that_are_about_other_instances(site: Path) -> None:
    rows = said("map", CT, "--explain", DICOMCAST_MAPPING__OVERLAYS=str(site))

    assert "site.mr" not in {row["rule"] for row in rows}


def test_values_are_shown_only_when_asked_for(tmp_path: Path) -> None:
    study = a_study(
        instances=2, PatientName="Qzplanted^Name", StudyDescription="Qzplanted", PatientBirthDate="19111213"
    )
    study[1].PatientID = ""
    paths = [tmp_path / "0.dcm", tmp_path / "1.dcm"]
    for path, one in zip(paths, study, strict=True):
        path.write_bytes(modality.encoded(one))
    odd = {**json_of(study[0]), "00100040": {"vr": "CS", "Value": ["Qz"]}, "00080060": {"vr": "Qz", "Value": ["CT"]}}
    (tmp_path / "odd.json").write_text(json.dumps([odd, "Qzplanted"]))

    for form in ("table", "json", "csv"):
        code, out, err = run("map", *paths, "odd.json", "--explain", "--format", form)
        assert code == 1
        assert str(study[0].SOPInstanceUID) in out
        assert "rule patient.gender, tag 00100040 CS: none of M, F, O" in err
        assert "patient-id-missing" in err
        assert re.search("qz|19111213|1911-12-13", (out + err).lower()) is None
    for form in ("table", "csv"):
        _, out, _ = run("map", paths[0], "--explain", "--show-values", "--format", form)
        assert "Qzplanted" in out
        assert "1911-12-13" in out
    rows = said("map", paths[0], "--explain", "--show-values")
    (name,) = (row["value"] for row in rows if row["rule"] == "patient.name")
    assert name == [{"use": "usual", "family": "Qzplanted", "given": ["Name"]}]


def test_explain_of_nothing_is_an_empty_table(tmp_path: Path) -> None:
    assert said("map", tmp_path, "--explain") == []


def test_what_is_for_explain_goes_with_it() -> None:
    assert run("map", CT, "--show-values")[:2] == (2, "")
    assert run("map", CT, "--format", "json")[:2] == (2, "")


def test_reports_are_mapped_with_references_to_study_and_patient(tmp_path: Path) -> None:
    (tmp_path / "dose.json").write_text(json.dumps(json_of(dose.ct(STUDY))))
    more = {"DICOMCAST_MAPPING__MODULES": "patient,endpoint,imaging_study,radiation_dose"}

    code, out, err = run("map", "dose.json", **more)

    assert (code, err) == (0, "")
    entries = json.loads(out)["entry"]
    urls = {entry["resource"]["resourceType"]: entry["fullUrl"] for entry in entries}
    observations = [entry["resource"] for entry in entries if entry["resource"]["resourceType"] == "Observation"]
    assert len(observations) > 1
    assert len({entry["fullUrl"] for entry in entries}) == len(entries)
    for one in observations:
        assert one["subject"] == {"reference": urls["Patient"]}
        assert one["partOf"] == [{"reference": urls["ImagingStudy"]}]
    assert '"valueQuantity": {\n' in out
    rows = said("map", "dose.json", "--explain", **more)
    assert "Observation.status" not in {row["element"] for row in rows}
    assert any(row["element"].startswith("Observation.component") for row in rows)


# test


@pytest.fixture
def cases(site: Path) -> Path:
    """The folder of two cases of that overlay, one of which has the Bundle of before."""
    folder = site.with_suffix(".cases")
    folder.mkdir()
    for name in ("ct", "mr"):
        data = a_study(name.upper(), instances=2, PatientName="Qzplanted^Name", StudyDescription="Qzplanted")
        (folder / f"{name}.dicom.json").write_text(json.dumps([json_of(one) for one in data]))
    _, out, _ = run("map", folder / "ct.dicom.json", DICOMCAST_MAPPING__OVERLAYS=str(site))
    (folder / "ct.fhir.json").write_text(out, encoding="utf-8")
    return folder


def test_cases_are_what_map_prints(site: Path, cases: Path) -> None:
    assert run("mappings", "test", site)[:2] == (1, "pass ct\nfail mr\n  mr.fhir.json: missing\n")
    (cases / "ct.fhir.json").write_text("[1]")
    assert run("mappings", "test", site)[1].startswith("fail ct\n  ct.fhir.json: unreadable\n")
    assert run("mappings", "test", site, "--update") == (0, "updated ct\nnew mr\n", "")
    assert run("mappings", "test", "site.yaml", DICOMCAST_MAPPING__OVERLAYS=str(site)) == (0, "pass ct\npass mr\n", "")

    _, out, _ = run("map", cases / "mr.dicom.json", DICOMCAST_MAPPING__OVERLAYS=str(site))
    assert (cases / "mr.fhir.json").read_text(encoding="utf-8") == out


def test_each_place_that_differs_is_named(site: Path, cases: Path) -> None:
    golden = cases / "ct.fhir.json"
    bundle = json.loads(golden.read_text(encoding="utf-8"))
    _, patient, study = (entry["resource"] for entry in bundle["entry"])
    patient["name"][0]["family"] = "Qzother"
    del study["numberOfInstances"]
    study["series"][0]["laterality"] = {"code": "Qzother"}
    study["series"][0]["number"] = 77
    study["series"][0]["instance"].pop()
    bundle["entry"][0]["fullUrl"] = "Qzother"
    bundle["entry"].append({"fullUrl": "urn:uuid:1", "resource": {"resourceType": "Patient"}})
    golden.write_text(json.dumps(bundle), encoding="utf-8")
    (cases / "mr.dicom.json").unlink()

    code, out, err = run("mappings", "test", site)
    shown = run("mappings", "test", site, "--show-values")[1]
    updated = run("mappings", "test", site, "--update")

    assert code == 1
    first, *places = out.splitlines()
    assert first == "fail ct"
    assert sorted(places) == sorted(
        [
            "  Endpoint.fullUrl: differs",
            "  Patient.name[0].family: differs",
            "  ImagingStudy.series[0].number: differs",
            "  ImagingStudy.series[0].instance[1]: unexpected",
            "  ImagingStudy.series[0].laterality: missing",
            "  ImagingStudy.numberOfInstances: unexpected",
            "  Patient[1]: missing",
        ]
    )
    assert "--update" in err
    assert "qz" not in (out + err).lower()
    assert 'ImagingStudy.series[0].laterality: missing (expected {"code":"Qzother"})' in shown
    assert 'Patient.name[0].family: differs (expected "Qzother", found "Qzplanted")' in shown
    assert updated == (0, "updated ct\n", "")
    assert run("mappings", "test", site)[0] == 0


def test_decimals_are_compared_as_they_are_written(tmp_path: Path) -> None:
    source = (
        '"""Ours."""\nfrom dicomcast.mapping import Rule, Slice\n'
        'RULES = (Rule("own.dose", "series", Slice("extension", {"url": "https://hospital.example/"},'
        ' at="valueDecimal"), sources=("ReconstructionDiameter",)),)\n'
    )
    (tmp_path / "own.py").write_text(source, encoding="utf-8")
    (tmp_path / "own.cases").mkdir()
    data = [json_of(one) for one in a_study(ReconstructionDiameter="1.50")]
    (tmp_path / "own.cases" / "a.dicom.json").write_text(json.dumps(data))
    golden = tmp_path / "own.cases" / "a.fhir.json"

    assert run("mappings", "test", "own.py", "--update")[:2] == (0, "new a\n")
    text = golden.read_text(encoding="utf-8")
    assert '"valueDecimal": 1.5\n' in text
    golden.write_text(text.replace('"valueDecimal": 1.5\n', '"valueDecimal": 1.50\n'), encoding="utf-8")

    code, out, _ = run("mappings", "test", "own.py")
    assert (code, out) == (1, "fail a\n  ImagingStudy.series[0].extension[0].valueDecimal: differs\n")


def test_what_a_case_cannot_map_is_said(site: Path, cases: Path) -> None:
    data = json.loads((cases / "ct.dicom.json").read_text())
    broken = {**data[0], "00100020": {"vr": "LO"}, "00080018": {"vr": "UI", "Value": ["1.2.3"]}}
    (cases / "ct.dicom.json").write_text(json.dumps([*data, broken]))
    (cases / "mr.dicom.json").unlink()

    code, out, err = run("mappings", "test", site)

    assert (code, out) == (0, "pass ct\n")
    assert "patient-id-missing" in err
    assert "1.2.3" in err


def test_cases_that_are_unusable_end_with_2(site: Path, cases: Path) -> None:
    def problem(*arguments: str | Path) -> str:
        code, out, err = run("mappings", "test", *arguments)
        assert (code, out) == (2, "")
        return err

    for path in cases.iterdir():
        path.unlink()
    assert "site.cases: has no cases" in problem(site)
    site.write_text(WRONG, encoding="utf-8")
    assert "site.yaml:2: rule site.typo" in problem(site)


def test_a_case_that_can_not_be_read_fails_alone(site: Path, cases: Path) -> None:
    assert run("mappings", "test", site, "--update")[0] == 0
    (cases / "bad.dicom.json").write_text("[")
    (cases / "file.dcm").write_bytes(Path(CT).read_bytes())
    code, out, err = run("mappings", "test", site, "--update")
    assert (code, out.splitlines()) == (
        1,
        ["fail bad", "  bad.dicom.json: unreadable", "pass ct", "new file", "pass mr"],
    )
    assert "bad.dicom.json: unreadable: can't be read as JSON" in err


def test_a_shipped_module_has_its_cases_beside_it() -> None:
    code, out, err = run("mappings", "test", "endpoint")

    assert code in (0, 2), out
    assert code == 0 or "endpoint.cases: has no cases" in err


def test_no_verb_writes_a_database_or_asks_a_service(site: Path, cases: Path) -> None:
    before = {path.name for path in site.parent.iterdir()}
    nobody = {"DICOMCAST_DICOM__URL": "http://127.0.0.1:9", "DICOMCAST_FHIR__URL": "http://127.0.0.1:9"}
    for verb in (["check"], ["test", str(site)]):
        assert run("mappings", *verb, **nobody)[0] in (0, 1)

    assert {path.name for path in site.parent.iterdir()} == before
