"""The resolved configuration of a release. Frozen, plain types, unknown keys refused.

Nothing that moves epsilon has a default here: presets.py and the workflow's inputs carry the values. Fields of
``PerformanceConfig`` cannot change the guarantee.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LatentMechanism = Literal["dp_sgd", "noised_latents"]


class Frozen(BaseModel):
    """Plain public values that never change: unknown keys, infinities and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal values, equal digests."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class DpSgdConfig(Frozen):
    """DP-SGD of one stage. The noise multiplier is not here: it is calibrated to the asked epsilon."""

    sample_rate: float = Field(gt=0, le=1, description="Poisson inclusion probability of a unit per step; public")
    num_steps: int = Field(ge=1, description="logical optimizer steps")
    max_grad_norm: float = Field(gt=0, description="per-unit L2 clip norm")
    learning_rate: float = Field(gt=0, description="of the stage's optimizer")
    ema_decay: float = Field(ge=0, lt=1, description="of the average over steps")
    budget_share: float = Field(
        ge=0, le=1, description="share of the squared Gaussian-DP budget; all shares sum to 1; 0: no private steps"
    )


class AutoencoderConfig(Frozen):
    """Stage 1."""

    frequencies: int = Field(ge=2, le=64, description="cosine frequencies kept per axis and channel")
    refiner_channels: int = Field(ge=1, le=256, description="width of the convolutions")
    procedural_steps: int = Field(ge=0, description="steps on procedural images before private data; free")
    procedural_batch_size: int = Field(ge=1, description="procedural images per step")
    latent_noise: float = Field(ge=0, description="largest noise of whitened latents that the decoder learns from")
    dp_sgd: DpSgdConfig


class PriorConfig(Frozen):
    """The one-shot Gaussian prior that stage 2 starts from."""

    clip_norm: float = Field(gt=0, description="L2 norm of a latent over sqrt(latent_dim) that it is clipped to")
    covariance_clip_norm: float = Field(gt=0, description="the same of its difference from the released class mean")
    mean_share: float = Field(gt=0, lt=1, description="of the prior's budget, for means; the rest is for covariances")
    variance_floor: float = Field(gt=0, description="smallest variance of a latent direction")
    class_weight: float = Field(ge=0, le=1, description="trust in class covariances below the noise edge")
    budget_share: float = Field(gt=0, le=1, description="share of the squared Gaussian-DP budget")


class DiffusionConfig(Frozen):
    """Stage 2."""

    width: int = Field(ge=8, le=256, description="channels of the denoiser")
    depth: int = Field(ge=1, le=24, description="residual blocks of the denoiser")
    procedural_steps: int = Field(ge=0, description="steps on procedural images before private data; free")
    procedural_batch_size: int = Field(ge=1, description="procedural images per step")
    sigma_data: float = Field(gt=0, description="standard deviation of a latent coordinate; a public constant")
    P_mean: float = Field(description="mean of ln sigma in training")
    P_std: float = Field(gt=0, description="standard deviation of ln sigma in training")
    noise_multiplicity: int = Field(ge=1, description="noise draws per record, averaged before the clip; free")
    dp_sgd: DpSgdConfig


class TeacherConfig(Frozen):
    """The label teacher, which names the classes of the synthetic images. Used by latent_mechanism dp_sgd only."""

    num_synthetic: int = Field(ge=2, description="synthetic images that its features are learnt from; free")
    num_epochs: int = Field(ge=1, description="epochs on them")
    deformation: float = Field(
        ge=0, le=3, description="how much they are turned, scaled and moved, anew each epoch; 1: about 8 degrees"
    )
    num_views: int = Field(
        ge=1,
        le=9,
        description="positions, a 28th of a side apart, that name an image together where it is not clear as it is",
    )
    num_copies: int = Field(
        ge=0, le=8, description="deformed copies of each private image beside it, averaged before the clip; free"
    )
    fine_tuned: bool = Field(description="private steps go on from its dense layers, not from a new linear head")
    num_features: int = Field(ge=1, description="principal directions of its features that a linear head gets")
    ridge: float = Field(gt=0, description="added to the variance of a direction, in units of their mean")
    expected_batch_size: int = Field(ge=1, description="public; divides the summed gradient")
    first_share: float = Field(
        ge=0,
        lt=1,
        description="budget share of a first teacher, which names what this one learns from; 0: there is none",
    )
    from_prior: bool = Field(
        description="with budget_share 0: a network that learnt from samples of the prior names the classes; free. "
        "Without it they are those that images were drawn for"
    )
    dp_sgd: DpSgdConfig


class NoisedLatentsConfig(Frozen):
    """Used by latent_mechanism noised_latents only."""

    autoencoder_share: float = Field(gt=0, lt=1, description="budget share of stage 1")
    label_share: float = Field(gt=0, lt=1, description="budget share of the labels' randomized response")
    num_steps: int = Field(ge=1, description="steps of stage 2, on released latents; free")
    batch_size: int = Field(ge=1, description="released latents per step")

    @model_validator(mode="after")
    def _leave_a_share_to_latents(self) -> Self:
        if (taken := self.autoencoder_share + self.label_share) >= 1:
            raise ValueError(f"autoencoder_share + label_share = {taken:g} must be below 1: the latents get the rest")
        return self


class SamplingConfig(Frozen):
    """The sampler. Post-processing: free."""

    num_samples: int = Field(ge=1, description="synthetic images, when the input num_samples is 0")
    num_steps: int = Field(ge=2, description="noise levels of the sampler, one evaluation each")
    sigma_min: float = Field(gt=0)
    sigma_max: float = Field(gt=0)
    eta: float = Field(ge=0, description="fresh noise of the sampler: 0 none, 1 as the reverse diffusion")
    S_noise: float = Field(gt=0, description="standard deviation of fresh noise; above 1 makes up for lost detail")
    guidance: float = Field(ge=0, description="mean strength of class guidance, of half of the images; 0 for none")
    guided_below: float = Field(gt=0, description="noise level from which on images are guided")
    sharpness: float = Field(ge=0, description="how much further than the denoiser to step away from the prior")
    sharpened_below: float = Field(gt=0, description="noise level from which on images are sharpened")
    num_shards: int = Field(ge=1, description="parallel sampling tasks, at most one an image")

    @model_validator(mode="after")
    def _order_the_levels(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min:g} must be below sigma_max={self.sigma_max:g}")
        return self


class EvaluationConfig(Frozen):
    """Internal measurements, and the accuracy that is released when ``publish_metrics`` asks for it."""

    num_epochs: int = Field(ge=1, description="epochs of the downstream classifier; fixed, nothing is selected")
    num_seeds: int = Field(ge=1, description="classifiers trained")
    max_frechet_images: int = Field(ge=2, description="images a side in Frechet distances")
    metrics_share: float = Field(
        gt=0,
        lt=1,
        description="share of the squared Gaussian-DP budget for a released accuracy; the others shrink by it",
    )


class PerformanceConfig(Frozen):
    """Knobs that cannot change the guarantee."""

    physical_batch_size: int = Field(
        ge=1, le=2048, description="units per forward pass: float32 sums of more would round by too much"
    )
    clip_backend: Literal["book_keeping", "opacus"] = Field(description="opacus is slower and checks the other")
    matmul_precision: Literal["float32", "bfloat16"] = Field(
        description="of the products of a DP-SGD step; bfloat16 clips 0.8 % tighter for its rounding"
    )
    checkpoint_every: int = Field(ge=1, description="steps of private training between two checkpoints")

    @model_validator(mode="after")
    def _opacus_multiplies_exactly(self) -> Self:
        if self.clip_backend == "opacus" and self.matmul_precision != "float32":
            raise ValueError("clip_backend=opacus knows matmul_precision=float32 alone; set that, or book_keeping")
        return self


class AuditNote(Frozen):
    """The result of an audit on public data, shown on the card beside the claim. Cannot change the guarantee."""

    dataset: str = Field(description="built-in public data set that was audited")
    preset: str
    epsilon: float = Field(gt=0, description="asked for the release whose plan was audited")
    num_canaries: int = Field(ge=1)
    confidence: float = Field(gt=0, lt=1)
    claim: float = Field(ge=0, description="epsilon of the audited stages together, as charged")
    epsilon_lower_bound: float = Field(ge=0, description="of the same stages, as shown by the audit")
    method: str


class ReleaseConfig(Frozen):
    """Everything that decides what a release is, resolved before any private data is read."""

    dataset: str = Field(description="built-in name, or path or s3:// URI of own data")
    epsilon: float = Field(gt=0, description="asked for the whole release")
    delta: float = Field(gt=0, lt=1, description="asked for the whole release")
    preset: str
    latent_mechanism: LatentMechanism
    num_samples: int = Field(ge=1, description="synthetic images")
    publish_metrics: bool = Field(description="release the accuracy on held-out private records, as part of epsilon")
    seed: int = Field(ge=0, lt=2**62, description="of initial weights, procedural images and sampling; protects nobody")
    num_classes: int | None = Field(default=None, ge=1, description="declared public number of classes of own data")
    num_records: int | None = Field(default=None, ge=1, description="declared public number of records of own data")
    max_records_per_group: int = Field(ge=1, description="most records of one person that are used")
    audit: AuditNote | None = Field(default=None, description="shown on the card; in a file: path of an audit's result")
    autoencoder: AutoencoderConfig
    prior: PriorConfig
    diffusion: DiffusionConfig
    teacher: TeacherConfig
    noised_latents: NoisedLatentsConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    performance: PerformanceConfig

    @property
    def num_shards(self) -> int:
        """Sampling tasks of the release: none without an image."""
        return min(self.sampling.num_shards, self.num_samples)

    def named_by_prior(self, num_classes: int) -> bool:
        """Whether samples of the prior make the teacher of a release: where no private record teaches one."""
        unpaid = self.latent_mechanism == "dp_sgd" and self.teacher.dp_sgd.budget_share == 0
        return unpaid and self.teacher.from_prior and num_classes > 1
