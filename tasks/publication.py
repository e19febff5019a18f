"""publish: the bundle, the registered model, and the end of the release; resampling makes another bundle for free."""

from __future__ import annotations

from typing import NamedTuple

from tasks._resources import SMALL, dpldm_task, execution_id, open_ledger, work_folder
from tasks.artifacts import Codec, DiffusionModel, Evaluation, Release, Shard, Teacher


class Published(NamedTuple):
    """Where the bundle is and what it promises."""

    bundle: str
    release_id: str
    epsilon: float
    delta: float


@dpldm_task(**SMALL, retries=2)
def publish(
    release: Release,
    codec: Codec,
    model: DiffusionModel,
    teacher: Teacher,
    shards: list[Shard],
    evaluation: Evaluation,
) -> Published:
    """Write and verify the bundle, close the ledger entry, register the model. Only what was paid for goes in."""
    from dpldm_core.release.publishing import publish_release
    from tasks import _tracking

    ledger = open_ledger()
    ledger.check_ready(release.entry_id)
    with _tracking.child_run(release.run_id, "publish") as run:
        parts = [shard.images.download() for shard in shards]
        files = {"decoder": codec.decoder.download(), "denoiser": model.denoiser.download()}
        if judge := teacher.file():
            files["teacher"] = judge
        done = publish_release(
            release.out,
            release.release_id,
            release.release_config(),
            release.plan,
            release.image_schema,
            account=release.account,
            entry=release.entry_id,
            synthetic=parts,
            model_files=files,
            noise_std=model.noise_std,
            work=work_folder("publish"),
            metrics=evaluation.released_metrics,
        )
        ledger.publish(release.entry_id, bundle_digest=done.digest)
        made_by = {"codec_by": codec.run_id, "model_by": model.run_id, "teacher_by": teacher.run_id}
        run.params(**made_by, evaluated_by=evaluation.run_id)
    parent, plan = _tracking.Run(release.run_id), release.release_plan()
    parent.stage(plan, plan.stages())
    parent.private_input(release.account)
    parent.publication(done)
    _tracking.close_run(release.run_id)
    print(done.summary())
    return Published(done.bundle, release.release_id, done.report.epsilon, done.report.delta)


@dpldm_task(**SMALL)
def resample(bundle: str, num_samples: int, seed: int, guidance: float, out: str) -> Published:
    """Draw more images from a released model: post-processing, so neither epsilon nor the ledger changes."""
    from dpldm_core.release.publishing import resample_release
    from tasks import _tracking

    done = resample_release(bundle, num_samples, seed, guidance, out, work_folder("resample"))
    run_id = _tracking.open_run(done.release_id, execution_id())
    run = _tracking.Run(run_id)
    run.params(parent_release_id=done.parent_release_id, seed=seed, num_samples=num_samples, guidance=guidance)
    run.publication(done)
    _tracking.close_run(run_id)
    print(done.summary())
    return Published(done.bundle, done.release_id, done.report.epsilon, done.report.delta)
