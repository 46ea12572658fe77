"""Patient data is planted in every attribute, and looked for wherever dicomcast leaves a word: it must be nowhere."""

import asyncio
import io
import json
import signal
from collections.abc import Callable, Coroutine
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import pydicom
import pydicom.config
import pytest
import sqlalchemy as sa
import stack
from hospital import NO_LIMITS, SYSTEM, Hospital, a_study, database, uid, until
from pydicom.datadict import DicomDictionary, tag_for_keyword
from test_operators import cli, imported
from test_readme import verbs

from dicomcast import app, errors, operations
from dicomcast.state import reports

PLANTED = {
    "PN": "Qzplant^Name",
    **dict.fromkeys(("LO", "SH", "LT", "ST", "UT", "UC"), "Qzplant text"),
    "AE": "QZPLANTAE",
    "UR": "https://qzplant.example",
    "DA": "19310717",
    "TM": "031731.717171",
    "DT": "19310717031731.717171",
    "IS": "717317717",
    "DS": "7173.17717",
}
"""A value for each kind of attribute."""
MARKS = ("qzplant", "19310717", "1931-07-17", "031731.717171", "03:17:31", "717317717", "7173.17717")
GROUPS = (0x0008, 0x0010, 0x0018, 0x0020, 0x0032, 0x0038, 0x0040)
PLAIN = {"SpecificCharacterSet", "TimezoneOffsetFromUTC", "PatientID"}
FORMS = ("table", "json", "csv")
STATUSES = (400, 401, 403, 404, 409, 412, 415, 422, 429, 500, 503) if stack.CI else (403, 500)
HASTE = {"DICOMCAST_SYNC__PATIENCE": "0.1", "DICOMCAST_SETTLE__IDLE": "0.1", "DICOMCAST_LOG__LEVEL": "debug"}
ELSEWHERE = {"run", "map", "mappings", "sandbox", "demo", "db upgrade"}
"""Verbs that are tried in another way, or that show nothing of what was synced; `map` prints what it is asked to."""


def planted(*, instances: int = 2, **values: str) -> list[pydicom.Dataset]:
    """A study with a mark in each attribute of the dictionary that holds one word of somebody."""
    study = a_study(instances=instances, **values)
    for dataset in study:
        for tag, (vr, multiplicity, _, retired, keyword) in DicomDictionary.items():
            fits = tag >> 16 in GROUPS and vr in PLANTED and multiplicity in ("1", "1-n") and not retired
            if fits and keyword and keyword not in PLAIN:
                dataset.add_new(tag, vr, PLANTED[vr])
        dataset.PatientID = values.get("PatientID", "QZPLANTEDID")
    return study


def everything(hospital: Hospital) -> str:
    """All rows of all tables and views; of SQLite also the files, where what was deleted may still stand."""
    found = []
    with database(hospital) as connection:
        known = sa.inspect(connection)
        for name in (*known.get_table_names(), *known.get_view_names()):
            found += [f"{name} {tuple(row)}" for row in connection.execute(sa.text(f'SELECT * FROM "{name}"'))]
    if hospital.database.startswith("sqlite"):
        path = Path(hospital.database.removeprefix("sqlite:///"))
        found += [file.read_bytes().decode("latin-1") for file in path.parent.glob(f"{path.name}*")]
    return "\n".join(found)


def marks(text: str) -> list[str]:
    """The marks in a text, with what is around each."""
    lower = text.lower()
    return [lower[max(0, lower.find(mark) - 80) : lower.find(mark) + 40] for mark in MARKS if mark in lower]


def hurried(hospital: Hospital, verb: Callable[..., Coroutine[Any, Any, Any]]) -> str:
    """What is logged and said of a verb that takes hours; it may fail."""
    err = io.StringIO()
    with redirect_stderr(err):
        options = hospital.options(log={"level": "debug"}, sync={"patience": 300})
        app.configure_logging(options.log)
        try:
            done = str(asyncio.run(verb(options, clock=hospital.clock)))
        except errors.Error as failed:
            done = str(failed)
    return err.getvalue() + done


def corpus(hospital: Hospital) -> list[list[pydicom.Dataset]]:
    """Three studies that can be mapped, and as many with an instance that can't, each for another reason."""
    whole = [planted(PatientID=f"QZPLANTED{number}") for number in range(3)]
    nobody, several, never = planted(), planted(), planted()
    nobody[1].PatientID = ""
    several[1].PatientID = ["QZPLANTED", "QZPLANTED2"]
    for keyword, vr in (("StudyDate", "DA"), ("PatientBirthDate", "DA"), ("PatientSex", "CS"), ("SeriesTime", "TM")):
        tag = tag_for_keyword(keyword)
        never[1][tag] = pydicom.DataElement(tag, vr, "Qzplant^Wrong", validation_mode=pydicom.config.IGNORE)
    studies = [*whole, nobody, several, never]
    hospital.send(*(one for study in studies for one in study))
    return studies


def lines(hospital: Hospital, studies: list[list[pydicom.Dataset]], tmp_path: Path) -> list[list[str]]:
    """Every verb that asks or changes something, and where it can fail also so; in CI in each form."""
    file = tmp_path / "studies.txt"
    file.write_text("\n".join(uid(study[0]) for study in studies))
    failure = str(hospital.failures()[0]["id"])
    study = uid(studies[3][0])
    shown = [
        ["status"],
        ["status", "--max-lag", "15m"],
        ["status", "--study", study],
        ["failures", "list"],
        ["failures", "list", "--status", "resolved"],
        ["failures", "summary"],
        ["failures", "show", failure],
        ["work", "list"],
        ["state", "show"],
        ["state", "audit"],
        ["db", "current"],
        *(["report", name] for name in reports.REPORTS),
    ]
    done = [
        ["replay", "--all", "--dry-run"],
        ["replay", "--all"],
        ["replay", "--id", failure],
        ["replay", "--series", str(studies[3][0].SeriesInstanceUID)],
        ["verify", "--all"],
        ["verify", "--study", study],
        ["verify", "--all", "--repair"],
        ["backfill", "--all"],
        ["backfill", "--studies-file", str(file)],
        ["sync"],
    ]
    every = enumerate((*shown, *done))
    formed = [[*line, "--format", form] for at, line in every for form in (FORMS if stack.CI else [FORMS[at % 3]])]
    return [
        *formed,
        ["failures", "dismiss", "--id", failure, "--reason", "known"],
        ["work", "cancel", "1"],
        ["state", "set", "--watermark", "3", "--yes"],
        ["state", "export"],
        ["sync"],
        ["db", "prune", "--older-than", "2040-01-01"],
        ["db", "show", "--format", "markdown"],
    ]


def test_scenario_13_no_verb_leaves_patient_data_anywhere(clinic: Hospital, tmp_path: Path) -> None:
    studies = corpus(clinic)
    heard = [*cli(clinic, "sync", **HASTE)[1:]]
    kinds = set(clinic.kinds())
    clinic.modality.correct([uid(studies[0][0])], {"StudyDescription": "Qzplant second", "PatientName": "Qzplant^Two"})
    clinic.modality.delete(uid(studies[1][0]))
    every = lines(clinic, studies, tmp_path)

    said = {" ".join(line): cli(clinic, *line, **HASTE) for line in every}
    position = said["state export"][1]
    said["state import -"] = imported(clinic, position.replace('"watermark": ', '"watermark": "Qzplant'), "--yes")

    assert kinds >= {"patient-id-missing"}
    assert {line: marks(out + err) for line, (_, out, err) in said.items() if marks(out + err)} == {}
    assert marks("\n".join([*heard, everything(clinic)])) == []
    tried = [verb for verb in verbs() if any(f"{line} ".startswith(f"{verb} ") for line in said)]
    assert [verb for verb in verbs() if verb not in (*tried, *ELSEWHERE) and not verb.startswith("mappings ")] == []


@pytest.mark.parametrize("status", STATUSES)
def test_no_answer_of_a_service_leaves_patient_data_anywhere(local: Hospital, status: int) -> None:
    """Services that put patient data into their errors."""
    studies = corpus(local)
    local.sync()
    for study in studies[:2]:
        local.modality.correct([uid(study[0])], {"StudyDescription": "Qzplant second"})
    body = json.dumps({"resourceType": "OperationOutcome", "issue": [{"code": "Qzplant", "diagnostics": "Qzplant"}]})
    local.fault("fhir", path="Patient|ImagingStudy|fhir$", status=status, body=body, skip=2, every=2)
    local.fault("dicom", path="metadata", status=status, body=body, every=3)
    replay = partial(operations.replay, selection=operations.Selection(everything=True), limits=NO_LIMITS)

    heard = [hurried(local, app.sync)]
    for verb in (replay, partial(replay, dry_run=True), partial(operations.verify, limits=NO_LIMITS, repair=True)):
        heard.append(hurried(local, lambda options, clock, verb=verb: operations.at_desk(options, verb, clock=clock)))

    assert marks("\n".join([*heard, everything(local)])) == []


def test_two_patients_of_one_identifier_are_not_named(local: Hospital) -> None:
    for family in ("Qzplant", "Qzplanted"):
        identifier = {"system": SYSTEM, "value": "QZPLANTEDID"}
        local.post({"resourceType": "Patient", "identifier": [identifier], "name": [{"family": family}]})
    study = planted()
    local.send(*study)

    heard = [
        *cli(local, "sync", **HASTE),
        *cli(local, "failures", "list", **HASTE),
        *cli(local, "verify", "--all", **HASTE),
    ]

    assert local.kinds() == ["ambiguous"]
    assert marks("\n".join([*map(str, heard), everything(local)])) == []


def test_run_and_its_probes_leave_no_patient_data(clinic: Hospital) -> None:
    studies = corpus(clinic)
    quick = {"DICOMCAST_DICOM__POLL": "0.1", "DICOMCAST_WEB__PORT": "0", "DICOMCAST_LOG__FORMAT": "json"}
    clinic.fault("fhir", path="Patient|ImagingStudy|fhir$", status=503, body="Qzplant")
    heard: list[str] = []
    with clinic.dicomcast("run", **quick, **HASTE) as process:
        for line in process.stderr or ():
            heard.append(line)
            if port := json.loads(line).get("port"):
                break
        address = f"http://127.0.0.1:{port}"

        def probed(code: int) -> bool:
            answers = [clinic.http.get(f"{address}/{probe}") for probe in ("livez", "readyz")]
            heard.extend(answer.text for answer in answers)
            return answers[1].status_code == code

        until(lambda: probed(503))
        clinic.heal()
        until(lambda: probed(200) and clinic.watermark() == clinic.latest())
        process.send_signal(signal.SIGTERM)
        heard += process.communicate(timeout=20)

    assert process.returncode == 143
    assert "patient-id-missing" in clinic.kinds()
    assert uid(studies[0][0]) in "".join(heard)
    assert marks("\n".join([*heard, everything(clinic)])) == []
