"""Utility: a small classifier trained on synthetic images and tested on held-out real ones.

Nothing is selected: epochs and learning rates are fixed, and the accuracy is that of the last step. Trained on the
real training records instead, the same classifier gives the ceiling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

_BATCH_SIZE = 128
_LEARNING_RATE = 3e-3
_WARMUP = 0.1  # share of the steps in which the learning rate rises
_WIDTHS = (32, 48, 96)
_NUM_FEATURES = 128


@dataclass(frozen=True)
class DownstreamAccuracy:
    """Accuracy on held-out real records. Private when those records are.

    Args:
        accuracy: Share of all test records that are classified right.
        per_class: The same share of each class, [num_classes]; None: the class has no test record.
    """

    accuracy: float
    per_class: tuple[float | None, ...]


class SmallCnn(nn.Module):
    """Three convolutions and a hidden layer, the size that the field uses for 28x28 images.

    Pooling comes before normalisation: a ReLU is monotone, so that computes nearly the same on a quarter of the pixels.

    Args:
        image_shape: (h, w, c) of the images, h and w from 8, c 1 or 3.
        num_classes: Outputs.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        height, width, channels = image_shape
        a, b, c = _WIDTHS
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, a, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(a), nn.ReLU()),
            *(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(b), nn.ReLU()),
            *(nn.Conv2d(b, c, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(c), nn.ReLU()),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(c * math.prod((side + 1) // 2 // 4 for side in (height, width)), _NUM_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(_NUM_FEATURES, num_classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits [b, num_classes] of uint8 pixels [b, c, h, w]."""
        return self.head(self.features(pixels))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The layer before the logits, [b, 128], of uint8 pixels [b, c, h, w]."""
        return self.body(pixels.float().div(127.5).sub(1))


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_pixels(images: np.ndarray, where: torch.device) -> torch.Tensor:
    """uint8 [n, h, w, c] copied to a tensor [n, c, h, w] that keeps the layout in memory (channels last)."""
    return torch.tensor(np.ascontiguousarray(images)).to(where).permute(0, 3, 1, 2)


def train_classifier(
    images: np.ndarray, labels: np.ndarray, *, num_classes: int, num_epochs: int, seed: int
) -> SmallCnn:
    """Train a SmallCnn for a fixed number of epochs with AdamW and a cosine schedule.

    Equal arguments give equal weights on one machine with one number of threads. The global random state of torch is
    left as it was.

    Args:
        images: uint8 [n, h, w, c], n from 2. Synthetic; for the ceiling the real training records (private).
        labels: int64 [n], 0 to num_classes - 1.
        num_classes: Number of classes.
        num_epochs: Passes over the images.
        seed: Of initial weights, order and dropout.

    Returns:
        The classifier of the last step, in evaluation mode. Private when the images are.
    """
    where = device()
    pixels, targets = to_pixels(images, where), torch.tensor(labels).to(where)
    steps_per_epoch = math.ceil(len(images) / _BATCH_SIZE)
    total = num_epochs * steps_per_epoch
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with torch.random.fork_rng(range(torch.cuda.device_count())), cudnn:
        torch.manual_seed(seed)
        model = SmallCnn(images.shape[1:], num_classes).to(memory_format=torch.channels_last).to(where)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step / total))
        for _ in range(num_epochs):
            for batch in torch.randperm(len(images)).to(where).tensor_split(steps_per_epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(pixels[batch]), targets[batch]).backward()
                optimizer.step()
                scheduler.step()
    return model.eval()


def _schedule(progress: float) -> float:
    """Factor of the learning rate: a linear rise, then a half cosine to zero.

    >>> [round(_schedule(p), 3) for p in (0.0, 0.1, 0.55, 1.0)]
    [0.01, 1.0, 0.5, 0.0]
    """
    if progress < _WARMUP:
        return max(0.01, progress / _WARMUP)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))


@torch.inference_mode()
def held_out_accuracy(
    classifier: SmallCnn, images: np.ndarray, labels: np.ndarray, *, num_classes: int
) -> DownstreamAccuracy:
    """Accuracy of a trained classifier on real records that it has not seen.

    Args:
        classifier: From ``train_classifier``.
        images: Held-out real uint8 [n, h, w, c]. Private.
        labels: int64 [n]. Private.
        num_classes: Number of classes.

    Returns:
        Accuracy, over all and per class. Private.
    """
    where = device()
    batches = [to_pixels(images[i : i + 500], where) for i in range(0, len(images), 500)]
    hits = torch.cat([classifier(pixels).argmax(1) for pixels in batches]).cpu().numpy() == labels
    counts = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels, weights=hits, minlength=num_classes)
    per_class = tuple(float(r / n) if n else None for r, n in zip(right, counts, strict=True))
    return DownstreamAccuracy(float(hits.mean()), per_class)


@torch.inference_mode()
def predicted_right(classifier: SmallCnn, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each record is classified right, bool [n]: a function of that record alone.

    Each goes through the network by itself: in a batch, rounding may depend on who else is in it, and a tie could turn
    because of another record. One thread is the fastest for one image.

    Args:
        classifier: From ``train_classifier``.
        images: Held-out real uint8 [n, h, w, c]. Private.
        labels: int64 [n]. Private.

    Returns:
        Private.
    """
    where, threads = device(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [int(classifier(to_pixels(images[i : i + 1], where)).argmax()) for i in range(len(images))]
    finally:
        torch.set_num_threads(threads)
    return np.array(found, dtype=np.int64) == labels


def train_on_synthetic_accuracy(
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    num_epochs: int,
    seed: int,
) -> DownstreamAccuracy:
    """Train on synthetic images, test on held-out real ones (TSTR, Esteban et al. 2017, arXiv 1706.02633).

    Args:
        images: Training images, uint8 [n, h, w, c]: synthetic, or the real training records for the ceiling.
        labels: int64 [n].
        test_images: Held-out real images, uint8 [m, h, w, c]. Private.
        test_labels: int64 [m]. Private.
        num_classes: Number of classes.
        num_epochs: Passes over the training images; fixed, nothing is selected.
        seed: Of initial weights, order and dropout.

    Returns:
        Accuracy of the last step. Private.
    """
    classifier = train_classifier(images, labels, num_classes=num_classes, num_epochs=num_epochs, seed=seed)
    return held_out_accuracy(classifier, test_images, test_labels, num_classes=num_classes)
