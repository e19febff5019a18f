"""Stage 2: a denoiser on top of the latent prior, first on procedural images (free), then on private ones by DP-SGD."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpldm_core.config import DiffusionConfig
from dpldm_core.data.procedural import procedural_images
from dpldm_core.diffusion.loss import denoising_loss
from dpldm_core.diffusion.schedule import training_sigmas
from dpldm_core.models.autoencoder import Encoder
from dpldm_core.models.denoiser import Denoiser
from dpldm_core.models.ema import Ema
from dpldm_core.models.precond import edm_weight
from dpldm_core.models.prior import GaussianPrior
from dpldm_core.privacy.engine import Batch
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey
from dpldm_core.threads import multiplying_in_bfloat16
from dpldm_core.training.private import TrainLoop, train_private
from dpldm_core.training.units import Units

_POOL = 16_384  # most procedural images that pretraining draws its batches from
_CHUNK = 2_048
_GROUPS = 20  # groups of like procedural images, which stand for classes
_PROCEDURAL_FLOOR = 3e-3  # variance of a latent direction: drawings from formulas are smoother than photographs
_PROCEDURAL_RATE = 3e-3


def build_denoiser(
    config: DiffusionConfig,
    *,
    latent_shape: tuple[int, int, int],
    num_classes: int,
    seed: int = 0,
    noise_std: float = 0.0,
) -> Denoiser:
    """An untrained denoiser; equal seeds give equal weights, and the global generator is left alone.

    Args:
        config: Size and sigma_data.
        latent_shape: (channels, k, k) of the small image that a latent is.
        num_classes: Public number of classes.
        seed: Public.
        noise_std: Standard deviation of noise that the training latents carry (mode noised_latents).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(
            latent_shape=latent_shape,
            num_classes=num_classes,
            width=config.width,
            depth=config.depth,
            sigma_data=config.sigma_data,
            noise_std=noise_std,
        )


def pretrain_denoiser(model: Denoiser, encoder: Encoder, config: DiffusionConfig, *, seed: int) -> list[float]:
    """Train the network to draw strokes and blobs from formulas; touches no private data, so its loss curve is public.

    Groups of like drawings stand for classes: the network learns to make the estimate of a class Gaussian better.

    Args:
        model: Its network is trained in place.
        encoder: Of stage 1; it has no weights.
        config: Steps, batch size and noise levels.
        seed: Public.

    Returns:
        The loss of each step.
    """
    from sklearn.cluster import KMeans  # takes a second; most of those that import this module train nothing

    if config.procedural_steps == 0:
        return []
    generator, device = np.random.default_rng(seed), next(model.network.parameters()).device
    size = min(_POOL, max(_GROUPS, config.procedural_steps * config.procedural_batch_size))
    pool = procedural_images(size, *encoder.transform.shape, generator=torch.Generator().manual_seed(seed))
    latents = torch.cat([encoder(images) for images in pool.split(_CHUNK)])
    clusters = KMeans(_GROUPS, n_init=1, max_iter=20, random_state=seed % 2**32)  # it takes no larger seed
    groups = torch.from_numpy(clusters.fit_predict(latents)).long()
    prior = GaussianPrior(_GROUPS, model.dim)
    members = [latents[groups == group].double() for group in range(_GROUPS)]
    prior.set_moments(
        torch.stack([found.mean(0) for found in members]),
        torch.stack([torch.cov(found.T, correction=0) for found in members]),
        variance_floor=_PROCEDURAL_FLOOR,
    )
    prior, latents, groups = prior.to(device), latents.to(device), groups.to(device)

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return model.refine(x, sigma, prior.denoise(x, sigma, labels), torch.full_like(labels, -1))

    trainable, losses = list(model.network.parameters()), []
    optimizer = torch.optim.AdamW(trainable, lr=_PROCEDURAL_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _PROCEDURAL_RATE, total_steps=config.procedural_steps, pct_start=0.1, cycle_momentum=False
    )
    with multiplying_in_bfloat16(model.network):
        for _ in range(config.procedural_steps):
            rows = torch.from_numpy(generator.integers(size, size=config.procedural_batch_size)).to(device)
            batch = draw_diffusion({"values": latents[rows][:, None]}, generator, config, model.sigma_data)
            sigma, noise = batch["sigma"][:, 0], batch["noise"][:, 0]
            weight = edm_weight(sigma, model.sigma_data)
            loss = denoising_loss(denoise, latents[rows], groups[rows], sigma, noise, weight).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


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
            "weights": torch.ones(len(rows), 1, device=latents.device),
        }
        loss = diffusion_loss(model, draw_diffusion(batch, generator, config, model.sigma_data)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        ema.update(model, step)
        losses.append(loss.item())
    return ema.model, losses  # type: ignore[return-value]
