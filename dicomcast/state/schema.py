"""The schema's versions, by Alembic: an empty database is made by whoever comes first, any other step is a person's."""

import functools
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from dicomcast import errors

_SCRIPTS = Path(__file__).with_name("migrations")


def newest() -> str:
    """The revision that this version of dicomcast works with."""
    head = _scripts().get_current_head()
    assert head is not None
    return head


def current(connection: sa.Connection) -> str | None:
    """The database's revision; None where it has no schema of ours."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: sa.Connection) -> tuple[str | None, str]:
    """Bring the schema to the newest revision; raises `Incompatible` where it is ahead of us."""
    before = current(connection)
    _refuse_unknown(before)
    config = _config()
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
    if revision is not None and revision not in {script.revision for script in _scripts().walk_revisions()}:
        raise errors.Incompatible(
            f"the database's schema is at {revision}, which this version does not know: a newer dicomcast made it"
        )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    return config


def _scripts() -> ScriptDirectory:
    return _directory(str(_SCRIPTS))


@functools.cache
def _directory(_: str) -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())
