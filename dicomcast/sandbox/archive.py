"""What the sandbox's DICOM service keeps: instances, the QIDO index and the change feed, in SQLite.

A feed entry's state and metadata are worked out when it is read: the feed is no log of snapshots. Sequences can be
burnt, held back and taken back, as databases do that roll back, commit late or are restored.
"""

import contextlib
import re
import sqlite3
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson

Json = Any  # a JSON value

# QIDO attributes that the index holds, by level (searchable by the service; UIDs are columns of their own).
STUDY_TAGS = ("00080020", "00080050", "00080090", "00081030", "00100010", "00100020", "00100030")
SERIES_TAGS = ("00080060", "00081090", "00400244")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INSTANT = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(:\d\d)?(?:\.(\d{1,7})\d*)?\s*(Z|[+-]\d\d:\d\d)", re.IGNORECASE)

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT OR IGNORE INTO counter VALUES ('sequence', 0), ('watermark', 0);
CREATE TABLE IF NOT EXISTS file (key INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS study (
    key INTEGER PRIMARY KEY, partition TEXT, study TEXT, elements BLOB,
    {", ".join(f'"{tag}" TEXT' for tag in STUDY_TAGS)}, UNIQUE (partition, study));
CREATE TABLE IF NOT EXISTS series (
    key INTEGER PRIMARY KEY, partition TEXT, study TEXT, series TEXT, elements BLOB,
    {", ".join(f'"{tag}" TEXT' for tag in SERIES_TAGS)}, UNIQUE (partition, study, series));
CREATE TABLE IF NOT EXISTS instance (
    watermark INTEGER PRIMARY KEY, partition TEXT, study TEXT, series TEXT, sop TEXT, pending INTEGER NOT NULL,
    syntax TEXT, metadata BLOB, file INTEGER, original_metadata BLOB, original_file INTEGER,
    UNIQUE (partition, study, series, sop));
CREATE TABLE IF NOT EXISTS feed (
    sequence INTEGER PRIMARY KEY, ticks INTEGER, action TEXT, partition TEXT, study TEXT, series TEXT, sop TEXT,
    watermark INTEGER, held INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS feed_time ON feed (ticks, sequence);
"""  # noqa: S608 - column names
_FEED = """
SELECT f.*, i.watermark AS current, i.metadata AS metadata FROM feed f LEFT JOIN instance i
ON i.partition = f.partition AND i.study = f.study AND i.series = f.series AND i.sop = f.sop AND i.pending = 0
WHERE f.held = 0
"""


class Exists(Exception):
    """The instance is there already; `pending` when it is still being created."""

    def __init__(self, *, pending: bool):
        super().__init__("pending" if pending else "exists")
        self.pending = pending


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the change feed as it reads today; `ticks` are 100 ns since 1970, `metadata` DICOM JSON bytes."""

    sequence: int
    ticks: int
    action: str
    partition: str
    study: str
    series: str
    sop: str
    state: str
    metadata: bytes | None


@dataclass(frozen=True, slots=True)
class Instance:
    """A stored instance in the version that was asked for."""

    watermark: int
    study: str
    series: str
    sop: str
    syntax: str
    metadata: bytes
    file: int


def ticks_of(text: str) -> int:
    """100 ns since 1970 of an ISO 8601 instant with a zone; ValueError without one."""
    match = _INSTANT.fullmatch(text.strip())
    if not match:
        raise ValueError("no date and time with a time zone")
    zone = "+00:00" if match[5] in "Zz" else match[5]
    moment = datetime.fromisoformat(f"{match[1]}T{match[2]}{match[3] or ':00'}{zone}")
    return (moment - _EPOCH) // timedelta(microseconds=1) * 10 + int((match[4] or "").ljust(7, "0"))


def instant(ticks: int, zone: str = "+00:00") -> str:
    """The instant as .NET writes it: up to 7 fractional digits, trailing zeros cut."""
    whole, fraction = divmod(ticks, 10_000_000)
    digits = f"{fraction:07d}".rstrip("0")
    text = (_EPOCH + timedelta(seconds=whole)).strftime("%Y-%m-%dT%H:%M:%S")
    return text + (f".{digits}" if digits else "") + zone


def folded(text: str, *, name: bool) -> str:
    """What QIDO compares: without case, person names also without accents."""
    if name:
        text = "".join(char for char in unicodedata.normalize("NFD", text) if not unicodedata.combining(char))
    return text.casefold()


def _indexed(element: Mapping[str, Json] | None) -> str | None:
    """The first value of an element as the index holds it; None when there is none."""
    values = (element or {}).get("Value")
    if not values or values[0] is None:
        return None
    if isinstance(values[0], dict):
        groups = [values[0].get(group, "") for group in ("Alphabetic", "Ideographic", "Phonetic")]
        return folded("=".join(groups).rstrip("="), name=True)
    return folded(str(values[0]), name=False)


def _fuzzy(stored: str | None, wanted: str) -> bool:
    """Each word of what is wanted begins the next word of the name, from any word on."""
    words = re.split(r"[\s^=]+", stored or "")
    sought = re.split(r"[\s^=]+", wanted.strip())
    starts = range(len(words) - len(sought) + 1)
    return any(all(words[at + i].startswith(word) for i, word in enumerate(sought)) for at in starts)


class Archive:
    """The store. `folder` holds SQLite and the files; None keeps all in memory. `now` is the feed's clock."""

    def __init__(self, folder: Path | None, *, now: Callable[[], datetime] | None = None):
        if folder is not None:
            (folder / "files").mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._now = now
        self.frozen: int | None = None  # ticks that every entry gets while set
        self.holding = 0  # how many entries from now on get a sequence, and stay unseen until released
        self._db = sqlite3.connect(
            ":memory:" if folder is None else folder / "dicom.sqlite", check_same_thread=False, isolation_level=None
        )
        self._db.row_factory = sqlite3.Row
        self._db.create_function("fuzzy", 2, _fuzzy, deterministic=True)
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;" + _SCHEMA)

    def close(self) -> None:
        """Let go of the database; the archive is of no use afterwards."""
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _next(self, name: str, by: int = 1) -> int:
        row = self._db.execute("UPDATE counter SET value = value + ? WHERE name = ? RETURNING value", (by, name))
        return int(row.fetchone()[0])

    def ticks(self) -> int:
        """The time of the feed now."""
        if self.frozen is not None:
            return self.frozen
        if self._now is not None:
            return (self._now() - _EPOCH) // timedelta(microseconds=1) * 10
        return time.time_ns() // 100

    # Files

    def _put(self, key: int, data: bytes) -> None:
        if self._folder is None:
            self._db.execute("INSERT INTO file VALUES (?, ?)", (key, data))
        else:
            (self._folder / "files" / f"{key}.dcm").write_bytes(data)

    def file(self, key: int) -> bytes:
        """The bytes of a stored file."""
        if self._folder is not None:
            return (self._folder / "files" / f"{key}.dcm").read_bytes()
        return bytes(self._db.execute("SELECT data FROM file WHERE key = ?", (key,)).fetchone()[0])

    def _drop(self, keys: Iterable[int | None]) -> None:
        for key in {key for key in keys if key is not None}:
            if self._folder is None:
                self._db.execute("DELETE FROM file WHERE key = ?", (key,))
            else:
                (self._folder / "files" / f"{key}.dcm").unlink(missing_ok=True)

    # Instances

    def store(
        self, partition: str, study: str, series: str, sop: str, *, syntax: str, metadata: Json, data: bytes
    ) -> None:
        """Add an instance and its Create entry, in one transaction; raises Exists."""
        key = (partition, study, series, sop)
        there = self._db.execute(
            "SELECT pending FROM instance WHERE partition = ? AND study = ? AND series = ? AND sop = ?", key
        ).fetchone()
        if there:
            raise Exists(pending=bool(there[0]))
        moment = self.ticks()
        with self._transaction():
            watermark = self._next("watermark")
            self._put(watermark, data)
            held = self._append("Create", key, watermark, moment)
            self._db.execute(
                "INSERT INTO instance VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)",
                (watermark, *key, held, syntax, orjson.dumps(metadata), watermark),
            )
            if not held:
                self._index(key, metadata)

    def _append(self, action: str, key: tuple[str, str, str, str], watermark: int, ticks: int) -> bool:
        """One entry of the feed; True when it is held back."""
        held = self.holding > 0
        self.holding -= held
        self._db.execute(
            "INSERT INTO feed VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self._next("sequence"), ticks, action, *key, watermark, held),
        )
        return held

    def _index(self, key: tuple[str, str, str, str], metadata: Mapping[str, Json]) -> None:
        """Study and series attributes: the latest value that is not empty wins."""
        self._merge("study", ("partition", "study"), key[:2], STUDY_TAGS, metadata)
        self._merge("series", ("partition", "study", "series"), key[:3], SERIES_TAGS, metadata)

    def _merge(
        self, table: str, names: Sequence[str], key: Sequence[str], tags: Sequence[str], metadata: Mapping[str, Json]
    ) -> None:
        where = " AND ".join(f"{name} = ?" for name in names)
        row = self._db.execute(f"SELECT elements FROM {table} WHERE {where}", key).fetchone()  # noqa: S608
        before = orjson.loads(row[0]) if row else {}
        elements = {**before, **{tag: metadata[tag] for tag in tags if metadata.get(tag, {}).get("Value")}}
        if row is None:
            marks = ", ".join("?" * len(names))
            self._db.execute(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", key)  # noqa: S608
        if row is None or elements != before:
            columns = ", ".join(f'"{tag}" = ?' for tag in tags)
            values = [_indexed(elements.get(tag)) for tag in tags]
            self._db.execute(
                f"UPDATE {table} SET elements = ?, {columns} WHERE {where}",  # noqa: S608
                (orjson.dumps(elements), *values, *key),
            )

    def instances(
        self, partition: str, study: str, series: str | None = None, sop: str | None = None, *, original: bool = False
    ) -> list[Instance]:
        """The visible instances in no particular order, as they were before any update if `original`."""
        where, values = _scope(partition, study, series, sop)
        metadata, file = ("metadata", "file")
        if original:
            metadata, file = ("coalesce(original_metadata, metadata)", "coalesce(original_file, file)")
        rows = self._db.execute(
            f"SELECT watermark, study, series, sop, syntax, {metadata}, {file} FROM instance "  # noqa: S608
            f"WHERE {where} AND pending = 0",
            values,
        )
        return [Instance(*row) for row in rows]

    def delete(self, partition: str, study: str, series: str | None = None, sop: str | None = None) -> int:
        """Remove instances, with one Delete entry each, all of one time; how many there were."""
        where, values = _scope(partition, study, series, sop)
        rows = self._db.execute(f"SELECT * FROM instance WHERE {where} ORDER BY watermark", values).fetchall()  # noqa: S608
        moment = self.ticks()
        with self._transaction():
            for row in rows:
                self._db.execute("DELETE FROM instance WHERE watermark = ?", (row["watermark"],))
                self._drop((row["file"], row["original_file"]))
                if row["pending"]:  # its Create never becomes visible, so neither does a Delete
                    self._db.execute("DELETE FROM feed WHERE watermark = ? AND held = 1", (row["watermark"],))
                else:
                    key = (row["partition"], row["study"], row["series"], row["sop"])
                    self._append("Delete", key, row["watermark"], moment)
            self._prune(partition, study)
        return sum(not row["pending"] for row in rows)

    def _prune(self, partition: str, study: str) -> None:
        """Take emptied series and studies out of the index."""
        for table, extra in (("series", "AND i.series = t.series"), ("study", "")):
            self._db.execute(
                f"DELETE FROM {table} AS t WHERE partition = ? AND study = ? AND NOT EXISTS (SELECT 1 "  # noqa: S608
                f"FROM instance i WHERE i.partition = t.partition AND i.study = t.study {extra})",
                (partition, study),
            )

    def update(self, partition: str, study: str, change: Mapping[str, Json], rewrite: Callable[[bytes], bytes]) -> int:
        """Put elements into every instance of a study, with one Update entry each; the first version is kept."""
        rows = self.instances(partition, study)
        moment = self.ticks()
        with self._transaction():
            for row in rows:
                watermark = self._next("watermark")
                self._put(watermark, rewrite(self.file(row.file)))
                metadata = dict(sorted({**orjson.loads(row.metadata), **change}.items()))
                kept = self._db.execute("SELECT original_file FROM instance WHERE watermark = ?", (row.watermark,))
                if kept.fetchone()[0] is not None:
                    self._drop((row.file,))
                self._db.execute(
                    "UPDATE instance SET original_metadata = coalesce(original_metadata, metadata), "
                    "original_file = coalesce(original_file, file), watermark = ?, file = ?, metadata = ? "
                    "WHERE watermark = ?",
                    (watermark, watermark, orjson.dumps(metadata), row.watermark),
                )
                key = (partition, study, row.series, row.sop)
                self._append("Update", key, watermark, moment)
                self._index(key, metadata)
        return len(rows)

    def partitions(self) -> list[str]:
        """Every partition that something was ever stored in."""
        rows = self._db.execute("SELECT partition FROM instance UNION SELECT partition FROM feed ORDER BY 1")
        return [row[0] for row in rows]

    # The change feed

    def by_sequence(self, offset: int, limit: int) -> list[Entry]:
        """The entries with offset < sequence <= offset + limit: a window of numbers, not a count (v1)."""
        return self._entries("AND f.sequence BETWEEN ? AND ? ORDER BY f.sequence", (offset + 1, offset + limit))

    def by_time(self, start: int, end: int, offset: int, limit: int) -> list[Entry]:
        """Rows of the window start <= ticks < end by (time, sequence), paged by rows (v2)."""
        clause = "AND f.ticks >= ? AND f.ticks < ? ORDER BY f.ticks, f.sequence LIMIT ? OFFSET ?"
        return self._entries(clause, (start, end, limit, offset))

    def latest(self, *, by_time: bool) -> Entry | None:
        """The entry with the highest sequence, or of the newest time (which need not be the same)."""
        order = "f.ticks DESC, f.sequence DESC" if by_time else "f.sequence DESC"
        return next(iter(self._entries(f"ORDER BY {order} LIMIT 1", ())), None)

    def _entries(self, clause: str, values: Sequence[int]) -> list[Entry]:
        return [
            Entry(
                row["sequence"],
                row["ticks"],
                row["action"],
                row["partition"],
                row["study"],
                row["series"],
                row["sop"],
                _state(row["watermark"], row["current"]),
                row["metadata"],
            )
            for row in self._db.execute(_FEED + clause, values)
        ]

    def skip(self, count: int) -> int:
        """Burn sequence numbers, as a rolled-back insert does; the last one burnt."""
        return self._next("sequence", count)

    def release(self) -> int:
        """Make what was held visible, under the sequences it got then; how many entries."""
        self.holding = 0
        with self._transaction():
            for row in self._db.execute("SELECT * FROM instance WHERE pending = 1").fetchall():
                key = (row["partition"], row["study"], row["series"], row["sop"])
                self._index(key, orjson.loads(row["metadata"]))
            self._db.execute("UPDATE instance SET pending = 0 WHERE pending = 1")
            return self._db.execute("UPDATE feed SET held = 0 WHERE held = 1").rowcount

    def reset(self, sequence: int) -> None:
        """Take the feed back to a sequence, as a restore from a back-up does; the instances stay."""
        with self._transaction():
            self._db.execute("DELETE FROM feed WHERE sequence > ?", (sequence,))
            self._db.execute("UPDATE counter SET value = ? WHERE name = 'sequence'", (sequence,))

    # QIDO

    def search(
        self, level: str, conditions: Sequence[str], values: Sequence[str], *, limit: int, offset: int
    ) -> list[sqlite3.Row]:
        """Rows of a level (`study`, `series`, `instance`), newest first; conditions use the aliases s, r and i."""
        joins = {
            "study": "SELECT s.partition, s.study, s.elements AS study_elements FROM study s",
            "series": "SELECT r.partition, r.study, r.series, s.elements AS study_elements, "
            "r.elements AS series_elements FROM series r JOIN study s USING (partition, study)",
            "instance": "SELECT i.partition, i.study, i.series, i.sop, i.metadata, s.elements AS study_elements, "
            "r.elements AS series_elements FROM instance i JOIN series r USING (partition, study, series) "
            "JOIN study s USING (partition, study)",
        }
        order = {"study": "s.key", "series": "r.key", "instance": "i.watermark"}[level]
        visible = ["i.pending = 0"] if level == "instance" else []
        where = " AND ".join([*visible, *conditions])
        sql = f"{joins[level]} WHERE {where} ORDER BY {order} DESC LIMIT ? OFFSET ?"
        return self._db.execute(sql, (*values, limit, offset)).fetchall()

    def newest(self, partition: str, study: str, series: str | None = None) -> dict[str, Json]:
        """The metadata of the newest instance of a study or series."""
        where, values = _scope(partition, study, series, None)
        row = self._db.execute(
            f"SELECT metadata FROM instance WHERE {where} AND pending = 0 ORDER BY watermark DESC LIMIT 1",  # noqa: S608
            values,
        ).fetchone()
        return dict(orjson.loads(row[0])) if row else {}

    def count(self, partition: str, study: str, series: str | None = None) -> int:
        """How many instances a study or series has."""
        where, values = _scope(partition, study, series, None)
        row = self._db.execute(f"SELECT count(*) FROM instance WHERE {where} AND pending = 0", values)  # noqa: S608
        return int(row.fetchone()[0])

    def modalities(self, partition: str, study: str) -> list[str]:
        """The modalities of the series of a study."""
        rows = self._db.execute(
            "SELECT elements FROM series WHERE partition = ? AND study = ? ORDER BY key", (partition, study)
        )
        elements = [orjson.loads(row[0]).get("00080060") for row in rows]
        return list(dict.fromkeys(element["Value"][0] for element in elements if element))


def _state(watermark: int, current: int | None) -> str:
    """The state of an entry today, from the version that it was written for and the one that is there now."""
    if current is None:
        return "Deleted"
    return "Current" if current == watermark else "Replaced"


def _scope(partition: str, study: str, series: str | None, sop: str | None) -> tuple[str, list[str]]:
    given = {"partition": partition, "study": study, "series": series, "sop": sop}
    kept = {name: value for name, value in given.items() if value is not None}
    return " AND ".join(f"{name} = ?" for name in kept), list(kept.values())
