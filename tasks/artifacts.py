"""Typed artifacts between tasks: files, the run that made them, their privacy events, and whether they are private.

``events`` is JSON, a list of {stage, event} with dp-accounting's own field names: what the mechanisms that made the
artifact released, for whoever finds it in a store. A release is billed by its plan, and the ledger must have booked all
of that. Tasks return artifacts as ``Hashed...``: Flyte's cache then knows them by the content of their files, not by
where those lie.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated

from flytekit import HashMethod
from flytekit.types.file import FlyteFile
from pydantic import BaseModel, ConfigDict

from tasks._resources import sha256_of

if TYPE_CHECKING:
    from dpldm_core.config import ReleaseConfig
    from dpldm_core.privacy.plan import ReleasePlan

PRIVATE, PUBLIC = "private", "public"


class _Artifact(BaseModel):
    model_config = ConfigDict(extra="forbid")
    visibility: str


class Release(_Artifact):
    """An opened release: its reservation in the ledger and everything public that was decided."""

    release_id: str
    run_id: str
    account: str
    entry_id: str
    config: str
    plan: str
    image_schema: str
    out: str

    def events_of(self, stages: list[str]) -> str:
        """The events of stages of the plan, as artifacts carry them."""
        from dpldm_core.privacy.accounting import event_to_json

        plan = self.release_plan()
        return json.dumps([{"stage": s, "event": event_to_json(plan.mechanism(s).event())} for s in stages])

    def release_plan(self) -> ReleasePlan:
        """Every private mechanism."""
        from dpldm_core.privacy.plan import ReleasePlan

        return ReleasePlan.model_validate_json(self.plan)

    def release_config(self) -> ReleaseConfig:
        """The resolved configuration."""
        from dpldm_core.config import ReleaseConfig

        return ReleaseConfig.model_validate_json(self.config)


class PrivateData(_Artifact):
    """Ingested records. Private: never leaves the steward's store."""

    train: FlyteFile
    heldout: FlyteFile
    run_id: str


class Codec(_Artifact):
    """The trained autoencoder: the whole of it for inside use, and the public decoder."""

    autoencoder: FlyteFile
    decoder: FlyteFile
    run_id: str
    events: str


class Latents(_Artifact):
    """Latents of the training records: private (dp_sgd), or released and public (noised_latents)."""

    latents: FlyteFile
    noise_std: float
    run_id: str
    events: str


class DiffusionModel(_Artifact):
    """The trained latent denoiser with its prior, and the noise of the latents that it was trained on: public."""

    denoiser: FlyteFile
    noise_std: float
    run_id: str
    events: str


class Teacher(_Artifact):
    """The label teacher: public. No file where a release has none: noised latents, no labels, classes as drawn."""

    teacher: FlyteFile | None
    run_id: str
    events: str

    def file(self) -> str | None:
        """Local path of the model file, if there is one."""
        return self.teacher.download() if self.teacher else None


class Shard(_Artifact):
    """A part of the synthetic images: public."""

    images: FlyteFile
    run_id: str


class Evaluation(_Artifact):
    """Internal measurements, which stay inside; and the released ones, public JSON with their events, if any."""

    metrics: FlyteFile
    released_metrics: str
    run_id: str
    events: str


def content_of(artifact: _Artifact) -> str:
    """SHA-256 over an artifact's fields, its files by their content and without the run that made it."""
    plain = {name: sha256_of(v) if isinstance(v, FlyteFile) else v for name, v in artifact if name != "run_id"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


HashedPrivateData = Annotated[PrivateData, HashMethod(content_of)]
HashedCodec = Annotated[Codec, HashMethod(content_of)]
HashedLatents = Annotated[Latents, HashMethod(content_of)]
HashedDiffusionModel = Annotated[DiffusionModel, HashMethod(content_of)]
HashedTeacher = Annotated[Teacher, HashMethod(content_of)]
HashedShard = Annotated[Shard, HashMethod(content_of)]
HashedEvaluation = Annotated[Evaluation, HashMethod(content_of)]
