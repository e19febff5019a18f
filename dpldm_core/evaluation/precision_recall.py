"""Precision and recall of features: are the images like real ones, and are all real ones drawn?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpldm_core.evaluation.features import DrawnFeatures

NEIGHBOURHOOD = 3  # neighbours to whose distance an image's ball reaches, as in the paper
_CHUNK = 1_000  # rows of distances at a time: 80 MB of them for 10,000 images


@dataclass(frozen=True)
class PrecisionRecall:
    """How much of each set lies where the other is, on equally many images a side. Private.

    Args:
        metric: Whose features: the name of the Frechet distance on them.
        num_images: Images a side; both shares move with it, so compare equal numbers alone.
        neighbourhood: An image's ball reaches to its neighbour of this number in its own set.
        precision: Of the synthetic images, those that lie in a ball of a real training image.
        recall: Of the real training images, those that lie in a ball of a synthetic image.
        heldout_precision: As precision, of real held-out images in the place of the synthetic ones: what perfect
            images would reach.
        heldout_recall: As recall, likewise.
    """

    metric: str
    num_images: int
    neighbourhood: int
    precision: float
    recall: float
    heldout_precision: float
    heldout_recall: float


def precision_recall(drawn: DrawnFeatures) -> PrecisionRecall | None:
    """Improved precision and recall, Kynkaanniemi et al. (2019), arXiv 1904.06991, Eq. 1 and 2, by torch-fidelity.

    Args:
        drawn: Features of all three sets. Private.

    Returns:
        The shares, private; None where a set has no neighbour of that number.
    """
    num_images = len(drawn.heldout)
    if num_images <= NEIGHBOURHOOD:
        return None
    train = drawn.train[:num_images]
    precision, recall = _shares(drawn.synthetic[:num_images], train)
    heldout_precision, heldout_recall = _shares(drawn.heldout, train)
    return PrecisionRecall(
        metric=drawn.metric,
        num_images=num_images,
        neighbourhood=NEIGHBOURHOOD,
        precision=precision,
        recall=recall,
        heldout_precision=heldout_precision,
        heldout_recall=heldout_recall,
    )


def _shares(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Precision and recall of features [n, d] by the reference [n, d], in float64: distances are small beside norms."""
    import torch  # here because torch-fidelity imports torchvision, which takes seconds
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    sides = (torch.from_numpy(part.astype(np.float64)) for part in (features, reference))
    return calculate_precision_recall_part(*sides, NEIGHBOURHOOD, _CHUNK)
