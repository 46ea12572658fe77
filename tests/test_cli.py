"""The command line as scripts see it: exit codes, JSON on stdout, words on stderr, signals."""

import io
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
import stack
from hospital import PROGRAM, Hospital, Scripted, a_study, entry_of, json_of, serving, uid, until

from dicomcast import sandbox as services
from dicomcast.sandbox import modality

Json = Any
NOBODY = "http://127.0.0.1:9"


def run(hospital: Hospital, *arguments: str, **more: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with hospital.dicomcast(*arguments, **more) as process:
        out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def said(hospital: Hospital, *arguments: str, code: int = 0, **more: str) -> Json:
    """The one JSON document on stdout."""
    returned, out, err = run(hospital, *arguments, "--format", "json", **more)
    assert returned == code, err
    return json.loads(out)


def mapped(*arguments: str | Path, content: bytes = b"") -> tuple[int, Json, str]:
    """`map` needs no setting at all: exit code, Bundle, stderr."""
    done = subprocess.run(
        [PROGRAM, "map", *map(str, arguments)],
        check=False,
        input=content,
        capture_output=True,
        timeout=60,
        env={"PATH": "/bin"},
    )
    return done.returncode, json.loads(done.stdout), done.stderr.decode()


# sync


def test_sync_reports_what_it_did(hospital: Hospital) -> None:
    hospital.send(*a_study(instances=3), *a_study())

    first, second = said(hospital, "sync"), said(hospital, "sync")

    assert (first["watermark"], first["entries"]) == (4, 4)
    assert first["studies"] == {"created": 2, "updated": 0, "unchanged": 0, "deleted": 0, "failed": 0}
    assert first["failures"] == {"opened": 0, "open": 0}
    assert first["requests"].keys() == {"dicom", "fhir"}
    assert isinstance(first["seconds"], float)
    assert set(second["studies"].values()) == {0}
    assert (second["watermark"], second["entries"], second["requests"]["fhir"]) == (4, 0, 1)


def test_sync_ends_with_1_where_something_of_this_call_failed(hospital: Hospital, tmp_path: Path) -> None:
    study = a_study(instances=2)
    hospital.send(*study)
    hospital.fault("dicom", path="changefeed", entry="broken", sequence=2)

    first = said(hospital, "sync", code=1)
    hospital.heal()
    second = said(hospital, "sync", code=0)

    assert first["failures"] == {"opened": 1, "open": 1}
    assert second["failures"] == {"opened": 0, "open": 1}


def test_sync_ends_with_3_where_a_service_is_away(hospital: Hospital) -> None:
    hospital.send(*a_study())

    for more in ({"DICOMCAST_FHIR__URL": NOBODY}, {"DICOMCAST_DICOM__URL": NOBODY}):
        code, out, err = run(hospital, "sync", "--format", "json", DICOMCAST_SYNC__PATIENCE="0.1", **more)
        assert (code, out) == (3, "")
        assert "Nothing was skipped" in err


def test_sync_ends_with_3_where_a_service_denies_us(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.fault("fhir", status=401)

    code, _, err = run(hospital, "sync", DICOMCAST_SYNC__PATIENCE="0.1")

    assert code == 3
    assert "401" in err


def test_sync_ends_with_3_where_the_database_is_away(hospital: Hospital) -> None:
    code, _, _ = run(hospital, "sync", DICOMCAST_DATABASE__URL="postgresql+psycopg://nobody@127.0.0.1:9/nowhere")

    assert code == 3


def test_sync_ends_with_2_where_the_feed_went_backwards(hospital: Hospital) -> None:
    hospital.send(*a_study(instances=2))
    hospital.sync()
    before, versions = hospital.dump(), hospital.versions()
    hospital.feed("reset", sequence=1)

    code, out, err = run(hospital, "sync", "--format", "json")

    assert (code, out) == (2, "")
    assert "reset or restored" in err
    assert hospital.versions() == versions
    assert hospital.watermark() == 2
    assert before.count("INSERT INTO") == hospital.dump().count("INSERT INTO")


def test_sync_ends_with_2_where_fhir_is_no_fhir_r4(hospital: Hospital) -> None:
    code, _, err = run(hospital, "sync", DICOMCAST_FHIR__URL=hospital.dicom_url)

    assert code == 2
    assert "/metadata" in err


def test_sync_ends_with_4_where_another_worker_holds_the_lease(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.fault("fhir", latency=30, times=1)
    with hospital.dicomcast("sync"):
        until(hospital.log)
        code, _, _ = run(hospital, "sync", DICOMCAST_SYNC__PATIENCE="0.1")
        lease = said(hospital, "status")["lease"]

    assert code == 4
    assert lease["held"] is True


# Ends that nobody chose


@pytest.mark.parametrize("at", range(3) if stack.CI else [1])
def test_a_worker_that_is_killed_is_made_good_by_the_next(hospital: Hospital, at: int) -> None:
    study, other = a_study(instances=4, series=2), a_study()
    hospital.send(*study[:3])
    hospital.sync()
    hospital.send(study[3], *other)
    hospital.modality.delete(uid(study[0]), str(study[0].SeriesInstanceUID), str(study[0].SOPInstanceUID))
    hospital.log(clear=True)
    # What was asked for has happened, and the process dies before it can know.
    hospital.fault("fhir", status=500, when="after", skip=at, times=1)
    hospital.fault("fhir", latency=30, skip=at + 1)
    with hospital.dicomcast("sync", DICOMCAST_SYNC__LEASE="1") as process:
        until(lambda: len(hospital.log()) > at + 1)
        process.kill()
        process.communicate()
    hospital.heal()

    done = said(hospital, "sync", DICOMCAST_SYNC__LEASE="1")

    assert done["failures"]["open"] == 0
    assert done["watermark"] == hospital.latest()
    hospital.check(uid(study[0]))
    hospital.check(uid(other[0]))


def test_sigterm_ends_sync_cleanly(hospital: Hospital) -> None:
    done, hanging = a_study(), a_study()
    hospital.send(*done)
    hospital.sync()
    hospital.send(*hanging)
    hospital.log(clear=True)
    hospital.fault("fhir", path="fhir$", latency=120)
    with hospital.dicomcast("sync") as process:
        until(lambda: "POST /fhir" in hospital.log())
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    hospital.heal()

    assert process.returncode == 143, err
    assert hospital.watermark() == 1
    assert said(hospital, "sync")["studies"]["created"] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_sync_while_a_service_does_not_answer_at_the_start(
    hospital: Hospital, number: int, code: int
) -> None:
    hospital.send(*a_study())
    hospital.fault("fhir", path="metadata", latency=120)
    with hospital.dicomcast("sync") as process:
        until(hospital.log)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)

    assert process.returncode == code, err
    assert said(hospital, "status")["lease"]["held"] is False


def test_sigterm_ends_sync_while_it_waits_for_a_service(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.fault("fhir", status=503, retry_after=3600)
    with hospital.dicomcast("sync", DICOMCAST_SYNC__PATIENCE="1h") as process:
        until(hospital.log)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)

    assert process.returncode == 143


def test_run_follows_the_feed_until_sigterm(hospital: Hospital) -> None:
    study = a_study(instances=3)
    quick = {"DICOMCAST_DICOM__POLL": "0.1", "DICOMCAST_SETTLE__IDLE": "0.1", "DICOMCAST_WEB__PORT": "0"}
    with hospital.dicomcast("run", **quick) as process:
        try:
            hospital.send(study[0])
            until(lambda: hospital.study(uid(study[0])))
            hospital.send(*study[1:])
            until(lambda: hospital.study(uid(study[0]))["numberOfInstances"] == 3)
            hospital.modality.delete(uid(study[0]))
            until(lambda: hospital.study(uid(study[0])) is None)
            until(lambda: hospital.watermark() == 6)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()

    assert process.returncode == 143, err
    assert said(hospital, "status")["lease"]["held"] is False


def test_run_waits_out_an_outage_and_says_so_to_probes(hospital: Hospital) -> None:
    study = a_study()
    quick = {"DICOMCAST_DICOM__POLL": "0.1", "DICOMCAST_WEB__PORT": "0", "DICOMCAST_LOG__FORMAT": "json"}
    hospital.fault("fhir", status=503)
    with hospital.dicomcast("run", **quick) as process:
        try:
            port = None
            for line in process.stderr or ():
                port = json.loads(line).get("port")
                if port:
                    break
            hospital.send(*study)
            until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 503)
            assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
            until(lambda: "fhir" in httpx.get(f"http://127.0.0.1:{port}/readyz").text)
            hospital.heal()
            until(lambda: hospital.study(uid(study[0])))
            until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)
        finally:
            process.kill()

    assert process.returncode == 143


# Questions


def test_status_before_and_after_the_first_sync(hospital: Hospital) -> None:
    before = said(hospital, "status")
    hospital.send(*a_study(instances=2), *a_study())
    hospital.sync()
    after = said(hospital, "status")

    assert before["feed"].keys() == after["feed"].keys()
    assert before["feed"]["watermark"] is None
    wanted = {"url": hospital.dicom_url, "watermark": 3, "latest": 3, "lag_entries": 0, "lag_seconds": 0}
    assert after["feed"].items() >= wanted.items()
    assert after["studies"] == {"synced": 2}
    assert (before["failures"], after["failures"]) == ({"open": 0, "by_kind": {}},) * 2
    assert after["lease"]["held"] is False


def test_status_knows_of_entries_that_nobody_has_synced(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.sync()
    hospital.send(*a_study(instances=3))

    feed = said(hospital, "status")["feed"]

    assert feed["latest"] - feed["watermark"] == feed["lag_entries"]
    assert feed["lag_entries"] == 3


def test_questions_make_no_database(hospital: Hospital, tmp_path: Path) -> None:
    elsewhere = {"DICOMCAST_DATABASE__URL": f"sqlite:///{tmp_path}/typo.db"}

    assert said(hospital, "status", **elsewhere)["feed"]["watermark"] is None
    assert said(hospital, "failures", "list", **elsewhere) == []
    assert not (tmp_path / "typo.db").exists()


def test_status_of_a_study(hospital: Hospital) -> None:
    study = a_study(instances=3, series=2)
    hospital.send(*study)
    hospital.sync()
    shown = hospital.study(uid(study[0]))

    known = said(hospital, "status", "--study", uid(study[0]))
    unknown = said(hospital, "status", "--study", "1.2.3", code=1)

    assert known.keys() == unknown.keys()
    assert (known["outcome"], unknown["outcome"]) == ("synced", "unknown")
    assert known["imaging_study"] == shown["id"]
    assert f"Patient/{known['patient']}" == shown["subject"]["reference"]
    assert (known["series"], known["instances"], known["last_sequence"], known["failures"]) == (2, 3, 3, [])


def test_failures_are_listed_and_filtered(hospital: Hospital) -> None:
    study = a_study(instances=2)
    hospital.send(*study)
    hospital.fault("dicom", path="changefeed", entry="unknown-action", sequence=2)
    hospital.sync()
    hospital.heal()

    (row,) = said(hospital, "failures", "list")

    assert row.keys() >= {
        *("id", "status", "kind", "stage", "study_instance_uid", "series_instance_uid", "sop_instance_uid"),
        *("sequence", "rule", "tag", "message", "attempts", "first_seen", "last_seen", "next_retry"),
    }
    assert (row["kind"], row["status"], row["sequence"], row["attempts"]) == ("unknown-action", "open", 2, 1)
    assert said(hospital, "failures", "list", "--status", "open", "--study", uid(study[0])) == [row]
    assert said(hospital, "failures", "list", "--kind", "other") == []


@pytest.mark.parametrize("form", ["table", "csv"])
def test_other_forms_of_output_say_the_same(hospital: Hospital, form: str) -> None:
    hospital.send(*a_study())

    code, out, _ = run(hospital, "sync", "--format", form)

    assert code == 0
    assert "watermark" in out


# Configuration


def test_every_problem_of_the_configuration_is_named(tmp_path: Path) -> None:
    environment = {
        "PATH": "/bin",
        "DICOMCAST_DICOM__URL": "ftp://archive",
        "DICOMCAST_SYNC__PATIENCE": "soon",
        "DICOMCAST_NO__SUCH": "1",
    }
    done = subprocess.run([PROGRAM, "sync"], env=environment, check=False, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (2, "")
    for name in ("DICOM__URL", "FHIR__URL", "PATIENT__SYSTEM", "SYNC__PATIENCE", "NO__SUCH"):
        assert f"DICOMCAST_{name}" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DICOMCAST_PATIENT__SYSTEM", ""),
        ("DICOMCAST_PATIENT__POLICY", "guess"),
        ("DICOMCAST_DATABASE__URL", "mysql://localhost/x"),
        ("DICOMCAST_DATABASE__URL", "nonsense"),
        ("DICOMCAST_MAPPING__MODULES", '["no_such_module"]'),
    ],
)
def test_a_setting_that_is_wrong_ends_with_2_and_changes_nothing(hospital: Hospital, name: str, value: str) -> None:
    hospital.send(*a_study())

    code, out, _ = run(hospital, "sync", **{name: value})

    assert (code, out) == (2, "")
    assert hospital.search("ImagingStudy") == []


WRONG = "sink|sync --form|status --format xml|map|demo --format csv|failures list --status opn"


@pytest.mark.parametrize("arguments", [line.split() for line in WRONG.split("|")], ids=str)
def test_wrong_usage_ends_with_2(hospital: Hospital, arguments: list[str]) -> None:
    assert run(hospital, *arguments)[0] == 2


def test_the_schema_can_be_shown_and_made(hospital: Hospital) -> None:
    before = said(hospital, "db", "current")
    code, _, _ = run(hospital, "db", "upgrade")
    after = said(hospital, "db", "current")

    assert code == 0
    assert before["current"] is None
    assert after["current"] == after["newest"]


# map


def files_of(folder: Path, datasets: list[pydicom.Dataset]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for number, dataset in enumerate(datasets):
        paths.append(folder / f"{number}.dcm")
        paths[-1].write_bytes(modality.encoded(dataset))
    return paths


def test_files_are_mapped_the_same_in_any_order(tmp_path: Path) -> None:
    paths = files_of(tmp_path / "in", [*a_study(instances=5, series=2), *a_study("MR", instances=2)])

    results = [mapped(*paths), mapped(*reversed(paths)), mapped(tmp_path / "in", *paths)]

    assert [code for code, _, _ in results] == [0] * 3
    assert all(bundle == results[0][1] for _, bundle, _ in results)
    bundle = results[0][1]
    assert (bundle["resourceType"], bundle["type"]) == ("Bundle", "collection")
    kinds = sorted(entry["resource"]["resourceType"] for entry in bundle["entry"])
    assert kinds == ["Endpoint", "ImagingStudy", "ImagingStudy", "Patient", "Patient"]


def test_one_instance_with_two_contents_is_mapped_the_same_in_any_order(tmp_path: Path) -> None:
    one, other = a_study()[0], None
    other = pydicom.dcmread(io.BytesIO(modality.encoded(one)))
    other.InstanceNumber, other.StudyDescription, other.PatientName = 99, "other", "Other^Name"
    paths = files_of(tmp_path / "in", [one, other])

    assert mapped(*paths)[1] == mapped(*reversed(paths))[1]


def test_dicom_json_is_mapped_like_the_files_it_came_from(tmp_path: Path) -> None:
    study = a_study(instances=5)
    datasets = [json_of(one) for one in study]
    gone = {**entry_of(study[0], 9, action="Delete", state="Deleted", metadata=None)}
    forms = {
        "object": datasets[0],
        "array": datasets[1:2],
        "entry": entry_of(study[2], 1),
        "page": [gone, entry_of(study[3], 2)],
    }
    for name, value in forms.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    read = json.dumps(datasets[4]).encode()

    _, wanted, _ = mapped(*files_of(tmp_path / "files", study))

    assert mapped("-", *(tmp_path / f"{name}.json" for name in forms), content=read)[:2] == (0, wanted)


def test_what_cannot_be_mapped_is_listed_without_values_and_the_rest_is_printed(tmp_path: Path) -> None:
    study = a_study(instances=3, PatientName="Secret^Person")
    study[1].PatientID = ""
    odd = json_of(study[2])
    odd["0020000D"]["Value"] = ["Secret^Person"]
    (tmp_path / "odd.json").write_text(json.dumps([odd, 17, None, "Secret^Person", []]))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "text.dcm").write_text("no dicom")

    code, bundle, err = mapped(
        *files_of(tmp_path / "in", study[:2]),
        *(tmp_path / name for name in ("odd.json", "broken.json", "text.dcm", "absent.dcm")),
    )

    assert code == 1
    (shown,) = [one["resource"] for one in bundle["entry"] if one["resource"]["resourceType"] == "ImagingStudy"]
    assert shown["numberOfInstances"] == 1
    assert str(study[1].SOPInstanceUID) in err
    assert "00100020" in err
    assert len(err.splitlines()) == 9
    assert "Secret" not in err
    assert "Traceback" not in err


def test_folder_may_hold_more_than_dicom(tmp_path: Path) -> None:
    folder = tmp_path / "cd"
    folder.mkdir()
    (folder / "README.TXT").write_text("Viewer: run AUTORUN.EXE", encoding="utf-8")
    (folder / "DICOMDIR").write_bytes(b"an index")
    (folder / "1.dcm").write_bytes(modality.encoded(a_study(instances=1)[0]))

    code, bundle, err = mapped(folder)

    assert (code, err) == (0, "")
    assert [entry["resource"]["resourceType"] for entry in bundle["entry"]] == ["Endpoint", "Patient", "ImagingStudy"]


def test_nothing_to_map_is_an_empty_collection(tmp_path: Path) -> None:
    code, bundle, _ = mapped(tmp_path)

    assert (code, bundle) == (0, {"resourceType": "Bundle", "type": "collection"})


# No patient data


@stack.long
def test_no_patient_data_is_in_database_logs_and_output(sandbox: services.Sandbox, tmp_path: Path) -> None:
    planted = {
        "PatientName": "Qzplanted^Name",
        "PatientID": "QZPLANTEDID",
        "AccessionNumber": "QZPLANTEDACC",
        "InstitutionName": "Qzplanted Hospital",
        "StudyDescription": "Qzplanted description",
        "SeriesDescription": "Qzplanted series",
        "ReferringPhysicianName": "Qzplanted^Referrer",
        "StudyID": "QZPLANTEDSTID",
        "PatientBirthDate": "19111213",
        "StudyDate": "20111112",
        "DeviceSerialNumber": "QZPLANTEDDEV",
    }
    feed = Scripted()
    study = a_study(instances=4, **planted)
    for sequence, one in enumerate(study, 1):
        feed.create(one, sequence)
    bad = {"Qzplanted": "Qzplanted", "StudyDate": {"vr": "DA", "Value": ["Qzplanted"]}}
    feed.entries[1]["metadata"] = {**json_of(study[1]), "00100010": bad, "00080020": {"vr": "DA", "Value": ["Qzplant"]}}
    feed.entries[2]["metadata"] = {**json_of(study[2]), "00080018": {"vr": "UI", "Value": ["Qzplanted"]}}
    feed.entries[3]["metadata"] = {**json_of(study[3]), "00100020": {"vr": "LO", "Value": ["Qzplanted\\Qzplanted", 1]}}
    feed.studies[uid(study[0])] = [entry["metadata"] for entry in feed.entries]
    feed.entries.append(entry_of(study[0], 5, action="Qzplanted"))
    feed.entries.append(entry_of(study[0], 6, studyInstanceUid="Qzplanted"))
    feed.entries.append(entry_of(study[0], 7, timestamp="Qzplanted", partitionName="Qzplanted"))
    feed.entries.append(entry_of(study[0], 8, timestamp="Qzplanted", action="Update"))
    with serving(feed.app()) as url:
        hospital = Hospital(url, sandbox.fhir_url, f"sqlite:///{tmp_path}/state.db")
        verbs = [
            ["sync"],
            ["status"],
            ["status", "--study", uid(study[0])],
            ["failures", "list"],
            ["failures", "list", "--format", "json"],
        ]
        texts = []
        for verb in verbs:
            _, out, err = run(hospital, *verb, DICOMCAST_LOG__LEVEL="debug")
            texts += [out, err]
        hospital.fault("fhir", method="PUT", status=422, body="Qzplanted")
        feed.entries.append(entry_of(study[0], 9, action="Update"))
        feed.studies[uid(study[0])][0]["00081030"] = {"vr": "LO", "Value": ["Qzplanted again"]}
        texts += run(hospital, "sync", DICOMCAST_LOG__LEVEL="debug")[1:]
        texts.append(hospital.dump())
        assert hospital.failures()
        hospital.close()

    together = "\n".join(texts).lower()
    assert uid(study[0]) in together
    for value in ("qz", "19111213", "1911-12-13", "20111112", "2011-11-12"):
        assert value not in together, value


def test_no_patient_data_is_said_of_an_outage(hospital: Hospital) -> None:
    hospital.send(*a_study(patient_id="QZPLANTEDID"))
    hospital.fault("fhir", path="fhir(/Patient.*)?$", status=503, body="QZPLANTEDID")

    code, out, err = run(hospital, "sync", DICOMCAST_LOG__LEVEL="debug", DICOMCAST_SYNC__PATIENCE="0.1")

    assert code == 3
    assert "QZ" not in out + err + hospital.dump()


def test_the_version_is_printed() -> None:
    done = subprocess.run(
        [PROGRAM, "--version"], check=False, capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )

    assert done.returncode == 0
    assert done.stdout.startswith("dicomcast ")
