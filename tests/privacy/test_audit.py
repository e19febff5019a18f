import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import binom, norm
from torch import nn

from dpldm_core.errors import AuditError
from dpldm_core.privacy.accounting import gaussian_mu
from dpldm_core.privacy.audit import CanaryScores, record_and_replay, single_step_audit
from dpldm_core.privacy.audit_bounds import (
    MAX_EPSILON,
    f_dp_mu,
    gdp_epsilon,
    gdp_fit,
    one_run_bounds,
    refutes_gdp,
    steinke_epsilon,
    steinke_p_value,
    two_sample_bound,
)
from dpldm_core.privacy.class_statistics import ClassMeans, noisy_class_covariances, noisy_class_means
from dpldm_core.privacy.engine import DpSgdEngine
from dpldm_core.privacy.one_shot import noisy_histogram
from dpldm_core.privacy.plan import DpSgdPlan, GaussianSumPlan, HistogramPlan
from dpldm_core.rng import SecretKey

KEY = SecretKey(bytes(range(32)))
C = 0.5


def plan_of(**changes):
    fields = {
        "stage": "s",
        "sample_rate": 0.4,
        "num_steps": 6,
        "max_grad_norm": C,
        "noise_multiplier": 1.2,
        "truncation_probability": 1e-12,
        "max_batch_size": 20,
    }
    return DpSgdPlan(**fields | changes)


@pytest.mark.parametrize("guesses", [1, 100, 5000])
def test_steinke_when_every_guess_is_right(guesses):
    """Without delta: P[Binomial(r, p) = r] = p^r, so epsilon = log(p / (1 - p)) at p = significance^(1 / r)."""
    p = 0.03 ** (1 / guesses)
    expected = max(0.0, math.log(p / (1 - p)))
    assert steinke_epsilon(guesses, guesses, guesses, 0.0, 0.03) == pytest.approx(expected, abs=2e-3)


def test_steinke_p_value_against_a_slow_reference():
    m, r, v, epsilon, delta = 60, 40, 33, 0.9, 1e-3
    w = binom(r, 1 / (1 + math.exp(-epsilon)))
    chance = sum(w.pmf(k) for k in range(v, r + 1))
    alpha = max(sum(w.pmf(k) for k in range(v - i, v)) / i for i in range(1, v + 1))
    assert steinke_p_value(m, r, v, epsilon, delta) == pytest.approx(chance + 2 * m * delta * alpha, rel=1e-9)


def test_guesses_no_better_than_chance_bound_nothing():
    assert steinke_epsilon(1000, 1000, 510, 1e-5, 0.05) == 0.0
    assert f_dp_mu(1000, 1000, 510, 0.05) == 0.0


def largest_chance(num_canaries, guesses, correct, mu):
    """Slow reference: the largest P[N >= correct] over all laws of N that fulfil every inequality of the theorem.

    A linear programme: r <= 1 - f(h) is the intersection of the half-planes under the curve's tangents.
    """
    values, rows, limits = np.arange(guesses + 1), [], []
    h = norm.cdf(np.linspace(-8, 8, 400))
    slope = np.exp(norm.logpdf(norm.ppf(h) + mu) - norm.logpdf(norm.ppf(h)))
    for i in range(guesses):
        r = np.where(values > i, values, 0) / num_canaries
        wrong = np.where(values >= i, guesses - values, 0) / num_canaries
        rows += list(r[None] - slope[:, None] * wrong[None])
        limits += list(norm.cdf(norm.ppf(h) + mu) - slope * h)
    aim = -(values >= correct).astype(float)
    best = linprog(aim, np.array(rows), np.array(limits), np.ones((1, guesses + 1)), np.ones(1))
    return -best.fun


@pytest.mark.parametrize(("num_canaries", "guesses", "correct"), [(9, 9, 7), (9, 6, 6), (12, 8, 8)])
@pytest.mark.parametrize("mu", [0.2, 0.8])
def test_refutation_of_gdp_against_a_slow_reference(num_canaries, guesses, correct, mu):
    chance = largest_chance(num_canaries, guesses, correct, mu)
    assert 0.01 < chance < 0.99
    assert refutes_gdp(num_canaries, guesses, correct, mu, 1.01 * chance)
    assert not refutes_gdp(num_canaries, guesses, correct, mu, 0.99 * chance)


def test_one_guess_refutes_gdp_as_hypothesis_testing_does():
    """One canary: P[right] <= Phi(mu / 2) for mu-GDP, refuted at a significance above it."""
    for mu in (0.5, 1.0, 2.0):
        assert refutes_gdp(1, 1, 1, mu, norm.cdf(mu / 2) + 1e-6)
        assert not refutes_gdp(1, 1, 1, mu, norm.cdf(mu / 2) - 1e-6)


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 8.0, 60.0])
def test_gdp_epsilon_inverts_gaussian_mu(epsilon):
    assert gdp_epsilon(gaussian_mu(epsilon, 1e-5), 1e-5) == pytest.approx(epsilon, rel=1e-6)


def test_gdp_epsilon_at_the_ends():
    assert gdp_epsilon(0.0, 1e-5) == 0.0 and gdp_epsilon(1e6, 1e-5) == MAX_EPSILON


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 4.0])
def test_gdp_fit_recovers_mu(mu):
    """The lower limit at 5 % misses the truth in 5 % of 400 runs, give or take four standard deviations (4.4 %)."""
    rng, misses, fits = np.random.default_rng(7), 0, []
    for _ in range(400):
        included = rng.random(1000) < 0.5
        estimate, lower = gdp_fit(rng.normal(size=1000) + mu * included, included, 0.05)
        misses += lower > mu
        fits.append(estimate)
    assert misses / 400 <= 0.05 + 0.044 and (mu == 0.0 or misses > 0)
    assert np.mean(fits) == pytest.approx(mu, abs=0.03)


@pytest.mark.parametrize("mu", [0.5, 1.3, 3.0])
def test_bounds_lie_below_the_truth_and_near_it(mu):
    rng = np.random.default_rng(3)
    included = rng.random(4000) < 0.5
    attacks = {"good": rng.normal(size=4000) + mu * included, "useless": rng.normal(size=4000)}
    found, truth = one_run_bounds(attacks, included, delta=1e-5, confidence=0.95), gdp_epsilon(mu, 1e-5)
    assert 0.1 * truth < found.steinke < found.f_dp < found.gdp_lower < found.gdp_fit
    assert found.gdp_lower < truth and found.gdp_fit == pytest.approx(truth, rel=0.2)


def test_bounds_do_not_exceed_the_truth_more_often_than_stated():
    """Negative control of the selection among attacks and sizes: 40 runs at 80 %; above 16 misses has chance 1e-3."""
    rng, misses = np.random.default_rng(1), {"steinke": 0, "f_dp": 0}
    for _ in range(40):
        included = rng.random(200) < 0.5
        attacks = {str(k): rng.normal(size=200) for k in range(2)}
        found = one_run_bounds(attacks, included, delta=1e-5, confidence=0.8)
        misses = {name: count + (getattr(found, name) > 0.02) for name, count in misses.items()}
    assert max(misses.values()) <= 16


def test_two_sample_bound_by_clopper_and_pearson():
    """k = n: the limits are a^(1/n) and 1 - a^(1/n); k = 0 in the first world bounds nothing."""
    p = 0.025 ** (1 / 500)
    assert two_sample_bound(500, 0, 500, 0.01, 0.05) == pytest.approx(math.log((p - 0.01) / (1 - p)))
    assert two_sample_bound(0, 0, 500, 0.0, 0.05) == two_sample_bound(500, 500, 500, 0.0, 0.05) == 0.0


def test_likelihood_ratio_of_a_sampled_gaussian():
    """log(1 - q + q N(g; 1/sigma, 1) / N(g; 0, 1)), added over the steps."""
    gradients = np.random.default_rng(0).normal(size=(3, 5))
    scores, plan = CanaryScores(5), plan_of(sample_rate=0.3, noise_multiplier=0.8)
    for row in gradients:
        scores.observe(row, plan)
    ratio = 0.7 + 0.3 * norm.pdf(gradients, loc=1.25) / norm.pdf(gradients)
    assert scores.attacks()["likelihood_ratio"] == pytest.approx(np.log(ratio).sum(0))
    assert scores.attacks()["range"] == pytest.approx(np.ptp(gradients, axis=0))


def test_likelihood_ratio_without_sampling_is_a_shifted_gradient():
    scores = CanaryScores(2)
    scores.observe(np.array([0.0, 2.0]), plan_of(sample_rate=1.0, noise_multiplier=0.5))
    assert scores.attacks()["likelihood_ratio"] == pytest.approx([-2.0, 2.0])


class Unclipped(DpSgdEngine):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._clip.max_norm *= 5


class SmallNoise(DpSgdEngine):
    def __init__(self, model, plan, key, **options):
        super().__init__(model, plan, key, **options)
        self._noise = plan.model_copy(update={"noise_multiplier": plan.noise_multiplier / 4}).noise(key)


class SkipsEmptyBatches(DpSgdEngine):
    def noisy_step(self, step, num_units, fetch):
        if (self.batch_indices(step, num_units) >= 0).any():
            super().noisy_step(step, num_units, fetch)


class SizeOfTheData(DpSgdEngine):
    def batch_indices(self, step, num_units):
        return super().batch_indices(step, num_units)[:num_units]


class NoiseFromTheData(DpSgdEngine):
    def noisy_step(self, step, num_units, fetch):
        self._noise = self.plan.noise(KEY.derive(str(num_units)))
        super().noisy_step(step, num_units, fetch)


def dp_sgd(engine=DpSgdEngine, **changes):
    """All steps of a small run, from one key."""

    def run(data):
        torch.manual_seed(0)
        worker = engine(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
            plan_of(**changes),
            KEY,
            loss=lambda model, batch: 100 * model(batch["x"])[:, 0].square(),
            probe={"x": torch.randn(4, 3)},
            physical_batch_size=4,
        )
        for step in range(6):
            worker.noisy_step(step, len(data), lambda indices: {"x": data[indices]})

    return run


SUM = GaussianSumPlan(stage="s", max_norm=1.0, noise_multiplier=2.0)


def of_one_class(data, weight):
    return data, torch.zeros(len(data), dtype=torch.int64), weight * torch.ones(len(data))


def class_means(weight=1.0):
    def run(data):
        noisy_class_means(SUM, KEY, *of_one_class(data, weight), num_classes=2, clip_norm=1.0)

    return run


def class_covariances(weight=1.0):
    """About means that both data sets share, as one that was released before."""

    def run(data):
        released = ClassMeans(torch.full((2,), 9.0), torch.full((2, 3), -1.0), count_std=1.0, mean_std=1.0)
        noisy_class_covariances(SUM, KEY, *of_one_class(data, weight), released, clip_norm=1.0)

    return run


def counts(charged=1, recounted=1):
    """Records of a unit in bins by their sign."""

    def run(data):
        plan = HistogramPlan(stage="s", num_bins=2, max_records_per_unit=charged, noise_multiplier=3.0)
        bins = (data[:, 0] > 0).long().numpy().repeat(recounted)
        return noisy_histogram(plan, KEY, bins, np.arange(len(bins))[:, None])

    return run


@pytest.mark.parametrize(
    ("mechanism", "sensitivity", "sums"),
    [(dp_sgd(), C, 6), (class_means(), 1.0, 1), (class_covariances(), 1.0, 1), (counts(), 1.0, 1)],
    ids=["dp_sgd", "class_means", "class_covariances", "counts"],
)
def test_replay_on_neighbours(mechanism, sensitivity, sums):
    data = torch.randn(17, 3, generator=torch.Generator().manual_seed(1))
    moved = record_and_replay(mechanism, data, data[:16], sensitivity=sensitivity)
    assert len(moved) == sums and 0.9 < max(moved) <= 1.001


@pytest.mark.parametrize(
    ("mechanism", "message"),
    [
        (dp_sgd(Unclipped), "moves sum"),
        (dp_sgd(SkipsEmptyBatches), "depends on the data"),
        (dp_sgd(SizeOfTheData, max_batch_size=None), "depends on the data"),
        (dp_sgd(NoiseFromTheData), "depends on the data"),
        (class_means(weight=3.0), "moves sum"),
        (class_covariances(weight=3.0), "moves sum"),
        (counts(recounted=2), "moves sum"),
    ],
    ids=[
        "unclipped",
        "skips_empty",
        "size_of_data",
        "noise_from_data",
        "means_of_weights_above_one",
        "covariances_of_weights_above_one",
        "counted_twice",
    ],
)
def test_replay_finds_faults(mechanism, message, request):
    n = 2 if "empty" in request.node.name else 17
    data = torch.randn(17, 3, generator=torch.Generator().manual_seed(1))
    sensitivity = C if "dp_sgd" in mechanism.__qualname__ else 1.0
    with pytest.raises(AuditError, match=message):
        record_and_replay(mechanism, data[:n], data[: n - 1], sensitivity=sensitivity)


def test_recording_leaves_nothing_behind():
    from dpldm_core.privacy.noise import GaussianNoise

    before = GaussianNoise.add, DpSgdPlan.sample_batch
    with pytest.raises(ZeroDivisionError):
        record_and_replay(lambda data: 1 / data, 0, 1, sensitivity=1.0)
    assert (GaussianNoise.add, DpSgdPlan.sample_batch) == before


@pytest.mark.parametrize(("engine", "caught"), [(DpSgdEngine, False), (SmallNoise, True)])
def test_single_step_audit(engine, caught):
    """Seeded. The bound fails for the true code with probability 1e-3."""
    plan = plan_of(sample_rate=1.0, noise_multiplier=1.5)
    found = single_step_audit(plan, KEY, delta=1e-2, confidence=0.999, trials=600, engine=engine)
    assert found.claim == pytest.approx(gdp_epsilon(1 / 1.5, 1e-2), rel=0.02)
    assert (found.epsilon_lower_bound > found.claim) == caught
