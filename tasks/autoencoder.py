"""train_autoencoder: stage 1."""

from __future__ import annotations

from flytekit.types.file import FlyteFile

from tasks._resources import GPU_TASK, StageKeys, checkpoint, dpldm_task, work_folder
from tasks.artifacts import PUBLIC, Codec, HashedCodec, PrivateData, Release


@dpldm_task(**GPU_TASK)
def train_autoencoder(release: Release, data: PrivateData) -> HashedCodec:
    """Pretrain the autoencoder on procedural images, then train it on the private ones with DP-SGD (if planned)."""
    from dpldm_core.privacy.calibration import AUTOENCODER
    from dpldm_core.training.stages import Run, binding_of, train_codec
    from tasks import _tracking

    plan = release.release_plan()
    with _tracking.child_run(release.run_id, AUTOENCODER) as run:
        train = data.train.download()
        resume, save = checkpoint(AUTOENCODER)
        attempt = Run(work_folder(AUTOENCODER), binding_of(train, release.plan), resume, save)
        key_of = StageKeys(release, train)
        autoencoder, decoder, curve = train_codec(train, release.release_config(), plan, key_of, attempt)
        run.stage(plan, key_of.booked)
        run.private_input(release.account)
        run.curve("procedural_loss", curve)
        files = FlyteFile(str(autoencoder)), FlyteFile(str(decoder))
        events = release.events_of(key_of.booked)
        return Codec(autoencoder=files[0], decoder=files[1], run_id=run.run_id, events=events, visibility=PUBLIC)
