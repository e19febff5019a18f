"""The label teacher: features from synthetic images (free), then a linear head on private ones with DP-SGD."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dpldm_core.config import TeacherConfig
from dpldm_core.models.classifier import train_classifier
from dpldm_core.models.teacher import LabelTeacher
from dpldm_core.privacy.engine import Batch
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey
from dpldm_core.training.private import TrainLoop, train_private
from dpldm_core.training.units import Units

MOMENTUM = 0.9
_TURN, _SCALE, _SHEAR, _SHIFT = (
    math.radians(8),
    0.08,
    0.08,
    1 / 14,
)  # most at deformation 1; a shift of 1 is half a side
_CHUNK = 5_000
_MOST_FITTED = 20_000  # images that the principal directions are those of


def build_teacher(config: TeacherConfig, image_shape: tuple[int, int, int], num_classes: int) -> LabelTeacher:
    """An untrained teacher."""
    with torch.random.fork_rng(devices=[]):
        return LabelTeacher(image_shape, num_classes, num_features=config.num_features, ridge=config.ridge)


def learn_features(
    teacher: LabelTeacher, images: np.ndarray, labels: np.ndarray, config: TeacherConfig, *, seed: int
) -> None:
    """Train the teacher's network on synthetic images with the labels they were drawn for: post-processing.

    Args:
        teacher: Changed in place.
        images: Synthetic, uint8 [n, h, w, c].
        labels: int64 [n].
        config: Epochs, and how much each deforms the images.
        seed: Public.
    """
    views = np.concatenate(
        [deform(images, config.deformation, seed=seed + epoch) for epoch in range(config.num_epochs)]
    )
    labels = np.tile(labels, config.num_epochs)
    network = train_classifier(views, labels, num_classes=teacher.head.out_features, num_epochs=1, seed=seed)
    teacher.fit_features(network, images[:_MOST_FITTED])


def deform(images: np.ndarray, deformation: float, *, seed: int) -> np.ndarray:
    """Each image turned, scaled, sheared and moved a little, at random: what moves a real one within its class.

    Args:
        images: Synthetic, uint8 [n, h, w, c].
        deformation: At most about 8 degrees, 8 % and a 28th of a side times this; 0 leaves the images as they are.
        seed: Public.

    Returns:
        As many images, same shape and type.
    """
    if deformation == 0:
        return images
    generator = torch.Generator().manual_seed(seed)
    uniform = (torch.rand(6, len(images), generator=generator) * 2 - 1) * deformation
    turn, wide, high, shear, right, down = (
        uniform * torch.tensor([_TURN, _SCALE, _SCALE, _SHEAR, _SHIFT, _SHIFT])[:, None]
    )
    cos, sin = turn.cos(), turn.sin()
    rows = [cos * (1 + wide), shear - sin * (1 + high), right], [sin * (1 + wide), cos * (1 + high), down]
    maps = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    found = np.empty_like(images)
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        pixels = torch.from_numpy(images[part]).permute(0, 3, 1, 2).float()
        grid = functional.affine_grid(maps[part], list(pixels.shape), align_corners=False)
        moved = functional.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False)
        found[part] = moved.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    return found


def teacher_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of a unit's records, weighted within the unit, [B]."""
    units, records = batch["weights"].shape
    logits = model(batch["values"].flatten(0, 1))
    per_record = nn.functional.cross_entropy(logits, batch["class_labels"].flatten(), reduction="none")
    return (per_record.view(units, records) * batch["weights"]).sum(1)


def train_head(
    teacher: LabelTeacher,
    units: Units,
    plan: DpSgdPlan,
    key: SecretKey,
    config: TeacherConfig,
    *,
    train: TrainLoop = train_private,
    **loop: Any,
) -> None:
    """DP-SGD on features of private images.

    Args:
        teacher: With its features learnt; its head is replaced by the trained one.
        units: Private features, values [n, num_features + 1].
        plan: What is charged.
        key: Secret key of this stage.
        config: Learning rate, for a sum of clipped gradients over the public expected batch, and averaging.
        train: The loop.
        loop: Further arguments of :func:`train_private`.
    """
    noise_std = plan.noise_multiplier * plan.max_grad_norm  # gradients arrive divided by it
    teacher.head = train(  # type: ignore[assignment]
        teacher.head,
        units,
        plan,
        key,
        loss=teacher_loss,
        draw=lambda batch, generator: batch,
        learning_rate=config.dp_sgd.learning_rate * noise_std / config.expected_batch_size,
        momentum=MOMENTUM,
        ema_decay=config.dp_sgd.ema_decay,
        **loop,
    )
