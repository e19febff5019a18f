"""The stochastic Heun sampler."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpldm_core.diffusion.loss import DenoiserFn


def sample_noise(seeds: list[int], dim: int, num_steps: int) -> Tensor:
    """The initial noise and the churn noise of each sample from its own seed: [num_steps + 1, n, dim].

    A sample depends on its seed alone, never on the batch that it is drawn in.
    """
    out = torch.empty(num_steps + 1, len(seeds), dim)
    for i, seed in enumerate(seeds):
        out[:, i] = torch.randn(num_steps + 1, dim, generator=torch.Generator().manual_seed(seed))
    return out


@torch.no_grad()
def heun_sampler(
    denoiser: DenoiserFn,
    noise: Tensor,
    class_labels: Tensor,
    *,
    sigmas: Tensor,
    S_churn: float = 0.0,
    S_noise: float = 1.0,
) -> Tensor:
    """Heun's second-order steps with churn, Karras et al. (2022), Algorithm 2.

    Args:
        denoiser: D(x, sigma, class_labels).
        noise: From :func:`sample_noise`, [steps + 1, n, d]: the start, then one draw per step for the churn.
        class_labels: int64 [n].
        sigmas: Decreasing levels with a final zero, [steps + 1].
        S_churn: Total amount of noise added back; 0 is deterministic after the start.
        S_noise: Standard deviation of the added noise.

    Returns:
        Clean latents [n, d], float32.
    """
    levels = [float(s) for s in sigmas]
    gamma = min(S_churn / (len(levels) - 1), math.sqrt(2) - 1)
    x = noise[0] * levels[0]
    ones = torch.ones(len(x), device=x.device)
    for step, (sigma, following) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        raised = sigma * (1 + gamma)
        x = x + math.sqrt(raised**2 - sigma**2) * S_noise * noise[step + 1]
        slope = (x - denoiser(x, raised * ones, class_labels)) / raised
        moved = x + (following - raised) * slope
        if following > 0:
            slope = (slope + (moved - denoiser(moved, following * ones, class_labels)) / following) / 2
            moved = x + (following - raised) * slope
        x = moved
    return x
