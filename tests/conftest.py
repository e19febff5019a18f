"""Before flytekit is imported: no cache of earlier runs, and every temporary file in the test's own folder."""

import os
import tempfile

os.environ["FLYTE_LOCAL_CACHE_ENABLED"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="dpldm-tests-")
tempfile.tempdir = None
