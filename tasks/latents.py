"""extract_latents: private latents, or released ones in the mode noised_latents."""

from __future__ import annotations

from flytekit.types.file import FlyteFile

from tasks._resources import CPU_TASK, StageKeys, dpldm_task, work_folder
from tasks.artifacts import PRIVATE, PUBLIC, Codec, HashedLatents, Latents, PrivateData, Release


@dpldm_task(**CPU_TASK)
def extract_latents(release: Release, data: PrivateData, codec: Codec) -> HashedLatents:
    """Encode the private records with the trained encoder."""
    from dpldm_core.training import stages
    from tasks import _tracking

    plan = release.release_plan()
    with _tracking.child_run(release.run_id, "extract_latents") as run:
        train, autoencoder = data.train.download(), codec.autoencoder.download()
        key_of = StageKeys(release, train)
        attempt = stages.Run(work_folder("latents"))
        path, noise_std = stages.extract_latents(train, autoencoder, release.release_config(), plan, key_of, attempt)
        run.stage(plan, key_of.booked)
        run.private_input(release.account)
        events, visibility = release.events_of(key_of.booked), PUBLIC if key_of.booked else PRIVATE
        return Latents(
            latents=FlyteFile(str(path)), noise_std=noise_std, run_id=run.run_id, events=events, visibility=visibility
        )
