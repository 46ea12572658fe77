"""What operators do to the state itself: dismiss failures, set and move positions, prune. The audit keeps who and what.

A position is set under the feed's lease: never beside a worker. Only a backfill of all begins a feed without one.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

import pydantic
import sqlalchemy as sa
from sqlalchemy.sql import ColumnElement

from dicomcast import errors
from dicomcast.state import tables
from dicomcast.state.jobs import note
from dicomcast.state.store import ATTENTION, Lease, Row, Store, plain

_TOGETHER = 5000
"""Rows that are pruned in one transaction."""


_OF_ENTRIES = tuple(name for name, kind in errors.KINDS.items() if kind.about == "change feed entry")

_Text = Annotated[str, pydantic.Field(max_length=64)]


class Position(pydantic.BaseModel):
    """Where a feed is, as `state export` writes it. Sequences; `mark` is the entry at the watermark."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    feed: str = pydantic.Field(min_length=1, max_length=512)
    url: str = pydantic.Field(max_length=1024)
    first: int = pydantic.Field(ge=0, lt=2**63)
    watermark: int = pydantic.Field(ge=0, lt=2**63)
    latest: int = pydantic.Field(ge=0, lt=2**63)
    mark: tuple[_Text, _Text, _Text] | None = None
    gaps: list[Annotated[int, pydantic.Field(gt=0)]] = pydantic.Field(default_factory=list, max_length=1_000_000)

    @pydantic.model_validator(mode="after")
    def _possible(self) -> "Position":
        if not self.first <= self.watermark <= self.latest:
            raise ValueError("first, watermark and latest must ascend")
        if len(set(self.gaps)) < len(self.gaps) or max(self.gaps, default=0) > self.watermark:
            raise ValueError("gaps must be below the watermark, each once")
        return self


def position(state: Store, feed_id: int) -> Position | None:
    """Where the feed is; None where it was never begun. Raises `Incompatible` where that can't be read."""
    table = tables.gap
    with state.transaction() as connection:
        feed = connection.execute(sa.select(tables.feed).where(tables.feed.c.id == feed_id)).one()
        found = state.read_position(connection, feed)
        gaps = sa.select(table.c.sequence).where(table.c.feed_id == feed_id).order_by(table.c.sequence)
        missed = list(connection.execute(gaps).scalars())
    if found is None:
        return None
    return Position(
        feed=feed.name,
        url=feed.url,
        first=found.first,
        watermark=found.watermark,
        latest=found.latest,
        mark=found.mark,
        gaps=missed,
    )


def set_position(state: Store, lease: Lease, wanted: Position, *, action: str, who: str, now: datetime) -> None:
    """Put a feed where `wanted` says. Where that skips entries, no study counts as fully read any more."""
    table, gap = tables.feed, tables.gap
    with state.transaction(alone=True) as connection:
        feed = connection.execute(sa.select(table).where(table.c.id == lease.feed_id)).one()
        before = feed.watermark if isinstance(feed.watermark, int) else None
        skips = before is None or wanted.watermark > before
        mark = wanted.mark or (None, None, None)
        values: Row = {
            "first": wanted.watermark if skips else wanted.first,
            "watermark": wanted.watermark,
            "latest": wanted.latest,
            "current_at": None,
            **dict(zip(("mark_study_uid", "mark_sop_uid", "mark_timestamp"), mark, strict=True)),
        }
        state.fenced(connection, lease, **values)
        connection.execute(sa.delete(gap).where(gap.c.feed_id == lease.feed_id))
        rows = [{"feed_id": lease.feed_id, "sequence": one, "first_missed": now} for one in wanted.gaps]
        if rows:
            connection.execute(sa.insert(gap), rows)
        detail = f"watermark {feed.watermark} -> {wanted.watermark}"
        note(connection, lease.feed_id, who=who, action=action, detail=detail, now=now)


def dismiss(
    state: Store,
    feed_id: int,
    *,
    ids: Sequence[int] = (),
    kind: str | None = None,
    study_uid: str | None = None,
    reason: str,
    who: str,
    now: datetime,
) -> list[int]:
    """Failures that nobody will mend, and why: they are open no more. Their ids."""
    table = tables.failure
    chosen: list[ColumnElement[bool]] = [table.c.feed_id == feed_id, table.c.status.in_(ATTENTION)]
    chosen += [table.c.id.in_(sorted(ids))] if ids else []
    chosen += [table.c.kind == kind] if kind else []
    chosen += [table.c.study_instance_uid == study_uid] if study_uid else []
    values = {"status": "dismissed", "resolution": "dismissed", "note": reason, "next_retry": None}
    with state.transaction(alone=True) as connection:
        dismissed = sa.update(table).where(*chosen).values(values).returning(table.c.id)
        found = sorted(connection.execute(dismissed).scalars())
        if found:
            named = ", ".join(map(str, found[:50])) + (f" and {len(found) - 50} more" if len(found) > 50 else "")
            note(connection, feed_id, who=who, action="dismiss", detail=f"failures {named}: {reason}", now=now)
    return found


def audited(state: Store, feed_id: int, *, limit: int) -> list[Row]:
    """The latest actions of operators, the newest first."""
    table = tables.audit
    query = sa.select(table.c.at, table.c.who, table.c.action, table.c.detail).where(table.c.feed_id == feed_id)
    with state.transaction() as connection:
        rows = connection.execute(query.order_by(table.c.id.desc()).limit(limit))
        return [plain(row) for row in rows]


def prune(state: Store, feed_id: int, *, before: datetime, who: str, now: datetime) -> dict[str, int]:
    """Remove what was over before a moment, a little at a time; rows by table.

    Flushes (their sums by the hour stay), resolved failures, dismissed ones of entries that come no more, finished work
    with its jobs, and rows of deleted studies.
    """
    flush, failure, work, job, study = tables.flush, tables.failure, tables.work, tables.job, tables.study
    left = sa.select(work.c.id).where(work.c.job_id == job.c.id).exists()
    other = work.alias()
    waits = sa.select(other.c.job_id).where(other.c.feed_id == feed_id, other.c.state.in_(("listed", "waiting")))
    unlisted = sa.select(job.c.id).where(job.c.feed_id == feed_id, job.c.listed_at.is_(None))
    going_on = sa.and_(
        work.c.job_id.is_not(None),
        sa.or_(work.c.job_id.in_(waits.where(other.c.job_id.is_not(None))), work.c.job_id.in_(unlisted)),
    )
    over: dict[sa.Table, list[Any]] = {
        flush: [flush.c.at < before],
        failure: [
            sa.or_(failure.c.status == "resolved", failure.c.kind.in_(_OF_ENTRIES) & (failure.c.status == "dismissed")),
            failure.c.last_seen < before,
        ],
        work: [work.c.state.in_(("done", "cancelled")), work.c.finished_at < before, ~going_on],
        job: [job.c.requested_at < before, job.c.listed_at.is_not(None), ~left],
        study: [study.c.outcome == "deleted", study.c.synced_at < before],
    }
    counts: dict[str, int] = {}
    for table, conditions in over.items():
        key = table.c.study_instance_uid if table is study else table.c.id
        some = sa.select(key).where(table.c.feed_id == feed_id, *conditions).limit(_TOGETHER).scalar_subquery()
        counts[table.name] = 0
        while True:
            with state.transaction(alone=True) as connection:
                gone = connection.execute(sa.delete(table).where(table.c.feed_id == feed_id, key.in_(some))).rowcount
            counts[table.name] += gone
            if gone < _TOGETHER:
                break
    with state.transaction(alone=True) as connection:
        detail = f"before {before:%Y-%m-%dT%H:%M:%SZ}: " + ", ".join(
            f"{name} {count}" for name, count in counts.items()
        )
        note(connection, feed_id, who=who, action="prune", detail=detail, now=now)
    return counts


def read_exported(text: str | bytes) -> Position:
    """A position as `state export` wrote it. Raises `Misconfigured` for anything else."""
    try:
        return Position.model_validate_json(text)
    except pydantic.ValidationError as invalid:
        problems = invalid.errors(include_input=False, include_url=False)
        named = [".".join(map(str, problem["loc"])) or "it" for problem in problems]
        raise errors.Misconfigured(
            [f"position: {name}: {problem['msg']}" for name, problem in zip(named, problems, strict=True)]
        ) from None
