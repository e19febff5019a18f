"""The stochastic Heun sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dpldm_core.diffusion.loss import DenoiserFn


def sample_noise(seed: int, indices: Sequence[int], *, num_draws: int, dim: int) -> Tensor:
    """Standard normal draws of each sample from its own stream: float32 [num_draws, n, dim].

    A sample depends on (seed, index) alone, never on the batch it is drawn in. The streams are Philox (Salmon et al.
    2011) because torch's CPU generator keeps only 32 bits of a seed.

    Args:
        seed: Public seed of the release.
        indices: Numbers of the samples.
        num_draws: Draws per sample: the start, one per sampler step, and what else is needed.
        dim: Latent dimension.
    """
    out = np.empty((num_draws, len(indices), dim), dtype=np.float32)
    for i, index in enumerate(indices):
        stream = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
        out[:, i] = stream.standard_normal((num_draws, dim), dtype=np.float32)
    return torch.from_numpy(out)


@torch.no_grad()
def heun_sampler(
    denoiser: DenoiserFn,
    start: Tensor,
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
        start: What the first noise is added to, [n, d]: clean draws of a model that is as good as the denoiser at the
            first level, or zeros where that level drowns everything.
        noise: From :func:`sample_noise`, [steps + 1, n, d]: of the start, then one draw per step for the churn.
        class_labels: int64 [n].
        sigmas: Decreasing levels with a final zero, [steps + 1].
        S_churn: Total amount of noise added back; 0 is deterministic after the start.
        S_noise: Standard deviation of the added noise.

    Returns:
        Clean latents [n, d], float32.
    """
    levels = [float(s) for s in sigmas]
    gamma = min(S_churn / (len(levels) - 1), math.sqrt(2) - 1)
    x = start + noise[0] * levels[0]
    ones = torch.ones(len(x), device=x.device)
    for step, (sigma, following) in enumerate(pairwise(levels)):
        raised = sigma * (1 + gamma)
        x = x + math.sqrt(raised**2 - sigma**2) * S_noise * noise[step + 1]
        slope = (x - denoiser(x, raised * ones, class_labels)) / raised
        moved = x + (following - raised) * slope
        if following > 0:
            slope = (slope + (moved - denoiser(moved, following * ones, class_labels)) / following) / 2
            moved = x + (following - raised) * slope
        x = moved
    return x
