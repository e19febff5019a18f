"""Frechet distance of features, always with the number of images and the floor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import svdvals

from dpldm_core.evaluation.features import DrawnFeatures


@dataclass(frozen=True)
class FrechetResult:
    """Distances of one feature extractor, on equally many images a side. Private: real records are in each.

    Args:
        metric: ``fid``, ``fd_inception768`` or ``fd_real_classifier``; only the first is comparable with papers.
        num_features: Length of a feature vector.
        num_images: Images a side in the next three; distances fall with it, so compare equal numbers alone.
        distance: Synthetic images to real training images.
        distance_to_heldout: Synthetic images to real held-out images.
        floor: Real training images to real held-out images: what perfect images would reach.
        num_images_all: Images a side of ``distance_all``.
        distance_all: As ``distance``, without being cut to the number of held-out images.
    """

    metric: str
    num_features: int
    num_images: int
    distance: float
    distance_to_heldout: float
    floor: float
    num_images_all: int
    distance_all: float


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians fitted to features, Heusel et al. (2017), arXiv 1706.08500, Eq. 6.

    With R the triangular factor of the centred features, covariance = R'R, and the trace of (C_1 C_2)^(1/2) is the sum
    of the singular values of R_1 R_2'. That holds for singular covariances too, as they are with fewer images than
    features; pytorch-fid's sqrtm of a product does not, and is called with an argument that scipy is dropping.

    Args:
        features: [n, d], n from 2.
        reference: [m, d], m from 2.

    Returns:
        The distance, in squared units of the features, computed in float64.

    >>> corners = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    >>> round(frechet_distance(corners, 3 * corners + 5), 9)  # |5, 5|^2 + (4 / 3) * 2 * (3 - 1)^2
    60.666666667
    """
    mean_1, root_1 = _moments(features)
    mean_2, root_2 = _moments(reference)
    trace = np.square(root_1).sum() + np.square(root_2).sum() - 2 * svdvals(root_1 @ root_2.T).sum()
    return max(0.0, float(np.square(mean_1 - mean_2).sum() + trace))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d], and a matrix R with R'R = the unbiased covariance [d, d]."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    return mean, np.linalg.qr(features - mean, mode="r") / np.sqrt(len(features) - 1)


def frechet_distances(drawn: DrawnFeatures) -> FrechetResult:
    """Distances of synthetic images to both real sets, and of these to each other.

    Args:
        drawn: Features of all three. Private.

    Returns:
        The distances. Private.
    """
    num_all, num_images = len(drawn.synthetic), len(drawn.heldout)
    few, few_train = drawn.synthetic[:num_images], drawn.train[:num_images]
    distance = frechet_distance(few, few_train)
    return FrechetResult(
        metric=drawn.metric,
        num_features=drawn.synthetic.shape[1],
        num_images=num_images,
        distance=distance,
        distance_to_heldout=frechet_distance(few, drawn.heldout),
        floor=frechet_distance(few_train, drawn.heldout),
        num_images_all=num_all,
        distance_all=distance if num_all == num_images else frechet_distance(drawn.synthetic, drawn.train),
    )
