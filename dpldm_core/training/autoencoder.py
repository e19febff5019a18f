"""Stage 1: an autoencoder, first on procedural images (free), then on private ones with DP-SGD."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpldm_core.config import AutoencoderConfig
from dpldm_core.data.procedural import procedural_images
from dpldm_core.models.autoencoder import Autoencoder, unwhitening
from dpldm_core.models.batches import in_equal_batches
from dpldm_core.privacy.engine import Batch
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey
from dpldm_core.threads import multiplying_in_bfloat16
from dpldm_core.training.private import TrainLoop, train_private
from dpldm_core.training.units import Units

_LEARNING_RATE = 6e-3
_POOL = 4096  # procedural images that pretraining draws its batches from


def build_autoencoder(
    config: AutoencoderConfig, *, channels: int, height: int, width: int, seed: int = 0
) -> Autoencoder:
    """An untrained autoencoder; equal seeds give equal weights, and the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Autoencoder(
            channels=channels,
            height=height,
            width=width,
            frequencies=config.frequencies,
            refiner_channels=config.refiner_channels,
        )


def draw_codec(batch: Batch, generator: np.random.Generator, config: AutoencoderConfig, spread: Tensor) -> Batch:
    """Adds noise for the latents of a batch, like what sampled latents carry: levels from 0 to ``latent_noise``.

    Args:
        batch: With ``values``, images [units, records, c, h, w].
        generator: Of the draws.
        config: Largest standard deviation, in whitened coordinates.
        spread: Map [d, d] from whitened coordinates to latents.

    Returns:
        The batch with ``noise`` [units, records, d].
    """
    units, records = batch["values"].shape[:2]
    levels = config.latent_noise * generator.random((units, records, 1), dtype=np.float32)
    noise = levels * generator.standard_normal((units, records, len(spread)), dtype=np.float32)
    return batch | {"noise": torch.from_numpy(noise).to(spread) @ spread.T}


def reconstruction_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared pixel error of a unit's images as they are shown, from noisy latents, weighted in the unit, [B].

    Images are clamped before they are shown: below black is black, above white is white, and neither is an error. So
    the decoder may go safely beyond where it knows a background, and what noise is left there does not show.
    """
    images, weights = batch["values"], batch["weights"]
    latents = model.encoder(images.flatten(0, 1)) + batch["noise"].flatten(0, 1)  # type: ignore[operator]
    restored = model.decoder(latents).view_as(images)  # type: ignore[operator]
    beyond = (images.abs() >= 1) & (images * restored > 1)
    errors = torch.where(beyond, 0.0, restored - images).square()
    return (errors.mean((2, 3, 4)) * weights).sum(1)


def pretrain_autoencoder(model: Autoencoder, config: AutoencoderConfig, *, seed: int) -> list[float]:
    """Train on drawings from formulas; touches no private data, so its loss curve is public.

    Args:
        model: Trained in place.
        config: Steps, batch size and noise of the latents.
        seed: Public.

    Returns:
        The loss of each step.
    """
    generator, draws = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    spread = unwhitening(model.encoder.transform.latent_shape)
    channels, height, width = model.encoder.transform.shape
    if config.procedural_steps == 0:
        return []
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=config.procedural_steps, pct_start=0.1, cycle_momentum=False
    )
    pool = procedural_images(_POOL, channels, height, width, generator=generator)
    losses = []
    with multiplying_in_bfloat16(model.decoder.refiner):
        for _ in range(config.procedural_steps):
            images = pool[torch.randint(_POOL, (config.procedural_batch_size,), generator=generator)]
            drawn = {"values": images[:, None], "weights": torch.ones(len(images), 1)}
            loss = reconstruction_loss(model, draw_codec(drawn, draws, config, spread)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


def train_autoencoder(
    model: Autoencoder,
    units: Units,
    plan: DpSgdPlan,
    key: SecretKey,
    config: AutoencoderConfig,
    *,
    train: TrainLoop = train_private,
    **loop: Any,
) -> Autoencoder:
    """DP-SGD on private images.

    Args:
        model: Pretrained on procedural images.
        units: Private images, values [n, c, h, w] in [-1, 1].
        plan: What is charged.
        key: Secret key of this stage.
        config: Noise of the latents, learning rate and averaging.
        train: The loop: :func:`train_private`, or one that adds canaries to it.
        loop: Further arguments of :func:`train_private`.

    Returns:
        The averaged autoencoder.
    """
    spread = unwhitening(model.encoder.transform.latent_shape).to(units.values.device)
    return train(  # type: ignore[return-value]
        model,
        units,
        plan,
        key,
        loss=reconstruction_loss,
        draw=lambda batch, generator: draw_codec(batch, generator, config, spread),
        learning_rate=config.dp_sgd.learning_rate,
        ema_decay=config.dp_sgd.ema_decay,
        **loop,
    )


@torch.no_grad()
def encode(model: Autoencoder, images: Tensor, *, batch_size: int = 2048) -> Tensor:
    """Latents of private images (private: the record is read again), float32 [n, latent_dim]."""
    model.eval()
    return in_equal_batches(model.encoder, images, batch_size)
