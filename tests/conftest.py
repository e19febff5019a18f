"""Before flytekit is imported: no cache of earlier runs, and every temporary file in the tests' own folder."""

import os
import tempfile

os.environ["FLYTE_LOCAL_CACHE_ENABLED"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="dpldm-tests-")
tempfile.tempdir = None
os.environ["OMP_NUM_THREADS"] = "1"  # short operations on busy cores: a second thread makes them slower
