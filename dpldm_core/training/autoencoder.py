"""Stage 1: an autoencoder, first on procedural images (free), then on private ones with DP-SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpldm_core.config import AutoencoderConfig
from dpldm_core.data.procedural import procedural_images
from dpldm_core.models.autoencoder import Autoencoder
from dpldm_core.privacy.engine import Batch
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey
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


def reconstruction_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared pixel error of a unit's images, weighted within the unit, [B]."""
    images, weights = batch["values"], batch["weights"]
    restored = model(images.flatten(0, 1)).view_as(images)
    return ((restored - images).square().mean((2, 3, 4)) * weights).sum(1)


def pretrain_autoencoder(model: Autoencoder, config: AutoencoderConfig, *, seed: int) -> list[float]:
    """Train on drawings from formulas; touches no private data, so its loss curve is public.

    Args:
        model: Trained in place.
        config: Steps and batch size.
        seed: Public.

    Returns:
        The loss of each step.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = model.encoder.transform.shape
    if config.procedural_steps == 0:
        return []
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=config.procedural_steps, pct_start=0.1, cycle_momentum=False
    )
    pool = procedural_images(_POOL, channels, height, width, generator=generator)
    losses = []
    for _ in range(config.procedural_steps):
        images = pool[torch.randint(_POOL, (config.procedural_batch_size,), generator=generator)]
        loss = (model(images) - images).square().mean()
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
        config: Learning rate and averaging.
        train: The loop: :func:`train_private`, or one that adds canaries to it.
        loop: Further arguments of :func:`train_private`.

    Returns:
        The averaged autoencoder.
    """
    return train(  # type: ignore[return-value]
        model,
        units,
        plan,
        key,
        loss=reconstruction_loss,
        draw=lambda batch, generator: batch,
        learning_rate=config.dp_sgd.learning_rate,
        ema_decay=config.dp_sgd.ema_decay,
        **loop,
    )


@torch.no_grad()
def encode(model: Autoencoder, images: Tensor, *, batch_size: int = 2048) -> Tensor:
    """Latents of private images (private: the record is read again), float32 [n, latent_dim]."""
    model.eval()
    return torch.cat([model.encoder(chunk) for chunk in images.split(batch_size)])
