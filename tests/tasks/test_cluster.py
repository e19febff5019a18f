"""Packaging, registration, and the packaged workflow run task by task, each in its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from dpldm_core.privacy.ledger import Ledger
from dpldm_core.release.verify import verify_bundle
from tests.tasks.cluster import Cluster, NodeFailedError, Package

ROOT = Path(__file__).resolve().parents[2]
PYFLYTE = str(Path(sys.executable).with_name("pyflyte"))
IMAGES = ["--image", "dpldm/cpu:t", "--image", "cpu=dpldm/cpu:t", "--image", "gpu=dpldm/gpu:t"]
GPU_TASKS = {
    "tasks.autoencoder.train_autoencoder",
    "tasks.diffusion.train_diffusion",
    "tasks.teacher.train_teacher",
    "tasks.evaluation.evaluate",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    archive = tmp_path_factory.mktemp("package") / "dpldm.tgz"
    command = [PYFLYTE, "--pkgs", "workflows", "package", *IMAGES, "-f", "-o", str(archive)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return Package.load(archive)


def test_register_dry_run_works_offline():
    command = [PYFLYTE, "--config", "flyte.config", "register", "--dry-run", "--copy", "none", "--version", "t"]
    done = subprocess.run([*command, *IMAGES, "workflows"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "release_pipeline" in done.stdout, done.stdout + done.stderr


def test_every_task_names_its_image_and_the_heavy_ones_a_gpu(package):
    for name, task in package.tasks.items():
        gpu = name in GPU_TASKS or "sample_shard" in name
        assert task.container.image == ("dpldm/gpu:t" if gpu else "dpldm/cpu:t"), name
        requested = {r.name: r.value for r in task.container.resources.requests}
        assert (requested.get(2) == "1") == gpu, f"{name}: {requested}"  # 2 = GPU in flyteidl
        assert task.extended_resources.gpu_accelerator.device == ("nvidia-tesla-a100" if gpu else ""), name


def test_caching_covers_the_code_and_never_the_ledger(package):
    for name, task in package.tasks.items():
        books = name.rsplit(".", 1)[1] in (
            "open_release",
            "close_failed_release",
            "close_failed_sweep",
            "publish",
            "resample",
            "audit_stages",
            "check_sweep",
            "release_each",
            "write_curve",
        )
        assert task.metadata.discoverable == (not books), f"{name}: a cached task would not book, or not write"
    versions = {t.metadata.discovery_version for t in package.tasks.values() if t.metadata.discoverable}
    assert len(versions) == 1 and len(versions.pop()) == 16


def test_stages_in_order_and_a_failure_node(package):
    workflow = package.workflows["workflows.release.release_pipeline"]
    assert workflow.failure_node.task_node.reference_id.name == "tasks.closing.close_failed_release"
    sweep = package.workflows["workflows.sweep.sweep_pipeline"]
    assert sweep.failure_node.task_node.reference_id.name == "tasks.closing.close_failed_sweep"
    upstream = {n.id: set(n.upstream_node_ids) for n in workflow.nodes}
    kinds = {n.id: n.WhichOneof("target") for n in workflow.nodes}
    assert list(kinds.values()).count("array_node") == 1
    assert (
        upstream["n1"] == {"n0"} and upstream["n2"] >= {"n1"} and upstream["n3"] >= {"n2"} and upstream["n4"] >= {"n3"}
    )


def cluster(package, machine, **more):
    env = {
        "DPLDM_LEDGER_URL": f"sqlite:///{machine / 'ledger.db'}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{machine / 'mlflow.db'}",
        "HOME": str(machine / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return Cluster(package, machine / "store", more.pop("execution_id", "e1"), ROOT, env, **more)


def test_a_release_by_processes_of_their_own_survives_a_killed_stage(package, machine, own_data):
    """Every task is one process. Stage 2 is killed at its first checkpoint and goes on from there: one mechanism.

    Stage 1 is killed before it has one: Flyte names the place where it would lie all the same.
    """
    config = machine / "c.json"
    config.write_text(json.dumps({"performance": {"checkpoint_every": 1}, "diffusion": {"dp_sgd": {"num_steps": 6}}}))
    inputs = {"dataset": own_data, "preset": "smoke", "num_samples": 20, "epsilon": 5.0, "delta": 1e-5}
    inputs |= {"latent_mechanism": "dp_sgd", "budget_epsilon": 0.0, "out": str(machine / "out"), "config": str(config)}
    inputs |= {"publish_metrics": True}
    killed = "tasks.autoencoder.train_autoencoder", "tasks.diffusion.train_diffusion"
    run = cluster(package, machine, kill_at_once=killed[0], kill_first_attempt_of=killed[1])
    done = run.run("workflows.release.release_pipeline", inputs)
    assert [run.attempts.count((task, 1)) for task in killed] == [1, 1], "each was killed once and retried"
    found = verify_bundle(done["bundle"])
    assert found.release_id == done["release_id"] and found.report.events[-1].stage == "released_accuracy"
    books = Ledger(run.env["DPLDM_LEDGER_URL"]).books()
    assert books.spent(own_data) == pytest.approx(done["epsilon"], abs=1e-9)
    client = mlflow.MlflowClient(run.env["MLFLOW_TRACKING_URI"])
    found = client.search_runs([client.get_experiment_by_name("dpldm").experiment_id])
    parent = next(r for r in found if r.data.tags.get("dpldm.kind") == "release")
    assert parent.info.status == "FINISHED" and parent.data.tags["flyte.execution_id"] == "e1"
    assert sum(r.data.tags.get("mlflow.parentRunId") == parent.info.run_id for r in found) >= 8

    again = cluster(package, machine, execution_id="e2")
    with pytest.raises(NodeFailedError, match="does not cover release"):
        again.run("workflows.release.release_pipeline", inputs)
    assert Ledger(run.env["DPLDM_LEDGER_URL"]).books().spent(own_data) == pytest.approx(done["epsilon"], abs=1e-9)
