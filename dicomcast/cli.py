"""The command line: verbs, forms of output and exit codes. What the verbs do is in `app` and `authoring`.

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
import rich.text
import typer
from rich.console import Console

import dicomcast
from dicomcast import app as verbs
from dicomcast import authoring, decimals, errors, mapping, settings

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
mappings_app = typer.Typer(help="Mapping modules and overlays, for those who write them.", no_args_is_help=True)
db_app = typer.Typer(help="The state database's schema.", no_args_is_help=True)
app.add_typer(failures_app, name="failures")
app.add_typer(mappings_app, name="mappings")
app.add_typer(db_app, name="db")


class Format(StrEnum):
    """Forms of output."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class RulesFormat(StrEnum):
    """Forms of output for rules."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MARKDOWN = "markdown"


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

ShowValues = Annotated[bool, typer.Option("--show-values", help="print values too: they are patient data")]


@app.command("map")
def map_(
    paths: Annotated[
        list[str], typer.Argument(help="DICOM files, folders, .json (DICOM JSON, change feed page), or -")
    ],
    explain: Annotated[bool, typer.Option("--explain", help="instead, which rule finds what, and where")] = False,
    show_values: ShowValues = False,
    output: Annotated[
        Format | None, typer.Option("--format", help="of --explain: table for people; json and csv for programs")
    ] = None,
) -> int:
    """Print the FHIR resources of DICOM data as a Bundle. Needs no service and no database."""
    if explain:
        return _explain(paths, output or Format.TABLE, show_values=show_values)
    if show_values or output is not None:
        raise typer.BadParameter("goes with --explain", param_hint="--show-values" if show_values else "--format")
    bundle, unmapped = authoring.map_paths(_rules(), paths)
    sys.stdout.buffer.write(authoring.printed(bundle))
    if not bundle.get("entry") and not unmapped:
        _say("No DICOM data found.")
    _say_unmapped(unmapped)
    return 1 if unmapped else 0


def _explain(paths: Sequence[str], output: Format, *, show_values: bool) -> int:
    told = authoring.explain(_rules(), paths, show_values=show_values)
    rows = [{**row, "value": decimals.dumps(row["value"]).decode()} if show_values else row for row in told.found]
    columns = ("sop_instance_uid", "element", "rule", "tag", "vr", "source", *(["value"] if show_values else []))
    for sop_uid in dict.fromkeys(row["sop_instance_uid"] for row in rows) if output is Format.TABLE else ():
        of_it = [row for row in rows if row["sop_instance_uid"] == sop_uid]
        _print(output, None, of_it, title=f"Instance {sop_uid}", columns=columns[1:])
    if output is not Format.TABLE:
        _print(output, told.found, rows, title="What rules find", columns=columns)
    for sop_uid in dict.fromkeys(uid for uid, _ in told.nothing):
        _say(f"instance {sop_uid}: nothing for {', '.join(rule for uid, rule in told.nothing if uid == sop_uid)}")
    for sop_uid, issue in told.issues:
        _say(f"instance {sop_uid}: rule {issue.rule}, tag {issue.tag} {issue.vr}: {issue.reason}")
    _say_unmapped(told.unmapped)
    return 1 if told.unmapped else 0


def _say_unmapped(unmapped: Sequence[authoring.Unmapped]) -> None:
    for one in unmapped:
        about = [f"study {one.study_uid}", f"instance {one.sop_uid}", f"rule {one.rule}", f"tag {one.tag}"]
        known = [text for text in about if not text.endswith(" None")]
        _say(": ".join(filter(None, (one.source, one.kind, one.message))) + f" ({', '.join(known)})" * bool(known))


@mappings_app.command("list")
def mappings_list(output: FormatOption = Format.TABLE) -> int:
    """List the modules that come with dicomcast, and what the settings name."""
    found = authoring.listed(_offline())
    rows = [{**row, "in_use": "yes" if row["in_use"] else "no"} for row in found]
    _print(output, found, rows, title="Mapping modules and overlays", columns=tuple(rows[0]))
    return 0


@mappings_app.command("show")
def mappings_show(
    names: Annotated[
        list[str] | None, typer.Argument(help="modules and overlays; default: the rules in effect")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="all modules that come with dicomcast")] = False,
    output: Annotated[
        RulesFormat, typer.Option("--format", help="table for people; json and csv for programs; markdown to publish")
    ] = RulesFormat.TABLE,
) -> int:
    """Show rules: what they write, and from what."""
    wanted = [*(authoring.shipped() if every else []), *(names or [])]
    found = authoring.sections(_offline(), wanted)
    if output is RulesFormat.MARKDOWN:
        command = " ".join(["dicomcast mappings show", *["--all"] * every, *(names or []), "--format markdown"])
        sys.stdout.buffer.write(authoring.markdown(found, command).encode())
        return 0
    rows = [authoring.row(rule) for section in found for rule in section.rules]
    columns = [name for name in authoring.COLUMNS if output is not RulesFormat.TABLE or any(row[name] for row in rows)]
    _print(Format(output.value), rows, rows, title="Rules", columns=columns, empty="No rules.")
    return 0


@mappings_app.command("check")
def mappings_check(
    paths: Annotated[list[str] | None, typer.Argument(help="modules and overlays beside those in use")] = None,
    output: FormatOption = Format.TABLE,
) -> int:
    """Say whether the mapping can be used, or all that is wrong with it."""
    found = authoring.check(_offline(), paths or [])
    _print(output, found, [{**found, "modules": ", ".join(found["modules"])}], title="The mapping can be used")
    return 0


@mappings_app.command("test")
def mappings_test(
    path: Annotated[
        str, typer.Argument(help="a module or an overlay; its cases are in the folder NAME.cases beside it")
    ],
    update: Annotated[bool, typer.Option("--update", help="write what new and differing cases give now")] = False,
    show_values: ShowValues = False,
) -> int:
    """Map the NAME.dicom.json of its cases, and compare with their NAME.fhir.json."""
    tried = authoring.cases(_offline(), path, update=update)
    for case in tried:
        lines = [f"{case.verdict} {case.name}"]
        for place, what, wanted, found in case.differences:
            pair = (("expected", wanted), ("found", found)) if show_values else ()
            told = [f"{name} {decimals.dumps(value).decode()}" for name, value in pair if value is not None]
            lines.append(f"  {place}: {what}" + f" ({', '.join(told)})" * bool(told))
        sys.stdout.write("\n".join(lines) + "\n")
        _say_unmapped(case.unmapped)
    failed = sum(case.verdict == "fail" for case in tried)
    if failed:
        _say(f"{failed} of {len(tried)} failed. Where what they give now is right, --update writes it.")
    return 1 if failed else 0


def _offline() -> settings.Settings:
    return _settings(unused=("dicom", "fhir"))


def _rules() -> mapping.Mapping:
    return authoring.rules(_offline())


# The database ---------------------------------------------------------------------------------------------------------


@db_app.command("upgrade")
def db_upgrade() -> int:
    """Bring the database's schema up to this version."""
    before, after = verbs.upgrade(_offline())
    _say(f"The schema is at {after}." if before == after else f"The schema went from {before or 'nothing'} to {after}.")
    return 0


@db_app.command("current")
def db_current(output: FormatOption = Format.TABLE) -> int:
    """Show the schema's revision, and the one that this version needs."""
    current, newest = verbs.revision(_offline())
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
        sys.stdout.write(decimals.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")
    elif output is Format.CSV:
        writer = csv.DictWriter(sys.stdout, fieldnames=names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({name: _cell(row[name]) for name in names} for row in rows)
    elif not rows:
        _stdout().print(empty)
    elif len(rows) == 1 and not columns:
        table = rich.table.Table(title=title, show_header=False, title_justify="left")
        for name in names:
            table.add_row(name.replace("_", " "), rich.text.Text(_cell(rows[0][name])))
        _stdout().print(table)
    else:
        table = rich.table.Table(title=title, title_justify="left")
        for name in names:
            table.add_column(name.replace("_", " "), overflow="fold")  # a UID that is cut is of no use
        for row in rows:
            table.add_row(*(rich.text.Text(_cell(row[name])) for name in names))  # not as markup
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
