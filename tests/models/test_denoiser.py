import math

import pytest
import torch

from dpldm_core.models.denoiser import Denoiser
from dpldm_core.models.ema import Ema
from dpldm_core.models.precond import edm_scalings, edm_weight
from dpldm_core.models.prior import GaussianPrior


def covariances(classes, dim, seed=0):
    factors = torch.randn(classes, dim, dim, generator=torch.Generator().manual_seed(seed))
    return factors @ factors.transpose(1, 2) / dim + 0.1 * torch.eye(dim)


@pytest.fixture
def prior():
    prior = GaussianPrior(3, 5)
    prior.set_moments(
        torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), covariances(3, 5), variance_floor=1e-3
    )
    return prior


@pytest.mark.parametrize("sigma", [0.01, 0.5, 30.0])
def test_prior_denoiser_is_the_gaussian_posterior_mean(prior, sigma):
    """Closed form: mean + S (S + sigma^2)^-1 (x - mean)."""
    x, labels = torch.randn(7, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    got = prior.denoise(x, torch.full((7,), sigma), labels)
    for i, label in enumerate(labels):
        mean, cov = prior.means[label], covariances(3, 5)[label]
        expected = mean + cov @ torch.linalg.solve(cov + sigma**2 * torch.eye(5), x[i] - mean)
        torch.testing.assert_close(got[i], expected, atol=1e-4, rtol=1e-4)


def test_posterior_sample_has_the_posterior_mean_and_covariance(prior):
    n, sigma = 40_000, 0.7
    generator = torch.Generator().manual_seed(3)
    x, labels = torch.ones(n, 5), torch.full((n,), 1)
    draws = prior.posterior_sample(x, sigma, labels, torch.randn(n, 5, generator=generator))
    cov = covariances(3, 5)[1]
    expected = cov - cov @ torch.linalg.solve(cov + sigma**2 * torch.eye(5), cov)
    torch.testing.assert_close(
        draws.mean(0), prior.denoise(x[:1], torch.tensor([sigma]), labels[:1])[0], atol=0.02, rtol=0
    )
    torch.testing.assert_close(torch.cov(draws.T), expected, atol=0.02, rtol=0)


def test_samples_have_the_mean_and_covariance_of_their_class(prior):
    n = 40_000
    noise, labels = torch.randn(n, 5, generator=torch.Generator().manual_seed(4)), torch.arange(n) % 3
    for added in (0.0, 0.5):
        draws = prior.sample(noise, labels, added)
        for label in range(3):
            own = draws[labels == label]
            torch.testing.assert_close(own.mean(0), prior.means[label], atol=0.06, rtol=0)
            expected = covariances(3, 5)[label] + added * torch.eye(5)
            torch.testing.assert_close(torch.cov(own.T), expected, atol=0.1, rtol=0)


def test_a_transformed_prior_is_that_of_the_transformed_latents(prior):
    """Draws of it have mean L m and covariance L S L^T."""
    linear = torch.randn(5, 5, generator=torch.Generator().manual_seed(5))
    means = prior.means.clone()
    prior.transform(linear)
    torch.testing.assert_close(prior.means, means @ linear.T, atol=1e-5, rtol=1e-5)
    for label in range(3):
        found = prior.bases[label] @ torch.diag(prior.variances[label]) @ prior.bases[label].T
        torch.testing.assert_close(found, linear @ covariances(3, 5)[label] @ linear.T, atol=1e-4, rtol=1e-4)


def test_eigenvalues_below_the_floor_are_raised():
    prior = GaussianPrior(1, 2)
    prior.set_moments(torch.zeros(1, 2), torch.tensor([[[1.0, 0.0], [0.0, -3.0]]]), variance_floor=0.25)
    assert sorted(prior.variances[0].tolist()) == [0.25, 1.0]


@pytest.mark.parametrize("sigma", [0.02, 1.0, 50.0])
def test_edm_preconditioning(sigma):
    """Karras et al. (2022), Table 1 and Eq. 21: c_out^2 weight = 1, and the scaled input has unit variance."""
    s = edm_scalings(torch.tensor([sigma]), 0.5)
    assert float(s.c_out**2 * edm_weight(torch.tensor([sigma]), 0.5)) == pytest.approx(1.0, rel=1e-5)
    assert float(s.c_in) ** 2 * (sigma**2 + 0.25) == pytest.approx(1.0, rel=1e-5)
    assert float(s.c_noise) == pytest.approx(math.log(sigma) / 4, rel=1e-5)


def test_an_untrained_denoiser_is_the_priors(prior):
    model = Denoiser(latent_shape=(1, 1, 5), num_classes=3, width=8, depth=2, sigma_data=0.5)
    model.prior.load_state_dict(prior.state_dict())
    x, sigma, labels = torch.randn(6, 5), torch.rand(6) + 0.1, torch.arange(6) % 3
    torch.testing.assert_close(model(x, sigma, labels), prior.denoise(x, sigma, labels))


def test_a_row_depends_on_its_own_inputs_alone():
    """What DP-SGD needs of the network: no statistics over the batch."""
    torch.manual_seed(0)
    model = Denoiser(latent_shape=(1, 1, 5), num_classes=3, width=8, depth=2, sigma_data=0.5)
    torch.nn.init.normal_(model.network.outer.weight)
    x, sigma, labels = torch.randn(6, 5), torch.rand(6) + 0.1, torch.arange(6) % 3
    together = model(x, sigma, labels)
    for i in range(6):
        torch.testing.assert_close(
            model(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1])[0], together[i], atol=1e-5, rtol=0
        )


def test_ema_equals_the_recursion():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema, expected = Ema(model, 0.9), 0.0
    for step in range(60):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(ema.model.weight) == pytest.approx(expected, rel=1e-5)
    assert not any(p.requires_grad for p in ema.model.parameters())
