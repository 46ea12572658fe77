"""Runs migrations on the connection that `dicomcast.state.schema` hands over."""

from alembic import context

from dicomcast.state import tables

context.configure(connection=context.config.attributes["connection"], target_metadata=tables.metadata)
with context.begin_transaction():
    context.run_migrations()
