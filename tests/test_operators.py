"""What operators do to the state: positions, dismissals and pruning, and what no operator should have to do."""

import ast
import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import sqlalchemy as sa
import stack
from hospital import Hospital, HurriedClock, a_failing_study, a_study, database, rows, uid, until

from dicomcast import app, errors, operations
from dicomcast.cli import main
from dicomcast.clock import Clock
from dicomcast.state import operators, store, tables

ROOT = Path(__file__).parent.parent
Json = Any
POSITION = ("first", "watermark", "latest", "mark_study_uid", "mark_sop_uid", "mark_timestamp")


class Terminal(io.StringIO):
    """Somebody who can be asked."""

    def isatty(self) -> bool:
        return True


def cli(hospital: Hospital, *arguments: str, stdin: io.StringIO | None = None, **more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, in this process: a new one takes a second."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in hospital.environment(**more).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["dicomcast", *arguments])
        patch.setattr(sys, "stdin", stdin or io.StringIO())
        with pytest.raises(SystemExit) as ended:
            main()
    assert "Internal error" not in err.getvalue(), err.getvalue()
    return int(ended.value.code or 0), out.buffer.getvalue().decode(), err.getvalue()


def said(hospital: Hospital, *arguments: str, code: int = 0, **more: str) -> Json:
    """The one JSON document on stdout."""
    returned, out, err = cli(hospital, *arguments, "--format", "json", **more)
    assert returned == code, err
    return json.loads(out)


def positioned(hospital: Hospital) -> tuple[Any, ...]:
    """What the feed's row says of where it is, as it stands there."""
    with database(hospital) as connection:
        return tuple(connection.execute(sa.text(f"SELECT {', '.join(POSITION)} FROM feed")).one())


def leased(hospital: Hospital) -> str | None:
    """Who holds the feed's lease."""
    with database(hospital) as connection:
        owner: str | None = connection.execute(sa.select(tables.feed.c.lease_owner)).scalar_one()
        return owner


def audit(hospital: Hospital) -> list[tuple[str, str, str]]:
    """Who did what, the latest first."""
    found = operations.audited(hospital.options(), limit=50)
    return [(one["who"], one["action"], one["detail"]) for one in found]


def roads(hospital: Hospital, study: str) -> list[str]:
    flush = tables.flush.c
    with database(hospital) as connection:
        query = sa.select(flush.road).where(flush.study_instance_uid == study).order_by(flush.id)
        return list(connection.execute(query).scalars())


def exported(hospital: Hospital, **changes: Json) -> str:
    """What `state export` prints, with changes."""
    found = operations.position(hospital.options())
    assert found is not None
    return json.dumps({**found.model_dump(), **changes})


def imported(hospital: Hospital, text: str, *options: str) -> tuple[int, str, str]:
    return cli(hospital, "state", "import", "-", *options, stdin=io.StringIO(text))


# Positions


def test_position_is_shown_and_exported(clinic: Hospital) -> None:
    study = a_study(instances=2)
    before = said(clinic, "state", "show")
    code, out, _ = cli(clinic, "state", "export")
    clinic.send(*study)
    clinic.sync()
    after = said(clinic, "state", "show")

    assert before == {"feed": clinic.dicom_url, "watermark": None}
    assert (code, out) == (1, "")
    mark = after.pop("mark")
    assert mark[:2] == [uid(study[1]), str(study[1].SOPInstanceUID)]
    assert after == {
        "feed": clinic.dicom_url,
        "url": clinic.dicom_url,
        "first": 0,
        "watermark": 2,
        "latest": 2,
        "gaps": [],
    }
    code, out, _ = cli(clinic, "state", "export")
    assert (code, json.loads(out)) == (0, {**after, "mark": mark})


@pytest.mark.parametrize("verb", ["set", "import"])
def test_position_is_changed_only_after_a_yes(hospital: Hospital, tmp_path: Path, verb: str) -> None:
    hospital.send(*a_study(instances=3))
    hospital.sync()
    file = tmp_path / "position.json"
    file.write_text(exported(hospital, watermark=1, mark=None))
    command = ["state", "set", "--watermark", "1"] if verb == "set" else ["state", "import", str(file)]
    before = rows(hospital)

    unasked = cli(hospital, *command)
    refused = cli(hospital, *command, stdin=Terminal("n\n"))

    assert (unasked[0], refused[0]) == (2, 1)
    assert "--yes" in unasked[2]
    assert rows(hospital) == before
    assert cli(hospital, *command, stdin=Terminal("y\n"))[0] == 0
    assert hospital.watermark() == 1


def test_who_set_a_position_is_known(clinic: Hospital) -> None:
    clinic.send(*a_study(instances=3))
    clinic.sync()
    text = exported(clinic)

    cli(clinic, "state", "set", "--watermark", "1", "--yes")
    imported(clinic, text, "--yes")

    who = operations.operator()
    assert audit(clinic) == [(who, "state import", "watermark 1 -> 3"), (who, "state set", "watermark 3 -> 1")]
    assert [one["action"] for one in said(clinic, "state", "audit", "--limit", "1")] == ["state import"]


def test_position_is_not_changed_beside_a_worker(clinic: Hospital) -> None:
    clinic.send(*a_study(instances=3))
    clinic.sync()
    text = exported(clinic, watermark=2)
    with clinic.state() as (state, _):
        lease = state.acquire(clinic.dicom_url, url=clinic.dicom_url, owner="a worker", seconds=3600)
        before = rows(clinic)

        codes = [cli(clinic, "state", "set", "--watermark", "1", "--yes")[0], imported(clinic, text, "--yes")[0]]

        assert codes == [4, 4]
        assert rows(clinic) == before
        state.release(lease)
    assert imported(clinic, text, "--yes")[0] == 0


def test_feed_that_is_set_back_is_read_again_and_nothing_is_written(clinic: Hospital) -> None:
    study, other = a_study(instances=3), a_study()
    clinic.send(*study, *other)
    clinic.sync()
    versions = clinic.versions()
    clinic.log(clear=True)

    code, _, err = cli(clinic, "state", "set", "--watermark", "1", "--yes")
    again = clinic.synced().report

    assert (code, "read 2 to 4 again" in err) == (0, True)
    assert (again["entries"], again["watermark"], again["studies"]["unchanged"]) == (3, 4, 2)
    assert (clinic.versions(), clinic.writes()) == (versions, [])


@pytest.mark.parametrize("verb", ["set", "import"])
def test_study_whose_entries_were_skipped_is_complete_after_its_next_change(clinic: Hospital, verb: str) -> None:
    grown, shrunk, new = a_study(instances=5), a_study(instances=3), a_study(instances=2)
    clinic.send(*grown[:2], *shrunk[:2])
    clinic.sync()
    clinic.send(grown[2], new[0])
    clinic.modality.delete(uid(shrunk[0]), str(shrunk[0].SeriesInstanceUID), str(shrunk[0].SOPInstanceUID))
    newest = clinic.latest()

    if verb == "set":
        code, _, _ = cli(clinic, "state", "set", "--watermark", str(newest), "--yes")
    else:
        code, _, _ = imported(clinic, exported(clinic, watermark=newest, latest=newest, mark=None), "--yes")
    skipped = clinic.synced().report
    shown = [clinic.study(uid(one[0])) for one in (grown, shrunk, new)]
    clinic.send(grown[3], shrunk[2], new[1])
    clinic.sync()
    whole = [clinic.study(uid(one[0]))["numberOfInstances"] for one in (grown, shrunk, new)]
    clinic.send(grown[4])
    clinic.sync()

    assert (code, skipped["entries"], skipped["watermark"]) == (0, 0, newest)
    assert [one and one["numberOfInstances"] for one in shown] == [2, 2, None]
    assert whole == [4, 2, 2]
    for study in (grown, shrunk, new):
        clinic.check(uid(study[0]))
    assert roads(clinic, uid(grown[0])) == ["fold", "reconcile", "fold"]


def test_feed_that_was_skipped_and_set_back_is_read_whole(hospital: Hospital) -> None:
    study = a_study(instances=4)
    hospital.send(study[0])
    hospital.sync()
    hospital.send(*study[1:3])
    for watermark in ("3", "2", "3"):
        assert cli(hospital, "state", "set", "--watermark", watermark, "--yes")[0] == 0
    hospital.send(study[3])
    hospital.sync()

    hospital.check(uid(study[0]))


GARBAGE = {
    "empty": "",
    "no JSON": "{",
    "another file": "watermark = 5",
    "a list": "[]",
    "nothing": "null",
    "too little": '{"watermark": 1}',
}
WRONG: dict[str, dict[str, Json]] = {
    "another feed": {"feed": "https://other.example"},
    "negative": {"first": -2, "watermark": -1},
    "watermark below first": {"first": 2, "watermark": 1},
    "latest below watermark": {"latest": 1},
    "text": {"watermark": "3"},
    "no number": {"watermark": None},
    "a fraction": {"watermark": 2.5},
    "yes or no": {"watermark": True},
    "too large": {"watermark": 2**63, "latest": 2**63},
    "unknown key": {"token": 7},
    "half a mark": {"mark": ["1.2", "1.3"]},
    "gaps that are no sequences": {"gaps": ["x"]},
    "a negative gap": {"gaps": [-1]},
    "a gap too large": {"gaps": [2**70]},
    "a gap above the watermark": {"gaps": [99]},
    "a gap twice": {"gaps": [1, 1]},
    "a mark too long": {"mark": ["1" * 65, "1.3", "2026"]},
    "an address too long": {"url": "http://" + "a" * 1024},
}


def test_what_is_no_position_of_this_feed_is_not_imported(clinic: Hospital) -> None:
    clinic.send(*a_study(instances=3))
    clinic.sync()
    before = rows(clinic)
    texts = GARBAGE | {wrong: exported(clinic, **changes) for wrong, changes in WRONG.items()}

    said = {wrong: imported(clinic, text, "--yes") for wrong, text in texts.items()}

    assert {wrong: code for wrong, (code, _, _) in said.items() if code != 2} == {}
    assert [wrong for wrong, (_, out, err) in said.items() if out or "position" not in err] == []
    assert rows(clinic) == before


def test_file_that_cannot_be_read_is_not_imported(hospital: Hospital, tmp_path: Path) -> None:
    hospital.send(*a_study())
    hospital.sync()
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    before = rows(hospital)

    codes = [cli(hospital, "state", "import", str(tmp_path / name), "--yes")[0] for name in ("binary.json", "absent")]

    assert codes == [2, 2]
    assert rows(hospital) == before


def test_feed_goes_on_in_another_database_where_it_was(clinic: Hospital, tmp_path: Path) -> None:
    study, other = a_study(instances=3), a_study()
    clinic.send(*study[:2], *other)
    clinic.sync()
    text, place, versions = exported(clinic), positioned(clinic), clinic.versions()
    clinic.log(clear=True)
    clinic.database = f"sqlite:///{tmp_path}/other.db"

    code, _, _ = imported(clinic, text, "--yes")
    moved = positioned(clinic)
    first = clinic.synced().report
    nothing_written = (clinic.versions(), clinic.writes()) == (versions, [])
    clinic.send(study[2])
    second = clinic.synced().report

    assert (code, moved[1:]) == (0, place[1:])
    assert (first["entries"], first["watermark"], nothing_written) == (0, 3, True)
    assert (second["entries"], second["studies"]["updated"]) == (1, 1)
    clinic.check(uid(study[0]))


def test_study_that_failed_before_the_move_is_whole_after_its_next_change(hospital: Hospital, tmp_path: Path) -> None:
    """Its failure stays behind in the old database; meanwhile the rule that it failed by was mended."""
    study = a_study(instances=2)
    hospital.send(study[0])
    hospital.fault("dicom", path="metadata|changefeed", entry="unknown-action", sequence=1)
    hospital.sync()
    hospital.heal()
    text = exported(hospital)
    hospital.database = f"sqlite:///{tmp_path}/other.db"
    imported(hospital, text, "--yes")
    hospital.send(study[1])

    hospital.sync()

    hospital.check(uid(study[0]))


# Positions that cannot be read: an error, never zero (acceptance scenario 14)

UNREADABLE = {
    "no watermark": "watermark = NULL",
    "no first": "first = NULL",
    "neither": "first = NULL, watermark = NULL",
    "negative": "watermark = -1",
    "below first": "first = 2, watermark = 1",
}
NO_NUMBERS = {"text": "watermark = 'abc'", "half": "watermark = 2.5"}


def spoilt(hospital: Hospital, change: str) -> None:
    with database(hospital) as connection:
        connection.execute(sa.text(f"UPDATE feed SET {change}"))


def refuses(hospital: Hospital, change: str) -> None:
    """Every verb that must know where the feed is, until somebody says it; and nothing is written."""
    study = a_study(instances=2)
    hospital.send(*study, *a_study())
    hospital.sync()
    versions = hospital.versions()
    spoilt(hospital, change)
    before = positioned(hospital)
    hospital.send(*a_study())
    hospital.log(clear=True)

    for verb in (["sync"], ["run"], ["state", "show"], ["state", "export"], ["replay", "--study", uid(study[0])]):
        code, out, err = cli(hospital, *verb, DICOMCAST_WEB__PORT="0")
        assert (code, out, leased(hospital)) == (2, "", None), verb
        assert "dicomcast state set --watermark N" in err

    assert (positioned(hospital), hospital.writes(), hospital.versions()) == (before, [], versions)
    code, _, _ = cli(hospital, "state", "set", "--watermark", "3", "--yes")
    mended = hospital.synced().report
    assert (code, mended["entries"], mended["studies"]["created"]) == (0, 1, 1)


@pytest.mark.parametrize("how", UNREADABLE)
def test_position_that_cannot_be_read_is_an_error_and_never_zero(clinic: Hospital, how: str) -> None:
    refuses(clinic, UNREADABLE[how])


@pytest.mark.parametrize("how", NO_NUMBERS)
def test_position_that_is_no_number_is_an_error_and_never_zero(hospital: Hospital, how: str) -> None:
    refuses(hospital, NO_NUMBERS[how])


def test_position_of_which_only_the_newest_entry_is_left_is_an_error(hospital: Hospital) -> None:
    hospital.send(*a_failing_study())
    hospital.sync()
    with database(hospital) as connection:
        connection.execute(sa.delete(tables.study))
        connection.execute(sa.update(tables.feed).values(first=None, watermark=None))

    with pytest.raises(errors.Incompatible, match="state set"):
        hospital.sync()


def test_position_beyond_the_feed_is_refused(clinic: Hospital) -> None:
    clinic.send(*a_study())
    clinic.sync()
    before = positioned(clinic)
    beyond = exported(clinic, watermark=5000, latest=5000)

    typed = cli(clinic, "state", "set", "--watermark", "5000", "--yes")
    brought = imported(clinic, beyond, "--yes")

    assert (typed[0], brought[0], positioned(clinic)) == (2, 2, before)
    assert "ends at 1" in typed[2]
    assert "ends at 1" in brought[2]


def test_position_that_went_too_far_while_nobody_could_be_asked_is_put_back(clinic: Hospital) -> None:
    clinic.send(*a_study())
    clinic.sync()
    clinic.fault("dicom", path="latest", status=503)
    assert cli(clinic, "state", "set", "--watermark", "5000", "--yes")[0] == 0
    clinic.heal()
    assert cli(clinic, "state", "set", "--watermark", "1", "--yes")[0] == 0
    clinic.send(*a_study())

    assert clinic.sync() == {"created": 1}


def test_entry_at_the_watermark_that_cannot_be_read_is_an_outage(clinic: Hospital) -> None:
    clinic.send(*a_study())
    clinic.sync()
    clinic.send(*a_study())
    clinic.fault("dicom", path=r"changefeed\?", entry="broken", times=1)

    assert clinic.sync() == {"created": 1}


def test_status_is_no_bug_where_the_position_is_no_number(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.sync()
    spoilt(hospital, NO_NUMBERS["text"])

    assert cli(hospital, "status", "--format", "json")[0] in (0, 2)


def test_what_was_skipped_by_an_import_over_an_unreadable_position_is_not_trusted(hospital: Hospital) -> None:
    study = a_study(instances=4)
    hospital.send(*study[:2])
    hospital.sync()
    hospital.send(study[2])
    text = exported(hospital, watermark=3, latest=3, mark=None)
    spoilt(hospital, "watermark = NULL")
    assert imported(hospital, text, "--yes")[0] == 0
    hospital.send(study[3])

    hospital.sync()

    hospital.check(uid(study[0]))


class Noticed(HurriedClock):
    """Says when somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = threading.Event()

    async def sleep(self, seconds: float) -> None:
        self.waited.set()
        await super().sleep(seconds)


@contextlib.contextmanager
def cut_off(server: str, url: str) -> Iterator[None]:
    """No connection to a PostgreSQL database, neither old nor new."""
    name = sa.make_url(url).database
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        try:
            yield
        finally:
            connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            connection.close()
            admin.dispose()


@pytest.fixture
def remote(sandbox: Any, postgres_server: str) -> Iterator[Hospital]:
    """A hospital whose state is in PostgreSQL."""
    with stack.database(postgres_server) as url:
        one = Hospital(sandbox.dicom_url, sandbox.fhir_url, url)
        yield one
        one.close()


def offsets(hospital: Hospital) -> list[int]:
    """Where pages of the feed were read from since the log was cleared."""
    asked = hospital.http.get(f"{hospital.dicom_url}/sandbox/requests").json()
    queries = [parse_qs(one["query"]) for one in asked if one["path"] == "/v1/changefeed"]
    return [int(query["offset"][0]) for query in queries]


def test_database_that_is_away_at_the_start_is_waited_for(remote: Hospital, postgres_server: str) -> None:
    remote.send(*a_study(instances=2))
    remote.sync()
    remote.send(*a_study())
    remote.log("dicom", clear=True)
    remote.clock = clock = Noticed()
    with ThreadPoolExecutor(1) as threads:
        with cut_off(postgres_server, remote.database):
            syncing = threads.submit(remote.synced, sync={"patience": 1_000_000})
            until(clock.waited.is_set)
            asked = remote.log("dicom")
        done = syncing.result(60).report

    assert asked == []
    assert (done["entries"], done["watermark"], done["studies"]["created"]) == (1, 3, 1)
    assert min(offsets(remote)) == 1  # the entry at the watermark, to know the feed again


def test_database_that_is_away_for_a_while_is_waited_for(remote: Hospital, postgres_server: str) -> None:
    first, second = a_study(instances=2), a_study()
    remote.send(*first)
    quick = {"DICOMCAST_DICOM__POLL": "0.1", "DICOMCAST_WEB__PORT": "0", "DICOMCAST_LOG__FORMAT": "json"}
    with remote.dicomcast("run", **quick) as process:
        ports = (json.loads(line).get("port") for line in process.stderr or ())
        ready = f"http://127.0.0.1:{next(filter(None, ports))}/readyz"
        until(lambda: remote.watermark() == 2)
        with cut_off(postgres_server, remote.database):
            until(lambda: "database" in remote.http.get(ready).text)
            remote.log("dicom", clear=True)
            remote.send(*second)
        until(lambda: remote.watermark() == 3)

    assert set(offsets(remote)) == {2}
    remote.check(uid(second[0]))


def test_database_file_without_rights_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "state.db")
        file.touch(mode=0o444)
        Path(folder).chmod(0o755)
        child = os.fork()
        if not child:
            ended = 1
            try:
                if os.getuid() == 0:
                    os.setuid(65534)  # who is root may do anything
                store.Store(f"sqlite:///{file}", clock=Clock())
            except errors.Misconfigured as wrong:
                ended = 0 if folder in wrong.problems[0] else 2
            finally:
                os._exit(ended)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_database_file_that_is_spoilt_ends_sync_and_nothing_is_read_anew(hospital: Hospital) -> None:
    hospital.send(*a_study(instances=2))
    hospital.sync()
    hospital.send(*a_study())
    file = Path(hospital.database.removeprefix("sqlite:///"))
    content = file.read_bytes()
    file.write_bytes(b"no database, bye" + content[16:])
    hospital.log("dicom", clear=True)

    code, out, _ = cli(hospital, "sync")
    asked = hospital.log("dicom")
    file.write_bytes(content)

    assert (code, out, asked) == (2, "", [])
    assert hospital.synced().report["entries"] == 1


# Failures


def test_failures_are_listed_summed_up_and_shown(clinic: Hospital) -> None:
    failing, other = a_failing_study(), a_failing_study()
    clinic.send(*failing, *other)
    clinic.fault("dicom", path="changefeed", entry="unknown-action", sequence=1)
    clinic.sync()

    listed = said(clinic, "failures", "list")
    summed = said(clinic, "failures", "summary")
    shown = said(clinic, "failures", "show", str(listed[0]["id"]))
    code, out, err = cli(clinic, "failures", "show", "999")

    assert Counter(one["kind"] for one in listed) == {"patient-id-missing": 2, "unknown-action": 1}
    assert [(one["kind"], one["failures"], one["instances"], one["studies"]) for one in summed] == [
        ("patient-id-missing", 2, 2, 2),
        ("unknown-action", 1, 1, 1),
    ]
    assert [one["to_do"] for one in summed] == [errors.KINDS[one["kind"]].to_do for one in summed]
    assert summed[0].keys() >= {"first_seen", "last_seen"}
    assert shown == listed[0]
    assert (code, out) == (1, "")
    assert "999" in err


def test_dismissed_failure_is_open_no_more_and_says_who_and_why(clinic: Hospital) -> None:
    failing, other = a_failing_study(), a_failing_study()
    clinic.send(*failing, *other)
    clinic.sync()
    first, second = clinic.failures()

    code, _, _ = cli(clinic, "failures", "dismiss", "--id", str(first["id"]), "--reason", "a phantom")

    assert code == 0
    assert [one["id"] for one in clinic.failures()] == [second["id"]]
    (row,) = said(clinic, "failures", "list", "--status", "dismissed")
    assert (row["id"], row["resolution"], row["note"]) == (first["id"], "dismissed", "a phantom")
    assert app.status(clinic.options())["failures"] == {"open": 1, "by_kind": {"patient-id-missing": 1}}
    assert audit(clinic) == [(operations.operator(), "dismiss", f"failures {first['id']}: a phantom")]


def test_failures_are_dismissed_by_kind_and_study_together(hospital: Hospital) -> None:
    failing, other = a_failing_study(), a_failing_study()
    hospital.send(*failing, *other)
    hospital.fault("dicom", path="changefeed", entry="unknown-action", sequence=1)
    hospital.sync()
    dismiss = partial(operations.dismiss, hospital.options(), ids=(), reason="known")

    assert dismiss(kind="internal", study_uid=uid(failing[0])) == []
    assert len(dismiss(kind="patient-id-missing", study_uid=uid(failing[0]))) == 1
    assert sorted(hospital.kinds()) == ["patient-id-missing", "unknown-action"]
    assert len(dismiss(kind=None, study_uid=uid(failing[0]))) == 1
    assert len(dismiss(kind="patient-id-missing", study_uid=None)) == 1
    assert hospital.failures() == []


def test_dismissed_failure_does_not_come_back_while_its_reason_is_the_same(clinic: Hospital) -> None:
    study = a_failing_study()
    clinic.send(*study)
    clinic.sync()
    (failed,) = clinic.failures()
    operations.dismiss(clinic.options(), ids=[failed["id"]], kind=None, study_uid=None, reason="a phantom")

    clinic.modality.correct([uid(study[0])], {"StudyDescription": "second look"})
    again = clinic.synced().report

    assert (again["studies"]["updated"], again["failures"]) == (1, {"opened": 0, "open": 0})
    (row,) = clinic.failures("dismissed")
    assert (row["id"], row["note"], row["next_retry"]) == (failed["id"], "a phantom", None)


def test_dismissed_failure_is_no_failure_of_sync_and_replay(hospital: Hospital) -> None:
    study = a_failing_study()
    hospital.send(*study)
    hospital.sync()
    operations.dismiss(hospital.options(), ids=(), kind="patient-id-missing", study_uid=None, reason="a phantom")
    hospital.modality.correct([uid(study[0])], {"StudyDescription": "second look"})

    synced = hospital.synced()
    replayed = said(hospital, "replay", "--study", uid(study[0]))

    assert synced.failed is False
    assert replayed["still_failing"] == 0


def test_dismissed_failure_is_not_tried_again(clinic: Hospital) -> None:
    study = a_study()
    clinic.send(*study)
    clinic.fault("fhir", path="fhir$", method="POST", status=422)
    clinic.sync()
    (failed,) = clinic.failures()
    operations.dismiss(clinic.options(), ids=[failed["id"]], kind=None, study_uid=None, reason="FHIR is too strict")
    clinic.heal()
    clinic.clock.skip(30 * 86_400)

    again = clinic.synced().report["studies"]

    assert (failed["kind"], failed["status"]) == ("rejected", "retrying")
    assert (sum(again.values()), clinic.search("ImagingStudy")) == (0, [])


def test_dismissed_failure_is_open_again_where_it_fails_for_another_reason(clinic: Hospital) -> None:
    study = a_study(instances=2)
    study[1].SOPClassUID = ""
    clinic.send(study[0])
    clinic.fault("dicom", path="changefeed", entry="broken", sequence=1)
    clinic.sync()
    with clinic.state() as (state, feed_id):
        lease = state.acquire(clinic.dicom_url, url=clinic.dicom_url, owner="a worker", seconds=3600)
        position = state.position(lease)
        failure = store.Failure("value-invalid", "map", "m", "1.2", "1.2.1", "1.2.1.1", 1, "study.started", "00080020")
        effects = [
            store.Effects(failures=[one]) for one in (failure, failure, dataclasses.replace(failure, tag="00080030"))
        ]
        assert position is not None
        state.commit(lease, position, effects[0])
        (known,) = state.failures(feed_id, study_uid="1.2")
        operations.dismiss(clinic.options(), ids=[known["id"]], kind=None, study_uid=None, reason="a phantom")

        statuses = []
        for one in effects[1:]:
            state.commit(lease, position, one)
            (row,) = state.failures(feed_id, statuses=(), study_uid="1.2")
            statuses.append((row["id"] == known["id"], row["status"], row["note"]))

    assert statuses == [(True, "dismissed", "a phantom"), (True, "open", None)]


# Kinds of failures


def texts(node: ast.AST) -> set[str]:
    return {one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def named_kinds(source: str) -> set[str]:
    """Kinds that a module gives to failures: what `InstanceFailed(...)`, `_fail(...)` and the like are called with."""
    tree, found = ast.parse(source), set[str]()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for call in ast.walk(function):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            callee = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            first = call.args[0]
            if not callee.endswith(("Failed", "_fail", "_failed")):
                continue
            if isinstance(first, ast.Constant):
                found.add(str(first.value))
            elif isinstance(first, ast.Name):
                assigned = (one for one in ast.walk(function) if isinstance(one, ast.Assign))
                values = (one.value for one in assigned if [getattr(to, "id", "") for to in one.targets] == [first.id])
                found |= set[str]().union(*map(texts, values))
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "missing":
            found |= texts(node.value)
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "missing" and node.value is not None:
            found |= texts(node.value)
    return found


def test_every_kind_of_failure_is_known_and_says_what_to_do() -> None:
    modules = [*(ROOT / "dicomcast").rglob("*.py"), *(ROOT / "mappings").glob("*.py")]
    real = [path for path in modules if "sandbox" not in path.parts]

    given = {str(path.relative_to(ROOT)): named_kinds(path.read_text(encoding="utf-8")) for path in real}

    assert {name: kinds - errors.KINDS.keys() for name, kinds in given.items() if kinds - errors.KINDS.keys()} == {}
    assert set().union(*given.values()) == errors.KINDS.keys()
    assert [name for name, kind in errors.KINDS.items() if not kind.to_do or not kind.about] == []


def test_kinds_are_found_however_they_are_given() -> None:
    source = """
def of_a_call(): raise errors.InstanceFailed("one", "message", stage="read")
def of_a_choice():
    kind = "two" if well else "three"
    return StudyFailed(kind, "message", stage="read")
def of_a_function(): _fail("four", "message", rule=None)
Rule("a.b", "study", "b", missing="five")
class Rule:
    missing: str = "six"
"""
    assert named_kinds(source) == {"one", "two", "three", "four", "five", "six"}


def test_readme_lists_exactly_the_kinds_of_failures() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("| kind | about |")[1].split("\n\n")[0]
    listed = [name for row in text.splitlines()[2:] for name in re.findall(r"`([a-z-]+)`", row.split("|")[1])]

    assert sorted(listed) == sorted(errors.KINDS)


# Pruning

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
OLD, NEW = NOW - timedelta(days=100), NOW - timedelta(days=10)
BEFORE = NOW - timedelta(days=90)
MANY = 12_000
"""More than two transactions prune."""


def filled(hospital: Hospital, feed_id: int) -> None:
    """Old and new of everything; `MANY` old flushes."""
    fixed: dict[sa.Table, dict[str, Any]] = {
        tables.flush: {"road": "fold", "outcome": "created", "entries": 1, "seconds": 0.1, "study_instance_uid": "1.2"},
        tables.failure: {"kind": "invalid", "stage": "map", "message": "m", "attempts": 1, "first_seen": OLD},
        tables.study: {"series": 1, "instances": 1, "first_sequence": 1, "last_sequence": 1, "mapping_digest": "d"},
        tables.job: {"verb": "replay", "scope": "--all", "requested_by": "me", "requested_at": OLD},
        tables.work: {"reason": "replay"},
        tables.flush_hour: {"road": "fold", "outcome": "created", "flushes": 1, "entries": 1, "seconds": 0.1},
        tables.audit: {"who": "me", "action": "dismiss", "detail": "failures 1: why"},
    }
    new: dict[sa.Table, list[dict[str, Any]]] = {
        tables.flush: [{"at": OLD}] * MANY + [{"at": NEW}],
        tables.failure: [
            {"status": status, "last_seen": when, "study_instance_uid": f"{status} {when:%m}"}
            for status in ("open", "retrying", "resolved", "dismissed")
            for when in (OLD, NEW)
        ],
        tables.study: [
            {"study_instance_uid": f"{outcome} {when:%m}", "outcome": outcome, "synced_at": when}
            for outcome in ("synced", "failed", "deleted", "cancelled", "shared")
            for when in (OLD, NEW)
        ],
        tables.job: [
            {"id": 10 * feed_id + 1, "listed_at": OLD},
            {"id": 10 * feed_id + 2, "listed_at": OLD},
            {"id": 10 * feed_id + 3, "listed_at": None},
            {"id": 10 * feed_id + 4, "listed_at": NEW, "requested_at": NEW},
        ],
        tables.work: [
            {"job_id": job and 10 * feed_id + job, "study_instance_uid": study, "state": state, "finished_at": when}
            for job, study, state, when in [
                (1, "1.0", "done", OLD),
                (1, "1.1", "cancelled", OLD),
                (2, "1.2", "listed", None),
                (3, "1.3", "waiting", None),
                (4, "1.4", "done", NEW),
                (None, "1.5", "done", OLD),
                (None, "1.6", "waiting", None),
            ]
        ],
        tables.flush_hour: [{"hour": OLD, "lag_within": 1, "lag_seconds": 1.0, "longest_lag": 1.0}],
        tables.audit: [{"at": OLD}],
    }
    with database(hospital) as connection:
        for table, these in new.items():
            connection.execute(sa.insert(table), [{"feed_id": feed_id, **fixed[table], **one} for one in these])


def named(hospital: Hospital, feed_id: int) -> dict[str, list[Any]]:
    """What is there of a feed, in short."""
    shown = {
        "flush": ("at",),
        "failure": ("study_instance_uid",),
        "study": ("study_instance_uid",),
        "job": ("id",),
        "work": ("study_instance_uid",),
    }
    found: dict[str, list[Any]] = {}
    for name, columns in shown.items():
        table = tables.metadata.tables[name]
        with database(hospital) as connection:
            query = sa.select(*(table.c[one] for one in columns)).where(table.c.feed_id == feed_id)
            found[name] = sorted(connection.execute(query).scalars())
    return found


def test_what_was_over_before_a_day_is_pruned_and_the_rest_stays(clinic: Hospital) -> None:
    with clinic.state() as (state, feed_id):
        other = state.know("other", url="https://other.example")
        filled(clinic, feed_id)
        filled(clinic, other)
        before = named(clinic, other)

        counts = operators.prune(state, feed_id, before=BEFORE, who="me", now=NOW)

        assert counts == {"flush": MANY, "failure": 1, "work": 3, "job": 1, "study": 1}
        left = named(clinic, feed_id)
        assert left == {
            "flush": [NEW],
            "failure": sorted(set(before["failure"]) - {f"resolved {OLD:%m}"}),
            "study": sorted(set(before["study"]) - {f"deleted {OLD:%m}"}),
            "job": [10 * feed_id + 2, 10 * feed_id + 3, 10 * feed_id + 4],
            "work": ["1.2", "1.3", "1.4", "1.6"],
        }
        assert named(clinic, other) == before
        kept = rows(clinic)
        assert (len(kept["flush_hour"]), len(kept["audit"])) == (2, 3)
        detail = "before 2025-11-02T12:00:00Z: flush 12000, failure 1, work 3, job 1, study 1"
        assert operators.audited(state, feed_id, limit=1) == [
            {"at": NOW, "who": "me", "action": "prune", "detail": detail}
        ]
        assert set(operators.prune(state, feed_id, before=BEFORE, who="me", now=NOW).values()) == {0}


def test_done_work_of_a_job_that_goes_on_is_kept(hospital: Hospital) -> None:
    """What it has come to so far is counted, and what it has done is not done again."""
    with hospital.state() as (state, feed_id), database(hospital) as connection:
        job = {"id": 1, "verb": "verify", "scope": "--all", "requested_by": "me", "requested_at": OLD}
        connection.execute(sa.insert(tables.job), {"feed_id": feed_id, "listed_at": OLD, **job})
        work = {"feed_id": feed_id, "job_id": 1, "reason": "verify", "result": "same"}
        done = {"study_instance_uid": "1.1", "state": "done", "finished_at": OLD}
        connection.execute(sa.insert(tables.work), [{**work, **done}])
        waiting = {"study_instance_uid": "1.2", "state": "listed", "finished_at": None}
        connection.execute(sa.insert(tables.work), [{**work, **waiting}])
        connection.commit()

        counts = operators.prune(state, feed_id, before=BEFORE, who="me", now=NOW)

    assert counts["work"] == 0


def test_study_whose_row_was_pruned_comes_back(clinic: Hospital) -> None:
    study = a_study(instances=2)
    clinic.send(*study)
    clinic.sync()
    clinic.modality.delete(uid(study[0]))
    clinic.sync()

    code, out, err = cli(clinic, "db", "prune", "--older-than", "2031-01-01")
    unknown = cli(clinic, "status", "--study", uid(study[0]))[0]
    clinic.send(*study)
    clinic.sync()

    assert (code, out) == (0, "")
    assert "flush" in err
    assert unknown == 1
    clinic.check(uid(study[0]))
