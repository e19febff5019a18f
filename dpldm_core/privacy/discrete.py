"""Exact discrete Gaussian noise for counts: integers from the secret stream, rational arithmetic, no float.

Canonne, Kamath and Steinke (2020), "The discrete Gaussian for differential privacy", Algorithms 1 to 3. The time that a
draw takes depends on the noise and never on a count.

What is charged is a continuous Gaussian whose variance is smaller by ``SMOOTHING_VARIANCE``
(docs/decisions/0009): a Gaussian of variance s^2 whose outcome x is replaced by a discrete Gaussian of variance t^2
centred at x has, up to a factor within 1 +- 4e^(-2 pi^2 t^2), the probabilities of a discrete Gaussian of variance
s^2 + t^2 (Peikert 2010, Theorem 3.1). Noise on a count is therefore post-processing of noise that is charged.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from dpldm_core.rng import SecretKey

SMOOTHING_VARIANCE = 2  # the factor differs from 1 by less than 3e-17: less than float64 can tell
MAX_BINS = 1_000  # independent coordinates whose factors together still cost less than 1e-13 of epsilon
_BLOCK = 4096  # bytes taken from the stream at a time


def drawn_variance(noise_multiplier: float, max_records: int) -> Fraction:
    """Exact variance of the noise of a count.

    Args:
        noise_multiplier: What is charged: noise standard deviation over ``max_records``.
        max_records: Most records of one unit that are counted.
    """
    return (Fraction(noise_multiplier) * max_records) ** 2 + SMOOTHING_VARIANCE


class RandomIntegers:
    """Exactly uniform integers of any size from the streams of one key.

    Args:
        key: Secret key; equal keys give equal integers in equal order.
    """

    def __init__(self, key: SecretKey) -> None:
        self._key, self._step, self._left = key, 0, b""

    def below(self, bound: int) -> int:
        """A uniform integer in [0, bound), by rejection."""
        bits = (bound - 1).bit_length()
        size = (bits + 7) // 8
        while True:
            while len(self._left) < size:
                self._left += self._key.random_bytes(self._step, _BLOCK)
                self._step += 1
            taken, self._left = self._left[:size], self._left[size:]
            if (value := int.from_bytes(taken, "big") >> (8 * size - bits)) < bound:
                return value

    def exp_coin(self, numerator: int, denominator: int) -> bool:
        """True with probability exp(-numerator / denominator), both integers, >= 0 and > 0. Algorithm 1."""
        whole, rest = divmod(numerator, denominator)
        if not all(self._exp_coin_below_one(1, 1) for _ in range(whole)):
            return False
        return self._exp_coin_below_one(rest, denominator)

    def _exp_coin_below_one(self, numerator: int, denominator: int) -> bool:
        k = 1
        while self.below(denominator * k) < numerator:
            k += 1
        return k % 2 == 1

    def laplace(self, scale: int) -> int:
        """P[x] proportional to exp(-|x| / scale), on the integers. Algorithm 2."""
        while True:
            rest = self.below(scale)
            if not self.exp_coin(rest, scale):
                continue
            whole = 0
            while self.exp_coin(1, 1):
                whole += 1
            size, negative = rest + scale * whole, self.below(2) == 1
            if not (negative and size == 0):
                return -size if negative else size

    def gaussian(self, variance: Fraction) -> int:
        """P[x] proportional to exp(-x^2 / (2 variance)), on the integers. Algorithm 3."""
        n, d = variance.numerator, variance.denominator
        scale = math.isqrt(n // d) + 1
        while True:
            x = self.laplace(scale)
            # (|x| - variance / scale)^2 / (2 variance), over a common denominator
            if self.exp_coin((abs(x) * scale * d - n) ** 2, 2 * n * d * scale**2):
                return x


class DiscreteGaussianNoise:
    """Adds independent discrete Gaussian noise to counts.

    Args:
        key: Secret key of this mechanism; the noise is a function of it.
        variance: Of the underlying Gaussian, an exact rational > 0.
    """

    def __init__(self, key: SecretKey, *, variance: Fraction) -> None:
        if variance <= 0:
            raise ValueError(f"variance={variance} must be positive")
        self._key, self._variance = key, variance

    def draw(self, size: int) -> np.ndarray:
        """The noise of every count, int64 [size]."""
        integers = RandomIntegers(self._key)
        return np.array([integers.gaussian(self._variance) for _ in range(size)], dtype=np.int64)
