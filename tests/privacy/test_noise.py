import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from dpldm_core.privacy.noise import GRID, MAX_COORDINATES, SENSITIVITY_SLACK, GaussianNoise
from dpldm_core.rng import SecretKey

KEY = SecretKey(bytes(range(32)))
SIGMA, C = 1.7, 0.25  # a power of two: grid points are exact floats
NOISE = GaussianNoise(KEY, noise_multiplier=SIGMA, max_norm=C)


def variance_p_value(x, std):
    """Two-sided chi-square test of the variance."""
    cdf = stats.chi2.cdf(np.square(x).sum() / std**2, len(x))
    return 2 * min(cdf, 1 - cdf)


def released(total, noise=NOISE, step=0):
    return noise.add(total, noise.draw(step, len(total)))


@pytest.mark.parametrize(("factor", "accept"), [(1.0, True), (0.95, False), (1.05, False)])
@pytest.mark.parametrize("sigma", [0.3, 1.7, 400.0])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 50.0])
def test_noise_is_sigma_times_clip_norm(sigma, max_norm, factor, accept):
    """Chi-square at 1e-6 (false alarm) with 200,000 draws: their standard deviation is known to 0.16 %."""
    noise = GaussianNoise(KEY, noise_multiplier=sigma, max_norm=max_norm)
    x = released(np.zeros(200_000), noise)
    std = factor * sigma * max_norm * SENSITIVITY_SLACK
    assert (variance_p_value(x, std) > 1e-6) == accept
    assert (stats.kstest(x, "norm", args=(0, std)).pvalue > 1e-6) == accept


def test_no_less_noise_is_drawn_than_the_event_charges():
    """The slack pays for float32 clipping and the grid: exact in grid units, before any draw."""
    assert SENSITIVITY_SLACK >= 1.001

    class Ones(SecretKey):
        def normal(self, step, size):
            return np.ones(size)

    noise = GaussianNoise(Ones(bytes(32)), noise_multiplier=SIGMA, max_norm=C)
    assert noise.add(np.zeros(1), noise.draw(0, 1))[0] >= SIGMA * C * 1.001 - C * GRID


def test_noise_fills_the_grid_as_float32_could_not():
    """Float32 holds 24 bits: beyond 2^25 grid units its draws would all be multiples of four. False alarm 1e-6."""
    z = NOISE.draw(0, 100_000)
    last_bits = z[np.abs(z) > 2**25] % 4
    assert len(last_bits) > 20_000 and stats.chisquare(np.bincount(last_bits, minlength=4)).pvalue > 1e-6


def test_every_coordinate_and_every_step_has_its_own_noise():
    """|correlation| of 100,000 pairs under 5 / sqrt(n): 6e-7 false alarm each."""
    draws = [NOISE.draw(step, 100_000) for step in range(3)]
    draws.append(GaussianNoise(SecretKey(bytes(32)), noise_multiplier=SIGMA, max_norm=C).draw(0, 100_000))
    assert all(len(np.unique(d)) > 99_000 for d in draws)
    corr = np.corrcoef(draws) - np.eye(4)
    assert np.abs(corr).max() < 5 / np.sqrt(100_000)
    assert abs(np.corrcoef(draws[0][:-1], draws[0][1:])[0, 1]) < 5 / np.sqrt(100_000)


def test_a_retry_replays_its_noise():
    """Retry with fresh noise booked once: the same key and step give the same noise, so it releases nothing new."""
    again = GaussianNoise(SecretKey(bytes(range(32))), noise_multiplier=SIGMA, max_norm=C)
    assert np.array_equal(NOISE.draw(4, 1000), again.draw(4, 1000))


@given(arrays(np.float64, 20, elements=st.floats(-1e6, 1e6)))
def test_only_multiples_of_the_grid_leave(total):
    """Mironov (2012): the low bits of a floating-point sum depend on the data; none of them is released."""
    x = released(total) / (C * GRID)
    assert np.array_equal(x, np.rint(x))


@settings(derandomize=True)
@given(arrays(np.float64, 50, elements=st.floats(-3.0, 3.0)), arrays(np.float64, 50, elements=st.floats(-1.0, 1.0)))
def test_rounding_moves_a_difference_by_at_most_the_grid(total, direction):
    """Record and replay: with the noise replayed, neighbours differ by their sums' difference and g sqrt(d) at most."""
    neighbour = total + C * direction / max(np.linalg.norm(direction), 1.0)
    moved = np.linalg.norm(released(total) - released(neighbour))
    assert moved <= np.linalg.norm(total - neighbour) + C * GRID * np.sqrt(50) + 1e-12


def test_the_slack_covers_the_rounding_of_the_largest_model():
    assert GRID * np.sqrt(MAX_COORDINATES) <= 0.25 * (SENSITIVITY_SLACK - 1) + 1e-9
    with pytest.raises(ValueError, match="coordinates"):
        NOISE.draw(0, MAX_COORDINATES + 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sum_that_is_not_finite_is_not_released(bad):
    with pytest.raises(FloatingPointError):
        released(np.array([0.0, bad]))


@pytest.mark.parametrize(("sigma", "norm"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (np.nan, 1.0)])
def test_no_noise_is_refused(sigma, norm):
    with pytest.raises(ValueError, match="positive"):
        GaussianNoise(KEY, noise_multiplier=sigma, max_norm=norm)


def test_sums_of_millions_of_records_do_not_overflow():
    x = released(np.full(1000, 1e7 * C)) - 1e7 * C
    assert abs(x.mean()) < 5 * SIGMA * C / np.sqrt(1000) and variance_p_value(x, SIGMA * C * SENSITIVITY_SLACK) > 1e-6
