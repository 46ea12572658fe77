"""Jobs and their work, the log of flushes, the audit, and views for those who report."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_Instant = sa.DateTime(timezone=True)

_VIEWS = (
    """
    CREATE VIEW v_study AS
    SELECT feed.name AS feed, study.study_instance_uid, study.outcome, study.modality, study.month, study.series,
        study.instances, study.imaging_study, study.version, study.patient, study.first_sequence, study.last_sequence,
        study.mapping_digest, study.synced_at,
        (SELECT count(*) FROM failure WHERE failure.feed_id = study.feed_id
            AND failure.study_instance_uid = study.study_instance_uid
            AND failure.status IN ('open', 'retrying')) AS failures
    FROM study JOIN feed ON feed.id = study.feed_id
    """,
    """
    CREATE VIEW v_failure AS
    SELECT feed.name AS feed, failure.id, failure.status, failure.kind, failure.stage, failure.study_instance_uid,
        failure.series_instance_uid, failure.sop_instance_uid, failure.sequence, failure.rule, failure.tag,
        failure.message, failure.instances, failure.attempts, failure.first_seen, failure.last_seen,
        failure.next_retry, failure.resolution, failure.note, study.modality
    FROM failure JOIN feed ON feed.id = failure.feed_id
        LEFT JOIN study ON study.feed_id = failure.feed_id AND study.study_instance_uid = failure.study_instance_uid
    """,
    """
    CREATE VIEW v_flush AS
    SELECT feed.name AS feed, flush_hour.hour, flush_hour.road, flush_hour.outcome, flush_hour.lag_within,
        flush_hour.flushes, flush_hour.entries, flush_hour.seconds, flush_hour.lag_seconds, flush_hour.longest_lag
    FROM flush_hour JOIN feed ON feed.id = flush_hour.feed_id
    """,
    """
    CREATE VIEW v_lag AS
    SELECT feed.name AS feed, feed.url, feed.watermark, feed.latest, feed.latest - feed.watermark AS lag_entries,
        feed.current_at, feed.seen_at, feed.trouble, feed.lease_owner, feed.lease_until, coalesce(gaps.gaps, 0) AS gaps
    FROM feed LEFT JOIN (SELECT feed_id, count(*) AS gaps FROM gap GROUP BY feed_id) AS gaps ON gaps.feed_id = feed.id
    """,
)


def upgrade() -> None:
    op.add_column("study", sa.Column("modality", sa.String(64), comment="modalities of its series, sorted, / between"))
    op.add_column(
        "study",
        sa.Column(
            "month",
            sa.String(7),
            comment="YYYY-MM in UTC in which the feed recorded its first change; absent: none yet",
        ),
    )
    op.create_index("study_by_outcome", "study", ["feed_id", "outcome", "month", "modality"])
    op.create_index("study_by_digest", "study", ["feed_id", "mapping_digest", "outcome", "synced_at"])
    op.add_column(
        "failure",
        sa.Column(
            "instances",
            sa.Integer,
            nullable=False,
            server_default="1",
            comment="alike in one study; from 20 on one row",
        ),
    )
    op.add_column(
        "patient",
        sa.Column(
            "study",
            sa.String(64),
            comment="Study Instance UID of that change; of several without one the greatest wins",
        ),
    )
    op.add_column("failure", sa.Column("note", sa.Text, comment="why an operator dismissed it"))
    op.create_index("issue_by_rule", "issue", ["feed_id", "rule", "tag", "vr", "reason", "count"])
    op.create_table(
        "job",
        sa.Column("id", _Id, primary_key=True, comment="number of the job"),
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), nullable=False, comment="feed that it is of"),
        sa.Column("verb", sa.String(16), nullable=False, comment="replay, verify, backfill"),
        sa.Column(
            "scope", sa.Text, nullable=False, comment="what was asked for: the same again takes an unfinished job up"
        ),
        sa.Column("requested_by", sa.String(128), nullable=False, comment="who started it"),
        sa.Column("requested_at", _Instant, nullable=False, comment="when"),
        sa.Column(
            "listed_at", _Instant, comment="when all its studies were in `work`; absent: listing goes on at `cursor`"
        ),
        sa.Column("cursor", sa.Text, comment="how far the listing came"),
        sa.Column(
            "handover",
            sa.BigInteger,
            comment="a little below the newest sequence when listing began: the feed goes on there",
        ),
        sa.Column(
            "per_second", sa.Float, comment="most studies a second; absent: as many as live traffic leaves room for"
        ),
        sa.Column("allow_deletes", sa.Integer, comment="most studies that it may take out of FHIR; absent: 20, or 5 %"),
        sa.Column("held", sa.Text, comment="why it waits for an operator; absent: it does not"),
        comment="jobs that people started",
    )
    op.create_index("job_by_scope", "job", ["feed_id", "verb"])
    op.create_table(
        "work",
        sa.Column("id", _Id, primary_key=True, comment="number of the work, in order of coming"),
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), nullable=False, comment="feed that it is of"),
        sa.Column("job_id", _Id, sa.ForeignKey("job.id"), comment="absent: the worker asked for it itself"),
        sa.Column("study_instance_uid", sa.String(64), nullable=False, comment="Study Instance UID"),
        sa.Column("reason", sa.String(32), nullable=False, comment="replay, verify, backfill, in doubt"),
        sa.Column("state", sa.String(16), nullable=False, comment="listed (to be compared), waiting, done, cancelled"),
        sa.Column("due_at", _Instant, comment="not before this"),
        sa.Column(
            "result",
            sa.String(16),
            comment="created, updated, unchanged, deleted, failed; of a comparison its kind",
        ),
        sa.Column("detail", sa.Text, comment="of a comparison: names of the elements that differ, as JSON"),
        sa.Column("finished_at", _Instant, comment="when it was done or cancelled"),
        comment="studies that are to be looked at without a change in the feed",
    )
    op.create_index("work_by_study", "work", ["job_id", "study_instance_uid"], unique=True)
    op.create_index("work_by_job", "work", ["job_id", "state", "id"])
    op.create_index("work_by_state", "work", ["feed_id", "state", "job_id"])
    differs = sa.text("detail IS NOT NULL")
    op.create_index("work_that_differs", "work", ["job_id", "id"], sqlite_where=differs, postgresql_where=differs)
    op.create_table(
        "flush",
        sa.Column("id", _Id, primary_key=True, comment="number of the settling"),
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), nullable=False, comment="feed that it is of"),
        sa.Column("at", _Instant, nullable=False, comment="when the study was settled"),
        sa.Column("study_instance_uid", sa.String(64), nullable=False, comment="Study Instance UID"),
        sa.Column("road", sa.String(16), nullable=False, comment="fold, reconcile"),
        sa.Column("reason", sa.String(32), comment="why it was reconciled"),
        sa.Column("outcome", sa.String(16), nullable=False, comment="created, updated, unchanged, deleted, failed"),
        sa.Column("entries", sa.Integer, nullable=False, comment="change feed entries that this settled"),
        sa.Column("seconds", sa.Float, nullable=False, comment="from the lane's start to its end"),
        sa.Column(
            "lag_seconds", sa.Float, comment="from the oldest of these entries in the feed to its effect in FHIR"
        ),
        comment="settlings of studies, each of them; old ones are pruned",
    )
    op.create_index("flush_by_time", "flush", ["feed_id", "at"])
    op.create_index("flush_by_lag", "flush", ["feed_id", "lag_seconds", "at"])
    op.create_table(
        "flush_hour",
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), primary_key=True, comment="feed that it is of"),
        sa.Column("hour", _Instant, primary_key=True, comment="its beginning"),
        sa.Column("road", sa.String(16), primary_key=True, comment="fold, reconcile"),
        sa.Column("outcome", sa.String(16), primary_key=True, comment="created, updated, unchanged, deleted, failed"),
        sa.Column(
            "lag_within", sa.Integer, primary_key=True, comment="seconds: 1, 2, 5, 10, ...; 0: no entry of the feed"
        ),
        sa.Column("flushes", sa.Integer, nullable=False, comment="how many"),
        sa.Column("entries", sa.BigInteger, nullable=False, comment="change feed entries that they settled"),
        sa.Column("seconds", sa.Float, nullable=False, comment="sum of seconds"),
        sa.Column("lag_seconds", sa.Float, nullable=False, comment="sum of lags in seconds"),
        sa.Column("longest_lag", sa.Float, nullable=False, comment="seconds"),
        comment="settlings of studies, summed up by the hour; they stay",
    )
    op.create_table(
        "audit",
        sa.Column("id", _Id, primary_key=True, comment="number of the action"),
        sa.Column("feed_id", _Id, sa.ForeignKey("feed.id"), comment="feed that it concerns; absent: all"),
        sa.Column("at", _Instant, nullable=False, comment="when"),
        sa.Column("who", sa.String(128), nullable=False, comment="user, and the machine"),
        sa.Column("action", sa.String(32), nullable=False, comment="replay, dismiss, state set, ..."),
        sa.Column("detail", sa.Text, nullable=False, comment="what was asked for"),
        comment="what operators did",
    )
    op.create_index("audit_by_time", "audit", ["feed_id", "at"])
    for view in _VIEWS:
        op.execute(view)
