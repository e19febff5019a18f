"""sample_shard: synthetic images from the public models; post-processing."""

from __future__ import annotations

from flytekit.types.file import FlyteFile

from tasks._resources import GPU_TASK, dpldm_task, work_folder
from tasks.artifacts import PUBLIC, Codec, DiffusionModel, HashedShard, Release, Shard, Teacher


@dpldm_task(**GPU_TASK)
def sample_shard(shard: int, release: Release, codec: Codec, model: DiffusionModel, teacher: Teacher) -> HashedShard:
    """Draw one shard of the synthetic images."""
    from dpldm_core.release.sampling import write_shard
    from tasks import _tracking

    config = release.release_config()
    with _tracking.child_run(release.run_id, f"sample-{shard}") as run:
        path = write_shard(
            work_folder("sample"),
            shard,
            config,
            release.image_schema,
            decoder=codec.decoder.download(),
            denoiser=model.denoiser.download(),
            noise_std=model.noise_std,
            teacher=teacher.file(),
        )
        run.params(shard=shard, seed=config.seed)
        return Shard(images=FlyteFile(str(path)), run_id=run.run_id, visibility=PUBLIC)
