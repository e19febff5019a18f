"""The label teacher: features from synthetic images (free), then a head on private ones with DP-SGD."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpldm_core.config import TeacherConfig
from dpldm_core.models.classifier import deform, to_pixels, train_classifier
from dpldm_core.models.teacher import FineTunedTeacher, LabelTeacher, LinearTeacher, PriorTeacher
from dpldm_core.privacy.engine import Batch
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey
from dpldm_core.training.private import TrainLoop, train_private
from dpldm_core.training.units import Units

MOMENTUM = 0.9
_BATCH_SIZE = 1000


def build_teacher(config: TeacherConfig, image_shape: tuple[int, int, int], num_classes: int) -> LabelTeacher:
    """An untrained teacher."""
    with torch.random.fork_rng(devices=[]):
        if config.dp_sgd.budget_share == 0:
            return PriorTeacher(image_shape, num_classes)
        if config.fine_tuned:
            return FineTunedTeacher(image_shape, num_classes)
        return LinearTeacher(image_shape, num_classes, num_features=config.num_features, ridge=config.ridge)


def learn_features(
    teacher: LabelTeacher, images: np.ndarray, labels: np.ndarray, config: TeacherConfig, *, seed: int
) -> None:
    """Train the teacher's network on synthetic images with their labels: post-processing.

    Args:
        teacher: Changed in place.
        images: Synthetic, uint8 [n, h, w, c].
        labels: int64 [n]: what they were drawn for, or what a first teacher says of them.
        config: Epochs, and how much each deforms the images.
        seed: Public.
    """
    network = train_classifier(
        images,
        labels,
        num_classes=teacher.num_classes,
        num_epochs=config.num_epochs,
        seed=seed,
        deformation=config.deformation,
    )
    teacher.take(network, images)


def deformed_copies(images: np.ndarray, config: TeacherConfig, *, seed: int) -> np.ndarray:
    """Copies of images, each turned, scaled, sheared and moved in one way that is the same for all.

    What becomes of a record depends on that record and on public numbers alone: with draws of its own, taken in the
    order of the records, one person less would move the copies of everybody after them.

    Args:
        images: Private, uint8 [n, h, w, c].
        config: How many copies of each, and how much they are deformed.
        seed: Public.

    Returns:
        uint8 [num_copies * n, h, w, c]: one copy of every image, then the next. Private.
    """
    ways = torch.rand(config.num_copies, 6, generator=torch.Generator().manual_seed(seed))
    copies = np.empty((config.num_copies, *images.shape), dtype=np.uint8)
    for copy, way in zip(copies, ways, strict=True):
        for start in range(0, len(images), _BATCH_SIZE):
            pixels = to_pixels(images[start : start + _BATCH_SIZE], torch.device("cpu"))
            moved = deform(pixels.float(), config.deformation, way)
            copy[start : start + _BATCH_SIZE] = moved.round().byte().permute(0, 2, 3, 1).numpy()
    return copies.reshape(-1, *images.shape[1:])


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
        units: Private features, from :meth:`LabelTeacher.features`, of records and their copies.
        plan: What is charged.
        key: Secret key of this stage.
        config: Averaging, and learning rate: for a sum of clipped gradients over the public expected batch; where dense
            layers are fine-tuned, for gradients whose noise has unit variance, so that noise moves no weight far.
        train: The loop.
        loop: Further arguments of :func:`train_private`.
    """
    learning_rate = config.dp_sgd.learning_rate
    if not config.fine_tuned:
        noise_std = plan.noise_multiplier * plan.max_grad_norm  # gradients arrive divided by it
        learning_rate *= noise_std / config.expected_batch_size
    teacher.head = train(
        teacher.head,
        units,
        plan,
        key,
        loss=teacher_loss,
        draw=lambda batch, generator: batch,
        learning_rate=learning_rate,
        momentum=MOMENTUM,
        ema_decay=config.dp_sgd.ema_decay,
        **loop,
    )
