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
        sa.Column("id", _Id, primary_key=True),
        sa.Column("name", sa.String(512), nullable=False, unique=True),
        sa.Column("url", sa.String(1024), nullable=False),
        sa.Column("first", sa.BigInteger),
        sa.Column("watermark", sa.BigInteger),
        sa.Column("mark_study_uid", sa.String(64)),
        sa.Column("mark_sop_uid", sa.String(64)),
        sa.Column("mark_timestamp", sa.String(64)),
        sa.Column("latest", sa.BigInteger, nullable=False),
        sa.Column("seen_at", _Instant),
        sa.Column("current_at", _Instant),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("lease_owner", sa.String(128)),
        sa.Column("lease_until", _Instant),
        sa.Column("trouble", sa.Text),
    )
    op.create_table(
        "gap",
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("first_missed", _Instant, nullable=False),
    )
    op.create_table(
        "study",
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), primary_key=True),
        sa.Column("study_instance_uid", sa.String(64), primary_key=True),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("imaging_study", sa.String(64)),
        sa.Column("version", sa.String(64)),
        sa.Column("patient", sa.String(64)),
        sa.Column("series", sa.Integer, nullable=False),
        sa.Column("instances", sa.Integer, nullable=False),
        sa.Column("first_sequence", sa.BigInteger, nullable=False),
        sa.Column("last_sequence", sa.BigInteger, nullable=False),
        sa.Column("mapping_digest", sa.String(64), nullable=False),
        sa.Column("synced_at", _Instant, nullable=False),
    )
    op.create_table(
        "patient",
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), primary_key=True),
        sa.Column("fhir_id", sa.String(64), primary_key=True),
        sa.Column("ours", sa.Boolean, nullable=False),
        sa.Column("version", sa.String(64)),
        sa.Column("sequence", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "failure",
        sa.Column("id", _Id, primary_key=True),
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("study_instance_uid", sa.String(64)),
        sa.Column("series_instance_uid", sa.String(64)),
        sa.Column("sop_instance_uid", sa.String(64)),
        sa.Column("sequence", sa.BigInteger),
        sa.Column("rule", sa.String(64)),
        sa.Column("tag", sa.String(64)),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("first_seen", _Instant, nullable=False),
        sa.Column("last_seen", _Instant, nullable=False),
        sa.Column("next_retry", _Instant),
        sa.Column("resolution", sa.String(32)),
    )
    op.create_index("failure_by_study", "failure", ["feed_id", "study_instance_uid", "status"])
    op.create_index("failure_by_status", "failure", ["feed_id", "status", "next_retry"])
    op.create_table(
        "issue",
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), primary_key=True),
        sa.Column("study_instance_uid", sa.String(64), primary_key=True),
        sa.Column("rule", sa.String(64), primary_key=True),
        sa.Column("tag", sa.String(64), primary_key=True),
        sa.Column("vr", sa.String(2), nullable=False),
        sa.Column("reason", sa.String(128), primary_key=True),
        sa.Column("count", sa.Integer, nullable=False),
    )
