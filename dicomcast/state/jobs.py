"""Jobs: what operators have asked for.

A job is one call of `replay`, `verify` or `backfill`; its work is one row for each study. Rows are written in small
transactions, so that a worker's commits find their turn between them, and whatever ends the call leaves a job that the
same call takes up again.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import sqlalchemy as sa

from dicomcast import errors
from dicomcast.state import tables
from dicomcast.state.store import ATTENTION, Store, plain
from dicomcast.state.waiting import Work

TOGETHER = 2000
"""Rows of one transaction at most: others wait no longer than it takes."""
CANCELLED = "cancelled"
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
    listed_at: datetime | None
    cursor: str | None
    handover: int | None
    held: str | None


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
    """The unfinished job of this verb and scope, whose limits are now these, or a new one; the audit says who asked."""
    table, work, feed = tables.job, tables.work, tables.feed
    limits = {"per_second": per_second, "allow_deletes": allow_deletes, "held": None}
    detail = scope + (f" allow-deletes={allow_deletes}" if allow_deletes is not None else "")
    with state.transaction(alone=True) as connection:
        connection.execute(sa.select(feed.c.id).where(feed.c.id == feed_id).with_for_update())  # two at once are one
        note(connection, feed_id, who=by, action=verb, detail=detail, now=now)
        asked = sa.select(work.c.id).where(work.c.job_id == table.c.id, work.c.state.in_(("listed", "waiting")))
        unfinished = sa.or_(table.c.listed_at.is_(None), asked.exists())
        same = (table.c.feed_id == feed_id, table.c.verb == verb, table.c.scope == scope)
        known = connection.execute(sa.select(table.c.id).where(*same, unfinished).order_by(table.c.id.desc())).first()
        if known is not None:
            connection.execute(sa.update(table).where(table.c.id == known.id).values(limits))
            return _job(connection, known.id)
        new = {"feed_id": feed_id, "verb": verb, "scope": scope, "requested_by": by, "requested_at": now, **limits}
        inserted = connection.execute(sa.insert(table).values(new))
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
        _refuse_cancelled(connection, job)
        if rows:
            unique = [work.c.job_id, work.c.study_instance_uid]
            connection.execute(state.insert(work).on_conflict_do_nothing(index_elements=unique), rows)
        connection.execute(sa.update(table).where(table.c.id == job.id).values(cursor=cursor))


def listed(state: Store, job: Job, *, now: datetime, whole: bool = False) -> None:
    """All studies of the job are there. With the `whole` archive in it, a feed not yet begun begins at the handover.

    Raises `NeedsPerson` if cancelled.
    """
    table, feed = tables.job, tables.feed
    with state.transaction(alone=True) as connection:
        _refuse_cancelled(connection, job)
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


def sign_of_life(state: Store, feed_id: int) -> tuple[Any, ...]:
    """What moves while a worker is alive and nothing keeps it from its work."""
    feed = tables.feed.c
    with state.transaction() as connection:
        row = connection.execute(sa.select(feed.watermark, feed.lease_until, feed.trouble).where(feed.id == feed_id))
        watermark, until, trouble = row.one()
        return watermark, trouble or until


def cancel(state: Store, feed_id: int, job_id: int, *, by: str, now: datetime) -> int | None:
    """Give up what a job still waits for; how many studies that were, or None where no such job goes on.

    Raises `NeedsPerson` where the feed was begun with it: what the job has not brought in yet, nobody would.
    """
    work, table, feed = tables.work, tables.job, tables.feed
    job = next((one for one in unfinished(state, feed_id) if one["id"] == job_id), None)
    if job is None:
        return None
    with state.transaction(alone=True) as connection:
        begun = sa.select(feed.c.id).where(feed.c.id == feed_id, feed.c.first == job["handover"], feed.c.first > 0)
        if job["verb"] == "backfill" and job["listed_at"] is not None and connection.execute(begun).first():
            raise errors.NeedsPerson(
                f"the feed begins at {job['handover']}, since job {job_id} brings in what was there before; to give "
                "it up all the same, have the feed read from its beginning first: `dicomcast state set --watermark 0`"
            )
        values = {"held": CANCELLED, "listed_at": sa.func.coalesce(table.c.listed_at, now)}
        connection.execute(sa.update(table).where(table.c.id == job_id).values(values))
        note(connection, feed_id, who=by, action="cancel", detail=f"job {job_id}", now=now)
    open_ = (work.c.job_id == job_id, work.c.state.in_(("listed", "waiting")))
    # In the order in which a worker commits them: each waits for the other, and neither for ever.
    some = sa.select(work.c.id).where(*open_).order_by(work.c.id).limit(TOGETHER).with_for_update().scalar_subquery()
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
        return [plain(row) for row in connection.execute(query)]


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


def pending(state: Store, work_ids: Iterable[int]) -> None:
    """Work that seemed to differ, and of which the worker is about to hear: no difference."""
    work, ids = tables.work, iter(work_ids)
    while some := list(islice(ids, 500)):
        with state.transaction(alone=True) as connection:
            values = {"result": "pending", "detail": None}
            connection.execute(sa.update(work).where(work.c.id.in_(some)).values(values))


def compare_again(state: Store, job: Job, *, before: datetime) -> None:
    """Have what was compared before then compared once more."""
    work = tables.work
    old = (work.c.job_id == job.id, work.c.state == "done", work.c.finished_at < before)
    with state.transaction(alone=True) as connection:
        connection.execute(sa.update(work).where(*old).values(state="listed", detail=None, finished_at=None))


def allow(state: Store, job: Job, deletes: int) -> None:
    """Let a job take so many studies out of FHIR."""
    table = tables.job
    with state.transaction(alone=True) as connection:
        connection.execute(sa.update(table).where(table.c.id == job.id).values(allow_deletes=deletes))


def put_back(state: Store, job: Job, *, as_: str) -> None:
    """Work that was found to differ: `listed` to be compared once more, `waiting` to be reconciled."""
    work, rows = tables.work, different(state, job)
    while some := [row.id for row in islice(rows, 500)]:
        chosen = work.c.id.in_(some)
        with state.transaction(alone=True) as connection:
            connection.execute(sa.update(work).where(chosen).values(state=as_, finished_at=None))


def _refuse_cancelled(connection: sa.Connection, job: Job) -> None:
    if _job(connection, job.id).held == CANCELLED:
        raise errors.NeedsPerson(f"job {job.id} was cancelled")


def _job(connection: sa.Connection, job_id: int) -> Job:
    row = connection.execute(sa.select(tables.job).where(tables.job.c.id == job_id)).one()
    return Job(
        row.id, row.feed_id, row.verb, row.scope, row.requested_at, row.listed_at, row.cursor, row.handover, row.held
    )
