"""One-shot mechanisms: sum, mean, principal axes and histogram, each by a single noisy sum.

Weights of records sum to at most 1 over one unit (1 for a record that is its own unit); where a sum is released in
parts, one unit's stacked contribution has norm 1. What is made of the noisy sum afterwards is post-processing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpldm_core.privacy.plan import GaussianRecordPlan, GaussianSumPlan, HistogramPlan
from dpldm_core.rng import SecretKey


@dataclass(frozen=True)
class Split:
    """How a record's unit of norm is divided between count, vector and outer product: squares sum to 1, 0 leaves out.

    Args:
        count: Factor of the count.
        mean: Factor of the vector over its clip norm.
        second: Factor of the outer product over the squared clip norm.
    """

    count: float
    mean: float
    second: float


MEAN = Split(0.1, math.sqrt(1 - 0.1**2), 0.0)
SECOND = Split(0.0, 0.0, 1.0)


@dataclass(frozen=True)
class NoisyMean:
    """A released mean, with the noise that it carries. Public once released.

    Args:
        mean: [d].
        count: Noisy sum of the weights.
        count_std: Noise standard deviation of the count.
        mean_std: Noise standard deviation of a coordinate of (count times mean).
    """

    mean: Tensor
    count: float
    count_std: float
    mean_std: float


@dataclass(frozen=True)
class PrincipalAxes:
    """Released leading eigenvectors of the second moment about zero, with its noise. Public once released.

    Args:
        axes: Orthonormal columns, [d, k], in descending order of ``values``.
        values: Eigenvalues of the noisy weighted sum of outer products, [k].
        second_std: Noise standard deviation of an off-diagonal entry of that sum.
    """

    axes: Tensor
    values: Tensor
    second_std: float


def clip_rows(vectors: Tensor, max_norm: float) -> Tensor:
    """Rows scaled down to an L2 norm of at most ``max_norm``, float64; rows that are not finite become zero."""
    rows = vectors.double()
    rows = torch.where(torch.isfinite(rows).all(1, keepdim=True), rows, torch.zeros_like(rows))
    return rows * (max_norm / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)


def sum_contributions(vectors: Tensor, weights: Tensor, *, max_norm: float) -> Tensor:
    """The exact sum that :func:`noisy_sum` releases: one unit moves it by at most ``max_norm``. float64 [d]."""
    return weights.double() @ clip_rows(vectors, max_norm)


def moment_contributions(vectors: Tensor, weights: Tensor, *, clip_norm: float, split: Split) -> Tensor:
    """The exact sum that means, axes and covariances are read from: one unit moves it by at most 1 in L2.

    A record adds w (COUNT, MEAN v / R, SECOND v v^T / R^2), where v is clipped to R.

    Returns:
        float64 [1 + d + d (d + 1) / 2], less the parts whose factor is 0; outer products as their upper triangle with
        off-diagonals times sqrt(2), so that the norm of a triangle is that of its matrix.
    """
    rows, w = clip_rows(vectors, clip_norm) / clip_norm, weights.double()
    parts = []
    if split.count:
        parts.append(split.count * w.sum()[None])
    if split.mean:
        parts.append(split.mean * (w @ rows))
    if split.second:
        upper, root = _triangle(rows.shape[1])
        outer = (rows * w[:, None]).T @ rows
        parts.append(split.second * root * outer[upper[0], upper[1]])
    return torch.cat(parts)


def noisy_sum(plan: GaussianSumPlan, key: SecretKey, vectors: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of vectors clipped to the plan's norm.

    Args:
        plan: Clip norm and noise.
        key: Secret key of this mechanism.
        vectors: Private vectors [n, d].
        weights: [n], summing to at most 1 over the records of one unit.

    Returns:
        The released sum, float64 [d]; each coordinate's noise has standard deviation ``noise_multiplier * max_norm``.
    """
    return release_sum(plan, key, sum_contributions(vectors, weights, max_norm=plan.max_norm))


def noisy_mean(
    plan: GaussianSumPlan, key: SecretKey, vectors: Tensor, weights: Tensor, *, clip_norm: float
) -> NoisyMean:
    """Mean of clipped vectors: their sum and their count by one Gaussian mechanism, then the quotient.

    Args:
        plan: Its ``max_norm`` must be 1, the sensitivity of sum and count together.
        key: Secret key of this mechanism.
        vectors: Private vectors [n, d].
        weights: [n], summing to at most 1 over the records of one unit.
        clip_norm: Public L2 norm R that vectors are clipped to.

    Returns:
        The released mean; the divisor is at least 1, whatever the noise made of the count.

    Raises:
        ValueError: The plan is for another sensitivity.
    """
    check_unit_norm(plan)
    noisy = release_sum(plan, key, moment_contributions(vectors, weights, clip_norm=clip_norm, split=MEAN))
    count = float(noisy[0]) / MEAN.count
    return NoisyMean(
        mean=noisy[1:] * (clip_norm / MEAN.mean) / max(count, 1.0),
        count=count,
        count_std=plan.noise_multiplier / MEAN.count,
        mean_std=plan.noise_multiplier * clip_norm / MEAN.mean,
    )


def noisy_pca(
    plan: GaussianSumPlan, key: SecretKey, vectors: Tensor, weights: Tensor, *, clip_norm: float, num_components: int
) -> PrincipalAxes:
    """Leading eigenvectors of the second moment of clipped vectors (Dwork et al. 2014, "Analyze Gauss", Algorithm 1).

    The vectors are not centred: subtract a public or released mean first. A symmetric matrix needs noise on its
    triangle alone, so off-diagonal entries carry sqrt(1/2) of the noise of that algorithm.

    Args:
        plan: Its ``max_norm`` must be 1, the sensitivity of the outer products over R^2.
        key: Secret key of this mechanism.
        vectors: Private vectors [n, d].
        weights: [n], summing to at most 1 over the records of one unit.
        clip_norm: Public L2 norm R that vectors are clipped to.
        num_components: Eigenvectors k, 1 to d.

    Returns:
        The released axes.

    Raises:
        ValueError: The plan is for another sensitivity, or k is out of range.
    """
    check_unit_norm(plan)
    dim = vectors.shape[1]
    if not 1 <= num_components <= dim:
        raise ValueError(f"num_components={num_components} must lie in 1 to {dim}, the dimension of the vectors")
    noisy = release_sum(plan, key, moment_contributions(vectors, weights, clip_norm=clip_norm, split=SECOND))
    values, basis = torch.linalg.eigh(symmetric(noisy, dim) * clip_norm**2)
    return PrincipalAxes(
        axes=basis.flip(1)[:, :num_components],
        values=values.flip(0)[:num_components],
        second_std=plan.noise_multiplier * clip_norm**2 / math.sqrt(2.0),
    )


def histogram_counts(plan: HistogramPlan, bins: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The exact counts that :func:`noisy_histogram` releases, int64 [num_bins]."""
    if table.ndim != 2 or table.shape[1] > plan.max_records_per_unit:
        raise ValueError(
            f"the table of units has shape {table.shape}: more records of a unit than the {plan.max_records_per_unit} "
            "that the plan charges for"
        )
    counted = bins[table[table >= 0]]
    return np.bincount(counted[(counted >= 0) & (counted < plan.num_bins)], minlength=plan.num_bins).astype(np.int64)


def noisy_histogram(plan: HistogramPlan, key: SecretKey, bins: np.ndarray, table: np.ndarray) -> np.ndarray:
    """How many records fall into each bin, with exact discrete Gaussian noise; no count is clamped.

    Args:
        plan: Bins, sensitivity and noise.
        key: Secret key of this mechanism.
        bins: Private bin of each record, int64 [n]; a record outside 0 to num_bins - 1 is not counted.
        table: Private, int64 [units, M]: record indices of each unit, -1 where it has fewer.

    Returns:
        Released counts, int64 [num_bins]; each carries noise of variance ``plan.variance``.

    Raises:
        ValueError: The table may hold more records of a unit than the plan charges for.
    """
    exact = histogram_counts(plan, bins, table)
    return exact + plan.noise(key).draw(plan.num_bins)


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


def check_unit_norm(plan: GaussianSumPlan) -> None:
    """Refuse a plan for another sensitivity than the 1 of stacked contributions, by a ValueError."""
    if plan.max_norm != 1.0:
        raise ValueError(f"max_norm={plan.max_norm}: the stacked contributions have sensitivity 1")


def release_sum(plan: GaussianSumPlan, key: SecretKey, exact: Tensor) -> Tensor:
    """The sum with the plan's noise, float64, same shape."""
    noise = plan.noise(key)
    return torch.from_numpy(noise.add(exact.flatten().numpy(), noise.draw(0, exact.numel()))).view(exact.shape)


def _triangle(dim: int) -> tuple[Tensor, Tensor]:
    """Indices of the upper triangle [2, d (d + 1) / 2], and sqrt(2) off the diagonal, 1 on it."""
    upper = torch.triu_indices(dim, dim)
    return upper, torch.where(upper[0] == upper[1], 1.0, math.sqrt(2.0)).double()


def symmetric(triangle: Tensor, dim: int) -> Tensor:
    """The inverse of the scaled upper triangle: [..., d (d + 1) / 2] to [..., d, d]."""
    upper, root = _triangle(dim)
    matrix = torch.zeros(*triangle.shape[:-1], dim, dim, dtype=torch.float64)
    matrix[..., upper[0], upper[1]] = triangle / root
    return matrix + matrix.triu(1).transpose(-2, -1)
