"""Typed artifacts between tasks: files, the run that made them, and whether they are private or public.

What a private mechanism spent is in the release's plan, which the ledger reserved; each artifact names the stages whose
events paid for it, so a cache hit or a reload keeps its cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from flytekit import HashMethod
from flytekit.types.file import FlyteFile

from dpldm_core.config import ReleaseConfig
from tasks._resources import sha256_of

PRIVATE, PUBLIC = "private", "public"


def _content(file: FlyteFile) -> str:
    return sha256_of(file)


HashedFile = Annotated[FlyteFile, HashMethod(_content)]


@dataclass
class Release:
    """An opened release: its reservation in the ledger and everything public that was decided."""

    release_id: str
    run_id: str
    account: str
    entry_id: str
    config: str
    plan: str
    schema: str
    out: str
    visibility: str = PUBLIC

    def release_config(self) -> ReleaseConfig:
        """The resolved configuration."""
        return ReleaseConfig.model_validate_json(self.config)


@dataclass
class PrivateData:
    """Ingested records. Private: never leaves the steward's store."""

    train: HashedFile
    heldout: HashedFile
    run_id: str
    visibility: str = PRIVATE


@dataclass
class Codec:
    """The trained autoencoder: the encoder stays inside, the decoder is public."""

    autoencoder: HashedFile
    decoder: HashedFile
    run_id: str
    paid_by: list[str] = field(default_factory=list)
    visibility: str = PUBLIC


@dataclass
class Latents:
    """Latents of the training records: private (dp_sgd), or released and public (noised_latents)."""

    latents: HashedFile
    noise_std: float
    run_id: str
    paid_by: list[str] = field(default_factory=list)
    visibility: str = PRIVATE


@dataclass
class DiffusionModel:
    """The trained latent denoiser with its prior: public."""

    denoiser: HashedFile
    run_id: str
    paid_by: list[str] = field(default_factory=list)
    visibility: str = PUBLIC


@dataclass
class Shard:
    """A part of the synthetic images: public."""

    images: HashedFile
    run_id: str
    visibility: str = PUBLIC


@dataclass
class Evaluation:
    """Internal measurements: they read private data and stay inside."""

    metrics: HashedFile
    run_id: str
    visibility: str = PRIVATE
