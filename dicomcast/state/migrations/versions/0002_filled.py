"""Whether the elements of a study that we only fill are still as we filled them."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column(
        "study",
        sa.Column(
            "filled",
            sa.Boolean,
            nullable=False,
            server_default=sa.true(),
            comment="elements of owner `fill` are ours: nobody else has set them",
        ),
    )
