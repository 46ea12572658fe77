"""The state database: what the worker reads at start and commits as it goes, and what the reports ask.

Synchronous; the worker calls it through `asyncio.to_thread`. A database that can't be used raises
`Unavailable("database", …)`. What a worker commits carries its fencing token: a worker whose lease went to
somebody else gets `LeaseLost` and has changed nothing.
"""

import contextlib
import os
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from dicomcast import errors
from dicomcast.clock import Clock
from dicomcast.state import schema, tables

_T = TypeVar("_T")

Row = dict[str, Any]

_RETRY_PAUSES = (60, 300, 1800, 7200, 21600)
"""Seconds until a failure that may heal by itself is tried again, by the number of attempts so far."""

_SUMS = ("flushes", "entries", "seconds", "lag_seconds")
_LAGS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21_600, 86_400, 604_800)
"""Seconds: the steps in which lags are counted."""

_ALIKE = 20
"""Instances of a study that failed alike, from which on they are one row."""

ATTENTION = ("open", "retrying")
"""Statuses of failures that are not over."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write for a feed. `token` is the fencing token; `expired`: its last owner did not give it back."""

    feed_id: int
    token: int
    owner: str
    expired: bool = False


@dataclass(frozen=True, slots=True)
class Position:
    """Where a feed is. `mark` is study UID, SOP UID and time of the entry at the watermark, where there was one."""

    first: int
    watermark: int
    latest: int
    mark: tuple[str, str, str] | None


@dataclass(frozen=True, slots=True)
class Study:
    """What we know of a study in FHIR: what became of it, and the version that we wrote last."""

    study_instance_uid: str
    outcome: str
    imaging_study: str | None
    version: str | None
    patient: str | None
    series: int
    instances: int
    first_sequence: int
    last_sequence: int
    mapping_digest: str
    synced_at: datetime
    modality: str | None = None
    month: str | None = None


@dataclass(frozen=True, slots=True)
class Patient:
    """What we know of a Patient in FHIR; `sequence` and `study` are of the change whose demographics it holds."""

    fhir_id: str
    ours: bool
    version: str | None
    sequence: int
    study: str | None = None

    @property
    def newest(self) -> tuple[int, str]:
        """Of several studies the greatest wins: the latest change, and of those that the feed knows nothing of one."""
        return self.sequence, self.study or ""


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that needs attention. `heals`: it may go away by itself, and is tried again."""

    kind: str
    stage: str
    message: str
    study_instance_uid: str | None = None
    series_instance_uid: str | None = None
    sop_instance_uid: str | None = None
    sequence: int | None = None
    rule: str | None = None
    tag: str | None = None
    heals: bool = False
    instances: int = 1


def gathered(failures: Iterable[Failure]) -> list[Failure]:
    """The same, where many instances of a study that failed alike have become one failure of the study."""
    alike: dict[tuple[str | None, ...], list[Failure]] = {}
    for one in failures:
        whose = one.sop_instance_uid if one.kind == "partition" or one.study_instance_uid is None else None
        about = (one.study_instance_uid, one.kind, one.stage, one.rule, one.tag, whose)
        alike.setdefault(about, []).append(one)
    found: list[Failure] = []
    for group in alike.values():
        if len(group) < _ALIKE:
            found += group
            continue
        newest = max((one.sequence or 0 for one in group), default=0) or None
        whole = replace(group[-1], series_instance_uid=None, sop_instance_uid=None)
        found.append(replace(whole, sequence=newest, instances=len(group)))
    return found


@dataclass(frozen=True, slots=True)
class Flush:
    """One settling of one study. `lag_seconds`: since its oldest entry was in the feed; None where it had no entry."""

    study_instance_uid: str
    at: datetime
    road: str
    reason: str | None
    outcome: str
    entries: int
    seconds: float
    lag_seconds: float | None


_FORMS = "sqlite:///relative.db, sqlite:////absolute.db or postgresql+psycopg://user@host/name is what it takes"

_MARK = ("mark_study_uid", "mark_sop_uid", "mark_timestamp")

IssueKey = tuple[str, str, str, str]
"""Rule, tag, VR, reason."""


@dataclass(slots=True)
class Effects:
    """What one commit makes true, all of it or nothing.

    `reconciled` maps a study to resolution and cut: its failures up to that sequence that are not in `failures` are
    resolved, and its issues replaced.
    """

    studies: dict[str, Study] = field(default_factory=dict)
    patients: dict[str, Patient] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    reconciled: dict[str, tuple[str, int]] = field(default_factory=dict)
    issues: dict[str, Counter[IssueKey]] = field(default_factory=dict)
    missed: dict[int, datetime] = field(default_factory=dict)
    closed_gaps: set[int] = field(default_factory=set)
    flushes: list[Flush] = field(default_factory=list)
    worked: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Work that is done, by id: the study, and what became of it."""
    again: dict[str, datetime] = field(default_factory=dict)
    """Studies that must be looked at once more, and not before when."""

    def reconcile(self, study_uid: str, resolution: str, *, cut: int) -> None:
        """A reconcile has the last word on a study: what was noted before is over. Other partitions are no study's."""
        self.reconciled[study_uid] = (resolution, cut)
        self.issues.pop(study_uid, None)
        self.failures = [
            one
            for one in self.failures
            if one.study_instance_uid != study_uid or one.kind == "partition" or (one.sequence or 0) > cut
        ]

    def follow(self, later: "Effects") -> None:
        """Add what came after, where these could not be committed."""
        self.studies |= later.studies
        self.patients |= later.patients
        for study_uid, (resolution, cut) in later.reconciled.items():
            self.reconcile(study_uid, resolution, cut=cut)
        self.failures += later.failures
        for study_uid, counts in later.issues.items():
            self.issues.setdefault(study_uid, Counter()).update(counts)
        self.missed |= later.missed
        self.closed_gaps |= later.closed_gaps
        self.flushes += later.flushes
        self.worked |= later.worked
        self.again |= later.again


class Committed(NamedTuple):
    """How many failures a commit opened, and how many it recorded that no operator has dismissed."""

    opened: int
    failed: int


class Store:
    """One state database. `open` first."""

    def __init__(self, url: str, *, clock: Clock):
        self._clock = clock
        try:
            self._engine = sa.create_engine(url, pool_pre_ping=True, connect_args=_patience(sa.make_url(url)))
        except (sa.exc.ArgumentError, ImportError) as invalid:
            mend = "install dicomcast[postgres]" if url.startswith("postgresql") else _FORMS
            raise errors.Misconfigured([f"database.url: {type(invalid).__name__}; {mend}"]) from None
        if self._engine.dialect.name not in ("sqlite", "postgresql"):
            raise errors.Misconfigured([f"database.url: {_FORMS}"])
        if self._engine.dialect.name == "sqlite":
            _check_file(self._engine.url.database)
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)

    def open(self) -> None:
        """Make an empty database's tables. Raises `Incompatible` for a schema that is behind or ahead of us."""
        with self.transaction(alone=True) as connection:
            schema.prepare(connection)

    def exists(self) -> bool:
        """Whether there is a database of ours to ask. Makes nothing; raises `Incompatible` as `open` does."""
        file = self._engine.url.database
        if self._engine.dialect.name == "sqlite" and not (file and Path(file).exists()):
            return False
        with self.transaction() as connection:
            if schema.current(connection) is None:
                return False
            schema.prepare(connection)
        return True

    def upgrade(self) -> tuple[str | None, str]:
        """Bring the schema up to this version: revision before and after."""
        with self.transaction(alone=True) as connection:
            return schema.upgrade(connection)

    def revision(self) -> tuple[str | None, str]:
        """Revision of the database's schema, and the one that this version needs."""
        with self.transaction() as connection:
            return schema.current(connection), schema.newest()

    def close(self) -> None:
        """Drop all connections."""
        self._engine.dispose()

    def know(self, feed: str, *, url: str) -> int:
        """The feed's id; the database now knows it."""
        table = tables.feed
        new = {"name": feed, "url": url, "latest": 0, "token": 0}
        with self.transaction(alone=True) as connection:
            connection.execute(self.insert(table).values(new).on_conflict_do_nothing(index_elements=["name"]))
            known: int = connection.execute(sa.select(table.c.id).where(table.c.name == feed)).scalar_one()
        return known

    # The lease ------------------------------------------------------------------------------------------------------

    def acquire(self, feed: str, *, url: str, owner: str, seconds: float) -> Lease:
        """Take the lease of a feed, which is made known to the database if need be. Raises `LeaseHeld`."""
        table = tables.feed
        self.know(feed, url=url)
        with self.transaction(alone=True) as connection:
            now = self._now(connection)
            before = connection.execute(sa.select(table.c.lease_owner).where(table.c.name == feed)).scalar_one()
            free = sa.or_(table.c.lease_owner.is_(None), table.c.lease_owner == owner, table.c.lease_until < now)
            taken = connection.execute(
                sa.update(table)
                .where(table.c.name == feed, free)
                .values(
                    url=url, token=table.c.token + 1, lease_owner=owner, lease_until=now + timedelta(seconds=seconds)
                )
                .returning(table.c.id, table.c.token)
            ).first()
        if taken is None:
            raise errors.LeaseHeld(f"another worker syncs the feed {feed}")
        return Lease(taken.id, taken.token, owner, expired=before not in (None, owner))

    def renew(self, lease: Lease, *, seconds: float) -> None:
        """Hold the lease for `seconds` from now. Raises `LeaseLost`."""
        with self.transaction() as connection:
            until = self._now(connection) + timedelta(seconds=seconds)
            self.fenced(connection, lease, lease_until=until)

    def release(self, lease: Lease) -> None:
        """Free the lease at once; nothing happens where it is lost already."""
        table = tables.feed
        with self.transaction() as connection:
            mine = (table.c.id == lease.feed_id, table.c.token == lease.token)
            connection.execute(sa.update(table).where(*mine).values(lease_owner=None, lease_until=None))

    # What the worker reads ------------------------------------------------------------------------------------------

    def position(self, lease: Lease) -> Position | None:
        """Where the feed is; None where it was never begun. Raises `Incompatible` where that can't be read."""
        with self.transaction() as connection:
            row = connection.execute(sa.select(tables.feed).where(tables.feed.c.id == lease.feed_id)).one()
            return self.read_position(connection, row)

    def read_position(self, connection: sa.Connection, row: Any) -> Position | None:
        """What a feed's row says. Only one that says nothing, and of which no study was synced, was never begun."""
        study = tables.study.c
        if row.first is None and row.watermark is None and row.mark_sop_uid is None and row.latest == 0:
            read = sa.select(study.feed_id).where(study.feed_id == row.id, study.last_sequence > 0).limit(1)
            if connection.execute(read).first() is None:
                return None
        numbers = (row.first, row.watermark, row.latest)
        if not all(isinstance(one, int) and one >= 0 for one in numbers) or row.first > row.watermark:
            raise errors.Incompatible(
                f"the position of the feed {row.name} in the database can't be read: it is not taken for zero; "
                "say where the feed is with `dicomcast state set --watermark N`, or `dicomcast state import`"
            )
        mark = (row.mark_study_uid, row.mark_sop_uid, row.mark_timestamp) if row.mark_sop_uid else None
        return Position(row.first, row.watermark, row.latest, mark)

    def gaps(self, lease: Lease) -> dict[int, datetime]:
        """Sequences that may still come, and since when they are missed."""
        with self.transaction() as connection:
            rows = connection.execute(
                sa.select(tables.gap.c.sequence, tables.gap.c.first_missed)
                .where(tables.gap.c.feed_id == lease.feed_id)
                .order_by(tables.gap.c.sequence)
            )
            return {row.sequence: row.first_missed for row in rows}

    def studies(self, lease: Lease, uids: Collection[str]) -> dict[str, tuple[Study | None, bool]]:
        """Of each study its row, and whether it has failures that are not over."""
        table = tables.study
        found: dict[str, tuple[Study | None, bool]] = dict.fromkeys(uids, (None, False))
        with self.transaction() as connection:
            for some in _chunks(sorted(uids), 500):
                rows = connection.execute(
                    sa.select(table).where(table.c.feed_id == lease.feed_id, table.c.study_instance_uid.in_(some))
                ).all()
                found |= {row.study_instance_uid: (Study(**_without_feed(row)), False) for row in rows}
                found |= {uid: (found[uid][0], True) for uid in self._failing(connection, lease.feed_id, some)}
        return found

    def _failing(self, connection: sa.Connection, feed_id: int, uids: Sequence[str]) -> set[str]:
        """Those of the studies that have failures that are not over."""
        table, found = tables.failure, set[str]()
        for some in _chunks(uids, 500):
            query = sa.select(table.c.study_instance_uid).where(
                table.c.feed_id == feed_id,
                table.c.study_instance_uid.in_(some),
                table.c.status.in_(ATTENTION),
                table.c.kind != "partition",
            )
            found |= set(connection.execute(query).scalars())
        return found

    def patient(self, lease: Lease, fhir_id: str) -> Patient | None:
        """The Patient's row."""
        table = tables.patient
        with self.transaction() as connection:
            row = connection.execute(
                sa.select(table).where(table.c.feed_id == lease.feed_id, table.c.fhir_id == fhir_id)
            ).first()
        return Patient(**_without_feed(row)) if row else None

    def due(self, lease: Lease, *, limit: int = 100) -> list[str]:
        """Studies with a failure whose next retry has come, the longest waiting first."""
        table = tables.failure
        with self.transaction() as connection:
            rows = connection.execute(
                sa.select(table.c.study_instance_uid)
                .where(
                    table.c.feed_id == lease.feed_id,
                    table.c.status.in_(ATTENTION),
                    table.c.next_retry <= self._clock.now(),
                    table.c.study_instance_uid.is_not(None),
                )
                .group_by(table.c.study_instance_uid)
                .order_by(sa.func.min(table.c.next_retry))
                .limit(limit)
            )
            return [row.study_instance_uid for row in rows]

    # What the worker commits ----------------------------------------------------------------------------------------

    def commit(
        self,
        lease: Lease,
        position: Position | None,
        effects: Effects,
        *,
        trouble: str | None = None,
        seen_at: datetime | None = None,
    ) -> Committed:
        """Write effects and position, where there is one, in one transaction.

        `trouble`: what the worker waits for; `seen_at`: when the feed's newest entry was asked for. Raises `LeaseLost`.
        """
        now = self._clock.now()
        with self.transaction() as connection:
            values: Row = {"trouble": trouble} | ({"seen_at": seen_at} if seen_at else {})
            if position is not None:
                numbers = {"first": position.first, "watermark": position.watermark, "latest": position.latest}
                mark = position.mark or (None, None, None)
                values |= numbers | dict(zip(_MARK, mark, strict=True))
                values |= {"current_at": now} if position.watermark >= position.latest else {}
            self.fenced(connection, lease, **values)
            feed_id = lease.feed_id
            self._upsert(connection, tables.study, feed_id, effects.studies.values())
            self._upsert(connection, tables.patient, feed_id, effects.patients.values())
            committed = self._commit_failures(connection, feed_id, effects, now)
            self._commit_issues(connection, feed_id, effects)
            self._commit_gaps(connection, feed_id, effects)
            self._commit_flushes(connection, feed_id, effects.flushes)
            self._commit_work(connection, feed_id, effects, now)
        return committed

    def _commit_failures(self, connection: sa.Connection, feed_id: int, effects: Effects, now: datetime) -> Committed:
        """One row for each study or instance, stage and kind, for good: what is resolved and fails again is reopened.

        What an operator has dismissed stays so while it fails for the same reason.
        """
        table = tables.failure
        opened = dismissed = 0
        kept: set[int] = set()
        failures = gathered(effects.failures)
        for failure in failures:
            known = self._known_failure(connection, feed_id, failure)
            values = asdict(failure) | {"last_seen": now, "resolution": None, "note": None}
            heals = values.pop("heals")
            open_before = known is not None and known.status in ATTENTION
            judged = known or self._dismissed_with_others(connection, feed_id, failure)
            if known is not None:
                values["sequence"] = failure.sequence or known.sequence
                if failure.instances > 1 and open_before and failure.study_instance_uid not in effects.reconciled:
                    # A fold has met these alone; a reconcile meets all.
                    more = (failure.sequence or 0) > (known.sequence or 0)
                    values["instances"] = max(known.instances, failure.instances + more * known.instances)
            if judged and judged.status == "dismissed" and (judged.rule, judged.tag) == (failure.rule, failure.tag):
                values |= {"status": "dismissed", "attempts": judged.attempts + 1, "next_retry": None}
                values |= {"resolution": judged.resolution, "note": judged.note}
                dismissed += 1
            else:
                # Another change of the study is no retry: only an attempt whose time had come stretches the pause.
                early = open_before and known.next_retry is not None and known.next_retry > now
                attempts = known.attempts + (not early) if open_before else 1
                pause = timedelta(seconds=_RETRY_PAUSES[min(attempts, len(_RETRY_PAUSES)) - 1])
                due = (known.next_retry if early else now + pause) if heals else None
                values |= {"attempts": attempts, "next_retry": due, "status": "retrying" if due else "open"}
                opened += not open_before
            if known:
                connection.execute(sa.update(table).where(table.c.id == known.id).values(values))
                kept.add(known.id)
            else:
                inserted = connection.execute(sa.insert(table).values(feed_id=feed_id, first_seen=now, **values))
                kept.add((inserted.inserted_primary_key or (0,))[0])
        self._resolve(connection, feed_id, effects.reconciled, now, kept=kept, counted=failures)
        return Committed(opened, failed=len(failures) - dismissed)

    def _resolve(
        self,
        connection: sa.Connection,
        feed_id: int,
        reconciled: dict[str, tuple[str, int]],
        now: datetime,
        *,
        kept: set[int],
        counted: Sequence[Failure],
    ) -> None:
        """What a reconcile has not met again is over; what it has `counted` in one row instead needs none of its own.

        What was dismissed by itself stays so beside the row that counts it.
        """
        table = tables.failure
        many = {
            (one.study_instance_uid, one.kind, one.stage, one.rule, one.tag) for one in counted if one.instances > 1
        }
        columns = (table.c.id, table.c.status, table.c.kind, table.c.stage, table.c.rule, table.c.tag)
        for study_uid, (resolution, cut) in reconciled.items():
            of_study = sa.select(*columns).where(
                table.c.feed_id == feed_id,
                table.c.study_instance_uid == study_uid,
                table.c.status != "resolved",
                table.c.kind != "partition",
                sa.or_(table.c.sequence.is_(None), table.c.sequence <= cut),
            )
            over, gone = set(), set()
            for row in connection.execute(of_study):
                if row.id in kept:
                    continue
                if (study_uid, row.kind, row.stage, row.rule, row.tag) not in many:
                    over.add(row.id)
                elif row.status != "dismissed":
                    gone.add(row.id)
            resolved = {"status": "resolved", "resolution": resolution, "last_seen": now, "next_retry": None}
            for some in _chunks(sorted(gone), 500):
                connection.execute(sa.delete(table).where(table.c.id.in_(some)))
            for some in _chunks(sorted(over), 500):
                connection.execute(sa.update(table).where(table.c.id.in_(some)).values(resolved))

    def _known_failure(self, connection: sa.Connection, feed_id: int, failure: Failure) -> Any:
        """The row of this failure, which no operator changes until it is committed."""
        table = tables.failure
        alike = [
            table.c.feed_id == feed_id,
            table.c.kind == failure.kind,
            table.c.stage == failure.stage,
            table.c.study_instance_uid.is_not_distinct_from(failure.study_instance_uid),
            table.c.series_instance_uid.is_not_distinct_from(failure.series_instance_uid),
            table.c.sop_instance_uid.is_not_distinct_from(failure.sop_instance_uid),
        ]
        if failure.study_instance_uid is None or failure.kind == "partition":
            alike.append(table.c.sequence == failure.sequence)
        if failure.instances > 1:
            alike += [table.c.rule.is_not_distinct_from(failure.rule), table.c.tag.is_not_distinct_from(failure.tag)]
            alike.append(table.c.instances > 1)
        elif failure.sop_instance_uid is None:
            alike.append(table.c.instances == 1)
        return connection.execute(sa.select(table).where(*alike).with_for_update()).first()

    def _dismissed_with_others(self, connection: sa.Connection, feed_id: int, failure: Failure) -> Any:
        """The row by which an operator has dismissed many instances at once, of which this is one."""
        table = tables.failure
        if failure.sop_instance_uid is None:
            return None
        whole = (
            table.c.feed_id == feed_id,
            table.c.kind == failure.kind,
            table.c.stage == failure.stage,
            table.c.study_instance_uid == failure.study_instance_uid,
            table.c.instances > 1,
            table.c.status == "dismissed",
        )
        return connection.execute(sa.select(table).where(*whole).with_for_update()).first()

    def _commit_issues(self, connection: sa.Connection, feed_id: int, effects: Effects) -> None:
        table = tables.issue
        for study_uid in effects.reconciled:
            connection.execute(
                sa.delete(table).where(table.c.feed_id == feed_id, table.c.study_instance_uid == study_uid)
            )
        rows = [
            {"feed_id": feed_id, "study_instance_uid": study_uid, "count": count}
            | dict(zip(("rule", "tag", "vr", "reason"), key, strict=True))
            for study_uid, counts in effects.issues.items()
            for key, count in counts.items()
        ]
        if rows:
            insert = self.insert(table)
            more = {"count": table.c.count + insert.excluded.count}
            connection.execute(insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=more), rows)

    def _commit_gaps(self, connection: sa.Connection, feed_id: int, effects: Effects) -> None:
        table = tables.gap
        rows = [
            {"feed_id": feed_id, "sequence": sequence, "first_missed": since}
            for sequence, since in effects.missed.items()
            if sequence not in effects.closed_gaps
        ]
        if rows:
            connection.execute(self.insert(table).on_conflict_do_nothing(), rows)
        for some in _chunks(sorted(effects.closed_gaps), 500):
            connection.execute(sa.delete(table).where(table.c.feed_id == feed_id, table.c.sequence.in_(some)))

    def _commit_work(self, connection: sa.Connection, feed_id: int, effects: Effects, now: datetime) -> None:
        table = tables.work
        if effects.worked:
            done = sa.update(table).where(table.c.id == sa.bindparam("which"))
            values = {"state": "done", "result": sa.bindparam("outcome"), "finished_at": now}
            failing = self._failing(connection, feed_id, sorted({uid for uid, _ in effects.worked.values()}))
            results = [
                {"which": work_id, "outcome": "failed" if uid in failing else _unless_failed(outcome)}
                for work_id, (uid, outcome) in sorted(effects.worked.items())
            ]
            connection.execute(done.values(values), results)
        if effects.again:
            fixed = {"feed_id": feed_id, "reason": "in doubt", "state": "waiting"}
            rows = [{**fixed, "study_instance_uid": uid, "due_at": due} for uid, due in effects.again.items()]
            connection.execute(sa.insert(table), rows)

    def _commit_flushes(self, connection: sa.Connection, feed_id: int, flushes: list[Flush]) -> None:
        """Into the log, and into its roll-up by the hour, which stays when the log is pruned."""
        if not flushes:
            return
        hours: dict[tuple[Any, ...], Row] = {}
        for one in flushes:
            lag = one.lag_seconds
            key = (one.at.replace(minute=0, second=0, microsecond=0), one.road, one.outcome, lag_within(lag))
            row = hours.setdefault(key, dict.fromkeys(_SUMS, 0))
            sums = (1, one.entries, one.seconds, lag or 0.0)
            row |= {name: row[name] + more for name, more in zip(_SUMS, sums, strict=True)}
            row["longest_lag"] = max(row.get("longest_lag", 0.0), lag or 0.0)
        table = tables.flush_hour
        connection.execute(sa.insert(tables.flush), [{"feed_id": feed_id, **asdict(one)} for one in flushes])
        insert = self.insert(table)
        new, known = insert.excluded, table.c
        more = {name: known[name] + new[name] for name in _SUMS}
        more["longest_lag"] = sa.case((new.longest_lag > known.longest_lag, new.longest_lag), else_=known.longest_lag)
        names = ("hour", "road", "outcome", "lag_within")
        rows = [{"feed_id": feed_id, **dict(zip(names, key, strict=True)), **row} for key, row in hours.items()]
        connection.execute(insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=more), rows)

    # What people ask ------------------------------------------------------------------------------------------------

    def feed(self, name: str) -> Row | None:
        """The feed's row."""
        with self.transaction() as connection:
            row = connection.execute(sa.select(tables.feed).where(tables.feed.c.name == name)).first()
            return plain(row) if row else None

    def now(self) -> datetime:
        """The clock that leases are measured by."""
        with self.transaction() as connection:
            return self._now(connection)

    def counts(self, feed_id: int) -> tuple[dict[str, int], dict[str, int]]:
        """Studies by outcome; failures that are not over by kind."""
        study, failure = tables.study, tables.failure
        with self.transaction() as connection:
            by_outcome = connection.execute(
                sa.select(study.c.outcome, sa.func.count()).where(study.c.feed_id == feed_id).group_by(study.c.outcome)
            )
            outcomes = {row[0]: row[1] for row in by_outcome}
            by_kind = connection.execute(
                sa.select(failure.c.kind, sa.func.count())
                .where(failure.c.feed_id == feed_id, failure.c.status.in_(ATTENTION))
                .group_by(failure.c.kind)
            )
            return outcomes, {row[0]: row[1] for row in by_kind}

    def study_row(self, feed_id: int, study_uid: str) -> Row | None:
        """Everything known of a study."""
        table = tables.study
        with self.transaction() as connection:
            row = connection.execute(
                sa.select(table).where(table.c.feed_id == feed_id, table.c.study_instance_uid == study_uid)
            ).first()
            return plain(row) if row else None

    def failures(
        self,
        feed_id: int,
        *,
        statuses: Sequence[str] = ATTENTION,
        kind: str | None = None,
        study_uid: str | None = None,
        failure_id: int | None = None,
    ) -> list[Row]:
        """Failures, oldest first; of all statuses where none is named."""
        table = tables.failure
        chosen = [table.c.feed_id == feed_id]
        if statuses:
            chosen.append(table.c.status.in_(statuses))
        if failure_id is not None:
            chosen.append(table.c.id == failure_id)
        if kind:
            chosen.append(table.c.kind == kind)
        if study_uid:
            chosen.append(table.c.study_instance_uid == study_uid)
        with self.transaction() as connection:
            return [plain(row) for row in connection.execute(sa.select(table).where(*chosen).order_by(table.c.id))]

    def issues(self, feed_id: int, *, study_uid: str | None = None) -> list[Row]:
        """Issues by rule, tag, VR and reason, with the number of instances that have them."""
        table = tables.issue
        columns = (table.c.rule, table.c.tag, table.c.vr, table.c.reason)
        chosen = [table.c.feed_id == feed_id]
        if study_uid:
            chosen.append(table.c.study_instance_uid == study_uid)
        query = sa.select(*columns, sa.func.sum(table.c.count).label("instances")).where(*chosen)
        with self.transaction() as connection:
            return [plain(row) for row in connection.execute(query.group_by(*columns).order_by(*columns))]

    # Inside ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self, *, alone: bool = False) -> Iterator[sa.Connection]:
        """All of it or nothing.

        `alone`: no other writer from the start, for what reads before it writes (SQLite; PostgreSQL has locks).
        """
        try:
            with self._engine.execution_options(alone=alone).begin() as connection:
                yield connection
        except (sa.exc.IntegrityError, sa.exc.ProgrammingError, sa.exc.DataError):
            raise  # ours, not the database's
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as failure:
            if type(orig := getattr(failure, "orig", None)) is sqlite3.DatabaseError:
                raise errors.Misconfigured([f"database.url: {orig}"]) from None
            cause = str(getattr(failure, "orig", None) or failure).splitlines() or [type(failure).__name__]
            raise errors.Unavailable("database", cause[0]) from failure

    def _now(self, connection: sa.Connection) -> datetime:
        """PostgreSQL's clock, which all workers share; SQLite has no other than ours."""
        if self._engine.dialect.name == "postgresql":
            now: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
            return now.astimezone(UTC)
        return self._clock.now()

    def fenced(self, connection: sa.Connection, lease: Lease, **values: Any) -> None:
        """Update the feed's row, if the lease is still ours. Raises `LeaseLost`."""
        table = tables.feed
        mine = (table.c.id == lease.feed_id, table.c.token == lease.token, table.c.lease_owner == lease.owner)
        if connection.execute(sa.update(table).where(*mine).values(values)).rowcount != 1:
            raise errors.LeaseLost("the lease of the feed went to another worker")

    def insert(self, table: sa.Table) -> Any:
        """An INSERT that knows ON CONFLICT, in the database's own dialect."""
        return (sqlite if self._engine.dialect.name == "sqlite" else postgresql).insert(table)

    def _upsert(
        self, connection: sa.Connection, table: sa.Table, feed_id: int, rows: Iterable[Study] | Iterable[Patient]
    ) -> None:
        values = [{"feed_id": feed_id, **asdict(row)} for row in rows]
        if values:
            insert = self.insert(table)
            changed = {column.name: insert.excluded[column.name] for column in table.c if not column.primary_key}
            connection.execute(
                insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=changed), values
            )


def _unless_failed(outcome: str) -> str:
    """What became of a study none of whose failures is open: those that there are were dismissed."""
    return "unchanged" if outcome == "failed" else outcome


def lag_within(seconds: float | None) -> int:
    """The step of seconds that a lag does not exceed; 0 for no lag, and the largest integer beyond the last step."""
    if seconds is None:
        return 0
    return next((step for step in _LAGS if seconds <= step), 2**31 - 1)


def _patience(url: sa.URL) -> dict[str, int]:
    """Seconds (and milliseconds) after which PostgreSQL's silence is an outage: libpq waits for ever."""
    return {"connect_timeout": 5, "tcp_user_timeout": 15_000} if url.get_backend_name() == "postgresql" else {}


def _check_file(path: str | None) -> None:
    """A database in memory is another one for every connection, and SQLite makes no folder."""
    if not path or path == ":memory:":
        raise errors.Misconfigured(["database.url: state must outlive the process: name a file, sqlite:///state.db"])
    file = Path(path).absolute()
    if not os.path.isdir(file.parent):  # pathlib's raises where a folder above may not be entered
        raise errors.Misconfigured([f"database.url: there is no folder {file.parent} that this user may enter"])
    for one in (file.parent, *([file] if file.exists() else ())):
        if not os.access(one, os.R_OK | os.W_OK):  # SQLite keeps its log beside the file
            raise errors.Misconfigured([f"database.url: {one} can't be read and written by this user"])


def _prepare_sqlite(connection: Any, _: Any) -> None:
    """Readers beside one writer, and a patient wait for the lock."""
    connection.isolation_level = None  # transactions begin below: the driver's own leave out DDL
    cursor = connection.cursor()
    for pragma in ("busy_timeout=4000", "synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    # Kept in the file; of several that meet a new one SQLite lets one switch, and the others do not wait for it.
    with contextlib.suppress(sqlite3.OperationalError):
        cursor.execute("PRAGMA journal_mode=WAL")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("alone") else "BEGIN")


def plain(row: Any) -> Row:
    """By column name. SQLAlchemy's names may be a kind of `str` that orjson takes for no key."""
    return {str(name): value for name, value in row._mapping.items()}


def _without_feed(row: Any) -> Row:
    return {name: value for name, value in row._mapping.items() if name != "feed_id"}


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
