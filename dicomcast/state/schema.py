"""The schema's versions, by Alembic: an empty database is made by whoever comes first, any other step is a person's.

Alembic is imported for a step, and not for a look: it is a sixth of the program's start.
"""

from pathlib import Path

import sqlalchemy as sa

from dicomcast import errors

_SCRIPTS = Path(__file__).with_name("migrations")


def newest() -> str:
    """The revision that this version of dicomcast works with."""
    return _revisions()[-1]


def current(connection: sa.Connection) -> str | None:
    """The database's revision; None where it has no schema of ours."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return revision


def upgrade(connection: sa.Connection) -> tuple[str | None, str]:
    """Bring the schema to the newest revision; raises `Incompatible` where it is ahead of us."""
    from alembic import command
    from alembic.config import Config

    before = current(connection)
    _refuse_unknown(before)
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    return before, newest()


def prepare(connection: sa.Connection) -> None:
    """Make the tables of an empty database; refuse one that is behind or ahead."""
    revision = current(connection)
    _refuse_unknown(revision)
    if revision is None:
        if connection.dialect.name == "postgresql":
            # Two workers that meet an empty database: the second waits here, and then finds the tables.
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(482193001)"))
        if current(connection) is None:
            upgrade(connection)
    elif revision != newest():
        raise errors.Incompatible(
            f"the database's schema is at {revision}, this version needs {newest()}: run `dicomcast db upgrade`"
        )


def _refuse_unknown(revision: str | None) -> None:
    if revision is not None and revision not in _revisions():
        raise errors.Incompatible(
            f"the database's schema is at {revision}, which this version does not know: a newer dicomcast made it"
        )


def _revisions() -> list[str]:
    """All that this version knows, oldest first: a file for each, whose name begins with it."""
    return sorted(path.name.split("_")[0] for path in (_SCRIPTS / "versions").glob("[0-9]*.py"))
