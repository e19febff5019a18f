"""The latent prior: a Gaussian per class from two noisy sums, or from latents that were released one by one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dpldm_core.config import PriorConfig
from dpldm_core.models.prior import GaussianPrior
from dpldm_core.privacy.class_statistics import ClassCovariances, ClassMeans, noisy_class_covariances, noisy_class_means
from dpldm_core.privacy.plan import GaussianSumPlan
from dpldm_core.rng import SecretKey
from dpldm_core.training.units import Units


def fit_prior(prior: GaussianPrior, means: ClassMeans, covariances: ClassCovariances, config: PriorConfig) -> None:
    """Class Gaussians from released statistics: post-processing that knows how much noise they carry.

    The pooled covariance keeps what stands above its noise (eigenvalues beyond the semicircle's edge 2 s sqrt(d)). Each
    class then adds the part of its own difference that stands above the class's edge, shrunk by sqrt(l^2 - edge^2)
    (Gavish and Donoho 2017, Frobenius loss), and ``class_weight`` of the rest.

    Args:
        prior: Set in place.
        means: Released counts and means.
        covariances: Released covariances.
        config: Floor and class weight.
    """
    counts = means.counts.clamp(min=1.0)
    dim = means.means.shape[1]
    pooled_edge = 2 * covariances.sum_std * math.sqrt(len(counts) * dim) / float(counts.sum())
    weighted = counts[:, None, None] * covariances.covariances
    values, basis = torch.linalg.eigh(weighted.sum(0) / counts.sum())
    kept = (values + (values.square() - pooled_edge**2).clamp(min=0).sqrt()) / 2
    values = torch.where(values > pooled_edge, kept, config.variance_floor).clamp(min=config.variance_floor)
    pooled = basis @ torch.diag(values) @ basis.T
    fitted = []
    for count, covariance in zip(counts, covariances.covariances, strict=True):
        difference = covariance - pooled
        edge = 2 * covariances.sum_std * math.sqrt(dim) / float(count)
        values, basis = torch.linalg.eigh(difference)
        strong = basis @ torch.diag(values.sign() * (values.square() - edge**2).clamp(min=0).sqrt()) @ basis.T
        fitted.append(pooled + strong + config.class_weight * (difference - strong))
    prior.set_moments(means.means, torch.stack(fitted), variance_floor=config.variance_floor)
    seen = means.counts.clamp(min=max(1.0, means.count_std))  # below its noise a count says only that it is small
    prior.shares.copy_(seen / seen.sum())


def release_prior(
    prior: GaussianPrior,
    units: Units,
    plans: tuple[GaussianSumPlan, GaussianSumPlan],
    key_of: Callable[[str], SecretKey],
    config: PriorConfig,
    white: Tensor,
) -> None:
    """Measure class means, then covariances about them, and fit the prior to both.

    They are measured in coordinates of about unit variance, so that the noise is as small beside the fine structure of
    images as beside the coarse.

    Args:
        prior: Of the latents; set in place.
        units: Private latents, values [n, d].
        plans: What is charged for the means, and for the covariances.
        key_of: Secret key of a stage; asked for before its mechanism runs.
        config: Clip norms, floor and class weight, in the whitened coordinates.
        white: Public map [d, d] to these coordinates.
    """
    num_classes, dim = prior.means.shape
    private = units.values @ white.T.to(units.values), units.class_labels, units.record_weights()
    (first, second), root = plans, math.sqrt(dim)
    means = noisy_class_means(
        first, key_of(first.stage), *private, num_classes=num_classes, clip_norm=config.clip_norm * root
    )
    covariances = noisy_class_covariances(
        second, key_of(second.stage), *private, means, clip_norm=config.covariance_clip_norm * root
    )
    fit_prior(prior, means, covariances, config)
    prior.transform(torch.linalg.inv(white.double()))


def fit_released_prior(
    prior: GaussianPrior, latents: Tensor, labels: Tensor, noise_std: float, replaced: float, config: PriorConfig
) -> None:
    """Class Gaussians of the clean latents, from released noisy latents and randomised labels: post-processing.

    The noise adds noise_std^2 I to every covariance, which is taken off. Of the records that carry label y, a share
    ``wrong`` comes from all classes alike; the class means are unmixed accordingly. Covariances are pooled.

    Args:
        prior: Set in place.
        latents: Released [n, d].
        labels: Released, int64 [n].
        noise_std: Known noise of each latent coordinate.
        replaced: Known probability that a label was replaced by a uniform one.
        config: Variance floor.
    """
    values = latents.double()
    num_classes, dim = prior.means.shape
    overall = values.mean(0)
    means = torch.stack([values[labels == y].mean(0) if (labels == y).any() else overall for y in range(num_classes)])
    shrink = num_classes * noise_std**2 / len(values)  # variance of a class mean's coordinate
    spread = (means - overall) / max(1.0 - replaced, 1e-6)
    signal = (spread.square().sum() / spread.numel()).item()
    noise = shrink / max(1.0 - replaced, 1e-6) ** 2
    means = overall + max(0.0, 1.0 - noise / max(signal, 1e-12)) * spread  # James and Stein (1961)
    centred = values - overall
    covariance = centred.T @ centred / len(values) - noise_std**2 * torch.eye(dim, dtype=torch.float64)
    covariance = covariance - (means - overall).T @ (means - overall) / num_classes
    edge = 2 * noise_std**2 * (dim / len(values)) ** 0.5
    variances, basis = torch.linalg.eigh(covariance)
    typical = (variances.sum() / dim).clamp(min=config.variance_floor)
    variances = torch.where(variances > edge, variances - edge, torch.minimum(typical, torch.tensor(edge)))
    pooled = basis @ torch.diag(variances) @ basis.T
    prior.set_moments(means, pooled.expand(num_classes, -1, -1), variance_floor=config.variance_floor)
