"""Lower bounds on epsilon from the guesses of an attacker. Pure functions of counts and scores.

Every bound is one-sided at a stated significance. Where the best of several thresholds is taken, the significance is
divided among them, so the confidence holds for the best one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import beta, binom, norm

from dpldm_core.privacy.accounting import gaussian_mu

MAX_EPSILON, MAX_MU = 100.0, 14.0  # nothing is claimed beyond: a bound that large says that all is lost
_FEWEST_GUESSES = 32
_TOLERANCE = 1e-3


class Bounds(BaseModel):
    """Epsilon from below, by three methods at the same delta and confidence, each on its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steinke: float = Field(description="Steinke, Nasr and Jagielski (2023): assumes nothing about the mechanism")
    f_dp: float = Field(description="Mahloujifar, Melis and Chaudhuri (2024): of the Gaussian-DP curves not refuted")
    gdp_lower: float = Field(description="lower confidence limit of gdp_fit")
    gdp_fit: float = Field(description="point estimate, of the Gaussian-DP curve with the scores' separation; no bound")


def steinke_p_value(num_canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest chance of so many correct guesses under (epsilon, delta)-DP.

    Steinke, Nasr and Jagielski (2023), Theorem 5.2: P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i with
    W ~ Binomial(r, e^epsilon / (e^epsilon + 1)).

    Args:
        num_canaries: m; each was included with probability 1/2.
        guesses: r, canaries that the attacker did not abstain from.
        correct: v, of these.
        epsilon: Of the hypothesis.
        delta: Of the hypothesis.
    """
    accuracy = 1.0 / (1.0 + math.exp(-epsilon))
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
    alpha = float((below / np.arange(1, correct + 1)).max(initial=0.0))
    return min(1.0, float(binom.sf(correct - 1, guesses, accuracy)) + 2 * num_canaries * delta * alpha)


def steinke_epsilon(num_canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """Smallest epsilon that so many correct guesses do not refute.

    >>> round(steinke_epsilon(1000, 1000, 1000, 0.0, 0.05), 3)  # log(p / (1 - p)) at p = 0.05^(1/1000)
    5.808
    """

    def excess(epsilon: float) -> float:
        return steinke_p_value(num_canaries, guesses, correct, epsilon, delta) - significance

    if excess(0.0) >= 0:
        return 0.0
    return float(brentq(excess, 0.0, MAX_EPSILON, xtol=_TOLERANCE)) - _TOLERANCE if excess(MAX_EPSILON) > 0 else 0.0


def refutes_gdp(num_canaries: int, guesses: int, correct: int, mu: float, significance: float) -> bool:
    """Whether so many correct guesses refute mu-GDP.

    Mahloujifar, Melis and Chaudhuri (2024), Theorem 3.2 and its recursion. Let N be the number of correct guesses,
    r_i = E[N; N >= i] / m and h_i = E[guesses - N; N >= i] / m. Turning one canary's bit turns a correct guess into a
    wrong one, so r_(i+1) <= 1 - f(h_i). With P[N >= correct] = significance these force a total mass; above 1 it is
    impossible.

    Args:
        num_canaries: m.
        guesses: Canaries that the attacker did not abstain from.
        correct: Of these.
        mu: Of the hypothesis, whose trade-off curve is f(x) = Phi(Phi^-1(1 - x) - mu).
        significance: Chance of a false refutation.
    """
    right = significance * correct / num_canaries
    wrong = significance * (guesses - correct) / num_canaries
    for i in range(correct - 1, -1, -1):
        forced = float(ndtr(ndtri(right) - mu))
        if forced <= wrong:
            break  # nothing is forced any more, and nothing will be
        right, wrong = right + i / (guesses - i) * (forced - wrong), forced
        if right + wrong > guesses / num_canaries:
            return True
    return False


def f_dp_mu(num_canaries: int, guesses: int, correct: int, significance: float) -> float:
    """Largest mu that so many correct guesses refute (0 if none), to 1e-3."""
    low, high = 0.0, MAX_MU
    if not refutes_gdp(num_canaries, guesses, correct, low, significance):
        return 0.0
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        refuted = refutes_gdp(num_canaries, guesses, correct, middle, significance)
        low, high = (middle, high) if refuted else (low, middle)
    return low


def gdp_epsilon(mu: float, delta: float) -> float:
    """Epsilon at ``delta`` of the mu-GDP trade-off curve: the inverse of :func:`gaussian_mu`.

    >>> round(gdp_epsilon(1.0, 1e-5), 2)
    4.38
    """
    low, high = 1e-6, MAX_EPSILON
    if mu <= gaussian_mu(low, delta):
        return 0.0
    if mu >= gaussian_mu(high, delta):
        return high
    return float(brentq(lambda epsilon: gaussian_mu(epsilon, delta) - mu, low, high, xtol=1e-9))


def gdp_fit(scores: np.ndarray, included: np.ndarray, significance: float) -> tuple[float, float]:
    """Mu from the separation of the scores of included and other canaries.

    (mean difference) / (root mean of the two variances), with the large-sample standard error of a standardised
    difference (Hedges and Olkin 1985, Eq. 5.14). Exact for normal scores of equal variance; an estimate otherwise.

    Args:
        scores: [m].
        included: bool [m].
        significance: Of the lower limit.

    Returns:
        (estimate, lower confidence limit), both at least 0.
    """
    inside, outside = scores[included], scores[~included]
    spread = math.sqrt((float(inside.var(ddof=1)) + float(outside.var(ddof=1))) / 2)
    mu = min(max(float(inside.mean() - outside.mean()), 0.0) / max(spread, 1e-12), MAX_MU)
    error = math.sqrt(1 / len(inside) + 1 / len(outside) + mu**2 / (2 * len(scores)))
    return mu, max(0.0, mu - float(norm.isf(significance)) * error)


def one_run_bounds(
    attacks: Mapping[str, np.ndarray], included: np.ndarray, *, delta: float, confidence: float
) -> Bounds:
    """The best bounds over attacks and numbers of guesses.

    The attacker guesses that the canaries with the highest scores were included and those with the lowest were not, as
    many of each, and abstains from the rest.

    Args:
        attacks: Scores [m] by name of the attack; higher for canaries that were included.
        included: bool [m], each True with probability 1/2 independently.
        delta: At which epsilon is stated.
        confidence: Of each bound, over all attacks and numbers of guesses together.
    """
    m = len(included)
    sizes = [m >> j for j in range(m.bit_length()) if m >> j >= min(_FEWEST_GUESSES, m)]
    share = (1.0 - confidence) / (len(attacks) * len(sizes))
    pure, mus = 0.0, 0.0
    for scores in attacks.values():
        order = np.argsort(scores, kind="stable")
        for size in sizes:
            low, high = order[: size // 2], order[m - size // 2 :]
            guesses, correct = 2 * (size // 2), int((~included[low]).sum() + included[high].sum())
            pure = max(pure, steinke_epsilon(m, guesses, correct, delta, share))
            mus = max(mus, f_dp_mu(m, guesses, correct, share))
    fits = [gdp_fit(scores, included, (1.0 - confidence) / len(attacks)) for scores in attacks.values()]
    estimate, lower = (gdp_epsilon(max(values), delta) for values in zip(*fits, strict=True))
    return Bounds(steinke=pure, f_dp=gdp_epsilon(mus, delta), gdp_lower=lower, gdp_fit=estimate)


def two_sample_bound(hits: int, misses: int, trials: int, delta: float, significance: float) -> float:
    """Epsilon from one event's frequency in two worlds: P[A | first] <= e^epsilon P[A | second] + delta.

    Args:
        hits: Times the event happened in the first world.
        misses: Times it happened in the second.
        trials: In each world.
        delta: At which epsilon is stated.
        significance: Of the bound; half for each Clopper-Pearson limit (1934).

    >>> round(two_sample_bound(1000, 0, 1000, 0.0, 0.05), 3)  # log(p / (1 - p)) at p = 0.025^(1/1000)
    5.601
    """
    often = float(beta.ppf(significance / 2, hits, trials - hits + 1)) if hits else 0.0
    seldom = float(beta.isf(significance / 2, misses + 1, trials - misses)) if misses < trials else 1.0
    return max(0.0, math.log(max(often - delta, 1e-300) / seldom))
