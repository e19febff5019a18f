"""With real servers: MLflow over HTTP, data and bundle in S3, the ledger in PostgreSQL."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest

from dpldm_core.privacy.ledger import Ledger
from dpldm_core.release.verify import verify_bundle
from tests.tasks.conftest import drawings
from workflows.release import release_pipeline

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def mlflow_server(machine, monkeypatch):
    port = free_port()
    command = [str(Path(sys.executable).with_name("mlflow")), "server", "--workers", "1", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{machine / 'server.db'}"]
    command += ["--artifacts-destination", str(machine / "artifacts")]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    env.pop("MLFLOW_TRACKING_URI")
    server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=machine)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            break
        except OSError:
            time.sleep(0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    yield url
    server.terminate()
    server.wait(20)


@pytest.fixture
def s3(monkeypatch):
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("steward")
    yield filesystem
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def release(dataset, **inputs):
    return release_pipeline(**{"dataset": dataset, "preset": "smoke", "num_samples": 40, "epsilon": 5.0} | inputs)


def test_a_release_on_an_mlflow_server_and_a_postgresql_ledger(mlflow_server, postgres_url, machine, monkeypatch):
    monkeypatch.setenv("DPLDM_LEDGER_URL", postgres_url)
    images, labels = drawings(400)
    np.savez(machine / "x.npz", images=images, labels=labels)
    done = release(str(machine / "x.npz"))
    assert verify_bundle(done.bundle).report.epsilon == pytest.approx(done.epsilon)
    assert Ledger(postgres_url).books().spent(str(machine / "x.npz")) == pytest.approx(done.epsilon, abs=1e-9)
    client = mlflow.MlflowClient(mlflow_server)
    found = client.search_runs([client.get_experiment_by_name("dpldm").experiment_id])
    [parent] = [r for r in found if r.data.tags.get("dpldm.kind") == "release"]
    children = [r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.info.status == "FINISHED" and len(children) == 9
    assert client.get_model_version_by_alias("dpldm-x-npz", "current")
    folder = mlflow.artifacts.download_artifacts("models:/dpldm-x-npz@current", tracking_uri=mlflow_server)
    assert {p.stem for p in Path(folder).iterdir()} == {"decoder", "denoiser", "teacher"}


def test_data_and_bundle_in_s3(s3, machine, ledger):
    images, labels = drawings(400)
    np.savez(machine / "x.npz", images=images, labels=labels)
    s3.put(str(machine / "x.npz"), "steward/scans.npz")
    done = release("s3://steward/scans.npz", out="s3://steward/releases")
    assert done.bundle == f"s3://steward/releases/{done.release_id}"
    assert verify_bundle(done.bundle, strict=True).num_samples == 40
    assert ledger.books().spent("s3://steward/scans.npz") == pytest.approx(done.epsilon, abs=1e-9)
    s3.pipe(f"steward/releases/{done.release_id}/README.md", b"changed")
    from dpldm_core.errors import BundleError

    with pytest.raises(BundleError, match=r"README\.md was changed"):
        verify_bundle(done.bundle)
