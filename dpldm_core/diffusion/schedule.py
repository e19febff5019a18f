"""Noise levels for training and sampling, Karras et al. (2022)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def training_sigmas(shape: tuple[int, ...], *, P_mean: float, P_std: float, generator: np.random.Generator) -> Tensor:
    """Log-normal noise levels, Table 1: ln sigma ~ N(P_mean, P_std^2)."""
    return torch.from_numpy(np.exp(P_mean + P_std * generator.standard_normal(shape, dtype=np.float32)))


def sampling_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Decreasing noise levels with a final zero, Eq. 5: shape [num_steps + 1], float64."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])
