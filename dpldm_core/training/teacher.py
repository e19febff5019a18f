"""The label teacher: features from synthetic images (free), then a linear head on private ones with DP-SGD."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpldm_core.config import TeacherConfig
from dpldm_core.models.classifier import train_classifier
from dpldm_core.models.teacher import LabelTeacher
from dpldm_core.privacy.engine import Batch
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey
from dpldm_core.training.private import TrainLoop, train_private
from dpldm_core.training.units import Units

MOMENTUM = 0.9


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
    network = train_classifier(
        images,
        labels,
        num_classes=teacher.head.out_features,
        num_epochs=config.num_epochs,
        seed=seed,
        deformation=config.deformation,
    )
    teacher.fit_features(network, images)


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
