"""Work for whoever holds the lease: what operators have asked for, and studies that must be looked at once more.

A job is one call of `replay`, `verify` or `backfill`; its work is one row for each study. Rows are written in small
transactions, so that a worker's commits find their turn between them, and whatever ends the call leaves a job that the
same call takes up again.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import sqlalchemy as sa

from dicomcast import errors
from dicomcast.state import tables
from dicomcast.state.store import ATTENTION, Lease, Store

_URGENCY = ("replay", "verify", "backfill")
"""Whose work comes first."""
TOGETHER = 2000
"""Rows of one transaction at most: others wait no longer than it takes."""
_CANCELLED = "cancelled"
_PASSED_OVER = ("partition",)
"""Kinds of failures that no look at the study can settle."""


@dataclass(frozen=True, slots=True)
class Job:
    """One call of a verb; `scope` says what it was asked for, `held` why it waits for an operator."""

    id: int
    feed_id: int
    verb: str
    scope: str
    requested_at: datetime
    listed: bool
    cursor: str | None
    handover: int | None
    held: str | None


@dataclass(frozen=True, slots=True)
class Work:
    """One study to be reconciled, and the limits of the job that asks for it."""

    id: int
    study_instance_uid: str
    reason: str
    job_id: int | None = None
    per_second: float | None = None
    allow_deletes: int | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is: its studies by state."""

    states: Counter[str]
    held: str | None

    @property
    def done(self) -> int:
        """Studies that are done with."""
        return self.states["done"]

    @property
    def left(self) -> int:
        """Studies that wait for a worker."""
        return self.states["waiting"]


def begin(
    state: Store,
    feed_id: int,
    verb: str,
    scope: str,
    *,
    by: str,
    now: datetime,
    per_second: float | None = None,
    allow_deletes: int | None = None,
) -> Job:
    """The unfinished job of this verb and scope, whose limits are now these, or a new one."""
    table, work = tables.job, tables.work
    limits = {"per_second": per_second, "allow_deletes": allow_deletes, "held": None}
    with state.transaction(alone=True) as connection:
        asked = sa.select(work.c.id).where(work.c.job_id == table.c.id, work.c.state.in_(("listed", "waiting")))
        unfinished = sa.or_(table.c.listed_at.is_(None), asked.exists())
        same = (table.c.feed_id == feed_id, table.c.verb == verb, table.c.scope == scope)
        known = connection.execute(sa.select(table.c.id).where(*same, unfinished).order_by(table.c.id.desc())).first()
        if known is not None:
            connection.execute(sa.update(table).where(table.c.id == known.id).values(limits))
            return _job(connection, known.id)
        new = {"feed_id": feed_id, "verb": verb, "scope": scope, "requested_by": by, "requested_at": now, **limits}
        inserted = connection.execute(sa.insert(table).values(new))
        detail = scope + (f" allow-deletes={allow_deletes}" if allow_deletes is not None else "")
        note(connection, feed_id, who=by, action=verb, detail=detail, now=now)
        return _job(connection, (inserted.inserted_primary_key or (0,))[0])


def note(connection: sa.Connection, feed_id: int, *, who: str, action: str, detail: str, now: datetime) -> None:
    """What an operator did, for good."""
    values = {"feed_id": feed_id, "at": now, "who": who, "action": action, "detail": detail}
    connection.execute(sa.insert(tables.audit).values(values))


def add(
    state: Store, job: Job, studies: Collection[str], *, to_compare: bool = False, cursor: str | None = None
) -> None:
    """Some studies of a job, each once, and how far its listing is with them. Raises `NeedsPerson` if cancelled."""
    work, table = tables.work, tables.job
    rows = [
        {
            "feed_id": job.feed_id,
            "job_id": job.id,
            "study_instance_uid": study_uid,
            "reason": job.verb,
            "state": "listed" if to_compare else "waiting",
        }
        for study_uid in studies
    ]
    with state.transaction(alone=True) as connection:
        if _job(connection, job.id).held == _CANCELLED:
            raise errors.NeedsPerson(f"job {job.id} was cancelled")
        if rows:
            unique = [work.c.job_id, work.c.study_instance_uid]
            connection.execute(state.insert(work).on_conflict_do_nothing(index_elements=unique), rows)
        connection.execute(sa.update(table).where(table.c.id == job.id).values(cursor=cursor))


def listed(state: Store, job: Job, *, now: datetime, whole: bool = False) -> None:
    """All studies of the job are there. With the `whole` archive in it, a feed not yet begun begins at the handover."""
    table, feed = tables.job, tables.feed
    with state.transaction(alone=True) as connection:
        connection.execute(sa.update(table).where(table.c.id == job.id).values(listed_at=now, cursor=None))
        if whole:
            handover = connection.execute(sa.select(table.c.handover).where(table.c.id == job.id)).scalar_one()
            unread = (feed.c.id == job.feed_id, feed.c.watermark.is_(None))
            start = {"first": handover, "watermark": handover, "latest": handover}
            connection.execute(sa.update(feed).where(*unread).values(start))


def hand_over_at(state: Store, job: Job, sequence: int) -> Job:
    """Remember where the feed is to be taken up, before anything is listed."""
    table = tables.job
    with state.transaction(alone=True) as connection:
        connection.execute(sa.update(table).where(table.c.id == job.id).values(handover=sequence))
        return _job(connection, job.id)


def progress(state: Store, job: Job) -> Progress:
    """How far it is."""
    work = tables.work
    query = sa.select(work.c.state, sa.func.count()).where(work.c.job_id == job.id).group_by(work.c.state)
    with state.transaction() as connection:
        states = Counter({row[0]: row[1] for row in connection.execute(query)})
        return Progress(states, _job(connection, job.id).held)


def results(state: Store, job_id: int) -> Counter[str]:
    """How many studies of a job came to which result."""
    work = tables.work
    query = sa.select(work.c.result, sa.func.count()).where(work.c.job_id == job_id, work.c.state == "done")
    with state.transaction() as connection:
        return Counter({row[0]: row[1] for row in connection.execute(query.group_by(work.c.result))})


def sign_of_life(state: Store, feed_id: int) -> tuple[Any, ...]:
    """What moves while a worker is alive and nothing keeps it from its work."""
    feed = tables.feed.c
    with state.transaction() as connection:
        row = connection.execute(sa.select(feed.watermark, feed.lease_until, feed.trouble).where(feed.id == feed_id))
        watermark, until, trouble = row.one()
        return watermark, trouble or until


def cancel(state: Store, feed_id: int, job_id: int, *, by: str, now: datetime) -> int | None:
    """Give up what a job still waits for; how many studies that were, or None where no such job goes on."""
    work, table = tables.work, tables.job
    if job_id not in {one["id"] for one in unfinished(state, feed_id)}:
        return None
    with state.transaction(alone=True) as connection:
        values = {"held": _CANCELLED, "listed_at": sa.func.coalesce(table.c.listed_at, now)}
        connection.execute(sa.update(table).where(table.c.id == job_id).values(values))
        note(connection, feed_id, who=by, action="cancel", detail=f"job {job_id}", now=now)
    open_ = (work.c.job_id == job_id, work.c.state.in_(("listed", "waiting")))
    some = sa.select(work.c.id).where(*open_).limit(TOGETHER).scalar_subquery()
    given_up = 0
    while True:
        with state.transaction(alone=True) as connection:
            gone = sa.update(work).where(work.c.id.in_(some)).values(state="cancelled", finished_at=now)
            count = connection.execute(gone).rowcount
        given_up += count
        if count < TOGETHER:
            return given_up


def unfinished(state: Store, feed_id: int) -> list[dict[str, Any]]:
    """Jobs that are not done with: what they are, who asked, and how many studies they still wait for."""
    table, work = tables.job, tables.work
    left = (
        sa.select(work.c.job_id, sa.func.count().label("left"))
        .where(work.c.feed_id == feed_id, work.c.state.in_(("listed", "waiting")))
        .group_by(work.c.job_id)
        .subquery()
    )
    count = sa.func.coalesce(left.c.left, 0)
    query = (
        sa.select(table, count.label("left"))
        .outerjoin_from(table, left, left.c.job_id == table.c.id)
        .where(table.c.feed_id == feed_id, sa.or_(table.c.listed_at.is_(None), count > 0))
        .order_by(table.c.id)
    )
    with state.transaction() as connection:
        return [{str(name): value for name, value in row._mapping.items()} for row in connection.execute(query)]


# Which studies --------------------------------------------------------------------------------------------------------


def failing(state: Store, feed_id: int, *chosen: Any, limit: int | None = None) -> list[str]:
    """Studies with a failure that is not over and fits; what was tried longest ago comes first."""
    table = tables.failure
    query = (
        sa.select(table.c.study_instance_uid)
        .where(
            table.c.feed_id == feed_id,
            table.c.status.in_(ATTENTION),
            table.c.study_instance_uid.is_not(None),
            table.c.kind.not_in(_PASSED_OVER),
            *chosen,
        )
        .group_by(table.c.study_instance_uid)
        .order_by(sa.func.min(table.c.last_seen))
        .limit(limit)
    )
    with state.transaction() as connection:
        return list(connection.execute(query).scalars())


def known(state: Store, feed_id: int, *chosen: Any, after: str = "") -> Iterator[str]:
    """Studies that have a row and are not deleted, in the order of their UIDs, in many short readings."""
    table = tables.study
    while True:
        query = (
            sa.select(table.c.study_instance_uid)
            .where(
                table.c.feed_id == feed_id,
                table.c.study_instance_uid > after,
                table.c.outcome != "deleted",
                *chosen,
            )
            .order_by(table.c.study_instance_uid)
            .limit(TOGETHER)
        )
        with state.transaction() as connection:
            some = list(connection.execute(query).scalars())
        yield from some
        if len(some) < TOGETHER:
            return
        after = some[-1]


# Comparisons ----------------------------------------------------------------------------------------------------------


def to_compare(state: Store, job: Job, *, limit: int) -> list[Work]:
    """The next studies of a job that are to be compared."""
    work = tables.work
    query = (
        sa.select(work.c.id, work.c.study_instance_uid, work.c.reason)
        .where(work.c.job_id == job.id, work.c.state == "listed")
        .order_by(work.c.id)
        .limit(limit)
    )
    with state.transaction() as connection:
        return [Work(*row) for row in connection.execute(query)]


def compared(state: Store, results: Sequence[tuple[int, str, str | None]], *, now: datetime) -> None:
    """What comparisons came to: id of the work, a word, and details as JSON."""
    work = tables.work
    values = {"state": "done", "result": sa.bindparam("outcome"), "detail": sa.bindparam("about"), "finished_at": now}
    done = sa.update(work).where(work.c.id == sa.bindparam("which")).values(values)
    with state.transaction(alone=True) as connection:
        connection.execute(done, [{"which": one, "outcome": word, "about": detail} for one, word, detail in results])


def different(state: Store, job: Job) -> Iterator[Any]:
    """Work of a job whose comparison found a difference: id, study UID, state, result and details."""
    work, after = tables.work, 0
    while True:
        query = (
            sa.select(work.c.id, work.c.study_instance_uid, work.c.state, work.c.result, work.c.detail)
            .where(work.c.job_id == job.id, work.c.detail.is_not(None), work.c.id > after)
            .order_by(work.c.id)
            .limit(TOGETHER)
        )
        with state.transaction() as connection:
            rows = connection.execute(query).all()
        yield from rows
        if len(rows) < TOGETHER:
            return
        after = rows[-1].id


def put_back(state: Store, job: Job, *, as_: str) -> None:
    """Work that was found to differ: `listed` to be compared once more, `waiting` to be reconciled."""
    work, rows = tables.work, different(state, job)
    while some := [row.id for row in islice(rows, 500)]:
        chosen = work.c.id.in_(some)
        with state.transaction(alone=True) as connection:
            connection.execute(sa.update(work).where(chosen).values(state=as_, finished_at=None))


# For the worker -------------------------------------------------------------------------------------------------------


def due(
    state: Store, lease: Lease, *, now: datetime, passing_over: Collection[int], only: int | None, limit: int
) -> list[Work]:
    """Work whose time has come, the most urgent first; `passing_over`: jobs that have had enough for now."""
    work, job = tables.work, tables.job
    waiting = sa.and_(work.c.feed_id == lease.feed_id, work.c.state == "waiting")
    columns = (work.c.id, work.c.study_instance_uid, work.c.reason)
    waits = sa.select(work.c.id).where(work.c.job_id == job.c.id, work.c.state == "waiting").exists()
    running = sa.select(job).where(job.c.feed_id == lease.feed_id, job.c.held.is_(None), waits)
    found: list[Work] = []
    with state.transaction() as connection:
        if only is None:
            own = sa.select(*columns).where(waiting, work.c.job_id.is_(None), work.c.due_at <= now).limit(limit)
            found += [Work(*row) for row in connection.execute(own)]
        rows = [row for row in connection.execute(running) if row.id not in passing_over and only in (None, row.id)]
        # One job after the other: what others have in store need not be looked through.
        for row in sorted(rows, key=lambda row: (_URGENCY.index(row.verb), row.id)):
            of_job = sa.select(*columns).where(work.c.job_id == row.id, work.c.state == "waiting")
            some = connection.execute(of_job.order_by(work.c.id).limit(limit - len(found)))
            found += [Work(*one, row.id, row.per_second, row.allow_deletes) for one in some]
    return found


def hold(state: Store, job_id: int, reason: str) -> None:
    """Stop a job until an operator says more; one that was cancelled stays so."""
    table = tables.job
    with state.transaction(alone=True) as connection:
        connection.execute(sa.update(table).where(table.c.id == job_id, table.c.held.is_(None)).values(held=reason))


def _job(connection: sa.Connection, job_id: int) -> Job:
    row = connection.execute(sa.select(tables.job).where(tables.job.c.id == job_id)).one()
    listed = row.listed_at is not None
    return Job(row.id, row.feed_id, row.verb, row.scope, row.requested_at, listed, row.cursor, row.handover, row.held)
