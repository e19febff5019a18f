"""Utility: a small classifier trained on synthetic images and tested on held-out real ones.

Nothing is selected: epochs and learning rates are fixed, and the accuracy is that of the last step. Trained on the
real training records instead, the same classifier gives the ceiling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dpldm_core.models.classifier import SmallCnn, device, to_pixels


@dataclass(frozen=True)
class DownstreamAccuracy:
    """Accuracy on held-out real records. Private when those records are.

    Args:
        accuracy: Share of all test records that are classified right.
        per_class: The same share of each class, [num_classes]; None: the class has no test record.
    """

    accuracy: float
    per_class: tuple[float | None, ...]


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
