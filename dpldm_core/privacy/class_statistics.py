"""Means and covariances of classes, by two one-shot mechanisms: the second one measures about what the first released.

Both are sums as those of one_shot.py, stacked over the classes: a unit's weights sum to at most 1 over all of them, so
its stacked contribution has norm 1 as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpldm_core.privacy.one_shot import SECOND, Split, check_unit_norm, moment_contributions, release_sum, symmetric
from dpldm_core.privacy.plan import GaussianSumPlan
from dpldm_core.rng import SecretKey

CLASS_MEANS = Split(0.3, math.sqrt(1 - 0.3**2), 0.0)


@dataclass(frozen=True)
class ClassMeans:
    """Released counts and means of each class, with the noise they carry. Public once released.

    Args:
        counts: Units per class, [classes].
        means: [classes, d].
        count_std: Noise standard deviation of a count.
        mean_std: Noise standard deviation of a coordinate of (count times mean).
    """

    counts: Tensor
    means: Tensor
    count_std: float
    mean_std: float


@dataclass(frozen=True)
class ClassCovariances:
    """Released covariances of each class about released means, with the noise they carry. Public once released.

    Args:
        covariances: [classes, d, d].
        sum_std: Noise standard deviation of an off-diagonal entry of (count times covariance).
    """

    covariances: Tensor
    sum_std: float


def class_contributions(
    vectors: Tensor, class_labels: Tensor, weights: Tensor, centres: Tensor, *, clip_norm: float, split: Split
) -> Tensor:
    """The exact sums that class means or covariances are read from: one unit moves them by at most 1 in L2.

    Args:
        vectors: Private vectors [n, d].
        class_labels: Private labels, int64 [n]; a record of no class adds nothing.
        weights: [n], summing to at most 1 over the records of one unit.
        centres: What is taken off the vectors of each class before the clip, [classes, d]: public, or released.
        clip_norm: Public L2 norm R that the differences are clipped to.
        split: Which parts.

    Returns:
        float64 [classes, length]: :func:`moment_contributions` of each class.
    """
    of_class = (class_labels == label for label in range(len(centres)))
    return torch.stack(
        [
            moment_contributions(vectors[rows].double() - centre, weights[rows], clip_norm=clip_norm, split=split)
            for rows, centre in zip(of_class, centres.double(), strict=True)
        ]
    )


def noisy_class_means(
    plan: GaussianSumPlan,
    key: SecretKey,
    vectors: Tensor,
    class_labels: Tensor,
    weights: Tensor,
    *,
    num_classes: int,
    clip_norm: float,
) -> ClassMeans:
    """Counts and means of every class by one Gaussian mechanism.

    Args:
        plan: Its ``max_norm`` must be 1, the sensitivity of the stacked sum.
        key: Secret key of this mechanism.
        vectors: Private vectors [n, d].
        class_labels: Private labels, int64 [n].
        weights: [n], summing to at most 1 over the records of one unit.
        num_classes: Public number of classes.
        clip_norm: Public L2 norm R that vectors are clipped to.

    Returns:
        The released statistics; a divisor is at least 1, whatever the noise made of the count.

    Raises:
        ValueError: The plan is for another sensitivity.
    """
    check_unit_norm(plan)
    origin = torch.zeros(num_classes, vectors.shape[1])
    exact = class_contributions(vectors, class_labels, weights, origin, clip_norm=clip_norm, split=CLASS_MEANS)
    noisy = release_sum(plan, key, exact)
    counts = noisy[:, 0] / CLASS_MEANS.count
    return ClassMeans(
        counts=counts,
        means=noisy[:, 1:] * (clip_norm / CLASS_MEANS.mean) / counts.clamp(min=1.0)[:, None],
        count_std=plan.noise_multiplier / CLASS_MEANS.count,
        mean_std=plan.noise_multiplier * clip_norm / CLASS_MEANS.mean,
    )


def noisy_class_covariances(
    plan: GaussianSumPlan,
    key: SecretKey,
    vectors: Tensor,
    class_labels: Tensor,
    weights: Tensor,
    released: ClassMeans,
    *,
    clip_norm: float,
) -> ClassCovariances:
    """Mean outer products of every class about its released mean, by one Gaussian mechanism.

    About its mean a vector is shorter than about the origin: it can be clipped to less, and needs less noise.

    Args:
        plan: Its ``max_norm`` must be 1, the sensitivity of the outer products over R^2.
        key: Secret key of this mechanism.
        vectors: Private vectors [n, d].
        class_labels: Private labels, int64 [n].
        weights: [n], summing to at most 1 over the records of one unit.
        released: Counts and means, paid for by a mechanism of their own.
        clip_norm: Public L2 norm R that the differences from the means are clipped to.

    Returns:
        The released statistics; a divisor is at least 1.

    Raises:
        ValueError: The plan is for another sensitivity.
    """
    check_unit_norm(plan)
    exact = class_contributions(vectors, class_labels, weights, released.means, clip_norm=clip_norm, split=SECOND)
    sums = symmetric(release_sum(plan, key, exact), vectors.shape[1]) * clip_norm**2
    return ClassCovariances(
        covariances=sums / released.counts.clamp(min=1.0)[:, None, None],
        sum_std=plan.noise_multiplier * clip_norm**2 / math.sqrt(2.0),
    )
