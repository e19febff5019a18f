"""Traps of the orchestration: what Flyte and MLflow would keep or show of private data if they were let."""

import hashlib
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
from flytekit.core.checkpointer import SyncCheckpoint

from dpldm_core.data.ingest import ingest_dataset
from tasks import _resources, _tracking
from tasks.closing import close_failed_release, close_failed_sweep
from tests.tasks.test_release_pipeline import release, runs
from workflows.audit import audit_pipeline
from workflows.release import release_pipeline, resample_pipeline
from workflows.sweep import sweep_pipeline

METRICS = ("epsilon", "delta", "procedural_loss", "released_latents_loss", "internal.")


@pytest.mark.slow
def test_no_fingerprint_of_private_data_leaves(machine, own_data, monkeypatch):
    """A digest of the data, of a file made from it, or of one image is an exact membership oracle.

    Looked for in everything public, and in the lineage and the ledger, which others than the steward may read.
    """
    private = [Path(own_data).read_bytes(), *(image.tobytes() for image in np.load(own_data)["images"][:10])]

    def noting_ingest(*arguments, **options):
        files = ingest_dataset(*arguments, **options)
        private.extend(Path(file).read_bytes() for file in files)
        return files

    monkeypatch.setattr("dpldm_core.data.ingest.ingest_dataset", noting_ingest)
    result = release(own_data)
    assert len(private) == 1 + 10 + 2
    places = [p for p in (machine / "releases" / result.release_id).rglob("*") if p.is_file()]
    places += [machine / "ledger.db", machine / "mlflow.db"]
    seen = b"".join(p.read_bytes() for p in places)
    kinds = (hashlib.sha256, hashlib.md5, hashlib.sha1)
    for digest in (kind(content) for content in private for kind in kinds):
        assert digest.hexdigest().encode() not in seen and digest.digest() not in seen
    public = hashlib.sha256((machine / "releases" / result.release_id / "config.json").read_bytes())
    assert public.hexdigest().encode() in seen, "the control: digests of public files are found"
    _check_metrics()


def _check_metrics():
    """Train loss, gradient norm, clip fraction, batch size: no run has a number of that kind."""
    names = {name for run in runs() for name in run.data.metrics}
    assert "procedural_loss" in names and "epsilon" in names
    assert [name for name in names if not name.startswith(METRICS)] == []
    client = mlflow.MlflowClient()
    artifacts = {a.path for run in runs() for a in client.list_artifacts(run.info.run_id)}
    assert {"config.json"} < artifacts <= {"config.json", "events", "privacy_report.json", "samples.png"}


def test_no_task_has_a_deck():
    """A deck shows a task's inputs and outputs, and lies beside them in the store."""
    for workflow in (release_pipeline, resample_pipeline, sweep_pipeline, audit_pipeline):
        tasks = [node.flyte_entity for node in workflow.nodes]
        assert tasks and all(getattr(task, "python_function_task", task).disable_deck for task in tasks)
    assert close_failed_release.disable_deck and close_failed_sweep.disable_deck


def test_private_files_lie_in_folders_of_their_owner_alone():
    """Flyte keeps outputs where a task wrote them, and never removes them: nobody else may read them there."""
    before = os.umask(0)
    try:
        folders = [_resources.work_folder("x") for _ in range(2)]
    finally:
        os.umask(before)
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
    assert folders[0] != folders[1], "shards of a map task share Flyte's own folder"
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
    assert "export TMPDIR := $(CURDIR)/.flyte-work" in makefile and "mkdir -p -m 700" in makefile


def test_an_attempt_that_is_killed_before_it_saves_hands_on_what_it_was_given(tmp_path, monkeypatch):
    """Flyte tells an attempt of the one before it alone, and of places where nothing lies."""
    place = tmp_path / "attempts"

    def attempt(number):
        store = SyncCheckpoint(str(place / str(number)), str(place / str(number - 1)) if number else None)
        context = SimpleNamespace(checkpoint=store, working_directory=str(tmp_path))
        monkeypatch.setattr(_resources, "current_context", lambda: context)
        return _resources.checkpoint("x")

    folder, save = attempt(0)
    (folder / "state").write_text("at step 3")
    save()
    attempt(1)  # killed
    folder, _ = attempt(2)
    assert (folder / "state").read_text() == "at step 3"
    folder, _ = attempt(5)  # attempt 4 never began
    assert list(folder.iterdir()) == []


def test_a_run_id_of_the_environment_does_not_capture_a_stage(machine, monkeypatch):
    """MLFLOW_RUN_ID would win over the parent, so that a stage logs into somebody else's run (mlflow#15713)."""
    parent = _tracking.open_run("r1", "e1")
    foreign = _tracking.open_run("r2", "e2")
    monkeypatch.setenv("MLFLOW_RUN_ID", foreign)
    with _tracking.child_run(parent, "stage") as run:
        assert run.run_id not in (parent, foreign)
    [child] = [r for r in runs() if r.info.run_id == run.run_id]
    assert child.data.tags["mlflow.parentRunId"] == parent
