"""extract_latents: private latents, or released ones in the mode noised_latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flytekit.types.file import FlyteFile

from tasks._resources import CPU_TASK, begin_stage, dpldm_task, work_folder
from tasks.artifacts import PRIVATE, PUBLIC, Codec, HashedLatents, Latents, PrivateData, Release

if TYPE_CHECKING:
    from dpldm_core.rng import SecretKey


@dpldm_task(**CPU_TASK)
def extract_latents(release: Release, data: PrivateData, codec: Codec) -> HashedLatents:
    """Encode the private records with the trained encoder."""
    from dpldm_core.privacy.plan import ReleasePlan
    from dpldm_core.training import stages
    from tasks import _tracking

    plan = ReleasePlan.model_validate_json(release.plan)
    with _tracking.child_run(release.run_id, "extract_latents") as run:
        train, autoencoder = data.train.download(), codec.autoencoder.download()
        paid: list[str] = []

        def key_of(stage: str) -> SecretKey:
            paid.append(stage)
            return begin_stage(release, stage, train)

        attempt = stages.Run(work_folder("latents"))
        path, noise_std = stages.extract_latents(train, autoencoder, release.release_config(), plan, key_of, attempt)
        run.stage(plan, paid)
        run.private_input(release.account)
        events, visibility = release.events_of(paid), PUBLIC if paid else PRIVATE
        return Latents(
            latents=FlyteFile(str(path)), noise_std=noise_std, run_id=run.run_id, events=events, visibility=visibility
        )
