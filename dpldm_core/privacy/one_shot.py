"""One-shot mechanisms: a single noisy sum, from which counts, means and second moments are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpldm_core.privacy.plan import GaussianRecordPlan, GaussianSumPlan
from dpldm_core.rng import SecretKey

# How a record's unit of norm is divided between its count, its vector and its outer product (squares sum to 1).
COUNT_WEIGHT, MEAN_WEIGHT = 0.1, 0.5
SECOND_WEIGHT = math.sqrt(1 - COUNT_WEIGHT**2 - MEAN_WEIGHT**2)


@dataclass(frozen=True)
class ClassMoments:
    """Released statistics of each class, with the noise they carry. Public once released.

    Args:
        counts: Units per class, [classes].
        means: [classes, d].
        second_moments: Mean outer products, [classes, d, d].
        count_std: Noise standard deviation of a count.
        mean_std: Noise standard deviation of a coordinate of (count times mean).
        second_std: Noise standard deviation of an off-diagonal entry of (count times second moment).
    """

    counts: Tensor
    means: Tensor
    second_moments: Tensor
    count_std: float
    mean_std: float
    second_std: float


def clip_rows(vectors: Tensor, max_norm: float) -> Tensor:
    """Rows scaled down to an L2 norm of at most ``max_norm``, float64; rows that are not finite become zero."""
    rows = vectors.double()
    rows = torch.where(torch.isfinite(rows).all(1, keepdim=True), rows, torch.zeros_like(rows))
    return rows * (max_norm / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)


def class_contributions(
    vectors: Tensor, class_labels: Tensor, weights: Tensor, *, num_classes: int, clip_norm: float
) -> Tensor:
    """The exact sum that :func:`noisy_class_moments` releases: one unit moves it by at most 1 in L2.

    A record of class y adds w (COUNT, MEAN v / R, SECOND v v^T / R^2) to block y, where v is clipped to R; the weights
    of one unit's records sum to at most 1.

    Returns:
        float64 [num_classes, 1 + d + d (d + 1) / 2], outer products with off-diagonals times sqrt(2).
    """
    scaled = clip_rows(vectors, clip_norm) / clip_norm
    dim = scaled.shape[1]
    upper = torch.triu_indices(dim, dim)
    root = torch.where(upper[0] == upper[1], 1.0, math.sqrt(2.0)).double()
    blocks = []
    for label in range(num_classes):
        rows, w = scaled[class_labels == label], weights[class_labels == label].double()
        outer = (rows * w[:, None]).T @ rows
        blocks.append(
            torch.cat(
                [
                    COUNT_WEIGHT * w.sum()[None],
                    MEAN_WEIGHT * (w @ rows),
                    SECOND_WEIGHT * root * outer[upper[0], upper[1]],
                ]
            )
        )
    return torch.stack(blocks)


def noisy_class_moments(
    plan: GaussianSumPlan,
    key: SecretKey,
    vectors: Tensor,
    class_labels: Tensor,
    weights: Tensor,
    *,
    num_classes: int,
    clip_norm: float,
) -> ClassMoments:
    """Counts, means and second moments of every class by one Gaussian mechanism.

    Args:
        plan: Its ``max_norm`` must be 1, the sensitivity of the stacked sum.
        key: Secret key of this mechanism.
        vectors: Private vectors [n, d].
        class_labels: Private labels, int64 [n].
        weights: [n], summing to at most 1 over the records of one unit (1 for a record that is its own unit).
        num_classes: Public number of classes.
        clip_norm: Public L2 norm R that vectors are clipped to.

    Returns:
        The released statistics.

    Raises:
        ValueError: The plan is for another sensitivity.
    """
    if plan.max_norm != 1.0:
        raise ValueError(f"max_norm={plan.max_norm}: the stacked moments have sensitivity 1")
    exact = class_contributions(vectors, class_labels, weights, num_classes=num_classes, clip_norm=clip_norm)
    noise = plan.noise(key)
    noisy = noise.add(exact.flatten().numpy(), noise.draw(0, exact.numel()))
    released = torch.from_numpy(noisy).view(exact.shape)
    dim = vectors.shape[1]
    counts = released[:, 0] / COUNT_WEIGHT
    divisor = counts.clamp(min=1.0)
    upper = torch.triu_indices(dim, dim)
    root = torch.where(upper[0] == upper[1], 1.0, math.sqrt(2.0)).double()
    second = torch.zeros(num_classes, dim, dim, dtype=torch.float64)
    second[:, upper[0], upper[1]] = released[:, 1 + dim :] / root * (clip_norm**2 / SECOND_WEIGHT)
    second = second + second.triu(1).transpose(1, 2)
    return ClassMoments(
        counts=counts,
        means=released[:, 1 : 1 + dim] * (clip_norm / MEAN_WEIGHT) / divisor[:, None],
        second_moments=second / divisor[:, None, None],
        count_std=plan.noise_multiplier / COUNT_WEIGHT,
        mean_std=plan.noise_multiplier * clip_norm / MEAN_WEIGHT,
        second_std=plan.noise_multiplier * clip_norm**2 / SECOND_WEIGHT / math.sqrt(2.0),
    )


def noisy_records(plan: GaussianRecordPlan, key: SecretKey, vectors: Tensor, records_per_unit: int) -> Tensor:
    """Every record's clipped vector with its own noise: a local mechanism (REPLACE_ONE).

    Args:
        plan: Clip norm of a unit and noise.
        key: Secret key of this mechanism.
        vectors: Private vectors [n, d].
        records_per_unit: Most records that one unit holds; each is clipped to max_norm / sqrt(records_per_unit), so
            that the unit's stacked vectors stay within max_norm.

    Returns:
        Released vectors, float32 [n, d].
    """
    exact = clip_rows(vectors, plan.max_norm / math.sqrt(records_per_unit)).numpy()
    noise = plan.noise(key)
    rows = [noise.add(row, noise.draw(i, row.size)) for i, row in enumerate(exact)]
    return torch.from_numpy(np.stack(rows)).float()
