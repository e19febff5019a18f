"""The latent denoiser: a residual network on top of a Gaussian prior's exact denoiser."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dpldm_core.models.precond import edm_scalings
from dpldm_core.models.prior import GaussianPrior


class Block(nn.Module):
    """h + W gelu(norm(h) (1 + scale) + shift), with scale and shift from the condition."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.modulate, self.linear = nn.Linear(condition, 2 * width), nn.Linear(width, width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Hidden [n, width] and condition [n, condition] to hidden [n, width]."""
        scale, shift = self.modulate(condition).chunk(2, dim=-1)
        normed = nn.functional.layer_norm(h, h.shape[-1:])  # no weights of its own, within one row
        return h + self.linear(nn.functional.gelu(normed * (1 + scale) + shift))


class ResidualNetwork(nn.Module):
    """F_x: (scaled latent, prior estimate, log sigma, class) to a latent; zero at the start."""

    def __init__(self, dim: int, num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("frequencies", torch.tensor([0.5, 1.0, 2.0, 4.0]), persistent=False)
        self.condition = nn.Linear(num_classes + 9, 64)
        self.inner = nn.Linear(2 * dim, width)
        self.blocks = nn.ModuleList(Block(width, 64) for _ in range(depth))
        self.outer = nn.Linear(width, dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor) -> Tensor:
        """Inputs [n, 2 dim], log-sigma [n] and int64 labels [n] to [n, dim]."""
        angles = c_noise[:, None] * self.frequencies  # type: ignore[operator]
        times = torch.cat([c_noise[:, None], angles.sin(), angles.cos()], dim=1)
        classes = (class_labels[:, None] == torch.arange(self.num_classes, device=x.device)).to(x.dtype)
        condition = nn.functional.gelu(self.condition(torch.cat([times, classes], dim=1)))
        h = self.inner(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.outer(nn.functional.gelu(h))


class Denoiser(nn.Module):
    """D(x; sigma, y) = prior estimate + c_out F_x(c_in x, prior estimate, c_noise, y).

    With F_x = 0 it samples the Gaussian prior exactly, so training can only start from there. Preconditioning: EDM,
    Karras et al. (2022), Table 1, with the prior's posterior mean in the place of c_skip x.

    Args:
        dim: Latent dimension.
        num_classes: Classes, 1 when there are no labels.
        width: Hidden width.
        depth: Residual blocks.
        sigma_data: Standard deviation of a latent coordinate (a public constant, never measured).
        latent_noise: Standard deviation of noise that the training latents carry themselves (mode noised_latents).
    """

    def __init__(
        self, *, dim: int, num_classes: int, width: int, depth: int, sigma_data: float, latent_noise: float = 0.0
    ) -> None:
        super().__init__()
        self.dim, self.num_classes, self.latent_noise = dim, num_classes, latent_noise
        self.sigma_data = math.hypot(sigma_data, latent_noise)
        self.prior = GaussianPrior(num_classes, dim)
        self.network = ResidualNetwork(dim, num_classes, width, depth)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        """Clean estimate.

        Args:
            x: Noisy latents [n, dim].
            sigma: Noise standard deviations [n].
            class_labels: int64 [n].

        Returns:
            [n, dim].
        """
        scalings = edm_scalings(sigma, self.sigma_data)
        estimate = self.prior.denoise(x, sigma, class_labels, added_variance=self.latent_noise**2)
        inputs = torch.cat([scalings.c_in[:, None] * x, estimate / self.sigma_data], dim=1)
        return estimate + scalings.c_out[:, None] * self.network(inputs, scalings.c_noise, class_labels)
