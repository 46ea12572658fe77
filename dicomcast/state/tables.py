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
    text,
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
    Column("id", _Id, primary_key=True, comment="number of the feed: feed_id elsewhere"),
    Column("name", String(512), nullable=False, unique=True, comment="dicom.feed, or the service's URL"),
    Column("url", String(1024), nullable=False, comment="base URL of the DICOM service"),
    Column("first", BigInteger, comment="reading began after this sequence; absent: it has not begun"),
    Column("watermark", BigInteger, comment="every sequence up to here is settled, or is a gap"),
    Column("mark_study_uid", String(64), comment="the entry at the watermark, to know the feed again"),
    Column("mark_sop_uid", String(64), comment="its SOP Instance UID"),
    Column("mark_timestamp", String(64), comment="its time, as the feed writes it"),
    Column("latest", BigInteger, nullable=False, comment="the highest sequence seen"),
    Column("seen_at", Instant, comment="when the service was last asked for it"),
    Column("current_at", Instant, comment="when the watermark last stood at the highest sequence"),
    Column("token", BigInteger, nullable=False, comment="fencing token: grows with every change of lease owner"),
    Column("lease_owner", String(128), comment="worker that syncs the feed; absent: none"),
    Column("lease_until", Instant, comment="free from then on, if it is not renewed"),
    Column("trouble", Text, comment="what the worker waits for; absent: nothing"),
    comment="change feeds, where each stands, and who holds its lease",
)

gap = Table(
    "gap",
    metadata,
    Column("feed_id", _Id, ForeignKey("feed.id"), primary_key=True, comment="feed that it is of"),
    Column("sequence", BigInteger, primary_key=True, comment="below the highest read, not seen yet"),
    Column("first_missed", Instant, nullable=False, comment="since when it is missed"),
    comment="sequences that may still come",
)

study = Table(
    "study",
    metadata,
    Column("feed_id", _Id, ForeignKey("feed.id"), primary_key=True, comment="feed that it is of"),
    Column("study_instance_uid", String(64), primary_key=True, comment="Study Instance UID"),
    Column("outcome", String(16), nullable=False, comment="synced, failed, deleted, cancelled, shared"),
    Column("imaging_study", String(64), comment="FHIR id"),
    Column("version", String(64), comment="FHIR version that we wrote last"),
    Column("patient", String(64), comment="FHIR id"),
    Column("series", Integer, nullable=False, comment="series in FHIR"),
    Column("instances", Integer, nullable=False, comment="instances in FHIR"),
    Column("first_sequence", BigInteger, nullable=False, comment="of its changes, the first that we know"),
    Column("last_sequence", BigInteger, nullable=False, comment="of its changes, the last that is settled"),
    Column("mapping_digest", String(64), nullable=False, comment="of the mapping that it was last written by"),
    Column("synced_at", Instant, nullable=False, comment="when it was last settled"),
    Column("modality", String(64), comment="modalities of its series, sorted, / between"),
    Column("month", String(7), comment="YYYY-MM in UTC in which the feed recorded its first change; absent: none yet"),
    Index("study_by_outcome", "feed_id", "outcome", "month", "modality"),
    Index("study_by_digest", "feed_id", "mapping_digest", "outcome", "synced_at"),
    comment="studies, and what became of each",
)

patient = Table(
    "patient",
    metadata,
    Column("feed_id", _Id, ForeignKey("feed.id"), primary_key=True, comment="feed that it is of"),
    Column("fhir_id", String(64), primary_key=True, comment="FHIR id"),
    Column("ours", Boolean, nullable=False, comment="created by us and edited by nobody else"),
    Column("version", String(64), comment="FHIR version that we wrote last"),
    Column("sequence", BigInteger, nullable=False, comment="of the change whose demographics it holds"),
    Column("study", String(64), comment="Study Instance UID of that change; of several without one the greatest wins"),
    comment="Patients that studies are linked to",
)

failure = Table(
    "failure",
    metadata,
    Column("id", _Id, primary_key=True, comment="number of the failure"),
    Column("feed_id", _Id, ForeignKey("feed.id"), nullable=False, comment="feed that it is of"),
    Column("status", String(16), nullable=False, comment="open, retrying, resolved, dismissed"),
    Column("kind", String(32), nullable=False, comment="stable word; the README lists them"),
    Column("stage", String(16), nullable=False, comment="read, map, validate, write"),
    Column("study_instance_uid", String(64), comment="absent: of an entry that names none"),
    Column("series_instance_uid", String(64), comment="absent: of the whole study"),
    Column("sop_instance_uid", String(64), comment="absent: of the whole study, or of several instances"),
    Column("sequence", BigInteger, comment="of the change that failed last"),
    Column("rule", String(64), comment="id of the mapping rule"),
    Column("tag", String(64), comment="DICOM tag, 8 characters"),
    Column("message", Text, nullable=False, comment="for people; never holds an attribute's value"),
    Column("attempts", Integer, nullable=False, comment="tries so far; what is met before its retry is due is none"),
    Column("first_seen", Instant, nullable=False, comment="when it was met first"),
    Column("last_seen", Instant, nullable=False, comment="when it was met last, or was over"),
    Column("next_retry", Instant, comment="when it is tried again; absent: not by itself"),
    Column("resolution", String(32), comment="mapped, deleted, dismissed"),
    Column("instances", Integer, nullable=False, server_default="1", comment="alike in one study; from 20 on one row"),
    Column("note", Text, comment="why an operator dismissed it"),
    Index("failure_by_study", "feed_id", "study_instance_uid", "status"),
    Index("failure_by_status", "feed_id", "status", "next_retry"),
    comment="what failed, open and over",
)

issue = Table(
    "issue",
    metadata,
    Column("feed_id", _Id, ForeignKey("feed.id"), primary_key=True, comment="feed that it is of"),
    Column("study_instance_uid", String(64), primary_key=True, comment="Study Instance UID"),
    Column("rule", String(64), primary_key=True, comment="id of the mapping rule"),
    Column("tag", String(64), primary_key=True, comment="DICOM tag, 8 characters"),
    Column("vr", String(2), primary_key=True, comment="value representation"),
    Column("reason", String(128), primary_key=True, comment="why"),
    Column("count", Integer, nullable=False, comment="instances concerned"),
    Index("issue_by_rule", "feed_id", "rule", "tag", "vr", "reason", "count"),
    comment="what was left out or guessed",
)

job = Table(
    "job",
    metadata,
    Column("id", _Id, primary_key=True, comment="number of the job"),
    Column("feed_id", _Id, ForeignKey("feed.id"), nullable=False, comment="feed that it is of"),
    Column("verb", String(16), nullable=False, comment="replay, verify, backfill"),
    Column("scope", Text, nullable=False, comment="what was asked for: the same again takes an unfinished job up"),
    Column("requested_by", String(128), nullable=False, comment="who started it"),
    Column("requested_at", Instant, nullable=False, comment="when"),
    Column("listed_at", Instant, comment="when all its studies were in `work`; absent: listing goes on at `cursor`"),
    Column("cursor", Text, comment="how far the listing came"),
    Column(
        "handover", BigInteger, comment="a little below the newest sequence when listing began: the feed goes on there"
    ),
    Column("per_second", Float, comment="most studies a second; absent: as many as live traffic leaves room for"),
    Column("allow_deletes", Integer, comment="most studies that it may take out of FHIR; absent: 20, or 5 %"),
    Column("held", Text, comment="why it waits for an operator; absent: it does not"),
    Index("job_by_scope", "feed_id", "verb"),
    comment="jobs that people started",
)

_DIFFERS = text("detail IS NOT NULL")

work = Table(
    "work",
    metadata,
    Column("id", _Id, primary_key=True, comment="number of the work, in order of coming"),
    Column("feed_id", _Id, ForeignKey("feed.id"), nullable=False, comment="feed that it is of"),
    Column("job_id", _Id, ForeignKey("job.id"), comment="absent: the worker asked for it itself"),
    Column("study_instance_uid", String(64), nullable=False, comment="Study Instance UID"),
    Column("reason", String(32), nullable=False, comment="replay, verify, backfill, in doubt"),
    Column("state", String(16), nullable=False, comment="listed (to be compared), waiting, done, cancelled"),
    Column("due_at", Instant, comment="not before this"),
    Column("result", String(16), comment="created, updated, unchanged, deleted, failed; of a comparison its kind"),
    Column("detail", Text, comment="of a comparison: names of the elements that differ, as JSON"),
    Column("finished_at", Instant, comment="when it was done or cancelled"),
    Index("work_by_study", "job_id", "study_instance_uid", unique=True),
    Index("work_by_job", "job_id", "state", "id"),
    Index("work_by_state", "feed_id", "state", "job_id"),
    Index("work_that_differs", "job_id", "id", sqlite_where=_DIFFERS, postgresql_where=_DIFFERS),
    comment="studies that are to be looked at without a change in the feed",
)

flush = Table(
    "flush",
    metadata,
    Column("id", _Id, primary_key=True, comment="number of the settling"),
    Column("feed_id", _Id, ForeignKey("feed.id"), nullable=False, comment="feed that it is of"),
    Column("at", Instant, nullable=False, comment="when the study was settled"),
    Column("study_instance_uid", String(64), nullable=False, comment="Study Instance UID"),
    Column("road", String(16), nullable=False, comment="fold, reconcile"),
    Column("reason", String(32), comment="why it was reconciled"),
    Column("outcome", String(16), nullable=False, comment="created, updated, unchanged, deleted, failed"),
    Column("entries", Integer, nullable=False, comment="change feed entries that this settled"),
    Column("seconds", Float, nullable=False, comment="from the lane's start to its end"),
    Column("lag_seconds", Float, comment="from the oldest of these entries in the feed to its effect in FHIR"),
    Index("flush_by_time", "feed_id", "at"),
    Index("flush_by_lag", "feed_id", "lag_seconds", "at"),
    comment="settlings of studies, each of them; old ones are pruned",
)

flush_hour = Table(
    "flush_hour",
    metadata,
    Column("feed_id", _Id, ForeignKey("feed.id"), primary_key=True, comment="feed that it is of"),
    Column("hour", Instant, primary_key=True, comment="its beginning"),
    Column("road", String(16), primary_key=True, comment="fold, reconcile"),
    Column("outcome", String(16), primary_key=True, comment="created, updated, unchanged, deleted, failed"),
    Column("lag_within", Integer, primary_key=True, comment="seconds: 1, 2, 5, 10, ...; 0: no entry of the feed"),
    Column("flushes", Integer, nullable=False, comment="how many"),
    Column("entries", BigInteger, nullable=False, comment="change feed entries that they settled"),
    Column("seconds", Float, nullable=False, comment="sum of seconds"),
    Column("lag_seconds", Float, nullable=False, comment="sum of lags in seconds"),
    Column("longest_lag", Float, nullable=False, comment="seconds"),
    comment="settlings of studies, summed up by the hour; they stay",
)

audit = Table(
    "audit",
    metadata,
    Column("id", _Id, primary_key=True, comment="number of the action"),
    Column("feed_id", _Id, ForeignKey("feed.id"), comment="feed that it concerns; absent: all"),
    Column("at", Instant, nullable=False, comment="when"),
    Column("who", String(128), nullable=False, comment="user, and the machine"),
    Column("action", String(32), nullable=False, comment="replay, dismiss, state set, ..."),
    Column("detail", Text, nullable=False, comment="what was asked for"),
    Index("audit_by_time", "feed_id", "at"),
    comment="what operators did",
)
