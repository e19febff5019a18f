import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp

from dpldm_core.privacy.accounting import NeighboringRelation, epsilon
from dpldm_core.privacy.discrete import MAX_BINS, SMOOTHING_VARIANCE, DiscreteGaussianNoise, RandomIntegers
from dpldm_core.privacy.plan import HistogramPlan, ReleasePlan
from dpldm_core.rng import SecretKey

KEY = SecretKey(bytes(range(32)))
DRAWS = 40_000


def log_pmf(variance, values):
    """Of the discrete Gaussian, by summation over all integers that count in float64."""
    tail = int(12 * math.sqrt(variance)) + 12
    return -np.square(values) / (2 * variance) - logsumexp(-np.square(np.arange(-tail, tail + 1)) / (2 * variance))


def fits(draws, log_probabilities, lowest):
    """Chi-square of goodness of fit at 1e-6, cells with fewer than 20 expected draws put together."""
    expected = len(draws) * np.exp(log_probabilities)
    observed = np.bincount(draws - lowest, minlength=len(expected))
    cells = expected >= 20
    f_obs, f_exp = np.append(observed[cells], len(draws) - observed[cells].sum()), expected[cells]
    return stats.chisquare(f_obs, np.append(f_exp, len(draws) - f_exp.sum())).pvalue > 1e-6


# The sampler


class Told(RandomIntegers):
    """Coins that come up ``heads`` times, then tails: below(b) gives 0, then b - 1."""

    def __init__(self, heads):
        super().__init__(KEY)
        self.heads, self.bounds = heads, []

    def below(self, bound):
        self.bounds.append(bound)
        return 0 if len(self.bounds) <= self.heads else bound - 1


@pytest.mark.parametrize(("numerator", "denominator"), [(1, 3), (7, 8), (10**40 - 1, 10**40)])
def test_the_coin_has_probability_exp_minus_gamma(numerator, denominator):
    """Enumeration of all runs of heads: P[j heads] = (1 - gamma / (j + 1)) prod_i gamma / i, in exact fractions."""
    gamma, run, total = Fraction(numerator, denominator), Fraction(1), Fraction(0)
    for heads in range(30):
        coins = Told(heads)
        if coins.exp_coin(numerator, denominator):
            total += run * (1 - gamma / (heads + 1))
        # exp(-0) first, for the whole part of gamma: none here
        assert coins.bounds == [denominator * (k + 1) for k in range(heads + 1)]
        run *= gamma / (heads + 1)
    assert float(total) == pytest.approx(math.exp(-gamma), rel=1e-14)


@cache
def tossed(numerator, denominator):
    coins = RandomIntegers(KEY)
    return sum(coins.exp_coin(numerator, denominator) for _ in range(100_000))


@pytest.mark.parametrize(("factor", "accept"), [(1.0, True), (0.95, False), (1.05, False)])
@pytest.mark.parametrize(("numerator", "denominator"), [(1, 2), (1, 1), (7, 4)])
def test_coins_above_one_too(numerator, denominator, factor, accept):
    """Binomial at 1e-6 with 100,000 coins, whose share is known to 0.7 % at worst."""
    heads = tossed(numerator, denominator)
    p = factor * math.exp(-numerator / denominator)
    assert (stats.binomtest(heads, 100_000, p).pvalue > 1e-6) == accept


def test_a_sure_coin():
    assert all(RandomIntegers(KEY).exp_coin(0, 5) for _ in range(100))


@pytest.mark.parametrize("bound", [2, 3, 100, 2**32 + 1])
def test_integers_are_uniform_below_any_bound(bound):
    integers = RandomIntegers(KEY.derive(str(bound)))
    draws = np.array([integers.below(bound) for _ in range(5000)])
    assert draws.min() >= 0 and draws.max() < bound
    assert stats.chisquare(np.bincount(draws * min(bound, 10) // bound, minlength=min(bound, 10))).pvalue > 1e-6
    assert integers.below(1) == 0


def test_the_stream_goes_on_and_is_the_key_s_own():
    """Many blocks, and integers wider than one: nothing repeats."""
    integers = RandomIntegers(KEY)
    wide = [integers.below(2**40_000) for _ in range(3)]
    assert len(set(wide)) == 3 and all(w.bit_length() > 39_900 for w in wide)
    again = RandomIntegers(KEY)
    assert [again.below(2**40_000) for _ in range(3)] == wide
    assert wide[0].to_bytes(5000, "big") == (KEY.random_bytes(0, 4096) + KEY.random_bytes(1, 4096))[:5000]


@pytest.mark.parametrize("scale", [1, 4])
def test_discrete_laplace(scale):
    integers = RandomIntegers(KEY.derive("laplace", str(scale)))
    draws, values = np.array([integers.laplace(scale) for _ in range(DRAWS)]), np.arange(-200, 201)
    log_p = -np.abs(values) / scale
    log_p = log_p - logsumexp(log_p)
    assert fits(draws, log_p, -200)
    twice_zero = log_p + math.log(2.0) * (values == 0)  # what a sampler does that accepts -0 beside 0
    assert not fits(draws, twice_zero - logsumexp(twice_zero), -200)


@cache
def drawn(variance):
    return DiscreteGaussianNoise(KEY.derive(str(variance)), variance=variance).draw(DRAWS)


@pytest.mark.parametrize(("factor", "accept"), [(1.0, True), (0.95, False), (1.05, False)])
@pytest.mark.parametrize("variance", [Fraction(1, 7), Fraction(2), Fraction(0.7) ** 2 * 9 + 2, Fraction(5001, 10)])
def test_noise_is_the_discrete_gaussian(variance, factor, accept):
    """Goodness of fit and variance, each at 1e-6, with 40,000 draws: standard deviations are known to 0.4 %."""
    draws = drawn(variance)
    lowest = -int(12 * math.sqrt(variance)) - 12
    values = np.arange(lowest, -lowest + 1)
    claimed = log_pmf(float(variance) * factor**2, values)
    assert fits(draws, claimed, lowest) == accept
    if variance > 1:
        true = (np.exp(claimed) * np.square(values)).sum()
        spread = math.sqrt(((np.exp(claimed) * np.square(values) ** 2).sum() - true**2) / DRAWS)
        assert (abs(np.square(draws).mean() - true) < 4.9 * spread) == accept


def test_every_count_has_its_own_noise_and_a_retry_the_same():
    """|correlation| of 10,000 pairs under 5 / sqrt(n): 6e-7 false alarm each."""
    noise = [DiscreteGaussianNoise(k, variance=Fraction(50)).draw(10_000) for k in (KEY, KEY.derive("x"))]
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.05
    assert abs(np.corrcoef(noise[0][:-1], noise[0][1:])[0, 1]) < 0.05
    again = DiscreteGaussianNoise(KEY, variance=Fraction(50)).draw(10_000)
    assert np.array_equal(again, noise[0])


@pytest.mark.parametrize("variance", [Fraction(0), Fraction(-1)])
def test_no_noise_is_refused(variance):
    with pytest.raises(ValueError, match="positive"):
        DiscreteGaussianNoise(KEY, variance=variance)


# What it costs (docs/decisions/0009)


def discrete_delta(shifts, variance, epsilons):
    """Hockey-stick divergences of counts moved by ``shifts``, by enumeration of all outcomes."""
    loss, log_p = np.zeros(1), np.zeros(1)
    for shift in shifts:
        reach = int(11 * math.sqrt(variance)) + abs(shift) + 12
        values = np.arange(-reach, reach + 1)
        moved, still = log_pmf(variance, values - shift), log_pmf(variance, values)
        loss, log_p = ((a[:, None] + b).ravel() for a, b in ((loss, moved - still), (log_p, moved)))
    order = np.argsort(loss)
    loss, p = loss[order], np.exp(log_p[order])
    upper_p, upper_q = (np.append(x[::-1].cumsum()[::-1], 0.0) for x in (p, p * np.exp(-loss)))
    first = np.searchsorted(loss, epsilons, side="right")
    return upper_p[first] - np.exp(epsilons) * upper_q[first]


def gaussian_delta(mu, epsilons):
    """Balle and Wang (2018), Theorem 8."""
    return stats.norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons + stats.norm.logcdf(-mu / 2 - epsilons / mu))


def excess(shifts, variance, charged_variance):
    """Largest amount by which the delta of counts moved by ``shifts`` exceeds what is charged, over all epsilons."""
    mu = math.hypot(*shifts) / math.sqrt(charged_variance)
    epsilons = np.linspace(0.0, mu * mu / 2 + 6 * mu, 2000)
    return (discrete_delta(shifts, variance, epsilons) - gaussian_delta(mu, epsilons)).max()


ONE_UNIT = [(1,), (5,), (3, 4), (1, 1, 1)]  # adding a unit of that many records
EXCHANGED = [(1, -1), (2, -3)]  # replacing it: its L2 is below 2 M, which the accountant charges
CHARGED = [0.04, 0.5, 3.0, 25.0, 400.0]


# Of three bins small noise alone: the enumeration grows with its cube.
CASES = [(shifts, charged) for shifts in ONE_UNIT + EXCHANGED for charged in CHARGED if len(shifts) < 3 or charged < 20]


@pytest.mark.parametrize(("shifts", "charged"), CASES)
def test_the_charged_gaussian_dominates_the_discrete_one_at_every_epsilon(shifts, charged):
    assert excess(shifts, charged + SMOOTHING_VARIANCE, charged) <= 1e-13


@pytest.mark.parametrize("variance", [2.04, 5.0, 27.0, 402.0])
def test_the_same_noise_would_not_be_charged_enough(variance):
    """Negative control: at equal variance the discrete Gaussian costs more; it needs 1/12 less, as rounding does."""
    assert excess((1,), variance, variance) > 1e-6
    assert excess((1,), variance, variance - 0.07) > 0
    assert excess((1,), variance, variance - 0.09) <= 1e-13


@pytest.mark.parametrize("sigma", [1.5, 4.0, 12.0])
@pytest.mark.parametrize("shift", [1, 3])
def test_the_enumeration_agrees_with_dp_accounting(sigma, shift):
    """Its optimistic and pessimistic estimates, of an interval of 1e-3, enclose ours."""
    epsilons = np.linspace(0.0, 3 * shift / sigma, 40)
    ours = discrete_delta((shift,), sigma**2, epsilons)
    bounds = [
        pld.from_discrete_gaussian_mechanism(
            sigma, sensitivity=shift, pessimistic_estimate=up, value_discretization_interval=1e-3
        ).get_delta_for_epsilon(epsilons)
        for up in (False, True)
    ]
    assert (np.array(bounds[0]) <= ours + 1e-9).all() and (ours <= np.array(bounds[1]) + 1e-9).all()
    charged = gaussian_delta(shift / math.sqrt(sigma**2 - SMOOTHING_VARIANCE), epsilons)
    assert (np.array(bounds[0]) <= charged).all()


@pytest.mark.parametrize("smoothing", [0.02, 0.15, 0.3, 0.5])
@pytest.mark.parametrize("charged", [0.3, 3.0])
def test_counts_are_post_processing_of_the_charged_gaussian(charged, smoothing):
    """Peikert (2010), Theorem 3.1, by integration, where an error could be seen; with too little smoothing it is.
    At SMOOTHING_VARIANCE the bound is below what float64 can tell from nothing."""
    centres, values = np.arange(-30, 31), np.arange(3)
    x, step = np.linspace(-12 * math.sqrt(charged), 12 * math.sqrt(charged), 8001, retstep=True)
    normaliser = logsumexp(-np.square(centres - x[:, None]) / (2 * smoothing), axis=1)
    steered = np.exp(-np.square(values - x[:, None]) / (2 * smoothing) - normaliser[:, None])
    probabilities = step * stats.norm.pdf(x, scale=math.sqrt(charged)) @ steered  # the sum is exact for smooth tails
    ratios = probabilities / np.exp(log_pmf(charged + smoothing, values))
    bound = 4 * math.exp(-2 * math.pi**2 * smoothing)
    worst = np.abs(ratios - 1).max()
    assert worst <= bound + 1e-12  # what the integration is good for
    assert worst > 0.01 or smoothing > 0.1
    assert 4 * math.exp(-2 * math.pi**2 * SMOOTHING_VARIANCE) < 3e-17
    assert MAX_BINS * 8 * math.exp(-2 * math.pi**2 * SMOOTHING_VARIANCE) < 1e-13


@settings(derandomize=True)
@given(st.floats(1e-3, 1e4), st.integers(1, 50))
def test_the_plan_draws_what_it_charges_and_the_smoothing(noise_multiplier, records):
    plan = HistogramPlan(stage="s", num_bins=2, max_records_per_unit=records, noise_multiplier=noise_multiplier)
    assert plan.variance == (Fraction(noise_multiplier) * records) ** 2 + 2
    assert plan.event().noise_multiplier == noise_multiplier


@pytest.mark.parametrize(
    ("relation", "change"), [("ADD_OR_REMOVE_ONE", (3, 0)), ("ADD_OR_REMOVE_ONE", (2, 1)), ("REPLACE_ONE", (3, -3))]
)
def test_the_statement_holds_for_the_worst_unit(relation, change):
    """Of a person with up to three records: the true delta at the published epsilon is within the published delta."""
    histogram = HistogramPlan(stage="s", num_bins=2, max_records_per_unit=3, noise_multiplier=2.0)
    plan = ReleasePlan(mechanisms=(histogram,), delta=1e-5, relation=relation, unit_of_privacy="one person")
    eps = plan.epsilon()
    assert eps == epsilon([histogram.event()], 1e-5, NeighboringRelation[relation])
    assert discrete_delta(change, float(histogram.variance), np.array([eps]))[0] <= 1e-5
