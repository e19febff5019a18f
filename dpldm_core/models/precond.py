"""EDM preconditioning, Karras et al. (2022), Table 1."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scalings(NamedTuple):
    """The factors around the raw network, each [n]."""

    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm_scalings(sigma: Tensor, sigma_data: float) -> Scalings:
    """Scalings that keep the network's input and target at unit variance.

    Args:
        sigma: Noise standard deviations [n].
        sigma_data: Standard deviation of the data.
    """
    total = sigma.square() + sigma_data**2
    return Scalings(
        c_out=sigma * sigma_data * total.rsqrt(),
        c_in=total.rsqrt(),
        c_noise=sigma.log() / 4,
    )


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """Loss weight 1 / c_out^2, Karras et al. (2022), Eq. 21."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
