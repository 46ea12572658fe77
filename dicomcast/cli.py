"""The command line: verbs, forms of output and exit codes. What the verbs do is in `app`.

Data goes to stdout, logs and progress to stderr. Exit codes: 0 done; 1 finished, but something that this call touched
has failed and is recorded; 2 needs a person; 3 a service is unavailable or denies us; 4 another worker holds the
lease; 130 and 143 after SIGINT and SIGTERM.
"""

import asyncio
import csv
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import orjson
import rich
import rich.progress
import rich.table
import typer
from rich.console import Console

import dicomcast
from dicomcast import app as verbs
from dicomcast import errors, settings

Json = Any


def _exit(code: int | None, **_: object) -> None:
    """What a verb returns is its exit code."""
    raise typer.Exit(code or 0)


app = typer.Typer(
    result_callback=_exit,
    help="Keeps a FHIR R4 service in step with a DICOM service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
failures_app = typer.Typer(help="What failed, and why.", no_args_is_help=True)
db_app = typer.Typer(help="The state database's schema.", no_args_is_help=True)
app.add_typer(failures_app, name="failures")
app.add_typer(db_app, name="db")


class Format(StrEnum):
    """Forms of output."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class Status(StrEnum):
    """What a failure has come to."""

    OPEN = "open"
    RETRYING = "retrying"
    RESOLVED = "resolved"
    DISMISSED = "dismissed"


FormatOption = Annotated[Format, typer.Option("--format", help="table for people; json and csv for programs")]
_config: Path | None = None


def main() -> None:
    """Run a verb; turn every expected error into a message and its exit code."""
    try:
        app()
    except errors.Misconfigured as wrong:
        _say("The configuration is not usable:", *(f"  {problem}" for problem in wrong.problems))
        code = 2
    except errors.NeedsPerson as needed:
        _say(f"Stopped: {needed}")
        code = 2
    except errors.Unavailable as away:
        _say(f"Unavailable: {away}. Nothing was skipped; run it again when the service is back.")
        code = 3
    except errors.LeaseHeld as held:
        _say(f"{held}. See `dicomcast status`.")
        code = 4
    except errors.LeaseLost as lost:
        _say(f"{lost}. Nothing was skipped.")
        code = 4
    except Exception as bug:
        # No traceback: it quotes what it can find. The place is what a report needs.
        frame = traceback.extract_tb(bug.__traceback__)[-1]
        _say(f"Internal error: {type(bug).__name__} at {frame.filename}:{frame.lineno}. Please report it.")
        code = 2
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _options(
    config: Annotated[Path | None, typer.Option(help="settings file; default: dicomcast.toml if it is there")] = None,
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    global _config  # noqa: PLW0603 - the one option of all verbs
    _config = config
    if version:
        print(f"dicomcast {dicomcast.__version__}")  # noqa: T201
        raise typer.Exit


# The worker -----------------------------------------------------------------------------------------------------------


@app.command()
def sync(output: FormatOption = Format.TABLE) -> int:
    """Catch up with the change feed, and exit."""
    options = _settings(to_sync=True)
    with _progress("Syncing") as progress:
        done = asyncio.run(verbs.sync(options, progress=progress))
    report = done.report
    flat = {
        "watermark": report["watermark"],
        "entries": report["entries"],
        **{f"studies {word}": count for word, count in report["studies"].items()},
        "failures opened": report["failures"]["opened"],
        "failures open": report["failures"]["open"],
        **{f"{service} requests": count for service, count in report["requests"].items()},
        "seconds": report["seconds"],
    }
    _print(output, report, [flat], title="Synced")
    if done.stopped:
        return 128 + done.stopped
    if done.failed and output is Format.TABLE:
        _say("Something failed: `dicomcast failures list` says what.")
    return 1 if done.failed else 0


@app.command()
def run() -> int:
    """Keep the FHIR service in step until SIGTERM."""
    return 128 + asyncio.run(verbs.run(_settings(to_sync=True)))


# Questions ------------------------------------------------------------------------------------------------------------


@app.command()
def status(
    study: Annotated[str | None, typer.Option(help="a Study Instance UID: what became of it")] = None,
    output: FormatOption = Format.TABLE,
) -> int:
    """Where the feed stands, or what became of one study."""
    options = _settings(unused=("fhir",))
    if study is not None:
        known = verbs.study_status(options, study)
        flat = {name: value for name, value in known.items() if name not in ("failures", "issues")}
        _print(output, known, [flat], title="Study")
        if output is Format.TABLE and known["failures"]:
            _print(output, None, known["failures"], title="Failures", columns=_FAILURE_COLUMNS)
        if output is Format.TABLE and known["issues"]:
            _print(output, None, known["issues"], title="Issues", columns=tuple(known["issues"][0]))
        return 1 if known["outcome"] == "unknown" else 0
    now = verbs.status(options)
    flat = {
        **{f"feed {name}": value for name, value in now["feed"].items()},
        **{f"studies {outcome}": count for outcome, count in now["studies"].items()},
        "failures open": now["failures"]["open"],
        **{f"failures {kind}": count for kind, count in now["failures"]["by_kind"].items()},
        **{f"lease {name}": value for name, value in now["lease"].items()},
    }
    _print(output, now, [flat], title="Status")
    return 0


_FAILURE_COLUMNS = ("id", "status", "kind", "study_instance_uid", "sop_instance_uid", "rule", "tag", "message")


@failures_app.command("list")
def failures_list(
    status: Annotated[Status | None, typer.Option(help="default: open and retrying")] = None,
    kind: Annotated[str | None, typer.Option(help="only this kind")] = None,
    study: Annotated[str | None, typer.Option(help="only this Study Instance UID")] = None,
    output: FormatOption = Format.TABLE,
) -> int:
    """List failures, oldest first."""
    rows = verbs.failures(_settings(unused=("fhir",)), status=status, kind=kind, study_uid=study)
    columns = _FAILURE_COLUMNS if output is Format.TABLE else verbs.FAILURE_FIELDS
    _print(output, rows, rows, title="Failures", columns=columns, empty="No failures.")
    return 0


# Mapping --------------------------------------------------------------------------------------------------------------


@app.command("map")
def map_(
    paths: Annotated[
        list[str], typer.Argument(help="DICOM files, folders, .json (DICOM JSON, change feed page), or -")
    ],
) -> int:
    """Print the FHIR resources of DICOM data as a Bundle. Needs no service and no database."""
    bundle, unmapped = verbs.map_paths(_settings(unused=("dicom", "fhir")), paths)
    sys.stdout.buffer.write(orjson.dumps(bundle, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    if not bundle.get("entry") and not unmapped:
        _say("No DICOM data found.")
    for one in unmapped:
        about = [f"study {one.study_uid}", f"instance {one.sop_uid}", f"rule {one.rule}", f"tag {one.tag}"]
        known = [text for text in about if not text.endswith(" None")]
        _say(": ".join(filter(None, (one.source, one.kind, one.message))) + f" ({', '.join(known)})" * bool(known))
    return 1 if unmapped else 0


# The database ---------------------------------------------------------------------------------------------------------


@db_app.command("upgrade")
def db_upgrade() -> int:
    """Bring the database's schema up to this version."""
    before, after = verbs.upgrade(_settings(unused=("dicom", "fhir")))
    _say(f"The schema is at {after}." if before == after else f"The schema went from {before or 'nothing'} to {after}.")
    return 0


@db_app.command("current")
def db_current(output: FormatOption = Format.TABLE) -> int:
    """Show the schema's revision, and the one that this version needs."""
    current, newest = verbs.revision(_settings(unused=("dicom", "fhir")))
    row = {"current": current, "newest": newest}
    _print(output, row, [row], title="Schema")
    return 0


# The sandbox ----------------------------------------------------------------------------------------------------------


@app.command()
def sandbox(
    dicom_port: Annotated[int, typer.Option(help="0 takes a free one")] = 0,
    fhir_port: Annotated[int, typer.Option(help="0 takes a free one")] = 0,
    data: Annotated[Path | None, typer.Option(help="folder to keep everything in; default: memory")] = None,
    host: Annotated[
        str, typer.Option(help="address to listen on; anything but loopback is for containers")
    ] = "127.0.0.1",
) -> int:
    """Serve a DICOM service and a FHIR service for development and tests, until SIGTERM."""
    from dicomcast import sandbox as services

    stopped: list[int] = []
    ended = threading.Event()

    def stop(received: int, _: object) -> None:
        stopped.append(received)
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        running = services.start(host=host, dicom_port=dicom_port, fhir_port=fhir_port, data=data)
    except OSError as taken:
        _say(str(taken.strerror or taken))
        return 2
    with running:
        sys.stdout.write(orjson.dumps({"dicom": running.dicom_url, "fhir": running.fhir_url}).decode() + "\n")
        sys.stdout.flush()
        ended.wait()
    return 128 + stopped[0]


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="stay up afterwards, to look around")] = False,
    output: FormatOption = Format.TABLE,
) -> int:
    """Show the whole of it: a sandbox, real studies, a sync, a correction and a delete. Needs nothing."""
    from dicomcast import demo as show

    if output is Format.CSV:
        raise typer.BadParameter("the demo has table and json", param_hint="--format")
    with _progress("Syncing") as progress:
        return show.run(console=_stdout(), as_json=output is Format.JSON, keep=keep, progress=progress)


# Output ---------------------------------------------------------------------------------------------------------------


def _settings(*, unused: Sequence[str] = (), to_sync: bool = False) -> settings.Settings:
    options = settings.load(_config, unused=unused, to_sync=to_sync)
    verbs.configure_logging(options.log)
    return options


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)  # noqa: T201


def _stdout() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _print(
    output: Format,
    document: Json,
    rows: Sequence[dict[str, Json]],
    *,
    title: str,
    columns: Sequence[str] = (),
    empty: str = "Nothing.",
) -> None:
    """One JSON document, CSV with a header, or a table: a single row stands upright."""
    names = list(columns or (rows[0] if rows else ()))
    if output is Format.JSON:
        sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")
    elif output is Format.CSV:
        writer = csv.DictWriter(sys.stdout, fieldnames=names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({name: _cell(row[name]) for name in names} for row in rows)
    elif not rows:
        _stdout().print(empty)
    elif len(rows) == 1 and not columns:
        table = rich.table.Table(title=title, show_header=False, title_justify="left")
        for name in names:
            table.add_row(name.replace("_", " "), _cell(rows[0][name]))
        _stdout().print(table)
    else:
        table = rich.table.Table(title=title, title_justify="left")
        for name in names:
            table.add_column(name.replace("_", " "), overflow="fold")  # a UID that is cut is of no use
        for row in rows:
            table.add_row(*(_cell(row[name]) for name in names))
        _stdout().print(table)


def _cell(value: Json) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    return "" if value is None else str(value)


@contextmanager
def _progress(what: str) -> Iterator[verbs.Progress]:
    """A bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda watermark, latest: None
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda watermark, latest: bar.update(task, completed=watermark, total=latest or None)
