"""evaluate: internal measurements, which stay in the steward's store, and an accuracy that epsilon pays for."""

from __future__ import annotations

import json

from flytekit.types.file import FlyteFile

from tasks._resources import GPU_TASK, StageKeys, dpldm_task, inception_weights, work_folder
from tasks.artifacts import PRIVATE, Evaluation, HashedEvaluation, PrivateData, Release, Shard


@dpldm_task(**GPU_TASK)
def evaluate(release: Release, data: PrivateData, shards: list[Shard]) -> HashedEvaluation:
    """Measure utility, fidelity and memorisation. Of it all, only an accuracy that the plan pays for is released."""
    from dpldm_core.release.measuring import evaluate_files, release_accuracy
    from tasks import _tracking

    config, plan = release.release_config(), release.release_plan()
    with _tracking.child_run(release.run_id, "evaluate") as run:
        parts, heldout = [shard.images.download() for shard in shards], data.heldout.download()
        key_of = StageKeys(release, heldout)
        released, classifier = release_accuracy(parts, heldout, config, plan, key_of)
        run.stage(plan, key_of.booked)
        run.params(visibility="internal: computed from private data, not covered by the promise")
        folder = work_folder("evaluate")
        try:
            path, numbers = evaluate_files(
                parts,
                data.train.download(),
                heldout,
                folder,
                config.evaluation,
                inception_weights=inception_weights(),
                synthetic_classifier=classifier,
            )
        except Exception as error:  # noqa: BLE001 - the release is paid for, and nothing of this enters its bundle
            path, numbers = folder / "evaluation.json", {}
            path.write_text(json.dumps({"failed": repr(error)}))
            run.params(failed=repr(error)[:500])
            print(f"the internal evaluation failed, the release goes on without it: {error!r}")
        run.metrics(**{f"internal.{name}": value for name, value in numbers.items()})
        if numbers:
            print("internal evaluation (stays in your store, not in the bundle):")
            print("\n".join(f"  {name:32s} {value:.4f}" for name, value in numbers.items()))
        return Evaluation(
            metrics=FlyteFile(str(path)),
            released_metrics=released,
            run_id=run.run_id,
            events=release.events_of(key_of.booked),
            visibility=PRIVATE,
        )
