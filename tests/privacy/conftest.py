"""Real stores for the ledger: a SQLite file and PostgreSQL."""

import uuid

import pytest
import sqlalchemy as sa


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request, tmp_path):
    """A fresh, empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger' / 'ledger.db'}"
    name = f"t{uuid.uuid4().hex}"
    url = sa.make_url(request.getfixturevalue("postgres_url")).set(drivername="postgresql+psycopg")
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {name}"))
    return url.update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)
