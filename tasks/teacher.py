"""train_teacher: the classifier that names the classes of the synthetic images."""

from __future__ import annotations

from pathlib import Path

from flytekit.types.file import FlyteFile

from tasks._resources import GPU_TASK, StageKeys, checkpoint, dpldm_task, work_folder
from tasks.artifacts import PUBLIC, Codec, DiffusionModel, HashedTeacher, PrivateData, Release, Teacher


@dpldm_task(**GPU_TASK)
def train_teacher(release: Release, data: PrivateData, codec: Codec, model: DiffusionModel) -> HashedTeacher:
    """Learn features from synthetic images, then a head on private ones with DP-SGD, if the plan has it."""
    from dpldm_core.data.schema import ImageSchema
    from dpldm_core.privacy.calibration import TEACHER
    from dpldm_core.training.stages import Run, binding_of, teach_from_prior
    from dpldm_core.training.stages import train_teacher as train
    from tasks import _tracking

    plan, config = release.release_plan(), release.release_config()
    schema = ImageSchema.model_validate_json(release.image_schema)
    booked: list[str] = []
    with _tracking.child_run(release.run_id, TEACHER) as run:
        if TEACHER not in plan.stages() and not config.named_by_prior(schema.num_classes):
            return Teacher(teacher=None, run_id=run.run_id, events=release.events_of(booked), visibility=PUBLIC)
        decoder, denoiser = Path(codec.decoder.download()), Path(model.denoiser.download())
        if TEACHER in plan.stages():
            private, autoencoder = data.train.download(), Path(codec.autoencoder.download())
            key_of = StageKeys(release, private)
            resume, save = checkpoint(TEACHER)
            attempt = Run(work_folder(TEACHER), binding_of(private, release.plan), resume, save)
            path = train(Path(private), autoencoder, decoder, denoiser, config, plan, key_of, attempt)
            booked = key_of.booked
            run.stage(plan, booked)
            run.private_input(release.account)
        else:
            path = teach_from_prior(decoder, denoiser, config, schema, Run(work_folder(TEACHER)))
        events = release.events_of(booked)
        return Teacher(teacher=FlyteFile(str(path)), run_id=run.run_id, events=events, visibility=PUBLIC)
