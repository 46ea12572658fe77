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
from datetime import UTC, date, datetime
from enum import StrEnum
from functools import partial
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
from dicomcast import authoring, decimals, errors, mapping, operations, reporting, settings
from dicomcast.dicom import values
from dicomcast.state import operators, reports

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
db_app = typer.Typer(help="The state database: its schema, and what may go.", no_args_is_help=True)
state_app = typer.Typer(help="Where the change feed is: show, set and move it.", no_args_is_help=True)
work_app = typer.Typer(help="Jobs of replay, verify and backfill that are not done with.", no_args_is_help=True)
app.add_typer(failures_app, name="failures")
app.add_typer(mappings_app, name="mappings")
app.add_typer(db_app, name="db")
app.add_typer(state_app, name="state")
app.add_typer(work_app, name="work")


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
        _say("That can't be done as it is asked for or configured:", *(f"  {problem}" for problem in wrong.problems))
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
    max_lag: Annotated[
        str | None, typer.Option("--max-lag", help="15m: exit code 1 where the worker is further behind than that")
    ] = None,
    output: FormatOption = Format.TABLE,
) -> int:
    """Where the feed stands, or what became of one study."""
    longest = _duration(max_lag, "--max-lag") if max_lag is not None else None
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
        **{f"job {job['id']}": _cell([job["verb"], f"{job['left']} left", job["held"]]) for job in now["jobs"]},
        **{f"lease {name}": value for name, value in now["lease"].items()},
    }
    _print(output, now, [flat], title="Status")
    lag = now["feed"]["lag_seconds"]
    if longest is not None and (lag is None or lag > longest):
        _say("The feed was never read." if lag is None else f"The worker is {lag:.0f} s behind.")
        return 1
    return 0


_FAILURE_COLUMNS = (
    *("id", "status", "kind", "sequence", "study_instance_uid", "sop_instance_uid", "instances"),
    *("rule", "tag", "message"),
)


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


@failures_app.command("summary")
def failures_summary(output: FormatOption = Format.TABLE) -> int:
    """Count failures that are not over, by kind, and say what to do about them."""
    rows = verbs.failures_summary(_settings(unused=("fhir",)))
    _print(output, rows, rows, title="Failures", columns=tuple(rows[0]) if rows else (), empty="No failures.")
    return 0


@failures_app.command("show")
def failures_show(
    failure: Annotated[int, typer.Argument(help="id of the failure")], output: FormatOption = Format.TABLE
) -> int:
    """Show all that is known of one failure."""
    rows = verbs.failures(_settings(unused=("fhir",)), failure_id=failure)
    if not rows:
        _say(f"There is no failure {failure}.")
        return 1
    _print(output, rows[0], [{**rows[0], "to_do": errors.kind(rows[0]["kind"]).to_do}], title=f"Failure {failure}")
    return 0


@failures_app.command("dismiss")
def failures_dismiss(
    reason: Annotated[str, typer.Option(help="why nobody will mend it; no patient data")],
    ids: Annotated[list[int] | None, typer.Option("--id", help="id of a failure; may be repeated")] = None,
    kind: Annotated[str | None, typer.Option(help="all of this kind")] = None,
    study: Annotated[str | None, typer.Option(help="all of this Study Instance UID")] = None,
) -> int:
    """Close failures that nobody will mend. They stay closed while they fail for the same reason."""
    if not (ids or kind or study):
        raise typer.BadParameter("say which: --id, --kind or --study")
    if not reason.strip():
        raise typer.BadParameter("must say something", param_hint="--reason")
    options = _settings(unused=("fhir",))
    gone = operations.dismiss(options, ids=ids or (), kind=kind, study_uid=study, reason=reason)
    _say(f"{len(gone)} dismissed.")
    return 0 if gone else 1


# Repair ---------------------------------------------------------------------------------------------------------------

Rate = Annotated[float | None, typer.Option(min=0.01, help="studies a second at most")]
AllowDeletes = Annotated[
    int | None,
    typer.Option("--allow-deletes", min=0, help="studies that may be taken out of FHIR; default: 20, or 5 %"),
]
Since = Annotated[str | None, typer.Option(help="30d, 12h, or a date or time")]


@app.command()
def replay(
    *,
    ids: Annotated[list[int] | None, typer.Option("--id", help="id of a failure; may be repeated")] = None,
    study: Annotated[list[str] | None, typer.Option(help="a Study Instance UID; may be repeated")] = None,
    series: Annotated[list[str] | None, typer.Option(help="a Series Instance UID; may be repeated")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="studies with failures of this kind; may be repeated")] = None,
    since: Annotated[str | None, typer.Option(help="studies with failures seen since: 30d, 12h, or a date")] = None,
    every: Annotated[bool, typer.Option("--all", help="all studies with failures that are not over")] = False,
    outdated: Annotated[bool, typer.Option("--outdated", help="studies that another mapping has written")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would change, and change nothing")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="no more studies than that")] = None,
    rate: Rate = None,
    allow_deletes: AllowDeletes = None,
    output: FormatOption = Format.TABLE,
) -> int:
    """Read studies anew from the DICOM service and put FHIR right."""
    if not (ids or study or series or kind or since or every or outdated):
        raise typer.BadParameter("say which: --id, --study, --series, --kind, --since, --all or --outdated")
    _moment(since)
    _uids(study, "--study")
    _uids(series, "--series")
    selection = operations.Selection(
        ids=tuple(ids or ()),
        studies=tuple(study or ()),
        series=tuple(series or ()),
        kinds=tuple(kind or ()),
        since=since,
        everything=every,
        outdated=outdated,
        limit=limit,
    )
    limits = operations.Limits(per_second=rate, allow_deletes=allow_deletes)
    return _job(partial(operations.replay, selection=selection, limits=limits, dry_run=dry_run), output, title="Replay")


@app.command()
def verify(
    *,
    study: Annotated[list[str] | None, typer.Option(help="a Study Instance UID; may be repeated")] = None,
    since: Annotated[str | None, typer.Option(help="studies that changed since: 30d, 12h, or a date")] = None,
    every: Annotated[bool, typer.Option("--all", help="all studies of either service")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="reconcile what differs")] = False,
    rate: Rate = None,
    allow_deletes: AllowDeletes = None,
    output: FormatOption = Format.TABLE,
) -> int:
    """Compare the DICOM service, the FHIR service and the database."""
    if [bool(study), bool(since), every].count(True) != 1:
        raise typer.BadParameter("say one of --study, --since and --all")
    _moment(since)
    _uids(study, "--study")
    limits = operations.Limits(per_second=rate, allow_deletes=allow_deletes)
    return _job(
        partial(operations.verify, limits=limits, studies=study or (), since=since, repair=repair),
        output,
        title="Verify",
        worker_helps=False,
    )


@app.command()
def backfill(
    *,
    first: Annotated[str | None, typer.Option("--from", help="studies of this StudyDate (YYYY-MM-DD) or later")] = None,
    last: Annotated[str | None, typer.Option("--to", help="up to this StudyDate; default: today")] = None,
    file: Annotated[Path | None, typer.Option("--studies-file", help="Study Instance UIDs, one a line")] = None,
    every: Annotated[bool, typer.Option("--all", help="all studies that the DICOM service has")] = False,
    rate: Rate = None,
    allow_deletes: AllowDeletes = None,
    output: FormatOption = Format.TABLE,
) -> int:
    """Bring studies into FHIR that the change feed does not tell of."""
    if [bool(first or last), bool(file), every].count(True) != 1 or (last and not first):
        raise typer.BadParameter("say one of --from (with --to), --studies-file and --all")
    dates = (_day(first, "--from"), _day(last, "--to") if last else None) if first else None
    if dates and dates[1] and dates[0] > dates[1]:
        raise typer.BadParameter("is before --from", param_hint="--to")
    limits = operations.Limits(per_second=rate, allow_deletes=allow_deletes)
    named = operations.named_in(file) if file is not None else None
    return _job(partial(operations.backfill, limits=limits, dates=dates, named=named), output, title="Backfill")


def _job(verb: Any, output: Format, *, title: str, worker_helps: bool = True) -> int:
    """Run a verb of `operations`, show what it did, and say how it ended.

    `worker_helps`: what it leaves undone, a worker does too.
    """
    options = _settings(to_sync=True)
    with _progress(title) as progress:
        done = asyncio.run(operations.at_desk(options, verb, progress=progress))
    counts = {name: value for name, value in done.document.items() if not isinstance(value, list)}
    if output is Format.JSON:
        _print(output, done.document, [], title=title)
    elif output is Format.CSV and done.rows:
        _print(output, None, done.rows, title=title, columns=_names(done.rows))
    else:
        if done.rows:
            _print(output, None, done.rows, title="Studies", columns=_names(done.rows))
        if counts:
            _print(output, None, [counts], title=title)
    if done.stopped:
        others = ", and so does a worker" if worker_helps else ""
        _say(f"Stopped. The same command goes on where it was{others}.")
        return 128 + done.stopped
    return 1 if done.amiss else 0


def _names(rows: Sequence[dict[str, Json]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


@work_app.command("list")
def work_list(output: FormatOption = Format.TABLE) -> int:
    """List jobs that still wait for a worker."""
    rows = operations.unfinished(_settings(unused=("fhir",)))
    columns = ("id", "verb", "scope", "requested_by", "requested_at", "listed_at", "left", "held")
    _print(output, rows, rows, title="Jobs", columns=columns, empty="No work waits.")
    return 0


@work_app.command("cancel")
def work_cancel(job: Annotated[int, typer.Argument(help="id of the job")]) -> int:
    """Give up what a job still waits for. What it has done stays done."""
    given_up = operations.cancel(_settings(unused=("fhir",)), job)
    _say(f"No job {job} waits." if given_up is None else f"{given_up} studies are not waited for any more.")
    return 1 if given_up is None else 0


@state_app.command("show")
def state_show(output: FormatOption = Format.TABLE) -> int:
    """Show where the change feed is."""
    options = _settings(unused=("fhir",))
    found = operations.position(options)
    document = found.model_dump() if found else {"feed": options.feed_name, "watermark": None}
    _print(output, document, [document], title="Position")
    return 0


@state_app.command("set")
def state_set(
    watermark: Annotated[int, typer.Option(min=0, help="entries above this sequence are read next")],
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> int:
    """Put the change feed to another sequence. Stop the worker first."""
    options = _settings(unused=("fhir",))
    newest = operations.newest(options, watermark, "--watermark")
    before = _position(options)
    wanted = operators.Position(
        feed=options.feed_name,
        url=options.dicom.url,
        first=min(before.first if before else watermark, watermark),
        watermark=watermark,
        latest=newest if newest is not None else max(before.latest if before else 0, watermark),
        gaps=[one for one in before.gaps if one <= watermark] if before else [],
    )
    _confirm_move(options, before, watermark, yes=yes)
    operations.set_position(options, wanted, action="state set")
    _say(f"The feed is at {watermark}.")
    return 0


@state_app.command("export")
def state_export() -> int:
    """Print the change feed's position as JSON, for `state import`."""
    found = operations.position(_settings(unused=("fhir",)))
    if found is None:
        _say("The feed was never begun: there is no position.")
        return 1
    sys.stdout.write(found.model_dump_json(indent=2) + "\n")
    return 0


@state_app.command("import")
def state_import(
    file: Annotated[str, typer.Argument(help="what `state export` printed, or - for stdin")],
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> int:
    """Take over a position that `state export` printed, of this feed. Stop the worker first."""
    options = _settings(unused=("fhir",))
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as unreadable:
        raise errors.Misconfigured([f"{file}: can't be read ({type(unreadable).__name__})"]) from None
    wanted = operators.read_exported(text)
    if wanted.feed != options.feed_name:
        message = f"the position is of the feed {wanted.feed}, this one is {options.feed_name} (dicom.feed)"
        raise errors.Misconfigured([message])
    operations.newest(options, wanted.watermark, "watermark")
    _confirm_move(options, _position(options), wanted.watermark, yes=yes)
    operations.set_position(options, wanted, action="state import")
    _say(f"The feed is at {wanted.watermark}.")
    return 0


@state_app.command("audit")
def state_audit(
    limit: Annotated[int, typer.Option(min=1, help="so many")] = 50, output: FormatOption = Format.TABLE
) -> int:
    """Show what operators did, the latest first."""
    rows = operations.audited(_settings(unused=("fhir",)), limit=limit)
    _print(output, rows, rows, title="Audit", columns=("at", "who", "action", "detail"))
    return 0


def _position(options: settings.Settings) -> operators.Position | None:
    """Where the feed is, as far as that can be read."""
    try:
        return operations.position(options)
    except errors.Incompatible as unreadable:
        _say(str(unreadable))
        return None


def _confirm_move(options: settings.Settings, before: operators.Position | None, watermark: int, *, yes: bool) -> None:
    """Say what a new position means, and ask, unless told not to; nobody there to be asked is a usage error."""
    what = f"be taken up at {watermark}"
    if before is not None:
        at = before.watermark
        what = f"read {watermark + 1} to {at} again" if watermark < at else f"skip {at + 1} to {watermark}"
    _say(f"The feed {options.feed_name} is to {what}.")
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("say --yes where nobody can be asked", param_hint="--yes")
    if not typer.confirm("Go on?", err=True):
        raise typer.Exit(1)


def _moment(text: str | None, option: str = "--since") -> datetime | None:
    try:
        return settings.moment(text, datetime.now(UTC)) if text is not None else None
    except ValueError as wrong:
        raise typer.BadParameter(str(wrong), param_hint=option) from None


def _duration(text: str, option: str) -> float:
    try:
        return settings.duration(text)
    except ValueError as wrong:
        raise typer.BadParameter(str(wrong), param_hint=option) from None


def _day(text: str, option: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("must be a date such as 2026-01-31", param_hint=option) from None


def _uids(texts: Sequence[str] | None, option: str) -> None:
    for text in texts or ():
        if not values.is_uid(text):
            raise typer.BadParameter(f"{text} is no UID", param_hint=option)


@app.command(help=f"Report from sync state: NAME is one of these.\n\n\b\n{reporting.overview()}")
def report(
    name: Annotated[str, typer.Argument(metavar="NAME", help="one of the above")],
    since: Annotated[str | None, typer.Option(help="30d, 12h, or a date; default: 30 days, or all there is")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="most rows; of failures, outdated, issues, slowest")] = None,
    output: FormatOption = Format.TABLE,
) -> int:
    """Report from sync state."""
    begin, asked = _moment(since), reports.REPORTS.get(name)
    if asked is None:
        raise typer.BadParameter(f"{name} is none of {', '.join(reports.REPORTS)}", param_hint="NAME")
    if begin and asked.since is None:
        raise typer.BadParameter(f"{name} have no time", param_hint="--since")
    if limit is not None and not asked.ranked:
        raise typer.BadParameter(f"{name} shows all of its rows", param_hint="--limit")
    found = reporting.report(_settings(unused=("fhir",)), name, since=begin, limit=limit)
    rows = reporting.shortened(found) if output is Format.TABLE else found
    _print(output, found, rows, title=f"{name.capitalize()} (UTC)", columns=tuple(asked.columns))
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


@db_app.command("show")
def db_show(
    output: Annotated[
        RulesFormat, typer.Option("--format", help="table for people; json and csv for programs; markdown to publish")
    ] = RulesFormat.TABLE,
) -> int:
    """Show what is in the database: views and tables, their columns and what they mean."""
    if output is RulesFormat.MARKDOWN:
        sys.stdout.buffer.write(reporting.schema_markdown().encode())
        return 0
    rows = reporting.schema()
    _print(Format(output.value), rows, rows, title="State database", columns=tuple(rows[0]))
    return 0


@db_app.command("prune")
def db_prune(
    older_than: Annotated[str, typer.Option("--older-than", help="90d, 2w, or a date")],
) -> int:
    """Remove what has long been over: flushes (their hourly sums stay), resolved failures, finished work."""
    before = _moment(older_than, "--older-than")
    assert before is not None
    gone = operations.prune(_settings(unused=("fhir",)), before=before)
    _say("Removed: " + ", ".join(f"{count} rows of {name}" for name, count in gone.items()) + ".")
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
        writer.writerows({name: _cell(row.get(name)) for name in names} for row in rows)
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
            table.add_row(*(rich.text.Text(_cell(row.get(name))) for name in names))  # not as markup
        _stdout().print(table)


def _cell(value: Json) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if isinstance(value, list | tuple):
        return ", ".join(_cell(one) for one in value if one is not None)
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
