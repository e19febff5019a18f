"""The stochastic sampler."""

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
def dpm_sampler(
    denoiser: DenoiserFn,
    start: Tensor,
    noise: Tensor,
    class_labels: Tensor,
    *,
    sigmas: Tensor,
    eta: float,
    S_noise: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M), Lu et al. (2022): second-order steps from the clean estimates of this level and the last.

    One evaluation per level, where Heun's method takes two; docs/decisions/0012 compares them.

    Args:
        denoiser: D(x, sigma, class_labels).
        start: What the first noise is added to, [n, d]: clean draws of a model that is as good as the denoiser at the
            first level, or zeros where that level drowns everything.
        noise: From :func:`sample_noise`, [steps, n, d]: of the start, then one draw per step but the last.
        class_labels: int64 [n].
        sigmas: Decreasing levels with a final zero, [steps + 1].
        eta: Fresh noise in the place of old: 0 follows the probability flow, 1 the reverse diffusion, more exchanges
            more of it, which corrects errors of earlier steps.
        S_noise: Standard deviation of the fresh noise, Karras et al. (2022), Sec. 4: a denoiser that removes a little
            too much leaves some of a little more.

    Returns:
        Clean latents [n, d], float32.
    """
    levels = [float(s) for s in sigmas]
    x = start + noise[0] * levels[0]
    before, width_before = None, 1.0
    for step, (sigma, following) in enumerate(pairwise(levels)):
        clean = denoiser(x, torch.full((len(x),), sigma, device=x.device), class_labels)
        if following == 0:
            return clean
        width = math.log(sigma / following)  # of the step in log sigma
        slope = 0.0 if before is None else (clean - before) * (width / width_before)
        kept, share = math.exp(-eta * width), -math.expm1(-(1 + eta) * width)
        x = following / sigma * kept * x + share * (clean + slope / 2)
        x = x + S_noise * following * math.sqrt(1 - kept**2) * noise[step + 1]
        before, width_before = clean, width
    return x
