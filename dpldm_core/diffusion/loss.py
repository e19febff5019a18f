"""Denoising score matching for one latent and K noise draws per record."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

DenoiserFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def denoising_loss(
    denoiser: DenoiserFn, latents: Tensor, class_labels: Tensor, sigma: Tensor, noise: Tensor, weight: Tensor
) -> Tensor:
    """Weighted squared error of the clean estimate, Karras et al. (2022), Eq. 2.

    Args:
        denoiser: D(x, sigma, class_labels).
        latents: Clean latents [n, d].
        class_labels: int64 [n].
        sigma: Noise levels [n, K]: K draws per record (noise multiplicity, Dockhorn et al. 2022).
        noise: Standard normal [n, K, d].
        weight: lambda(sigma), [n, K].

    Returns:
        One loss per record, the mean over its draws and coordinates, [n].
    """
    n, draws, dim = noise.shape
    noisy = latents[:, None] + sigma[..., None] * noise
    labels = class_labels[:, None].expand(n, draws).flatten()
    clean = denoiser(noisy.reshape(n * draws, dim), sigma.flatten(), labels).view(n, draws, dim)
    return (weight * (clean - latents[:, None]).square().mean(2)).mean(1)
