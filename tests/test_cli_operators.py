"""The verbs of operators as scripts see them: exit codes, JSON on stdout and nothing else there, other forms."""

import asyncio
import contextlib
import csv
import io
import json
import re
import signal
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hospital import NO_LIMITS, Hospital, a_failing_study, a_study, corrected, database, rows, uid, until
from test_operators import audit, cli, said

from dicomcast import errors, operations
from dicomcast.clock import Clock
from dicomcast.state import tables

Json = Any
NOBODY = "http://127.0.0.1:9"
HASTE = {"DICOMCAST_SYNC__PATIENCE": "0.1", "DICOMCAST_SETTLE__IDLE": "0.1"}


@contextlib.contextmanager
def idle_worker(hospital: Hospital) -> Iterator[None]:
    """Somebody holds the lease, and does nothing."""
    with hospital.state() as (state, _):
        lease = state.acquire(hospital.dicom_url, url=hospital.dicom_url, owner="somebody", seconds=3600)
        yield
        state.release(lease)


def listed(tmp_path: Path, *studies: list[Any]) -> str:
    """A file for `backfill`."""
    file = tmp_path / "studies.txt"
    file.write_text("# to be added\n" + "".join(f"{uid(one[0])}\n" for one in studies) + "\n")
    return str(file)


# Usage

WRONG = """
replay
replay --all --limit 0
replay --all --rate 0
replay --all --allow-deletes -1
replay --all --format xml
replay --study 1.2.a
replay --series x
replay --since yesterday
replay --id one
verify
verify --all --since 1d
verify --all --study 1.2.3
verify --study 1.2.3 --since 1d
verify --study abc
verify --since tomorrow
backfill
backfill --all --from 2026-01-01
backfill --all --studies-file studies.txt
backfill --from 2026-13-01
backfill --to 2026-01-01
backfill --from 2026-01-02 --to 2026-01-01
backfill --studies-file absent.txt
backfill --studies-file wrong.txt
failures show one
failures dismiss --id 1
failures dismiss --reason known
failures dismiss --id one --reason known
failures dismiss --id 1 --reason
failures list --status opn
db prune
db prune --older-than soon
state set
state set --watermark -1 --yes
state set --watermark x --yes
state import
status --max-lag long
status --max-lag -5
work cancel
work cancel one
"""


def test_wrong_usage_ends_with_2_and_touches_nothing(hospital: Hospital, tmp_path: Path) -> None:
    (tmp_path / "wrong.txt").write_text("1.2.3\nno UID\n")
    lines = [*WRONG.strip().splitlines(), "failures dismiss --id 1 --reason "]

    said = {line: cli(hospital, *line.split(" ")) for line in lines}

    assert {line: code for line, (code, _, _) in said.items() if code != 2} == {}
    assert [line for line, (_, out, err) in said.items() if out or not err] == []
    assert not (tmp_path / "state.db").exists()


def test_line_of_a_file_that_is_no_uid_is_named(hospital: Hospital, tmp_path: Path) -> None:
    (tmp_path / "wrong.txt").write_text("1.2.3\nMeier^Anna\n\n1.2.\n")

    _, _, err = cli(hospital, "backfill", "--studies-file", str(tmp_path / "wrong.txt"))

    assert [line.split(": ")[1][:6] for line in err.splitlines()[1:]] == ["line 2", "line 4"]
    assert "Meier" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["failures", "dismiss", "--id", "1", "--reason", "known"],
        ["db", "prune", "--older-than", "90d"],
        ["work", "cancel", "1"],
    ],
    ids=" ".join,
)
def test_change_of_a_database_that_nobody_has_made_ends_with_2(
    hospital: Hospital, tmp_path: Path, arguments: list[str]
) -> None:
    assert cli(hospital, *arguments)[0] == 2
    assert not (tmp_path / "state.db").exists()


@pytest.mark.parametrize("arguments", [["--id", "99"], ["--series", "1.2.3.4"]], ids=" ".join)
def test_replay_of_what_nobody_knows_ends_with_2_and_changes_nothing(hospital: Hospital, arguments: list[str]) -> None:
    hospital.send(*a_study())
    hospital.sync()
    before = rows(hospital)

    code, out, err = cli(hospital, "replay", *arguments)

    assert (code, out) == (2, "")
    assert arguments[1] in err
    assert rows(hospital) == before


@pytest.mark.parametrize("verb", ["show", "dismiss"])
def test_failure_that_is_not_there_ends_with_1(hospital: Hospital, verb: str) -> None:
    hospital.send(*a_study())
    hospital.sync()
    before = rows(hospital)
    arguments = ["show", "7"] if verb == "show" else ["dismiss", "--id", "7", "--reason", "known"]

    code, out, _ = cli(hospital, "failures", *arguments)

    assert (code, out) == (1, "")
    assert rows(hospital) == before


# replay


def test_replay_says_what_became_of_each_study(hospital: Hospital) -> None:
    study = a_failing_study()
    hospital.send(*study, *a_study())
    hospital.sync()

    failing = said(hospital, "replay", "--all", code=1)
    corrected(hospital, study)
    rehearsed = said(hospital, "replay", "--all", "--dry-run")
    waiting = hospital.kinds()
    mended = said(hospital, "replay", "--kind", "patient-id-missing")
    nothing = said(hospital, "replay", "--all")

    none = {"created": 0, "updated": 0, "unchanged": 0, "deleted": 0}
    assert failing == {"replayed": 1, **none, "still_failing": 1}
    assert rehearsed.items() >= {"replayed": 1, **none, "updated": 1, "still_failing": 0, "dry_run": True}.items()
    (one,) = rehearsed["studies"]
    assert (one["study_instance_uid"], one["outcome"], one["failures"]) == (uid(study[0]), "updated", [])
    assert waiting == ["patient-id-missing"]
    assert mended == {"replayed": 1, **none, "updated": 1, "still_failing": 0}
    assert nothing == {"replayed": 0, **none, "still_failing": 0}


def test_rehearsal_ends_with_1_where_something_would_fail(hospital: Hospital) -> None:
    study = a_failing_study()
    hospital.send(*study)
    hospital.sync()

    told = said(hospital, "replay", "--all", "--dry-run", code=1)

    assert (told["still_failing"], told["studies"][0]["failures"]) == (1, ["patient-id-missing"])


# verify


def test_verify_says_what_differs_and_repair_mends_it(hospital: Hospital) -> None:
    same, changed, gone, new = a_study(), a_study(), a_study(), a_study()
    hospital.send(*same, *changed, *gone)
    hospital.sync()
    hospital.modality.correct([uid(changed[0])], {"StudyDescription": "second look"})
    hospital.modality.delete(uid(gone[0]))
    hospital.send(*new)

    found = said(hospital, "verify", "--all", code=1)
    one = said(hospital, "verify", "--study", uid(same[0]))
    repaired = said(hospital, "verify", "--all", "--repair")
    again = said(hospital, "verify", "--since", "1d")

    kinds = {difference["study_instance_uid"]: difference["kind"] for difference in found["differences"]}
    assert (found["checked"], found["repaired"]) == (4, 0)
    assert kinds == {uid(changed[0]): "content", uid(gone[0]): "extra", uid(new[0]): "missing"}
    assert one == {"checked": 1, "differences": [], "repaired": 0, "pending": 0}
    assert (repaired["checked"], repaired["repaired"], len(repaired["differences"])) == (4, 3, 3)
    assert (again["differences"], again["repaired"]) == ([], 0)


def test_verify_ends_with_1_where_repair_did_not_mend_all(hospital: Hospital) -> None:
    hospital.send(*a_failing_study())
    hospital.sync()

    told = said(hospital, "verify", "--all", "--repair", code=1)

    assert (told["checked"], told["repaired"]) == (1, 0)
    assert [one["kind"] for one in told["differences"]] == ["failed"]


# backfill


def test_backfill_says_what_became_of_each_study(hospital: Hospital, tmp_path: Path) -> None:
    studies = [a_study(StudyDate="20260110"), a_study(StudyDate="20260120"), a_study(StudyDate="20260130")]
    failing = a_failing_study()
    hospital.send(*(one for study in studies for one in study), *failing)
    none = {"created": 0, "updated": 0, "unchanged": 0, "deleted": 0, "failed": 0}

    named = said(hospital, "backfill", "--studies-file", listed(tmp_path, studies[0]))
    dated = said(hospital, "backfill", "--from", "2026-01-10", "--to", "2026-01-20")
    whole = said(hospital, "backfill", "--all", code=1)

    assert named == {"listed": 1, **none, "created": 1, "handover": 0}
    assert dated == {"listed": 2, **none, "created": 1, "unchanged": 1, "handover": 0}
    assert whole == {"listed": 4, **none, "created": 1, "unchanged": 2, "failed": 1, "handover": 0}


def test_feed_begins_where_the_backfill_of_all_began_though_some_were_there_before(
    hospital: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_LATE", 0)
    first, second = a_study(), a_study(instances=2)
    hospital.send(*first, *second)

    said(hospital, "backfill", "--studies-file", listed(tmp_path, first))
    said(hospital, "replay", "--study", uid(first[0]))
    before = hospital.watermark()
    said(hospital, "backfill", "--all")

    assert (before, hospital.watermark()) == (None, 3)
    assert said(hospital, "sync")["entries"] == 0


# Services that are away, and others that hold the lease


@pytest.mark.parametrize("away", ["fhir", "dicom"])
def test_service_that_is_away_ends_each_verb_with_3(hospital: Hospital, away: str) -> None:
    study = a_study()
    hospital.send(*study)
    replay = partial(operations.replay, limits=NO_LIMITS, selection=operations.Selection(studies=(uid(study[0]),)))
    verify, backfill = (partial(one, limits=NO_LIMITS) for one in (operations.verify, operations.backfill))
    options = hospital.options(sync={"patience": 10}, **{away: {"url": NOBODY}})

    for verb in (replay, partial(replay, dry_run=True), verify, backfill, partial(backfill, named=["1.2.3"])):
        with pytest.raises(errors.Unavailable, match=away):
            asyncio.run(operations.at_desk(options, verb, clock=hospital.clock))
    address = {f"DICOMCAST_{away.upper()}__URL": NOBODY}
    code, out, err = cli(hospital, "verify", "--all", "--format", "json", **HASTE, **address)

    assert (code, out) == (3, "")
    assert "Nothing was skipped" in err
    assert hospital.search("ImagingStudy") == []


def test_what_a_service_that_was_away_has_left_is_done_by_the_same_call(hospital: Hospital) -> None:
    study = a_study()
    hospital.send(*study)
    hospital.fault("fhir", status=503)
    code, _, _ = cli(hospital, "replay", "--study", uid(study[0]), **HASTE)
    hospital.heal()

    assert code == 3
    assert said(hospital, "replay", "--study", uid(study[0]))["created"] == 1
    assert said(hospital, "work", "list") == []


def test_database_that_is_away_ends_with_3(hospital: Hospital) -> None:
    away = {"DICOMCAST_DATABASE__URL": "postgresql+psycopg://nobody@127.0.0.1:9/nowhere"}
    verbs = (
        "replay --all|verify --all|status|failures list|failures summary|work list|state show|db prune --older-than 1d"
    )

    codes = {verb: cli(hospital, *verb.split(), **HASTE, **away)[0] for verb in verbs.split("|")}

    assert set(codes.values()) == {3}, codes


def test_worker_that_comes_to_nothing_ends_each_verb_with_4_and_its_work_can_be_given_up(
    hospital: Hospital, tmp_path: Path
) -> None:
    study = a_study()
    hospital.send(*study)
    hospital.feed("reset", sequence=0)  # else it would be the worker's own
    with idle_worker(hospital):
        for verb in (
            ["replay", "--study", uid(study[0])],
            ["verify", "--study", uid(study[0]), "--repair"],
            ["backfill", "--studies-file", listed(tmp_path, study)],
        ):
            code, out, err = cli(hospital, *verb, "--format", "json", **HASTE)
            assert (code, out) == (4, ""), (verb, err)
        compared = said(hospital, "verify", "--study", uid(study[0]), code=1, **HASTE)
        waiting = said(hospital, "work", "list")
        counted = said(hospital, "status")["jobs"]
        first, second = waiting[0], waiting[1]
        given_up = cli(hospital, "work", "cancel", str(first["id"]))
        left = said(hospital, "work", "list")

    assert [one["kind"] for one in compared["differences"]] == ["missing"]
    # No file's name: it is what was found in it that counts.
    assert [(one["verb"], re.sub(r" [0-9a-f]{12}$", "", one["scope"]), one["left"]) for one in waiting] == [
        ("replay", f"--study {uid(study[0])}", 1),
        ("verify", f"--study {uid(study[0])} --repair", 1),
        ("backfill", "--studies-file", 1),
    ]
    assert waiting[0].keys() >= {"id", "requested_by", "requested_at", "listed_at", "held"}
    assert counted == [{name: one[name] for name in ("id", "verb", "left", "held")} for one in waiting]
    assert (given_up[0], [one["id"] for one in left]) == (0, [second["id"], waiting[2]["id"]])
    assert audit(hospital)[0][1:] == ("cancel", f"job {first['id']}")
    assert hospital.search("ImagingStudy") == []
    assert said(hospital, "sync")["studies"]["created"] == 1
    assert said(hospital, "work", "list") == []


def test_job_that_is_not_there_cannot_be_given_up(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.sync()

    code, out, _ = cli(hospital, "work", "cancel", "7")

    assert (code, out, audit(hospital)) == (1, "", [])


def test_sigterm_ends_verify_cleanly_and_the_same_call_goes_on(hospital: Hospital) -> None:
    study = a_study()
    hospital.send(*study)
    hospital.sync()
    hospital.log(clear=True)
    hospital.fault("fhir", path="ImagingStudy", latency=120)
    with hospital.dicomcast("verify", "--all", "--format", "json") as process:
        until(lambda: any("ImagingStudy" in one for one in hospital.log()))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    hospital.heal()

    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert json.loads(out) == {}
    assert said(hospital, "verify", "--all") == {"checked": 1, "differences": [], "repaired": 0, "pending": 0}


# status


def test_status_has_what_programs_rely_on(hospital: Hospital) -> None:
    hospital.send(*a_failing_study(), *a_study())
    hospital.sync()
    hospital.send(*a_study())

    shown = said(hospital, "status")

    assert shown.keys() >= {"feed", "studies", "failures", "lease", "jobs"}
    assert shown["feed"].keys() >= {"url", "watermark", "latest", "lag_entries", "lag_seconds"}
    assert (shown["feed"]["watermark"], shown["feed"]["latest"], shown["feed"]["lag_entries"]) == (3, 4, 1)
    assert shown["studies"] == {"synced": 2}
    assert shown["failures"] == {"open": 1, "by_kind": {"patient-id-missing": 1}}
    assert (shown["lease"]["held"], shown["jobs"]) == (False, [])


def test_lag_that_is_too_long_ends_status_with_1(hospital: Hospital) -> None:
    never = cli(hospital, "status", "--max-lag", "15m")
    hospital.send(*a_study())
    said(hospital, "sync")
    at_head = cli(hospital, "status", "--max-lag", "0")
    hospital.send(*a_study())
    with database(hospital) as connection:
        hour_ago = Clock().now() - timedelta(hours=1)
        connection.execute(sa.update(tables.feed).values(current_at=hour_ago, seen_at=hour_ago))
    behind = {limit: cli(hospital, "status", "--max-lag", limit)[0] for limit in ("15m", "2h", "3500", "3700s")}

    assert (never[0], "never read" in never[2]) == (1, True)
    assert at_head[0] == 0
    assert behind == {"15m": 1, "2h": 0, "3500": 1, "3700s": 0}
    assert 3600 <= said(hospital, "status")["feed"]["lag_seconds"] < 3660


def test_lag_counts_from_when_the_feed_was_last_seen_where_it_cannot_be_asked(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.clock = Clock()
    hospital.sync()
    with database(hospital) as connection:
        connection.execute(sa.update(tables.feed).values(seen_at=Clock().now() - timedelta(hours=2)))
    up_to_date = cli(hospital, "status", "--max-lag", "15m")[0]
    hospital.fault("dicom", path="latest", status=401)

    code, out, _ = cli(hospital, "status", "--max-lag", "15m", "--format", "json")

    assert (up_to_date, code) == (0, 1)
    assert json.loads(out)["feed"]["lag_seconds"] >= 7200


def test_worker_that_never_came_to_the_newest_entry_is_not_up_to_date(hospital: Hospital) -> None:
    """FHIR is away since the first sync; that was long ago."""
    hospital.send(*a_study())
    assert cli(hospital, "sync", DICOMCAST_FHIR__URL=NOBODY, **HASTE)[0] == 3
    with database(hospital) as connection:
        connection.execute(sa.update(tables.feed).values(seen_at=Clock().now() - timedelta(days=3)))

    assert cli(hospital, "status", "--max-lag", "15m")[0] == 1


def test_feed_that_was_begun_and_never_finished_is_not_up_to_date(hospital: Hospital) -> None:
    hospital.send(*a_study(), *a_study())
    cli(hospital, "state", "set", "--watermark", "1", "--yes")
    with database(hospital) as connection:
        connection.execute(sa.update(tables.feed).values(seen_at=Clock().now() - timedelta(days=3)))

    shown = said(hospital, "status")["feed"]

    assert shown["lag_entries"] == 1
    assert shown["lag_seconds"] != 0


# Forms of output


def test_tables_and_csv_say_the_same(hospital: Hospital, tmp_path: Path) -> None:
    failing, changed = a_failing_study(), a_study()
    hospital.send(*failing, *changed)
    hospital.sync()
    hospital.modality.correct([uid(changed[0])], {"StudyDescription": "second look"})
    other = uid(changed[0])
    with idle_worker(hospital):
        cli(hospital, "replay", "--study", other, **HASTE)
    (failed,) = hospital.failures()
    expected = {
        "status": {"feed watermark": "3", "failures open": "1"},
        "failures list": {"id": str(failed["id"]), "kind": "patient-id-missing"},
        "failures summary": {"kind": "patient-id-missing", "studies": "1"},
        f"failures show {failed['id']}": {"id": str(failed["id"]), "tag": "00100020"},
        "work list": {"verb": "replay", "scope": f"--study {other}", "left": "1"},
        "state show": {"watermark": "3", "first": "0"},
        "state audit": {"action": "replay", "detail": f"--study {other}"},
        f"verify --study {uid(changed[0])}": {"study_instance_uid": uid(changed[0]), "kind": "content"},
        f"replay --dry-run --study {uid(changed[0])}": {"study_instance_uid": uid(changed[0]), "outcome": "updated"},
        f"replay --study {uid(changed[0])}": {"replayed": "1", "still_failing": "0"},
        f"backfill --studies-file {listed(tmp_path, changed)}": {"listed": "1", "unchanged": "1"},
    }

    for line, wanted in expected.items():
        _, table, _ = cli(hospital, *line.split(), "--format", "table")
        _, text, err = cli(hospital, *line.split(), "--format", "csv")
        assert next(csv.DictReader(io.StringIO(text))).items() >= wanted.items(), (line, err)
        shown = [part for name, value in wanted.items() for part in (name.replace("_", " "), value)]
        assert [part for part in shown if part not in table] == [], line


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_nothing_to_show_is_said_in_each_form(hospital: Hospital, form: str) -> None:
    hospital.send(*a_study())
    hospital.sync()

    said = {
        line: cli(hospital, *line.split(), "--format", form)
        for line in ("failures list", "failures summary", "work list", "state audit", "replay --all", "verify --all")
    }

    assert {line: code for line, (code, _, _) in said.items() if code} == {}
    for line, (_, out, _) in said.items():
        assert out, line
        if form == "json":
            json.loads(out)


def test_schema_is_shown_in_each_form(hospital: Hospital) -> None:
    code, out, _ = cli(hospital, "db", "show", "--format", "json")
    _, text, _ = cli(hospital, "db", "show", "--format", "csv")

    assert code == 0
    assert json.loads(out) == list(csv.DictReader(io.StringIO(text)))
    assert {"table", "column", "type", "meaning"} == set(json.loads(out)[0])
