"""Guidance by the class Gaussians, and sharpening: what each claims to be, where it acts, and that it helps."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dpldm_core.diffusion.guidance import guide, sharpen
from dpldm_core.diffusion.sampler import dpm_sampler, sample_noise
from dpldm_core.diffusion.schedule import sampling_sigmas
from dpldm_core.models.prior import GaussianPrior

DIM, CLASSES = 3, 4


def two_sided_prior(classes=CLASSES, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(classes, DIM, DIM, generator=generator)
    prior = GaussianPrior(classes, DIM)
    means = spread * torch.randn(classes, DIM, generator=generator)
    prior.set_moments(means, roots @ roots.transpose(1, 2) / DIM, variance_floor=0.05)
    return prior


def inputs(n=50):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, DIM, generator=generator), torch.rand(n, generator=generator) + 0.5, torch.arange(n) % CLASSES


def log_density(prior, x, sigma, added):
    """log N(x; mean_c, V_c + (added + sigma^2) I) of every class, by torch's own distribution, [classes, n]."""
    eye = torch.eye(DIM)
    out = []
    for mean, basis, variance in zip(prior.means, prior.bases, prior.variances, strict=True):
        covariance = basis @ torch.diag(variance + added) @ basis.T + sigma[:, None, None] ** 2 * eye
        out.append(torch.distributions.MultivariateNormal(mean, covariance).log_prob(x))
    return torch.stack(out)


@pytest.mark.parametrize("added", [0.0, 0.3])
def test_the_shift_is_the_gradient_of_the_log_probability_of_the_class(added):
    """By autograd through another implementation of the densities; half the strength, half the shift."""
    prior, (x, sigma, labels) = two_sided_prior(), inputs()
    strengths = 0.5 * (1 + labels % 2).float()
    posterior = partial(prior.posterior, added_variance=added)
    guided = guide(lambda x, sigma, labels: x, posterior, strengths, highest=9.0)
    shift = guided(x, sigma, labels) - x
    x = x.clone().requires_grad_()
    named = log_density(prior, x, sigma, added).log_softmax(0)[labels, torch.arange(len(x))]
    (gradient,) = torch.autograd.grad(named.sum(), x)
    torch.testing.assert_close(shift, strengths[:, None] * sigma[:, None] ** 2 * gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("added", [0.0, 0.3])
def test_posterior_means_are_those_of_the_denoiser(added):
    prior, (x, sigma, labels) = two_sided_prior(), inputs()
    means = prior.posterior(x, sigma, added)[1][labels, torch.arange(len(x))]
    torch.testing.assert_close(means, prior.denoise(x, sigma, labels, added), atol=1e-5, rtol=1e-4)


def test_nothing_moves_without_strength_above_the_level_or_with_one_class():
    x, sigma, labels = inputs()
    ones = torch.ones(len(x))

    def moved(prior, strengths, highest, labels=labels):
        return not torch.equal(guide(lambda x, *_: x, prior.posterior, strengths, highest=highest)(x, sigma, labels), x)

    assert moved(two_sided_prior(), ones, 9.0)
    assert not moved(two_sided_prior(), 0 * ones, 9.0)
    assert not moved(two_sided_prior(), ones, 0.1)
    assert not moved(two_sided_prior(classes=1), ones, 9.0, 0 * labels)


def test_one_shift_is_bounded_whatever_the_strength():
    """A wrong guess of the classifier must not feed itself until the image is nothing but noise."""
    prior, (x, sigma, labels) = two_sided_prior(spread=30.0), inputs()
    guided = guide(lambda x, *_: x, prior.posterior, torch.full((len(x),), 1e6), highest=9.0)
    shift = guided(x, sigma, labels) - x
    assert bool((shift.norm(dim=1) <= 8.001 * sigma).all()) and float((shift.norm(dim=1) / sigma).max()) > 7.9


def test_guided_samples_belong_to_their_class_more_often():
    """Named as drawn by Bayes' rule: without guidance as often as overlapping Gaussians allow, with it more often."""
    prior, n = two_sided_prior(), 2000
    labels, noise = torch.arange(n) % CLASSES, sample_noise(3, range(n), num_draws=22, dim=DIM)
    sigmas = sampling_sigmas(20, sigma_min=0.02, sigma_max=4.0)

    def named(strength):
        guided = guide(prior.denoise, prior.posterior, torch.full((n,), strength), highest=2.0)
        out = dpm_sampler(guided, prior.sample(noise[-1], labels), noise[:-1], labels, sigmas=sigmas, eta=1.0)
        assert bool(out.isfinite().all())
        return float((log_density(prior, out, torch.full((n,), 1e-3), 0.0).argmax(0) == labels).double().mean())

    plain = named(0.0)
    assert 0.5 < plain < 0.9 and named(1.0) > plain + 0.05 and named(4.0) > named(1.0)


def test_a_sharpened_denoiser_goes_further_from_the_rough_one_below_its_level():
    prior, (x, sigma, labels) = two_sided_prior(), inputs()

    def denoiser(x, sigma, labels):
        return prior.denoise(x, sigma, labels) + 1.0

    def moved(sharpness, highest):
        return sharpen(denoiser, prior.denoise, sharpness, highest=highest)(x, sigma, labels) - denoiser(
            x, sigma, labels
        )

    torch.testing.assert_close(moved(0.4, 9.0), torch.full_like(x, 0.4))
    assert not bool(moved(0.0, 9.0).any()) and not bool(moved(0.4, 0.1).any())


def test_sharpening_makes_up_for_a_correction_that_is_too_small():
    """A denoiser half-way between a blunt Gaussian's and the true one's: doubled, it draws the true distribution."""
    n = 4000
    labels, noise = torch.zeros(n, dtype=torch.int64), sample_noise(4, range(n), num_draws=41, dim=1)
    blunt, true = GaussianPrior(1, 1), GaussianPrior(1, 1)
    blunt.set_moments(torch.zeros(1, 1), torch.full((1, 1, 1), 0.25), variance_floor=1e-6)
    true.set_moments(torch.ones(1, 1), torch.ones(1, 1, 1), variance_floor=1e-6)

    def between(x, sigma, labels):
        return (blunt.denoise(x, sigma, labels) + true.denoise(x, sigma, labels)) / 2

    def moments(denoiser):
        sigmas = sampling_sigmas(40, sigma_min=0.01, sigma_max=20.0)
        out = dpm_sampler(denoiser, torch.zeros(n, 1), noise, labels, sigmas=sigmas, eta=1.0)
        return float(out.mean()), float(out.std())

    mean, spread = moments(between)
    assert mean < 0.9 and spread < 0.9
    mean, spread = moments(sharpen(between, blunt.denoise, 1.0, highest=30.0))
    assert mean == pytest.approx(1.0, abs=5 / n**0.5) and spread == pytest.approx(1.0, rel=0.05)
