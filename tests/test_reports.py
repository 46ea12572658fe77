"""Reports and views of a small history, on SQLite and PostgreSQL alike, row by row; and their documentation."""

import contextlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import stack
import virtual

from dicomcast import app, errors, reporting, settings
from dicomcast.state import reports, store, tables

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "state.md"
FEED = "http://dicom.test"
NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
OLD, NEW = "a" * 64, "b" * 64
Rows = list[dict[str, Any]]


def at(text: str) -> datetime:
    """`31 10:05` of January 2026, or a whole date and time; UTC."""
    return datetime.fromisoformat(text if len(text) > 10 else f"2026-01-{text}").replace(tzinfo=UTC)


def a_flush(when: str, outcome: str = "created", lag: float | None = 0.5, **changes: Any) -> store.Flush:
    flush = store.Flush("1.2.3", at(when), "fold", None, outcome, entries=10, seconds=0.25, lag_seconds=lag)
    return replace(flush, **changes)


def a_study(uid: str, **changes: Any) -> store.Study:
    study = store.Study(
        study_instance_uid=uid,
        outcome="synced",
        imaging_study="s1",
        version="3",
        patient="p1",
        series=2,
        instances=40,
        first_sequence=1,
        last_sequence=41,
        mapping_digest=NEW,
        synced_at=at("31 11:00"),
        modality="CT",
        month="2026-01",
    )
    return replace(study, **changes)


def a_failure(uid: str | None = "1.1", **changes: Any) -> store.Failure:
    failure = store.Failure("value-invalid", "map", "m", uid, sequence=7, rule="study.started", tag="00080020")
    return replace(failure, **changes)


FLUSHES = [
    a_flush("2025-12-31 23:59", entries=1000),
    a_flush("01 00:00", "updated", lag=3, road="reconcile", reason="update"),
    a_flush("30 20:00", "unchanged", lag=None, entries=0, road="reconcile", reason="retry"),
    a_flush("31 10:20", "failed", lag=700_000.125, study_instance_uid="1.2.4", seconds=2.5),
    a_flush("31 10:05", "deleted", lag=61, study_instance_uid="1.2.5", road="reconcile", reason="delete"),
    a_flush("31 11:10"),
    a_flush("31 11:50", lag=7),
]
STUDIES = [
    a_study("1.1", outcome="failed", mapping_digest=OLD),
    a_study("1.2", mapping_digest=OLD, synced_at=at("2025-11-02 08:00"), month="2025-11"),
    a_study("1.3", mapping_digest=OLD, synced_at=at("20 08:00"), month="2025-12", modality="MR/SR"),
    a_study("1.4"),
    a_study("1.5"),
    a_study("1.6", outcome="cancelled", modality=None, month=None),
]
DATE: store.IssueKey = ("study.started", "00080020", "DA", "not a date")
SIDE: store.IssueKey = ("series.laterality", "00200060", "CS", "instances disagree")


@dataclass(frozen=True)
class History:
    """All of the above, which happened to one feed and to another one too; for tests that only look."""

    state: store.Store
    feed_id: int
    url: str
    engine: sa.Engine  # a look past the store


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def history(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    with contextlib.ExitStack() as opened:
        url = f"sqlite:///{tmp_path_factory.mktemp('reports')}/state.db"
        if request.param == "postgres":
            url = opened.enter_context(stack.database(request.getfixturevalue("postgres_server")))
        clock = virtual.Clock(at("2025-12-20 12:00"))
        state = opened.enter_context(closing(store.Store(url, clock=clock)))
        state.open()
        engine = sa.create_engine(url)
        opened.callback(engine.dispose)
        yield History(state, happened(state, clock), url, engine)


@pytest.fixture
def state(database_url: str) -> Iterator[store.Store]:
    """An empty one."""
    with closing(store.Store(database_url, clock=virtual.Clock(NOW))) as opened:
        opened.open()
        yield opened


def happened(state: store.Store, clock: virtual.Clock) -> int:
    """Commit it from 20 December to 31 January; id of the feed."""
    leases = [state.acquire(feed, url=FEED, owner="a", seconds=20) for feed in ("other", FEED)]
    position = store.Position(0, 90, 100, None)
    place = {"series_instance_uid": "1.1.1", "sop_instance_uid": "1.1.1.1"}

    def commit(**effects: Any) -> None:
        for lease in leases:
            state.commit(lease, position, store.Effects(**effects))

    commit(studies={one.study_instance_uid: one for one in STUDIES}, flushes=FLUSHES[:3])
    commit(issues={"1.1": Counter({DATE: 3, SIDE: 1}), "1.4": Counter({DATE: 4}), "1.3": Counter({SIDE: 5})})
    commit(failures=[a_failure("1.4", kind="rejected", stage="write", rule=None, tag=None)])
    clock.advance(32 * 86_400)
    commit(failures=[a_failure(**place), a_failure("1.3", kind="conflict", stage="write", rule=None, heals=True)])
    commit(failures=[a_failure("1.2", kind="uid-missing")], missed={50: clock.now(), 60: clock.now()})
    clock.advance(10 * 86_400)
    commit(reconciled={"1.2": ("mapped", 9)}, flushes=FLUSHES[3:])
    unknown = a_failure(None, kind="malformed-entry", stage="read", rule=None, tag=None, sequence=8)
    busy = a_failure("1.3", kind="conflict", stage="write", rule=None, series_instance_uid="1.3.1", heals=True)
    commit(failures=[a_failure(**place), a_failure(sequence=8, instances=25), a_failure("9.9"), unknown, busy])
    return leases[1].feed_id


def flushed(state: store.Store, flushes: list[store.Flush]) -> int:
    """Commit no more than these; id of the feed."""
    lease = state.acquire(FEED, url=FEED, owner="a", seconds=20)
    state.commit(lease, store.Position(0, 0, 0, None), store.Effects(flushes=flushes))
    return lease.feed_id


def rows(history: History, name: str, **options: Any) -> Rows:
    return asked(history.state, history.feed_id, name, **options)


def asked(state: store.Store, feed_id: int, name: str, **options: Any) -> Rows:
    return reports.report(state, feed_id, name, **{"now": NOW, "digest": NEW, **options})


def values(found: Rows, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in found]


# Throughput and latency


def test_throughput_of_a_month_is_by_the_day_in_utc(history: History) -> None:
    names = reports.REPORTS["throughput"].columns
    expected = [
        (at("01 00:00"), 1, 10, 0, 1, 0, 0, 0, 0.25),
        (at("30 00:00"), 1, 0, 0, 0, 1, 0, 0, 0.25),
        (at("31 00:00"), 4, 40, 2, 0, 0, 1, 1, 3.25),
    ]

    assert rows(history, "throughput") == [dict(zip(names, row, strict=True)) for row in expected]


def test_throughput_of_two_days_is_by_the_hour(history: History) -> None:
    found = rows(history, "throughput", since=NOW - timedelta(days=2))

    assert values(found, "start", "flushes", "created", "deleted", "failed") == [
        (at("30 20:00"), 1, 0, 0, 0),
        (at("31 10:00"), 2, 0, 1, 1),
        (at("31 11:00"), 2, 2, 0, 0),
    ]
    assert len(rows(history, "throughput", since=NOW - timedelta(days=2, seconds=1))) == 2


@pytest.mark.parametrize(
    ("since", "starts"),
    [
        ("31 10:59", ["31 10:00", "31 11:00"]),
        ("31 11:00", ["31 11:00"]),
        ("2025-12-31 12:00", ["2025-12-31 00:00", "01 00:00", "30 00:00", "31 00:00"]),
    ],
)
def test_periods_are_whole_from_the_one_that_since_lies_in(history: History, since: str, starts: list[str]) -> None:
    found = rows(history, "throughput", since=at(since))

    assert [row["start"] for row in found] == [at(start) for start in starts]
    assert [row["start"].utcoffset() for row in found] == [timedelta(0)] * len(starts)


def test_latency_leaves_out_what_had_no_entry_and_shows_what_is_beyond_the_last_step(history: History) -> None:
    names = reports.REPORTS["latency"].columns
    longest = 700_000.125
    expected = [
        (at("01 00:00"), 1, 3.0, 5, 5, 5, 3.0),
        (at("31 00:00"), 4, round((longest + 61 + 0.5 + 7) / 4, 3), 10, longest, longest, longest),
    ]

    assert rows(history, "latency") == [dict(zip(names, row, strict=True)) for row in expected]
    assert values(rows(history, "latency", since=at("31 09:00")), "start", "flushes", "p50_within") == [
        (at("31 10:00"), 2, 120),
        (at("31 11:00"), 2, 1),
    ]


def test_so_many_lags_are_within_a_step(state: store.Store) -> None:
    cases: list[tuple[list[float], tuple[int, int, int]]] = [
        ([0.5] * 50 + [4] * 45 + [9] * 4 + [50], (1, 5, 10)),
        ([0.5] * 49 + [4] * 46 + [9] * 4 + [50], (5, 5, 10)),
        ([0.5] * 50 + [4] * 44 + [9] * 5 + [50], (1, 10, 10)),
        ([0.5] * 50 + [4] * 45 + [9] * 3 + [50] * 2, (1, 5, 60)),
        ([2.0], (2, 2, 2)),
        ([0.5, 4.0], (1, 5, 5)),
        ([7.0, 10.0], (10, 10, 10)),
    ]
    feed_id = flushed(
        state,
        [
            a_flush(
                f"{day} 10:00", "updated" if int(lag) % 2 else "created", lag
            )  # one step, several rows of the roll-up
            for day, (lags, _) in enumerate(cases, 10)
            for lag in lags
        ],
    )

    found = asked(state, feed_id, "latency")

    assert values(found, "p50_within", "p95_within", "p99_within") == [within for _, within in cases]
    assert values(found, "flushes", "longest_seconds") == [(len(lags), max(lags)) for lags, _ in cases]


def test_slowest_are_the_longest_lags_of_the_period(history: History) -> None:
    found = rows(history, "slowest")

    assert values(found, "study_instance_uid", "lag_seconds") == [
        ("1.2.4", 700_000.125),
        ("1.2.5", 61.0),
        ("1.2.3", 7.0),
        ("1.2.3", 0.5),
    ]
    assert found[1] == {
        "study_instance_uid": "1.2.5",
        "at": at("31 10:05"),
        "road": "reconcile",
        "reason": "delete",
        "outcome": "deleted",
        "entries": 10,
        "seconds": 0.25,
        "lag_seconds": 61.0,
    }
    assert values(rows(history, "slowest", limit=1), "lag_seconds") == [(700_000.125,)]
    assert values(rows(history, "slowest", since=at("31 10:06"), limit=2), "lag_seconds") == [
        (700_000.125,),
        (7.0,),
    ]
    assert values(rows(history, "slowest", since=at("2025-12-31 23:59")), "entries")[-2] == (1000,)


def test_twenty_are_the_slowest(state: store.Store) -> None:
    feed_id = flushed(state, [a_flush("31 10:00", lag=float(lag)) for lag in range(30)])

    assert values(asked(state, feed_id, "slowest"), "lag_seconds") == [(float(lag),) for lag in range(29, 9, -1)]
    assert len(asked(state, feed_id, "slowest", limit=25)) == 25


# What is wrong


def test_failures_that_are_not_over_are_counted_by_what_they_have_in_common(history: History) -> None:
    date = ("value-invalid", "map", "study.started", "00080020")
    long_ago, first, last = at("2025-12-20 12:00"), at("21 12:00"), at("31 12:00")
    expected = [
        ("conflict", "write", None, "00080020", "MR/SR", "retrying", 2, 2, 1, first, last, at("21 12:01")),
        (*date, "CT", "open", 2, 26, 1, first, last, None),
        ("malformed-entry", "read", None, None, None, "open", 1, 1, 0, last, last, None),
        ("rejected", "write", None, None, "CT", "open", 1, 1, 1, long_ago, long_ago, None),
        (*date, None, "open", 1, 1, 1, last, last, None),
    ]
    names = reports.REPORTS["failures"].columns

    assert rows(history, "failures") == [dict(zip(names, row, strict=True)) for row in expected]


def test_failures_are_those_met_since_then(history: History) -> None:
    def kinds(**options: Any) -> list[tuple[Any, ...]]:
        return values(rows(history, "failures", **options), "kind", "rows")

    once = [("malformed-entry", 1), ("value-invalid", 1)]
    assert kinds(since=at("21 12:00")) == [("conflict", 2), ("value-invalid", 2), *once]
    assert kinds(since=at("21 12:01")) == [("value-invalid", 2), ("conflict", 1), *once]
    assert kinds(since=at("2025-12-01 00:00"))[2:] == [once[0], ("rejected", 1), once[1]]
    assert kinds(limit=1) == [("conflict", 2)]


def test_issues_are_counted_by_instance_and_study_the_most_first(history: History) -> None:
    names = ("rule", "tag", "vr", "reason", "instances", "studies")
    expected = [dict(zip(names, (*DATE, 7, 2), strict=True)), dict(zip(names, (*SIDE, 6, 2), strict=True))]

    assert (expected, expected[:1]) == (rows(history, "issues"), rows(history, "issues", limit=1))


# What there is


def test_coverage_counts_studies_by_month_modality_and_outcome(history: History) -> None:
    names = ("month", "modality", "outcome", "studies")
    expected = [
        (None, None, "cancelled", 1),
        ("2025-11", "CT", "synced", 1),
        ("2025-12", "MR/SR", "synced", 1),
        ("2026-01", "CT", "failed", 1),
        ("2026-01", "CT", "synced", 2),
    ]

    assert rows(history, "coverage") == [dict(zip(names, row, strict=True)) for row in expected]
    for since in ("2025-12-01 00:00", "2025-12-31 23:00"):
        assert values(rows(history, "coverage", since=at(since)), *names) == expected[2:]


def test_month_of_since_is_that_of_utc(history: History) -> None:
    in_december = datetime.fromisoformat("2026-01-01T03:00:00+05:45")

    assert values(rows(history, "coverage", since=in_december), "month")[0] == ("2025-12",)


def test_outdated_are_synced_studies_of_another_mapping(history: History) -> None:
    old = {"mapping_digest": OLD, "oldest_synced_at": at("2025-11-02 08:00"), "newest_synced_at": at("20 08:00")}
    new = {"mapping_digest": NEW, "oldest_synced_at": at("31 11:00"), "newest_synced_at": at("31 11:00")}

    assert rows(history, "outdated") == [{**old, "studies": 2}]
    assert rows(history, "outdated", digest=OLD) == [{**new, "studies": 2}]
    assert rows(history, "outdated", digest="c" * 64) == [{**old, "studies": 2}, {**new, "studies": 2}]
    assert values(rows(history, "outdated", since=at("20 08:00")), "studies") == [(1,)]


# All of them


@pytest.mark.parametrize("name", reports.REPORTS)
def test_rows_have_the_documented_columns_in_order(history: History, name: str) -> None:
    found = rows(history, name)

    assert found
    assert {tuple(row) for row in found} == {tuple(reports.REPORTS[name].columns)}
    assert all(
        moment.utcoffset() == timedelta(0) for row in found for moment in row.values() if hasattr(moment, "hour")
    )
    json.dumps(found, default=datetime.isoformat)  # what else would be a number of the database's own


def test_a_feed_without_a_history_has_no_rows(history: History) -> None:
    lease = history.state.acquire("another", url=FEED, owner="a", seconds=20)

    assert [row for name in reports.REPORTS for row in asked(history.state, lease.feed_id, name)] == []


# The verb


def options(*, url: str, feed: str = FEED) -> settings.Settings:
    flags: dict[str, Any] = {"dicom": {"url": FEED, "feed": feed}, "fhir": {"url": FEED}, "database": {"url": url}}
    return settings.load(flags={**flags, "patient": {"system": "urn:oid:1.2.3.4"}})


def test_no_database_has_no_rows_and_is_not_made(tmp_path: Path) -> None:
    given = options(url=f"sqlite:///{tmp_path}/state.db")

    assert [row for name in reports.REPORTS for row in reporting.report(given, name)] == []
    assert list(tmp_path.iterdir()) == []


def test_unknown_feed_has_no_rows(history: History) -> None:
    given = options(url=history.url, feed="nobody")

    assert [row for name in reports.REPORTS for row in reporting.report(given, name, clock=virtual.Clock(NOW))] == []


def test_outdated_compares_with_the_mapping_in_use(state: store.Store, database_url: str) -> None:
    present = app.rules(options(url=database_url)).digest
    lease = state.acquire(FEED, url=FEED, owner="a", seconds=20)
    studies = {"1.1": a_study("1.1", mapping_digest=present), "1.2": a_study("1.2", mapping_digest=OLD)}
    state.commit(lease, store.Position(0, 0, 0, None), store.Effects(studies=studies))

    found = reporting.report(options(url=database_url), "outdated")

    assert values(found, "mapping_digest", "studies") == [(OLD, 1)]
    assert values(reporting.shortened(found), "mapping_digest", "newest_synced_at") == [("a" * 12, "2026-01-31 11:00")]


def test_report_looks_back_from_now(history: History) -> None:
    given, later = options(url=history.url), virtual.Clock(NOW + timedelta(days=30))

    assert values(reporting.report(given, "throughput", clock=later), "start") == [(at("31 00:00"),)]
    assert len(reporting.report(given, "slowest", clock=virtual.Clock(NOW), limit=3)) == 3
    assert len(reporting.report(given, "slowest", clock=virtual.Clock(NOW), since=at("31 11:00"))) == 2


def test_database_that_is_away_is_unavailable() -> None:
    with pytest.raises(errors.Unavailable):
        reporting.report(options(url="postgresql+psycopg://nobody@127.0.0.1:9/nowhere"), "coverage")


def test_overview_has_a_line_about_each_report() -> None:
    assert [line.split()[0] for line in reporting.overview().splitlines()] == list(reports.REPORTS)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("15m", "2026-01-31 11:45"),
        ("12h", "2026-01-31 00:00"),
        ("30d", "2026-01-01 12:00"),
        (" 2w ", "2026-01-17 12:00"),
        ("0d", "2026-01-31 12:00"),
        ("2026-01-05", "2026-01-05 00:00"),
        ("2026-01-05T10:30", "2026-01-05 10:30"),
        ("2026-01-05 10:30:00Z", "2026-01-05 10:30"),
        ("2026-01-05T00:30:00+01:00", "2026-01-04 23:30"),
    ],
)
def test_moments_are_so_long_ago_or_iso_and_in_utc(text: str, found: str) -> None:
    moment = settings.moment(text, NOW)

    assert (moment, moment.utcoffset()) == (at(found), timedelta(0))


@pytest.mark.parametrize(
    "text", ["", "30", "30x", "-3d", "1.5h", "yesterday", "2026-13-01", "2026", "99999999999d", "9999999w", "٣d!"]
)
def test_what_is_no_moment_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"30d.*2026-01-31.*UTC"):
        settings.moment(text, NOW)


# Views


def answer(history: History, query: str) -> list[tuple[Any, ...]]:
    with history.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(query))]


def test_views_have_the_documented_columns(history: History) -> None:
    assert set(sa.inspect(history.engine).get_view_names()) == set(reports.VIEWS)
    for name, (_, columns) in reports.VIEWS.items():
        with history.engine.connect() as connection:
            found = connection.execute(sa.text(f"SELECT * FROM {name}"))

            assert list(found.keys()) == [column.name for column in columns]
            assert found.all()


@pytest.mark.parametrize("name", reports.VIEWS)
def test_view_cannot_be_written(history: History, name: str) -> None:
    before = answer(history, f"SELECT * FROM {name}")

    for change in (f"DELETE FROM {name}", f"UPDATE {name} SET feed = 'x'", f"INSERT INTO {name} (feed) VALUES ('x')"):
        with history.engine.begin() as connection, pytest.raises(sa.exc.DBAPIError, match="view"):
            connection.execute(sa.text(change))

    assert answer(history, f"SELECT * FROM {name}") == before


def test_views_show_what_the_store_was_told(history: History) -> None:
    def ours(columns: str, view: str, order: str = "") -> list[tuple[Any, ...]]:
        return answer(history, f"SELECT {columns} FROM {view} WHERE feed = '{FEED}' {order}")

    assert ours("study_instance_uid, failures", "v_study", "ORDER BY 1") == [
        ("1.1", 2),
        ("1.2", 0),
        ("1.3", 2),
        ("1.4", 1),
        ("1.5", 0),
        ("1.6", 0),
    ]
    assert ours("watermark, latest, lag_entries, gaps, lease_owner", "v_lag") == [(90, 100, 10, 2, "a")]
    assert ours("kind, status, modality", "v_failure", "ORDER BY id") == [
        ("rejected", "open", "CT"),
        ("value-invalid", "open", "CT"),
        ("conflict", "retrying", "MR/SR"),
        ("uid-missing", "resolved", "CT"),
        ("value-invalid", "open", "CT"),
        ("value-invalid", "open", None),
        ("malformed-entry", "open", None),
        ("conflict", "retrying", "MR/SR"),
    ]
    assert ours("sum(flushes), sum(entries), max(longest_lag)", "v_flush") == [(7, 1050, 700_000.125)]


# Documentation


def test_the_page_on_the_state_database_is_current() -> None:
    command = "dicomcast db show --format markdown"
    found = reporting.schema_markdown()

    assert PAGE.read_text(encoding="utf-8") == found, f"run `{command} > docs/state.md`"
    assert command in found.splitlines()[0]


def test_every_table_and_column_says_what_it_is() -> None:
    known = [*tables.metadata.tables.values()]
    columns = [column for table in known for column in table.columns]
    columns += [column for _, shown in reports.VIEWS.values() for column in shown]

    assert [table.name for table in known if not table.comment] == []
    assert [str(column) for column in columns if not column.comment] == []


def test_schema_has_every_column_of_views_and_tables() -> None:
    found = {(row["table"], row["column"]): row["type"] for row in reporting.schema()}

    assert len(found) == len(reporting.schema())
    assert {"v_study", "v_failure", "v_flush", "v_lag", *tables.metadata.tables} == {name for name, _ in found}
    assert found["v_study", "study_instance_uid"] == "text (64)"
    assert found["study", "study_instance_uid"] == "text (64), key"
    assert found["failure", "next_retry"] == "time or null"


def test_queries_of_the_page_have_an_answer(history: History) -> None:
    queries = re.findall(r"```sql\n(.*?);\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    found = [answer(history, query) for query in queries]

    assert len(found) == 4
    assert found[0] == [("CT", 2, 4)]  # of both feeds
    assert len(found[1]) == 2 * 5
    assert [round(float(row[0])) for row in found[2]] == [50]
    assert (FEED, 10, 2) in [row[:3] for row in found[3]]


# The benchmark


def test_benchmark_asks_everything_and_fails_over_its_limit(database_url: str) -> None:
    command = [sys.executable, str(ROOT / "bench" / "state.py"), "--database", database_url, "--rounds", "1"]

    filled = subprocess.run([*command, "--studies", "400", "--format", "json"], capture_output=True, check=False)
    figures = json.loads(filled.stdout)
    again = subprocess.run([*command, "--limit", "0"], capture_output=True, text=True, check=False)

    assert figures["studies"] == 400
    asked_for = {row["name"]: row for row in figures["questions"]}
    assert {"status", *reports.REPORTS} < set(asked_for)
    assert {name for name, row in asked_for.items() if not row["rows"]} <= {"slowest, an hour"}
    assert min(row["best"] for row in asked_for.values()) > 0
    assert filled.returncode == any(row["worst"] > row["limit"] for row in asked_for.values())
    assert again.returncode == 1
    assert "400 studies" in again.stdout
    assert "too slow" in again.stdout
