"""The tables, in SQLAlchemy Core. Alembic migrations make them; a test compares the two."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
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
    Column("outcome", String(16), nullable=False, comment="synced, failed, deleted, cancelled"),
    Column("imaging_study", String(64), comment="FHIR id"),
    Column("version", String(64), comment="FHIR version that we wrote last"),
    Column("patient", String(64), comment="FHIR id"),
    Column("series", Integer, nullable=False),
    Column("instances", Integer, nullable=False),
    Column("first_sequence", BigInteger, nullable=False),
    Column("last_sequence", BigInteger, nullable=False),
    Column("mapping_digest", String(64), nullable=False),
    Column("synced_at", Instant, nullable=False),
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
)
