"""train_diffusion: stage 2."""

from __future__ import annotations

from flytekit.types.file import FlyteFile

from tasks._resources import GPU_TASK, StageKeys, checkpoint, dpldm_task, work_folder
from tasks.artifacts import PUBLIC, DiffusionModel, HashedDiffusionModel, Latents, Release


@dpldm_task(**GPU_TASK)
def train_diffusion(release: Release, latents: Latents) -> HashedDiffusionModel:
    """Release the Gaussian prior of the latents, then train the denoiser on top of it with DP-SGD (if planned)."""
    from dpldm_core.data.schema import ImageSchema
    from dpldm_core.training import stages
    from tasks import _tracking

    plan, schema = release.release_plan(), ImageSchema.model_validate_json(release.image_schema)
    with _tracking.child_run(release.run_id, "train_diffusion") as run:
        private = latents.latents.download()
        resume, save = checkpoint("train_diffusion")
        binding = stages.binding_of(private, release.plan)
        key_of = StageKeys(release, private)
        attempt = stages.Run(work_folder("diffusion"), binding, resume, save)
        path, curve = stages.train_diffusion(
            private, latents.noise_std, release.release_config(), schema, plan, key_of, attempt
        )
        run.stage(plan, key_of.booked)
        run.curve("released_latents_loss" if latents.noise_std else "procedural_loss", curve)
        events = release.events_of(key_of.booked)
        return DiffusionModel(
            denoiser=FlyteFile(str(path)),
            noise_std=latents.noise_std,
            run_id=run.run_id,
            events=events,
            visibility=PUBLIC,
        )
