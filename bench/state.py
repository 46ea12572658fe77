"""How fast reports, status and views are answered from the state of a million studies. See README.md.

`python bench/state.py` prints a table, `--format json` the same figures for programs; it fails where it takes too long.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import sqlalchemy as sa

from dicomcast.clock import Clock
from dicomcast.state import reports, store, tables

Json: TypeAlias = Any
Rows: TypeAlias = Iterator[tuple[Any, ...]]
Question: TypeAlias = Callable[[store.Store, int], int]
"""Asks a database about a feed; how many rows the answer has."""

FEED = "http://dicom.example"
NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
ROUNDS = 3
LIMIT = 2.0  # seconds: the most that an answer may take
AT_ONCE = 0.5  # seconds: the same for status
DAYS, FLUSH_DAYS = 730, 30
MODALITIES = {"CT": 22, "MR": 18, "CR": 16, "DX": 14, "US": 12, "MG": 6, "XA": 3, "NM": 3}
MODALITIES |= {"CT/PT": 2, "CT/SR": 2, "OT": 1, "RF": 1}
OUTCOMES = {"synced": 930, "failed": 50, "deleted": 14, "shared": 4, "cancelled": 2}
SETTLED = {"created": 40, "updated": 35, "unchanged": 20, "deleted": 2, "failed": 3}
FAILURES = (
    # kind, stage, rule, tag
    ("patient-id-missing", "map", "patient.identifier", "00100020"),
    ("value-invalid", "map", "study.started", "00080020"),
    ("uid-invalid", "map", "series.uid", "0020000E"),
    ("modality-missing", "map", "series.modality", "00080060"),
    ("invalid", "validate", "study.description", None),
    ("metadata-refused", "read", None, None),
    ("rejected", "write", None, None),
    ("conflict", "write", None, None),
)
STATUSES = {"open": 20, "retrying": 15, "resolved": 60, "dismissed": 5}
ISSUES = [
    (f"{level}.rule_{number}", f"0008{number:04X}", vr, reason)
    for number in range(12)
    for level, vr, reason in (("study", "DA", "not a date"), ("series", "CS", "instances disagree"))
]
LAGS = (0, 1, 2, 5, 10, 15, 30, 60, 120)


def digest(number: int) -> str:
    """Of the mapping of that number."""
    return hashlib.sha256(str(number).encode()).hexdigest()


# What is in it --------------------------------------------------------------------------------------------------------


def fill(url: str, studies: int) -> None:
    """Make the database's tables and fill them; the same content every time, whatever the database."""
    chance = random.Random(1)
    with closing(store.Store(url, clock=Clock())) as state:
        state.open()
        lease = state.acquire(FEED, url=FEED, owner="bench", seconds=60)
        state.commit(lease, store.Position(0, studies * 90, studies * 90, None), store.Effects())
        state.release(lease)
    feed = lease.feed_id
    uids = [study_uid(_seen(number, studies), chance) for number in range(studies)]
    contents: list[tuple[sa.Table, tuple[str, ...], Rows]] = [
        (tables.study, tuple(tables.study.c.keys()), study_rows(feed, uids, chance)),
        (tables.failure, tuple(tables.failure.c.keys())[1:], failure_rows(feed, uids, chance)),
        (tables.issue, tuple(tables.issue.c.keys()), issue_rows(feed, uids, chance)),
        (tables.flush, tuple(tables.flush.c.keys())[1:], flush_rows(feed, uids, chance)),
        (tables.flush_hour, tuple(tables.flush_hour.c.keys()), hour_rows(feed, min(studies, DAYS * 24), chance)),
        (tables.job, tuple(tables.job.c.keys()), job_rows(feed)),
        (tables.work, tuple(tables.work.c.keys())[1:], work_rows(feed, uids, chance)),
    ]
    engine = sa.create_engine(url)
    load = _load_sqlite if engine.dialect.name == "sqlite" else _load_postgresql
    for table, columns, rows in contents:
        load(engine, table, columns, rows)
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")  # as its autovacuum does by and by
    engine.dispose()


def _seen(number: int, studies: int) -> datetime:
    """When the feed had the first entry of a study: one after another, over two years."""
    return NOW - timedelta(days=DAYS * (1 - number / studies))


def study_uid(seen: datetime, chance: random.Random) -> str:
    """Most devices number by time below a root of theirs, some at random (PS3.5 B.2)."""
    if chance.random() < 0.3:
        return f"2.25.{chance.getrandbits(122)}"
    return f"1.2.826.0.1.3680043.10.{chance.randint(1, 40)}.{seen:%Y%m%d%H%M%S}.{chance.randint(1, 9999)}"


def _picked(chance: random.Random, weights: dict[str, int]) -> Iterator[str]:
    """One after another, as often as the weights say."""
    names, shares = list(weights), list(weights.values())
    while True:
        yield from chance.choices(names, shares, k=1_000)


def study_rows(feed: int, uids: list[str], chance: random.Random) -> Rows:
    """Studies of two years; four mappings have written them in turn."""
    modalities, outcomes = _picked(chance, MODALITIES), _picked(chance, OUTCOMES)
    for number, (uid, modality, outcome) in enumerate(zip(uids, modalities, outcomes, strict=False)):
        seen = _seen(number, len(uids))
        synced = seen + (NOW - seen) * chance.random() if chance.random() < 0.2 else seen
        mapping = digest(min(3, int(4 * (1 - (NOW - synced).days / DAYS))))
        series, instances = chance.randint(1, 8), chance.randint(1, 500)
        ids = (f"s{number:x}", str(chance.randint(1, 9)), f"p{number // 3:x}")
        sequences = (number * 90, number * 90 + instances)
        month = f"{seen:%Y-%m}"
        yield feed, uid, outcome, *ids, series, instances, *sequences, mapping, synced, modality, month


def failure_rows(feed: int, uids: list[str], chance: random.Random) -> Rows:
    """Failures of two years, a third of them of this month: 3 % as many as studies that are not over, more that are."""
    wanted = 3 * len(uids) // 100
    for status in _picked(chance, STATUSES):
        wanted -= status in store.ATTENTION
        if wanted < 0:
            return
        age = chance.random() ** 3
        uid, first = uids[int(len(uids) * (1 - age)) - 1], NOW - timedelta(days=DAYS * age)
        kind, stage, rule, tag = chance.choice(FAILURES)
        series, sop = (f"{uid}.1", f"{uid}.1.{chance.randint(1, 500)}") if stage == "map" else (None, None)
        retry = NOW + timedelta(hours=6 * chance.random()) if status == "retrying" else None
        last = retry - timedelta(hours=6) if retry else min(NOW, first + timedelta(days=10 * chance.random()))
        resolution = {"resolved": "mapped", "dismissed": "dismissed"}.get(status)
        place = (uid, series, sop, chance.randint(1, 90 * len(uids)), rule, tag)
        message = "a sentence of the usual length that says what is wrong with it"
        times = (chance.randint(1, 9), first, last, retry)
        yield feed, status, kind, stage, *place, message, *times, resolution, chance.choice((1, 1, 1, 40)), None


def issue_rows(feed: int, uids: list[str], chance: random.Random) -> Rows:
    """One and a half for each study."""
    for uid in uids:
        for rule, tag, vr, reason in chance.sample(ISSUES, chance.randint(0, 3)):
            yield feed, uid, rule, tag, vr, reason, chance.randint(1, 300)


def flush_rows(feed: int, uids: list[str], chance: random.Random) -> Rows:
    """As many as studies, in a month."""
    for number, outcome in zip(range(len(uids)), _picked(chance, SETTLED), strict=False):
        at = NOW - timedelta(days=FLUSH_DAYS * (1 - number / len(uids)))
        uid = chance.choice(uids)
        lag = chance.lognormvariate(2.0, 1.0) if number % 20 else None
        road, reason = ("fold", None) if outcome == "created" else ("reconcile", "update")
        yield feed, at, uid, road, reason, outcome, chance.randint(1, 300), chance.random(), lag


def hour_rows(feed: int, many: int, chance: random.Random) -> Rows:
    """The roll-up of so many hours, about 15 rows each."""
    for hours in reversed(range(many)):
        hour = NOW - timedelta(hours=hours)
        for outcome in SETTLED:
            road = "fold" if outcome == "created" else "reconcile"
            for within in chance.sample(LAGS, chance.randint(1, 5)):
                flushes = chance.randint(1, 60)
                sums = (flushes, flushes * 90, flushes * 0.2, flushes * within * 0.7)
                yield feed, hour, road, outcome, within, *sums, within * 0.9


def job_rows(feed: int) -> Rows:
    """Jobs that are done."""
    for number in range(1, 4):
        at = NOW - timedelta(days=number)
        yield number, feed, "replay", "{}", "bench", at, at, None, None, None, None, None


def work_rows(feed: int, uids: list[str], chance: random.Random) -> Rows:
    """What those jobs had to do: half a study of a hundred."""
    for number, uid in enumerate(chance.sample(uids, len(uids) // 200)):
        yield feed, number % 3 + 1, uid, "replay", "done", None, "unchanged", None, NOW - timedelta(minutes=number)


def _load_sqlite(engine: sa.Engine, table: sa.Table, columns: tuple[str, ...], rows: Rows) -> None:
    times = [at for at, name in enumerate(columns) if isinstance(table.c[name].type, tables.Instant)]

    def kept() -> Iterator[list[Any]]:
        for row in rows:
            values = list(row)
            for at in times:
                if values[at] is not None:
                    values[at] = values[at].replace(tzinfo=None).isoformat(" ", "microseconds")
            yield values

    with engine.connect() as connection:
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-1000000"):
            connection.exec_driver_sql(f"PRAGMA {pragma}")
        for index in table.indexes:
            index.drop(connection)
        marks = ", ".join("?" * len(columns))
        cursor = connection.connection.cursor()
        cursor.executemany(f"INSERT INTO {table.name} ({_names(columns)}) VALUES ({marks})", kept())
        for index in table.indexes:
            index.create(connection)
        connection.commit()
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")


def _load_postgresql(engine: sa.Engine, table: sa.Table, columns: tuple[str, ...], rows: Rows) -> None:
    with engine.begin() as connection:
        for index in table.indexes:
            index.drop(connection)
        cursor: Any = connection.connection.cursor()
        with cursor.copy(f"COPY {table.name} ({_names(columns)}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        for index in table.indexes:
            index.create(connection)


def _names(columns: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in columns)


# What is asked --------------------------------------------------------------------------------------------------------


def _status(state: store.Store, feed_id: int) -> int:
    return sum(map(len, state.counts(feed_id)))


def _report(name: str, *, days: float | None = None) -> Question:
    since = None if days is None else NOW - timedelta(days=days)

    def ask(state: store.Store, feed_id: int) -> int:
        return len(reports.report(state, feed_id, name, now=NOW, since=since, digest=digest(4)))

    return ask


def _view(name: str) -> Question:
    def ask(state: store.Store, _: int) -> int:
        with state.transaction() as connection:
            return len(connection.execute(sa.text(f"SELECT * FROM {name} LIMIT 100")).all())

    return ask


QUESTIONS: dict[str, tuple[Question, float]] = {
    "status": (_status, AT_ONCE),
    **{name: (_report(name), LIMIT) for name in reports.REPORTS},
    "throughput, two years": (_report("throughput", days=DAYS), LIMIT),
    "latency, two years": (_report("latency", days=DAYS), LIMIT),
    "failures, two years": (_report("failures", days=DAYS), LIMIT),
    "coverage, two months": (_report("coverage", days=60), LIMIT),
    "outdated, a week": (_report("outdated", days=7), LIMIT),
    "slowest, an hour": (_report("slowest", days=1 / 24), LIMIT),
    **{f"{name}, 100 rows": (_view(name), LIMIT) for name in reports.VIEWS},
}
"""By name: how to ask, and the most seconds that the answer may take."""


def measure(url: str, rounds: int) -> list[Json]:
    """Each question so many times, on a connection of its own; the first time without what the system has cached."""
    taken: dict[str, list[float]] = {name: [] for name in QUESTIONS}
    sizes: dict[str, int] = {}
    for number in range(rounds):
        for name, (ask, _) in QUESTIONS.items():
            if number == 0:
                _forget(url)
            began = time.perf_counter()
            with closing(store.Store(url, clock=Clock())) as state:
                feed = state.feed(FEED)
                assert feed is not None
                sizes[name] = ask(state, feed["id"])
            taken[name].append(time.perf_counter() - began)
    return [
        {"name": name, "rows": sizes[name], "best": min(found), "worst": max(found), "limit": QUESTIONS[name][1]}
        for name, found in taken.items()
    ]


def _forget(url: str) -> None:
    """Drop a SQLite file from the system's cache, where the system lets us. A server's caches are its own."""
    file = sa.make_url(url).database
    if url.startswith("sqlite") and file and hasattr(os, "posix_fadvise"):
        with Path(file).open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _version(url: str) -> str:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        version = ".".join(map(str, connection.dialect.server_version_info or ()))
    engine.dispose()
    return f"{engine.dialect.name} {version}".strip()


def text(found: Json) -> str:
    """The figures for people."""
    lines = [f"{found['studies']} studies, {found['database']}; seconds", ""]
    lines.append(f"{'':28}{'rows':>8}{'best':>9}{'worst':>9}{'limit':>9}")
    for row in found["questions"]:
        over = "  too slow" if row["worst"] > row["limit"] else ""
        figures = f"{row['best']:9.3f}{row['worst']:9.3f}{row['limit']:9.1f}"
        lines.append(f"{row['name']:28}{row['rows']:8}{figures}{over}")
    return "\n".join(lines)


def _known(url: str) -> int:
    """Studies that the database has from an earlier run."""
    with closing(store.Store(url, clock=Clock())) as state:
        feed = state.feed(FEED) if state.exists() else None
        return sum(state.counts(feed["id"])[0].values()) if feed else 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Speed of reports, status and views.")
    parser.add_argument("--studies", type=int, default=1_000_000, help="(default: 1000000)")
    parser.add_argument(
        "--database",
        metavar="URL",
        help="an empty database, or one that an earlier run has filled; default: a temporary SQLite file",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="times that each is asked (default: 3)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="most seconds of an answer (default: 2)")
    parser.add_argument("--format", choices=["table", "json"], default="table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dicomcast-bench-") as folder:
        url = given.database or f"sqlite:///{folder}/state.db"
        studies = _known(url)
        if not studies:
            studies = given.studies
            fill(url, studies)
        questions = measure(url, given.rounds)
        database = _version(url)
    for row in questions:
        row["limit"] = min(row["limit"], given.limit)
    found = {"python": platform.python_version(), "database": database, "studies": studies, "questions": questions}
    print(json.dumps(found, indent=2) if given.format == "json" else text(found))
    sys.exit(1 if any(row["worst"] > row["limit"] for row in questions) else 0)


if __name__ == "__main__":
    main()
