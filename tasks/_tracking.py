"""MLflow: the only file that imports it.

One parent run per release, a child per task. The parent stays open across containers: it is made by ``open_run`` and
ended by ``close_run``, by its id. Private data enters the lineage as a
URI alone: no digest, no profile, no rows, no count.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpldm_core.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from dpldm_core.config import ReleaseConfig
    from dpldm_core.privacy.plan import ReleasePlan
    from dpldm_core.release.publishing import Publication

EXPERIMENT = "dpldm"
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def _client() -> MlflowClient:
    """A client on a store that is known to answer.

    Raises:
        TrackingError: It does not.
    """
    import logging

    import mlflow
    from filelock import FileLock

    uri = tracking_uri()
    os.environ.pop("MLFLOW_RUN_ID", None)  # it would win over parent_run_id (mlflow#15713)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    try:
        if uri.startswith("sqlite"):  # two processes creating the same file at once wreck it for good
            with FileLock(f"{uri.removeprefix('sqlite:///')}.lock"):
                client.search_experiments(max_results=1)
        else:
            client.search_experiments(max_results=1)
    except Exception as error:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI={uri!r} does not answer ({type(error).__name__}). Start the server, or unset the "
            "variable to use a SQLite file in the current folder"
        ) from None
    return client


def _experiment_id(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return experiment.experiment_id
    local = tracking_uri().startswith("sqlite")
    location = (Path.cwd() / "mlruns").as_uri() if local else None
    return client.create_experiment(EXPERIMENT, artifact_location=location)


def open_run(release_id: str, execution_id: str, *, promise: str = "") -> str:
    """Open the parent run of a release; a retry of the same execution finds the one it already opened.

    Args:
        release_id: Name of the release and of the run.
        execution_id: Flyte's, or the local process.
        promise: What is asked for, which tells releases of one execution apart and attempts at one together.

    Returns:
        The run's id.

    Raises:
        TrackingError: The store cannot be reached.
    """
    client = _client()
    experiment = _experiment_id(client)
    for run in client.search_runs([experiment], f"tags.`flyte.execution_id` = '{execution_id}'"):
        same = run.data.tags.get("dpldm.promise") == promise if promise else run.info.run_name == release_id
        if run.info.status == "RUNNING" and same:
            return run.info.run_id
    tags = {"flyte.execution_id": execution_id, "dpldm.release_id": release_id, "dpldm.kind": "release"}
    tags |= {"dpldm.promise": promise}
    return client.create_run(experiment, run_name=release_id, tags=tags).info.run_id


def close_run(run_id: str, *, failed: bool = False) -> None:
    """End the parent run."""
    _client().set_terminated(run_id, "FAILED" if failed else "FINISHED")


def find_open_runs(execution_id: str, *, promise: str = "") -> list[str]:
    """Parent runs of this execution that are still open: all, or those with one promise."""
    client = _client()
    query = f"tags.`flyte.execution_id` = '{execution_id}' and tags.`dpldm.kind` = 'release'"
    query += f" and tags.`dpldm.promise` = '{promise}'" if promise else ""
    runs = client.search_runs([_experiment_id(client)], query)
    return [run.info.run_id for run in runs if run.info.status == "RUNNING"]


class Run:
    """What may be logged to one run. Everything passed here must be public or meant to stay in the steward's store.

    Args:
        run_id: Of a release's run or of a task's.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._client = _client()

    def params(self, **values: Any) -> None:
        """Public parameters."""
        from mlflow.entities import Param

        self._client.log_batch(self.run_id, params=[Param(key, str(value)) for key, value in values.items()])

    def config(self, config: ReleaseConfig) -> None:
        """The resolved configuration, which the bundle holds too if there ever is one."""
        self._client.log_dict(self.run_id, config.model_dump(mode="json"), "config.json")

    def metrics(self, **values: float) -> None:
        """Numbers."""
        for key, value in values.items():
            self._client.log_metric(self.run_id, key, float(value))

    def curve(self, name: str, values: list[float]) -> None:
        """A public curve, at most 200 points."""
        from mlflow.entities import Metric

        stride = max(1, math.ceil(len(values) / 200))
        points = [Metric(name, values[i], 0, i) for i in range(0, len(values), stride)]
        self._client.log_batch(self.run_id, metrics=points)

    def stage(self, plan: ReleasePlan, stages: Sequence[str]) -> None:
        """What private mechanisms spent, each by itself."""
        from dpldm_core.privacy import accounting

        relation = accounting.relation_from_name(plan.relation)
        for stage in stages:
            mechanism = plan.mechanism(stage)
            self.metrics(**{f"epsilon.{stage}": accounting.epsilon([mechanism.event()], plan.delta, relation)})
            self.params(**{f"{stage}.{k}": v for k, v in mechanism.model_dump().items() if k != "stage"})
            self._client.log_dict(self.run_id, accounting.event_to_json(mechanism.event()), f"events/{stage}.json")

    def private_input(self, uri: str) -> None:
        """The private data as lineage: its URI alone."""
        self._dataset(uri, "private_data", "training", digest="private")

    def _dataset(self, uri: str, name: str, context: str, *, digest: str) -> None:
        from mlflow.data.http_dataset_source import HTTPDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        source = HTTPDatasetSource(uri)  # any URI; a source that resolves it would look at the data
        dataset = MetaDataset(source=source, name=name, digest=digest)._to_mlflow_entity()  # type: ignore[abstract]
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def publication(self, done: Publication) -> None:
        """A published bundle: its promise, report, picture, data and model."""
        import io

        from PIL import Image

        self.params(bundle=done.bundle, manifest_sha256=done.digest)
        self.metrics(**done.promise())
        self._client.set_tag(self.run_id, "mlflow.note.content", done.summary())
        self._client.log_dict(self.run_id, done.report.model_dump(mode="json"), "privacy_report.json")
        self._client.log_image(self.run_id, Image.open(io.BytesIO(done.samples_png)), "samples.png")
        self._dataset(done.bundle, done.release_id, "synthetic", digest=done.digest[:36])
        if done.model_folder is not None:
            params = {"release_id": done.release_id, "epsilon": f"{done.report.epsilon:.6g}"}
            self._register_model(done.model_folder, name=model_name(done.dataset), params=params)

    def _register_model(self, folder: Path, *, name: str, params: Mapping[str, str], alias: str = "current") -> None:
        """Register a folder of safetensors as a model with an alias. No pickle, no flavour."""
        import mlflow

        model = mlflow.initialize_logged_model(name, source_run_id=self.run_id, params=dict(params), model_type="dpldm")
        self._client.log_model_artifacts(model.model_id, str(folder))
        mlflow.finalize_logged_model(model.model_id, "READY")
        version = mlflow.register_model(f"models:/{model.model_id}", name)
        self._client.set_registered_model_alias(name, alias, version.version)


def model_name(dataset: str) -> str:
    """Name of a data set's registered model; MLflow allows no dots, slashes or quotes in it."""
    return "dpldm-" + "".join(c if c.isalnum() or c in "-_" else "-" for c in dataset)


@contextmanager
def child_run(parent_run_id: str, name: str) -> Iterator[Run]:
    """A run under the release's; marked FAILED when the body raises.

    Raises:
        TrackingError: The store cannot be reached.
    """
    import mlflow

    client = _client()
    with mlflow.start_run(
        experiment_id=_experiment_id(client), run_name=name, parent_run_id=parent_run_id, log_system_metrics=False
    ) as run:
        yield Run(run.info.run_id)
