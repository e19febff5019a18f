"""Stage 2: a Gaussian prior from one noisy sum, then a residual denoiser by DP-SGD on top of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpldm_core.config import DiffusionConfig, PriorConfig
from dpldm_core.diffusion.loss import denoising_loss
from dpldm_core.diffusion.schedule import training_sigmas
from dpldm_core.models.denoiser import Denoiser
from dpldm_core.models.ema import Ema
from dpldm_core.models.precond import edm_weight
from dpldm_core.models.prior import GaussianPrior
from dpldm_core.privacy.engine import Batch
from dpldm_core.privacy.one_shot import ClassMoments, noisy_class_moments
from dpldm_core.privacy.plan import DpSgdPlan, GaussianSumPlan
from dpldm_core.rng import SecretKey
from dpldm_core.training.private import TrainLoop, train_private
from dpldm_core.training.units import Units


def build_denoiser(
    config: DiffusionConfig, *, dim: int, num_classes: int, seed: int = 0, latent_noise: float = 0.0
) -> Denoiser:
    """An untrained denoiser; equal seeds give equal weights, and the global generator is left alone.

    Args:
        config: Size and sigma_data.
        dim: Latent dimension.
        num_classes: Public number of classes.
        seed: Public.
        latent_noise: Standard deviation of noise that the training latents carry (mode noised_latents).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(
            dim=dim,
            num_classes=num_classes,
            width=config.width,
            depth=config.depth,
            sigma_data=config.sigma_data,
            latent_noise=latent_noise,
        )


def fit_prior(prior: GaussianPrior, moments: ClassMoments, config: PriorConfig) -> None:
    """Class Gaussians from released moments: post-processing that knows how much noise they carry.

    The pooled covariance keeps what stands above its noise (eigenvalues beyond the semicircle's edge 2 s sqrt(d)). Each
    class then adds the part of its own difference that stands above the class's edge, shrunk by sqrt(l^2 - edge^2)
    (Gavish and Donoho 2017, Frobenius loss), and ``class_weight`` of the rest.

    Args:
        prior: Set in place.
        moments: Released statistics.
        config: Floor and class weight.
    """
    counts = moments.counts.clamp(min=1.0)
    dim = moments.means.shape[1]
    centred = moments.second_moments - moments.means[:, :, None] * moments.means[:, None, :]
    pooled_edge = 2 * moments.second_std * math.sqrt(len(counts) * dim) / float(counts.sum())
    values, basis = torch.linalg.eigh((counts[:, None, None] * centred).sum(0) / counts.sum())
    kept = (values + (values.square() - pooled_edge**2).clamp(min=0).sqrt()) / 2
    values = torch.where(values > pooled_edge, kept, config.variance_floor).clamp(min=config.variance_floor)
    pooled = basis @ torch.diag(values) @ basis.T
    covariances = []
    for label in range(len(counts)):
        difference = centred[label] - pooled
        edge = 2 * moments.second_std * math.sqrt(dim) / float(counts[label])
        values, basis = torch.linalg.eigh(difference)
        strong = basis @ torch.diag(values.sign() * (values.square() - edge**2).clamp(min=0).sqrt()) @ basis.T
        covariances.append(pooled + strong + config.class_weight * (difference - strong))
    prior.set_moments(moments.means, torch.stack(covariances), variance_floor=config.variance_floor)


def release_prior(
    prior: GaussianPrior, units: Units, plan: GaussianSumPlan, key: SecretKey, config: PriorConfig
) -> None:
    """Measure the class moments of private latents with one Gaussian mechanism and fit the prior to them."""
    num_classes, dim = prior.means.shape
    moments = noisy_class_moments(
        plan,
        key,
        units.values,
        units.class_labels,
        units.record_weights(),
        num_classes=num_classes,
        clip_norm=config.clip_norm * math.sqrt(dim),
    )
    fit_prior(prior, moments, config)


def fit_released_prior(
    prior: GaussianPrior, latents: Tensor, labels: Tensor, noise_std: float, replaced: float, config: PriorConfig
) -> None:
    """Class Gaussians of the clean latents, from released noisy latents and randomised labels: post-processing.

    The noise adds noise_std^2 I to every covariance, which is taken off. Of the records that carry label y, a share
    ``wrong`` comes from all classes alike; the class means are unmixed accordingly. Covariances are pooled.

    Args:
        prior: Set in place.
        latents: Released [n, d].
        labels: Released, int64 [n].
        noise_std: Known noise of each latent coordinate.
        replaced: Known probability that a label was replaced by a uniform one.
        config: Variance floor.
    """
    values = latents.double()
    num_classes, dim = prior.means.shape
    overall = values.mean(0)
    means = torch.stack([values[labels == y].mean(0) if (labels == y).any() else overall for y in range(num_classes)])
    shrink = num_classes * noise_std**2 / len(values)  # variance of a class mean's coordinate
    spread = (means - overall) / max(1.0 - replaced, 1e-6)
    signal = (spread.square().sum() / spread.numel()).item()
    noise = shrink / max(1.0 - replaced, 1e-6) ** 2
    means = overall + max(0.0, 1.0 - noise / max(signal, 1e-12)) * spread  # James and Stein (1961)
    centred = values - overall
    covariance = centred.T @ centred / len(values) - noise_std**2 * torch.eye(dim, dtype=torch.float64)
    covariance = covariance - (means - overall).T @ (means - overall) / num_classes
    edge = 2 * noise_std**2 * (dim / len(values)) ** 0.5
    variances, basis = torch.linalg.eigh(covariance)
    typical = (variances.sum() / dim).clamp(min=config.variance_floor)
    variances = torch.where(variances > edge, variances - edge, torch.minimum(typical, torch.tensor(edge)))
    pooled = basis @ torch.diag(variances) @ basis.T
    prior.set_moments(means, pooled.expand(num_classes, -1, -1), variance_floor=config.variance_floor)


def draw_diffusion(batch: Batch, generator: np.random.Generator, config: DiffusionConfig, sigma_data: float) -> Batch:
    """Adds K noise levels and noises per record to a batch; scaled with sigma_data."""
    latents = batch["values"]
    units, records, dim = latents.shape
    shape = (units, records, config.noise_multiplicity)
    sigma = sigma_data * training_sigmas(shape, P_mean=config.P_mean, P_std=config.P_std, generator=generator)
    noise = torch.from_numpy(generator.standard_normal((*shape, dim), dtype=np.float32))
    return batch | {"sigma": sigma.to(latents.device), "noise": noise.to(latents.device)}


def diffusion_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Denoising loss of a unit's latents, weighted within the unit, [B]."""
    units, records = batch["weights"].shape
    sigma = batch["sigma"].flatten(0, 1)
    per_record = denoising_loss(
        model,
        batch["values"].flatten(0, 1),
        batch["class_labels"].flatten(),
        sigma,
        batch["noise"].flatten(0, 1),
        edm_weight(sigma, model.sigma_data),  # type: ignore[arg-type]
    )
    return (per_record.view(units, records) * batch["weights"]).sum(1)


def train_denoiser(
    model: Denoiser,
    units: Units,
    plan: DpSgdPlan,
    key: SecretKey,
    config: DiffusionConfig,
    *,
    train: TrainLoop = train_private,
    **loop: Any,
) -> Denoiser:
    """DP-SGD on private latents.

    Args:
        model: With its prior set.
        units: Private latents, values [n, d].
        plan: What is charged.
        key: Secret key of this stage.
        config: Noise levels, multiplicity, learning rate and averaging.
        train: The loop: :func:`train_private`, or one that adds canaries to it.
        loop: Further arguments of :func:`train_private`.

    Returns:
        The averaged denoiser.
    """
    return train(  # type: ignore[return-value]
        model,
        units,
        plan,
        key,
        loss=diffusion_loss,
        draw=lambda batch, generator: draw_diffusion(batch, generator, config, model.sigma_data),
        learning_rate=config.dp_sgd.learning_rate,
        ema_decay=config.dp_sgd.ema_decay,
        **loop,
    )


def train_denoiser_on_released(
    model: Denoiser,
    latents: Tensor,
    class_labels: Tensor,
    config: DiffusionConfig,
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
) -> tuple[Denoiser, list[float]]:
    """Ordinary training on latents that were already released: post-processing.

    Args:
        model: With its prior set.
        latents: Released, [n, d].
        class_labels: Released, int64 [n].
        config: Noise levels and averaging.
        num_steps: Steps.
        batch_size: Latents per step.
        seed: Public.

    Returns:
        The averaged denoiser and its loss curve (public).
    """
    generator = np.random.default_rng(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-3)
    ema, losses = Ema(model, config.dp_sgd.ema_decay), []
    for step in range(num_steps):
        rows = torch.from_numpy(generator.integers(len(latents), size=min(batch_size, len(latents))))
        batch = {
            "values": latents[rows][:, None],
            "class_labels": class_labels[rows][:, None],
            "weights": torch.ones(len(rows), 1),
        }
        loss = diffusion_loss(model, draw_diffusion(batch, generator, config, model.sigma_data)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        ema.update(model, step)
        losses.append(loss.item())
    return ema.model, losses  # type: ignore[return-value]
