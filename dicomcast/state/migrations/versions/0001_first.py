"""Positions, studies, patients, failures and issues."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_Instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "feed",
        sa.Column("id", _Id, primary_key=True, comment="number of the feed: feed_id elsewhere"),
        sa.Column("name", sa.String(512), nullable=False, unique=True, comment="dicom.feed, or the service's URL"),
        sa.Column("url", sa.String(1024), nullable=False, comment="base URL of the DICOM service"),
        sa.Column("first", sa.BigInteger, comment="reading began after this sequence; absent: it has not begun"),
        sa.Column("watermark", sa.BigInteger, comment="every sequence up to here is settled, or is a gap"),
        sa.Column("mark_study_uid", sa.String(64), comment="the entry at the watermark, to know the feed again"),
        sa.Column("mark_sop_uid", sa.String(64), comment="its SOP Instance UID"),
        sa.Column("mark_timestamp", sa.String(64), comment="its time, as the feed writes it"),
        sa.Column("latest", sa.BigInteger, nullable=False, comment="the highest sequence seen"),
        sa.Column("seen_at", _Instant, comment="when the service was last asked for it"),
        sa.Column("current_at", _Instant, comment="when the watermark last stood at the highest sequence"),
        sa.Column(
            "token", sa.BigInteger, nullable=False, comment="fencing token: grows with every change of lease owner"
        ),
        sa.Column("lease_owner", sa.String(128), comment="worker that syncs the feed; absent: none"),
        sa.Column("lease_until", _Instant, comment="free from then on, if it is not renewed"),
        sa.Column("trouble", sa.Text, comment="what the worker waits for; absent: nothing"),
        comment="change feeds, where each stands, and who holds its lease",
    )
    op.create_table(
        "gap",
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), primary_key=True, comment="feed that it is of"),
        sa.Column("sequence", sa.BigInteger, primary_key=True, comment="below the highest read, not seen yet"),
        sa.Column("first_missed", _Instant, nullable=False, comment="since when it is missed"),
        comment="sequences that may still come",
    )
    op.create_table(
        "study",
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), primary_key=True, comment="feed that it is of"),
        sa.Column("study_instance_uid", sa.String(64), primary_key=True, comment="Study Instance UID"),
        sa.Column("outcome", sa.String(16), nullable=False, comment="synced, failed, deleted, cancelled, shared"),
        sa.Column("imaging_study", sa.String(64), comment="FHIR id"),
        sa.Column("version", sa.String(64), comment="FHIR version that we wrote last"),
        sa.Column("patient", sa.String(64), comment="FHIR id"),
        sa.Column("series", sa.Integer, nullable=False, comment="series in FHIR"),
        sa.Column("instances", sa.Integer, nullable=False, comment="instances in FHIR"),
        sa.Column("first_sequence", sa.BigInteger, nullable=False, comment="of its changes, the first that we know"),
        sa.Column("last_sequence", sa.BigInteger, nullable=False, comment="of its changes, the last that is settled"),
        sa.Column(
            "mapping_digest", sa.String(64), nullable=False, comment="of the mapping that it was last written by"
        ),
        sa.Column("synced_at", _Instant, nullable=False, comment="when it was last settled"),
        comment="studies, and what became of each",
    )
    op.create_table(
        "patient",
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), primary_key=True, comment="feed that it is of"),
        sa.Column("fhir_id", sa.String(64), primary_key=True, comment="FHIR id"),
        sa.Column("ours", sa.Boolean, nullable=False, comment="created by us and edited by nobody else"),
        sa.Column("version", sa.String(64), comment="FHIR version that we wrote last"),
        sa.Column("sequence", sa.BigInteger, nullable=False, comment="of the change whose demographics it holds"),
        comment="Patients that studies are linked to",
    )
    op.create_table(
        "failure",
        sa.Column("id", _Id, primary_key=True, comment="number of the failure"),
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), nullable=False, comment="feed that it is of"),
        sa.Column("status", sa.String(16), nullable=False, comment="open, retrying, resolved, dismissed"),
        sa.Column("kind", sa.String(32), nullable=False, comment="stable word; the README lists them"),
        sa.Column("stage", sa.String(16), nullable=False, comment="read, map, validate, write"),
        sa.Column("study_instance_uid", sa.String(64), comment="absent: of an entry that names none"),
        sa.Column("series_instance_uid", sa.String(64), comment="absent: of the whole study"),
        sa.Column("sop_instance_uid", sa.String(64), comment="absent: of the whole study, or of several instances"),
        sa.Column("sequence", sa.BigInteger, comment="of the change that failed last"),
        sa.Column("rule", sa.String(64), comment="id of the mapping rule"),
        sa.Column("tag", sa.String(64), comment="DICOM tag, 8 characters"),
        sa.Column("message", sa.Text, nullable=False, comment="for people; never holds an attribute's value"),
        sa.Column(
            "attempts", sa.Integer, nullable=False, comment="tries so far; what is met before its retry is due is none"
        ),
        sa.Column("first_seen", _Instant, nullable=False, comment="when it was met first"),
        sa.Column("last_seen", _Instant, nullable=False, comment="when it was met last, or was over"),
        sa.Column("next_retry", _Instant, comment="when it is tried again; absent: not by itself"),
        sa.Column("resolution", sa.String(32), comment="mapped, deleted, dismissed"),
        comment="what failed, open and over",
    )
    op.create_index("failure_by_study", "failure", ["feed_id", "study_instance_uid", "status"])
    op.create_index("failure_by_status", "failure", ["feed_id", "status", "next_retry"])
    op.create_table(
        "issue",
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), primary_key=True, comment="feed that it is of"),
        sa.Column("study_instance_uid", sa.String(64), primary_key=True, comment="Study Instance UID"),
        sa.Column("rule", sa.String(64), primary_key=True, comment="id of the mapping rule"),
        sa.Column("tag", sa.String(64), primary_key=True, comment="DICOM tag, 8 characters"),
        sa.Column("vr", sa.String(2), primary_key=True, comment="value representation"),
        sa.Column("reason", sa.String(128), primary_key=True, comment="why"),
        sa.Column("count", sa.Integer, nullable=False, comment="instances concerned"),
        comment="what was left out or guessed",
    )
