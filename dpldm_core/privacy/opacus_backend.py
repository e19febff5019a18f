"""Opacus as second opinion. The only file that imports opacus."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


def prv_epsilon(steps: Sequence[tuple[float, float, int]], delta: float) -> tuple[float, float]:
    """Epsilon by Opacus' PRV accountant (Gopi et al. 2021), under ADD_OR_REMOVE_ONE.

    Args:
        steps: (noise_multiplier, sample_rate, num_steps) of each mechanism.
        delta: Target delta.

    Returns:
        (lower, upper): bounds on epsilon, twice the error of 0.05 apart.
    """
    from opacus.accountants import PRVAccountant

    eps_error = 0.05
    accountant = PRVAccountant()
    accountant.history = list(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus takes log(0) in branches that np.where then drops
        upper = float(accountant.get_epsilon(delta=delta, eps_error=eps_error, delta_error=delta / 1000))
    return upper - 2 * eps_error, upper
