"""Reports on one feed from the state database, and the views that others may read it by.

Every report is answered in seconds from a database with a million studies (`bench/state.py`). What a report shows are
UIDs, names, counts and times; no attribute value is in the database.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from dicomcast.state import store, tables

DAYS = 30
"""How far back reports on a period go where nobody says otherwise."""
SLOWEST = 20
"""Flushes that `slowest` shows where nobody says otherwise."""
_BY_THE_HOUR = timedelta(days=2)
"""The longest period that is shown by the hour."""
_HOUR, _DAY = 3_600, 86_400
_SHARES = (50, 95, 99)
"""Per cent of the flushes, for the steps that so many of them did not exceed."""
_BEYOND = store.lag_within(math.inf)
_OUTCOMES = ("created", "updated", "unchanged", "deleted", "failed")


@dataclass(frozen=True, slots=True)
class _Question:
    """What a report is asked. `since` is None where the report has no period and nobody gave one."""

    connection: sa.Connection
    feed_id: int
    now: datetime
    since: datetime | None
    digest: str | None
    limit: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """What may be known of a report: a line about it, its columns with their meaning, and which rows `since` leaves.

    `since` is None where rows have no time. `period`: the last `DAYS` days, unless told otherwise. `ranked`: what
    weighs most comes first, and a limit may cut off the rest.
    """

    about: str
    since: str | None
    columns: dict[str, str]
    answer: Callable[[_Question], Iterable[Sequence[Any]]]
    period: bool = False
    ranked: bool = False


def report(
    opened: store.Store,
    feed_id: int,
    name: str,
    *,
    now: datetime,
    since: datetime | None = None,
    digest: str | None = None,
    limit: int | None = None,
) -> list[store.Row]:
    """The rows of a report of `REPORTS`, by the names of its columns; times are UTC-aware.

    `digest`: of the present mapping, which `outdated` needs. `limit`: most rows of a ranked report.
    """
    asked = REPORTS[name]
    if asked.period and since is None:
        since = now - timedelta(days=DAYS)
    with opened.transaction() as connection:
        if connection.dialect.name == "sqlite":
            # By the page, tens of thousands of studies of a file that nobody has read lately take seconds.
            connection.exec_driver_sql("PRAGMA mmap_size = 2147418112")
        rows = list(asked.answer(_Question(connection, feed_id, now, since, digest, limit)))
    return [dict(zip(asked.columns, row, strict=True)) for row in (rows[:limit] if asked.ranked else rows)]


# Periods --------------------------------------------------------------------------------------------------------------


def _step(question: _Question) -> int:
    """Seconds of the periods that are shown."""
    assert question.since is not None
    return _HOUR if question.now - question.since <= _BY_THE_HOUR else _DAY


def _by_period(question: _Question, step: int, *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
    """From the roll-up by the hour: number of the period since 1970, then these columns; whole periods only."""
    table = tables.flush_hour
    assert question.since is not None
    first = _beginning(int(question.since.timestamp()) // step, step)
    number = (sa.cast(sa.extract("epoch", table.c.hour), sa.BigInteger) // step).label("number")
    return sa.select(number, *columns).where(table.c.feed_id == question.feed_id, table.c.hour >= first)


def _beginning(number: int, step: int) -> datetime:
    return datetime.fromtimestamp(number * step, UTC)


def _throughput(question: _Question) -> Iterable[Sequence[Any]]:
    table, step = tables.flush_hour, _step(question)
    sums = [sa.func.sum(column) for column in (table.c.flushes, table.c.entries, table.c.seconds)]
    query = _by_period(question, step, table.c.outcome, *sums).group_by("number", table.c.outcome)
    found: dict[int, dict[str, tuple[int, int, float]]] = defaultdict(dict)
    for number, outcome, flushes, entries, seconds in question.connection.execute(query):
        found[number][outcome] = (int(flushes), int(entries), seconds)
    for number, by_outcome in sorted(found.items()):
        flushes, entries, seconds = map(sum, zip(*by_outcome.values(), strict=True))
        counts = [by_outcome.get(outcome, (0,))[0] for outcome in _OUTCOMES]
        yield _beginning(number, step), flushes, entries, *counts, round(seconds, 3)


def _latency(question: _Question) -> Iterable[Sequence[Any]]:
    table, step = tables.flush_hour, _step(question)
    sums = [sa.func.sum(table.c.flushes), sa.func.sum(table.c.lag_seconds), sa.func.max(table.c.longest_lag)]
    query = _by_period(question, step, table.c.lag_within, *sums).where(table.c.lag_within > 0)
    found: dict[int, list[tuple[int, int, float, float]]] = defaultdict(list)
    for number, within, flushes, seconds, longest in question.connection.execute(
        query.group_by("number", table.c.lag_within)
    ):
        found[number].append((within, int(flushes), seconds, longest))
    for number, steps in sorted(found.items()):
        flushes, longest = sum(one[1] for one in steps), max(one[3] for one in steps)
        counts = sorted((one[0], one[1]) for one in steps)
        shares = [_within(counts, math.ceil(flushes * share / 100), longest) for share in _SHARES]
        mean = round(sum(one[2] for one in steps) / flushes, 3)
        yield _beginning(number, step), flushes, mean, *shares, round(longest, 3)


def _within(counts: Iterable[tuple[int, int]], rank: int, longest: float) -> float:
    """The step within which so many lags are; beyond the last step all that is known is the longest lag."""
    for step, flushes in counts:
        rank -= flushes
        if rank <= 0:
            return step if step < _BEYOND else round(longest, 3)
    raise AssertionError("there are fewer lags than the rank")


def _slowest(question: _Question) -> Iterable[Sequence[Any]]:
    table = tables.flush
    assert question.since is not None
    in_period = (table.c.feed_id == question.feed_id, table.c.at >= question.since, table.c.lag_seconds.is_not(None))
    # The ids first, from the index alone: of a short period few of the longest lags are.
    ids = sa.select(table.c.id).where(*in_period).order_by(table.c.lag_seconds.desc()).limit(question.limit or SLOWEST)
    columns = [table.c[name] for name in REPORTS["slowest"].columns]
    query = sa.select(*columns).where(table.c.id.in_(ids)).order_by(table.c.lag_seconds.desc(), table.c.id)
    for *others, seconds, lag_seconds in question.connection.execute(query):
        yield *others, round(seconds, 3), round(lag_seconds, 3)


# The state as it is ---------------------------------------------------------------------------------------------------


def _failures(question: _Question) -> Iterable[Sequence[Any]]:
    table, study = tables.failure, tables.study
    met = [table.c.last_seen >= question.since] if question.since is not None else []
    of_study = sa.and_(study.c.feed_id == table.c.feed_id, study.c.study_instance_uid == table.c.study_instance_uid)
    groups = (table.c.kind, table.c.stage, table.c.rule, table.c.tag, study.c.modality, table.c.status)
    counts = (sa.func.count(), sa.func.sum(table.c.instances), sa.func.count(table.c.study_instance_uid.distinct()))
    times = (sa.func.min(table.c.first_seen), sa.func.max(table.c.last_seen), sa.func.min(table.c.next_retry))
    query = (
        sa.select(*groups, *counts, *times)
        .select_from(table.outerjoin(study, of_study))
        .where(
            table.c.feed_id == question.feed_id,
            table.c.status.in_(store.ATTENTION),
            *met,
        )
        .group_by(*groups)
    )
    return sorted(map(tuple, question.connection.execute(query)), key=lambda row: (-row[6], _text(row[:6])))


def _coverage(question: _Question) -> Iterable[Sequence[Any]]:
    table = tables.study
    groups = (table.c.month, table.c.modality, table.c.outcome)
    query = sa.select(*groups, sa.func.count()).where(table.c.feed_id == question.feed_id).group_by(*groups)
    if question.since is not None:
        query = query.where(table.c.month >= f"{question.since.astimezone(UTC):%Y-%m}")
    return sorted(map(tuple, question.connection.execute(query)), key=lambda row: _text(row[:3]))


def _outdated(question: _Question) -> Iterable[Sequence[Any]]:
    table = tables.study
    assert question.digest is not None
    times = (sa.func.min(table.c.synced_at), sa.func.max(table.c.synced_at))
    query = sa.select(table.c.mapping_digest, sa.func.count(), *times).where(
        table.c.feed_id == question.feed_id,
        table.c.outcome == "synced",
        table.c.mapping_digest != question.digest,
    )
    if question.since is not None:
        query = query.where(table.c.synced_at >= question.since)
    found = question.connection.execute(query.group_by(table.c.mapping_digest))
    return sorted(map(tuple, found), key=lambda row: (-row[1], row[0]))


def _issues(question: _Question) -> Iterable[Sequence[Any]]:
    table = tables.issue
    groups = (table.c.rule, table.c.tag, table.c.vr, table.c.reason)
    # One row for each study and group: the table's key.
    query = sa.select(*groups, sa.func.sum(table.c.count), sa.func.count()).where(table.c.feed_id == question.feed_id)
    found = question.connection.execute(query.group_by(*groups))
    return sorted(map(tuple, found), key=lambda row: (-row[4], _text(row[:4])))


def _text(names: Iterable[str | None]) -> list[str]:
    """To sort by, alike on all databases: what is absent comes first."""
    return [name or "" for name in names]


# What there is --------------------------------------------------------------------------------------------------------

_START = "beginning of the hour (period of at most two days) or the day, UTC; those without a flush are left out"
_WHOLE = "from the beginning of the hour (at most two days ago) or the day that it lies in"

REPORTS: dict[str, Report] = {
    "throughput": Report(
        "how many studies were settled, by the day or the hour, and how that came out",
        _WHOLE,
        {
            "start": _START,
            "flushes": "settlings of a study",
            "entries": "change feed entries that they settled",
            "created": "of the flushes, those that made an ImagingStudy",
            "updated": "those that changed one",
            "unchanged": "those that found nothing to change",
            "deleted": "those that took one out of FHIR",
            "failed": "those that ended in a failure",
            "seconds": "time that the flushes took, added up although many go on at once",
        },
        _throughput,
        period=True,
    ),
    "latency": Report(
        "how long entries took from the change feed to FHIR, by the day or the hour",
        _WHOLE,
        {
            "start": _START,
            "flushes": "settlings of a study that had an entry of the feed",
            "mean_seconds": "mean of their lags: from a flush's oldest entry in the feed to its effect in FHIR",
            "p50_within": "seconds that half of the lags did not exceed, in steps: 1, 2, 5, 10, ..., a day, a week",
            "p95_within": "the same for 95 %; beyond the last step the longest lag",
            "p99_within": "the same for 99 %",
            "longest_seconds": "the longest lag",
        },
        _latency,
        period=True,
    ),
    "failures": Report(
        "what fails, by kind, place in the mapping and modality; the most rows first",
        "those that were met since then",
        {
            "kind": "kind of the failure",
            "stage": "read, map, validate, write",
            "rule": "mapping rule",
            "tag": "DICOM tag",
            "modality": "modalities of the study, where it is known",
            "status": "open, retrying",
            "rows": "failures",
            "instances": "instances that they are about; of a study or an entry 1",
            "studies": "studies that they are about",
            "first_seen": "when the oldest of them was met first",
            "last_seen": "when one of them was met last",
            "next_retry": "when the first of them is tried again",
        },
        _failures,
        ranked=True,
    ),
    "coverage": Report(
        "how many studies there are, by month, modality and outcome",
        "months from the one that it lies in",
        {
            "month": "YYYY-MM in UTC in which the feed recorded the study's first change",
            "modality": "modalities of its series, sorted, / between",
            "outcome": "synced, failed, deleted, cancelled, shared",
            "studies": "how many",
        },
        _coverage,
    ),
    "outdated": Report(
        "studies that another mapping than the present one has written, by its digest; the most first",
        "those that were settled since then",
        {
            "mapping_digest": "of the mapping that wrote them; in tables its first 12 characters",
            "studies": "how many",
            "oldest_synced_at": "when the first of them was settled",
            "newest_synced_at": "when the last of them was settled",
        },
        _outdated,
        ranked=True,
    ),
    "issues": Report(
        "what was left out or guessed, by rule, tag and reason; the most instances first",
        None,
        {
            "rule": "mapping rule",
            "tag": "DICOM tag",
            "vr": "value representation",
            "reason": "why",
            "instances": "instances that have it",
            "studies": "studies that have it",
        },
        _issues,
        ranked=True,
    ),
    "slowest": Report(
        f"the {SLOWEST} flushes with the longest lag",
        "those since then",
        {
            "study_instance_uid": "Study Instance UID",
            "at": "when the study was settled",
            "road": "fold, reconcile",
            "reason": "why it was reconciled",
            "outcome": "created, updated, unchanged, deleted, failed",
            "entries": "change feed entries that this settled",
            "seconds": "time that the flush took",
            "lag_seconds": "from the oldest of these entries in the feed to its effect in FHIR",
        },
        _slowest,
        period=True,
        ranked=True,
    ),
}
"""By name, in the order of the documentation."""


def _of(table: sa.Table, *names: str) -> list[sa.Column[Any]]:
    return [table.c[name] for name in names]


_FEED: sa.Column[str] = sa.Column("feed", sa.String(512), nullable=False, comment=tables.feed.c.name.comment)

VIEWS: dict[str, tuple[str, list[sa.Column[Any]]]] = {
    "v_study": (
        "studies, and how many failures of each are not over",
        [
            _FEED,
            *_of(tables.study, "study_instance_uid", "outcome", "modality", "month", "series", "instances"),
            *_of(tables.study, "imaging_study", "version", "patient", "first_sequence", "last_sequence"),
            *_of(tables.study, "mapping_digest", "synced_at"),
            sa.Column("failures", sa.BigInteger, nullable=False, comment="rows of it that are open or retrying"),
        ],
    ),
    "v_failure": (
        "what failed, open and over, with the study's modality",
        [
            _FEED,
            *_of(tables.failure, "id", "status", "kind", "stage", "study_instance_uid", "series_instance_uid"),
            *_of(tables.failure, "sop_instance_uid", "sequence", "rule", "tag", "message", "instances", "attempts"),
            *_of(tables.failure, "first_seen", "last_seen", "next_retry", "resolution", "note"),
            *_of(tables.study, "modality"),
        ],
    ),
    "v_flush": (
        "settlings of studies, summed up by the hour",
        [
            _FEED,
            *_of(tables.flush_hour, "hour", "road", "outcome", "lag_within", "flushes", "entries", "seconds"),
            *_of(tables.flush_hour, "lag_seconds", "longest_lag"),
        ],
    ),
    "v_lag": (
        "where each feed stands",
        [
            _FEED,
            *_of(tables.feed, "url", "watermark", "latest"),
            sa.Column("lag_entries", sa.BigInteger, comment="sequences from the watermark to the highest"),
            *_of(tables.feed, "current_at", "seen_at", "trouble", "lease_owner", "lease_until"),
            sa.Column("gaps", sa.BigInteger, nullable=False, comment="sequences that may still come"),
        ],
    ),
}
"""What each is about, and its columns, in order. The migrations make them."""
