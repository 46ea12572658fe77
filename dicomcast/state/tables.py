"""The tables, in SQLAlchemy Core. Alembic migrations make them; a test compares the two."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

metadata = MetaData()


class Instant(TypeDecorator[datetime]):
    """A moment in UTC; always aware in Python, whatever the database keeps."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        """SQLite forgets the zone."""
        if value is None:
            return None
        moment: datetime = value if value.tzinfo else value.replace(tzinfo=UTC)
        return moment.astimezone(UTC)


_Id = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only in an INTEGER primary key."""

feed = Table(
    "feed",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(512), nullable=False, unique=True, comment="dicom.feed, or the service's URL"),
    Column("url", String(1024), nullable=False),
    Column("first", BigInteger, comment="reading began after this sequence; absent: it has not begun"),
    Column("watermark", BigInteger, comment="every sequence up to here is settled, or is a gap"),
    Column("mark_study_uid", String(64), comment="the entry at the watermark, to know the feed again"),
    Column("mark_sop_uid", String(64)),
    Column("mark_timestamp", String(64)),
    Column("latest", BigInteger, nullable=False, comment="the highest sequence seen"),
    Column("seen_at", Instant, comment="when the service was last asked for it"),
    Column("current_at", Instant, comment="when the watermark last stood at the highest sequence"),
    Column("token", BigInteger, nullable=False, comment="fencing token: grows with every change of lease owner"),
    Column("lease_owner", String(128)),
    Column("lease_until", Instant),
    Column("trouble", Text, comment="what the worker waits for; absent: nothing"),
)

gap = Table(
    "gap",
    metadata,
    Column("feed_id", _Id, ForeignKey("feed.id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, comment="below the highest read, not seen yet"),
    Column("first_missed", Instant, nullable=False),
)

study = Table(
    "study",
    metadata,
    Column("feed_id", _Id, ForeignKey("feed.id"), primary_key=True),
    Column("study_instance_uid", String(64), primary_key=True),
    Column("outcome", String(16), nullable=False, comment="synced, failed, deleted, cancelled, shared"),
    Column("imaging_study", String(64), comment="FHIR id"),
    Column("version", String(64), comment="FHIR version that we wrote last"),
    Column("patient", String(64), comment="FHIR id"),
    Column("series", Integer, nullable=False),
    Column("instances", Integer, nullable=False),
    Column("first_sequence", BigInteger, nullable=False),
    Column("last_sequence", BigInteger, nullable=False),
    Column("mapping_digest", String(64), nullable=False, comment="of the mapping that it was last written by"),
    Column("synced_at", Instant, nullable=False, comment="when it was last settled"),
    Column("modality", String(64), comment="modalities of its series, sorted, / between"),
    Column("month", String(7), comment="YYYY-MM in UTC in which its first change was recorded by the feed"),
    Index("study_by_month", "feed_id", "month", "modality", "outcome"),
    Index("study_by_digest", "feed_id", "mapping_digest", "outcome", "synced_at"),
)

patient = Table(
    "patient",
    metadata,
    Column("feed_id", _Id, ForeignKey("feed.id"), primary_key=True),
    Column("fhir_id", String(64), primary_key=True),
    Column("ours", Boolean, nullable=False, comment="created by us and edited by nobody else"),
    Column("version", String(64), comment="FHIR version that we wrote last"),
    Column("sequence", BigInteger, nullable=False, comment="of the change whose demographics it holds"),
)

failure = Table(
    "failure",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("feed_id", _Id, ForeignKey("feed.id"), nullable=False),
    Column("status", String(16), nullable=False, comment="open, retrying, resolved, dismissed"),
    Column("kind", String(32), nullable=False),
    Column("stage", String(16), nullable=False, comment="read, map, validate, write"),
    Column("study_instance_uid", String(64)),
    Column("series_instance_uid", String(64)),
    Column("sop_instance_uid", String(64)),
    Column("sequence", BigInteger, comment="of the change that failed last"),
    Column("rule", String(64)),
    Column("tag", String(64)),
    Column("message", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("first_seen", Instant, nullable=False),
    Column("last_seen", Instant, nullable=False),
    Column("next_retry", Instant),
    Column("resolution", String(32), comment="mapped, deleted, dismissed"),
    Column("instances", Integer, nullable=False, server_default="1", comment="alike in one study; from 20 on one row"),
    Column("note", Text, comment="why an operator dismissed it"),
    Index("failure_by_study", "feed_id", "study_instance_uid", "status"),
    Index("failure_by_status", "feed_id", "status", "next_retry"),
)

issue = Table(
    "issue",
    metadata,
    Column("feed_id", _Id, ForeignKey("feed.id"), primary_key=True),
    Column("study_instance_uid", String(64), primary_key=True),
    Column("rule", String(64), primary_key=True),
    Column("tag", String(64), primary_key=True),
    Column("vr", String(2), primary_key=True),
    Column("reason", String(128), primary_key=True),
    Column("count", Integer, nullable=False, comment="instances concerned"),
    Index("issue_by_rule", "feed_id", "rule", "tag", "vr", "reason", "count"),
)

job = Table(
    "job",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("feed_id", _Id, ForeignKey("feed.id"), nullable=False),
    Column("verb", String(16), nullable=False, comment="replay, verify, backfill"),
    Column("scope", Text, nullable=False, comment="what was asked for: the same again takes an unfinished job up"),
    Column("requested_by", String(128), nullable=False),
    Column("requested_at", Instant, nullable=False),
    Column("listed_at", Instant, comment="when all its studies were in `work`; absent: listing goes on at `cursor`"),
    Column("cursor", Text, comment="how far the listing came"),
    Column("handover", BigInteger, comment="newest sequence when listing began: what comes later is the feed's own"),
    Column("per_second", Float, comment="most studies a second; absent: as many as live traffic leaves room for"),
    Column("allow_deletes", Integer, comment="most studies that it may take out of FHIR; absent: 20, or 5 %"),
    Column("held", Text, comment="why it waits for an operator; absent: it does not"),
    Index("job_by_scope", "feed_id", "verb"),
)

work = Table(
    "work",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("feed_id", _Id, ForeignKey("feed.id"), nullable=False),
    Column("job_id", _Id, ForeignKey("job.id"), comment="absent: the worker asked for it itself"),
    Column("study_instance_uid", String(64), nullable=False),
    Column("reason", String(32), nullable=False, comment="replay, verify, backfill, in doubt"),
    Column("state", String(16), nullable=False, comment="listed (to be compared), waiting, done, cancelled"),
    Column("priority", Integer, nullable=False, comment="the lowest first"),
    Column("due_at", Instant, comment="not before this"),
    Column("result", String(16), comment="created, updated, unchanged, deleted, failed; of a comparison its kind"),
    Column("detail", Text, comment="of a comparison: names of the elements that differ, as JSON"),
    Column("finished_at", Instant),
    Index("work_by_job", "job_id", "study_instance_uid", unique=True),
    Index("work_by_state", "feed_id", "state", "priority", "id"),
    Index("work_by_study", "feed_id", "study_instance_uid"),
)

flush = Table(
    "flush",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("feed_id", _Id, ForeignKey("feed.id"), nullable=False),
    Column("at", Instant, nullable=False, comment="when the study was settled"),
    Column("study_instance_uid", String(64), nullable=False),
    Column("road", String(16), nullable=False, comment="fold, reconcile"),
    Column("reason", String(32), comment="why it was reconciled"),
    Column("outcome", String(16), nullable=False, comment="created, updated, unchanged, deleted, failed"),
    Column("entries", Integer, nullable=False, comment="change feed entries that this settled"),
    Column("seconds", Float, nullable=False, comment="from the lane's start to its end"),
    Column("lag_seconds", Float, comment="from the oldest of these entries in the feed to its effect in FHIR"),
    Index("flush_by_time", "feed_id", "at"),
    Index("flush_by_lag", "feed_id", "lag_seconds"),
)

flush_hour = Table(
    "flush_hour",
    metadata,
    Column("feed_id", _Id, ForeignKey("feed.id"), primary_key=True),
    Column("hour", Instant, primary_key=True, comment="its beginning"),
    Column("road", String(16), primary_key=True),
    Column("outcome", String(16), primary_key=True),
    Column("lag_within", Integer, primary_key=True, comment="seconds: 1, 2, 5, 10, ...; 0: no entry of the feed"),
    Column("flushes", Integer, nullable=False),
    Column("entries", BigInteger, nullable=False),
    Column("seconds", Float, nullable=False, comment="sum"),
    Column("lag_seconds", Float, nullable=False, comment="sum"),
    Column("longest_lag", Float, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("feed_id", _Id, ForeignKey("feed.id")),
    Column("at", Instant, nullable=False),
    Column("who", String(128), nullable=False),
    Column("action", String(32), nullable=False, comment="replay, dismiss, state set, ..."),
    Column("detail", Text, nullable=False),
    Index("audit_by_time", "feed_id", "at"),
)
