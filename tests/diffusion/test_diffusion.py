import math

import numpy as np
import pytest
import torch

from dpldm_core.diffusion.loss import denoising_loss
from dpldm_core.diffusion.sampler import dpm_sampler, sample_noise
from dpldm_core.diffusion.schedule import sampling_sigmas, training_sigmas
from dpldm_core.models.prior import GaussianPrior


def test_sampling_sigmas():
    """Karras et al. (2022), Eq. 5: ends at sigma_max, sigma_min, 0; uniform in sigma^(1/rho)."""
    sigmas = sampling_sigmas(9, sigma_min=0.01, sigma_max=80.0)
    assert float(sigmas[0]) == pytest.approx(80.0) and float(sigmas[-2]) == pytest.approx(0.01) and sigmas[-1] == 0
    steps = sigmas[:-1] ** (1 / 7)
    assert torch.allclose(steps.diff(), steps.diff()[0].expand(8))


def test_training_sigmas_are_log_normal():
    logs = training_sigmas((200_000,), P_mean=-1.2, P_std=1.3, generator=np.random.default_rng(0)).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.015) and float(logs.std()) == pytest.approx(1.3, abs=0.01)


def test_loss_is_the_mean_over_draws_and_coordinates():
    latents, sigma, noise = torch.randn(3, 4), torch.rand(3, 5), torch.randn(3, 5, 4)
    weight, labels = torch.rand(3, 5), torch.arange(3)
    got = denoising_loss(lambda x, s, y: 0.5 * x, latents, labels, sigma, noise, weight)
    for i in range(3):
        slow = [
            float(weight[i, k] * (0.5 * (latents[i] + sigma[i, k] * noise[i, k]) - latents[i]).square().mean())
            for k in range(5)
        ]
        assert float(got[i]) == pytest.approx(sum(slow) / 5, rel=1e-5)


def test_each_draw_meets_its_own_label_and_sigma():
    seen = {}

    def spy(x, sigma, labels):
        seen.update(sigma=sigma, labels=labels)
        return x

    sigma = torch.rand(2, 3)
    denoising_loss(spy, torch.zeros(2, 1), torch.tensor([7, 9]), sigma, torch.zeros(2, 3, 1), torch.ones(2, 3))
    assert seen["labels"].tolist() == [7, 7, 7, 9, 9, 9] and torch.equal(seen["sigma"], sigma.flatten())


def gaussian(mean, variance, dim):
    prior = GaussianPrior(1, dim)
    prior.set_moments(torch.full((1, dim), mean), variance * torch.eye(dim)[None], variance_floor=1e-6)
    return prior.denoise


def zeros(noise):
    return torch.zeros_like(noise[0])


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_sampler_draws_from_the_distribution_of_its_denoiser(eta):
    """With the exact denoiser of N(2, 0.3^2) the samples have that mean and variance (false alarm below 1e-6)."""
    dim, n = 4, 3000
    noise = sample_noise(1, range(n), num_draws=101, dim=dim)
    sigmas = sampling_sigmas(100, sigma_min=0.01, sigma_max=50.0)
    labels = torch.zeros(n, dtype=torch.int64)
    out = dpm_sampler(gaussian(2.0, 0.09, dim), zeros(noise), noise, labels, sigmas=sigmas, eta=eta)
    assert float(out.mean()) == pytest.approx(2.0, abs=6 * 0.3 / math.sqrt(dim * n))
    assert float(out.std()) == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_a_sampler_that_starts_from_draws_of_the_model_may_start_at_any_level(eta):
    """Draws of N(2, 0.3^2) plus noise, denoised, are draws of N(2, 0.3^2) again; from zeros they would not be."""
    dim, n = 4, 3000
    noise, labels = sample_noise(1, range(n), num_draws=43, dim=dim), torch.zeros(n, dtype=torch.int64)
    sigmas, denoise = sampling_sigmas(40, sigma_min=0.01, sigma_max=0.5), gaussian(2.0, 0.09, dim)
    start = 2.0 + 0.3 * noise[-1]
    out = dpm_sampler(denoise, start, noise[:-1], labels, sigmas=sigmas, eta=eta)
    assert float(out.mean()) == pytest.approx(2.0, abs=6 * 0.3 / math.sqrt(dim * n))
    assert float(out.std()) == pytest.approx(0.3, rel=0.05)
    far = dpm_sampler(denoise, zeros(noise), noise[:-1], labels, sigmas=sigmas, eta=eta)
    assert abs(float(far.mean()) - 2.0) > 0.1


def test_louder_fresh_noise_leaves_a_wider_distribution():
    """S_noise scales the fresh noise alone: nothing without any, more spread with it."""
    noise, labels = sample_noise(1, range(3000), num_draws=21, dim=4), torch.zeros(3000, dtype=torch.int64)
    sigmas = sampling_sigmas(20, sigma_min=0.1, sigma_max=5.0)

    def spread(eta, S_noise):
        denoise = gaussian(2.0, 0.09, 4)
        out = dpm_sampler(denoise, zeros(noise), noise, labels, sigmas=sigmas, eta=eta, S_noise=S_noise)
        return float(out.std())

    assert spread(0.0, 1.5) == spread(0.0, 1.0)
    assert spread(3.0, 1.5) > 1.1 * spread(3.0, 1.0)


def test_the_sampler_is_of_second_order():
    """Error against the exact flow of a Gaussian, x0 v / sqrt(v^2 + sigma_max^2): half the step, a quarter of it."""
    noise = sample_noise(2, range(50), num_draws=81, dim=3)
    labels, denoise = torch.zeros(50, dtype=torch.int64), gaussian(0.0, 0.25, 3)
    exact = noise[0] * 5.0 * 0.5 / math.sqrt(0.25 + 25.0)

    def error(steps):
        sigmas = sampling_sigmas(steps, sigma_min=1e-3, sigma_max=5.0)
        return float((dpm_sampler(denoise, zeros(noise), noise, labels, sigmas=sigmas, eta=0.0) - exact).abs().mean())

    assert error(80) < 0.35 * error(40) and error(40) < 0.35 * error(20)


def test_noise_of_a_sample_depends_on_seed_and_number_alone():
    whole = sample_noise(5, range(10), num_draws=3, dim=4)
    torch.testing.assert_close(sample_noise(5, [7, 2], num_draws=3, dim=4), whole[:, [7, 2]], atol=0, rtol=0)
    assert not torch.equal(sample_noise(6, [7], num_draws=3, dim=4), whole[:, [7]])
    far = sample_noise(2**61, [2**40], num_draws=2, dim=4)
    assert not torch.equal(far, sample_noise(2**61 % 2**32, [2**40], num_draws=2, dim=4)), "no bit of a seed is dropped"
