"""Gaussian noise that can be charged: secret key, float64, rounded to a grid.

docs/decisions/0004. A float32 generator with a 32-bit seed is neither secret nor Gaussian in its tails. Here the
clipped sum is rounded to the grid g = C 2^-24 before noise is added on the same grid, so the low bits of floating-point
sums, which depend on the data, never leave (Mironov 2012). Rounding and float32 clipping move the sensitivity by less
than 0.1 %; that is charged: the noise drawn is ``SENSITIVITY_SLACK`` times the noise in the event.
"""

from __future__ import annotations

import numpy as np

from dpldm_core.rng import SecretKey

SENSITIVITY_SLACK = 1.001
GRID = 2.0**-24
MAX_COORDINATES = int((0.25e-3 / GRID) ** 2)  # above this, rounding alone could use up a quarter of the slack


class GaussianNoise:
    """Adds noise to sums of records clipped to an L2 norm.

    Args:
        key: Secret key of this mechanism; the noise of step t is a function of (key, t).
        noise_multiplier: Noise standard deviation over ``max_norm``, as charged in the event.
        max_norm: L2 norm C that every record is clipped to.
    """

    def __init__(self, key: SecretKey, *, noise_multiplier: float, max_norm: float) -> None:
        if not (noise_multiplier > 0 and max_norm > 0):
            raise ValueError(f"noise_multiplier={noise_multiplier} and max_norm={max_norm} must be positive")
        self._key = key
        self._grid = max_norm * GRID
        self._std_in_grid = noise_multiplier * SENSITIVITY_SLACK / GRID

    def draw(self, step: int, size: int) -> np.ndarray:
        """The noise of one step in grid units, int64 [size]."""
        if size > MAX_COORDINATES:
            raise ValueError(f"{size} coordinates: rounding to the grid is charged for at most {MAX_COORDINATES}")
        return np.rint(self._std_in_grid * self._key.normal(step, size)).astype(np.int64)

    def add(self, clipped_sum: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """The noisy sum, float64, same shape.

        Args:
            clipped_sum: Sum of clipped records, [size]; non-finite entries are refused.
            noise: From :meth:`draw`, [size].
        """
        if not np.isfinite(clipped_sum).all():
            raise FloatingPointError("the clipped sum is not finite: a record passed the clip unclipped")
        return self._grid * (np.rint(clipped_sum.astype(np.float64) / self._grid).astype(np.int64) + noise)
