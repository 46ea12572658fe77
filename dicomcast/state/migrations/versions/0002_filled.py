"""Which elements of a study that we only fill are as we filled them; none of those that are there already."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column(
        "study",
        sa.Column(
            "filled",
            sa.Text,
            nullable=False,
            server_default="",
            comment="elements of owner `fill` that nobody else has set, by name",
        ),
    )
