"""Studies that somebody has asked for, as whoever holds the lease takes them from the database."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from dicomcast.state import tables
from dicomcast.state.store import Lease, Store

_URGENCY = ("replay", "verify", "backfill")
"""Whose work comes first."""


@dataclass(frozen=True, slots=True)
class Work:
    """One study to be reconciled, and the limits of the job that asks for it."""

    id: int
    study_instance_uid: str
    reason: str
    job_id: int | None = None
    per_second: float | None = None
    allow_deletes: int | None = None


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


def results(state: Store, job_id: int) -> Counter[str]:
    """How many studies of a job came to which result."""
    work = tables.work
    query = sa.select(work.c.result, sa.func.count()).where(work.c.job_id == job_id, work.c.state == "done")
    with state.transaction() as connection:
        return Counter({row[0]: row[1] for row in connection.execute(query.group_by(work.c.result))})
