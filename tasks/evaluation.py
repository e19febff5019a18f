"""evaluate: internal measurements; they read private data and stay in the steward's store."""

from __future__ import annotations

from flytekit.types.file import FlyteFile

from tasks._resources import GPU_TASK, dpldm_task, inception_weights, work_folder
from tasks.artifacts import PRIVATE, Evaluation, HashedEvaluation, PrivateData, Release, Shard


@dpldm_task(**GPU_TASK)
def evaluate(release: Release, data: PrivateData, shards: list[Shard]) -> HashedEvaluation:
    """Measure utility, fidelity and memorisation. Nothing of it enters the bundle."""
    from dpldm_core.release.measuring import evaluate_files
    from tasks import _tracking

    config = release.release_config()
    with _tracking.child_run(release.run_id, "evaluate") as run:
        path, numbers = evaluate_files(
            [shard.images.download() for shard in shards],
            data.train.download(),
            data.heldout.download(),
            work_folder("evaluate"),
            config.evaluation,
            inception_weights=inception_weights(),
        )
        run.params(visibility="internal: computed from private data, not covered by the promise")
        run.metrics(**{f"internal.{name}": value for name, value in numbers.items()})
        print("internal evaluation (stays in your store, not in the bundle):")
        print("\n".join(f"  {name:32s} {value:.4f}" for name, value in numbers.items()))
        return Evaluation(metrics=FlyteFile(str(path)), run_id=run.run_id, visibility=PRIVATE)
