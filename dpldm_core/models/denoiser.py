"""The latent denoiser: a convolutional network on top of a Gaussian prior's exact denoiser."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dpldm_core.models.precond import edm_scalings
from dpldm_core.models.prior import GaussianPrior

PATCH = 2  # latent pixels per side that become channels: a quarter of the positions
_CONDITION = 64


def _channels_last(conv: nn.Conv2d, h: Tensor) -> Tensor:
    """A convolution of [n, height, width, channels], which a CPU does faster than one of channels first."""
    return conv(h.movedim(3, 1)).movedim(1, 3)


class Block(nn.Module):
    """h + conv gelu(norm(h) (1 + scale) + shift), with scale and shift from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulate, self.conv = nn.Linear(_CONDITION, 2 * width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Hidden [n, height, width, channels] and condition [n, 64] to the same shape as the hidden."""
        scale, shift = self.modulate(condition)[:, None, None].chunk(2, dim=3)
        normed = nn.functional.layer_norm(h, h.shape[1:])  # no weights of its own, within one row
        return h + _channels_last(self.conv, nn.functional.gelu(normed * (1 + scale) + shift))


class ResidualNetwork(nn.Module):
    """F_x: (scaled latent, prior estimate, log sigma, class) to a latent; zero at the start.

    Weights are shared over the positions of the small image that a latent is: few of them, which a batch teaches much
    about, and which procedural images can teach beforehand.
    """

    def __init__(self, latent_shape: tuple[int, int, int], num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.latent_shape, self.num_classes = latent_shape, num_classes
        self.register_buffer("frequencies", torch.tensor([0.5, 1.0, 2.0, 4.0]), persistent=False)
        self.condition = nn.Linear(num_classes + 9, _CONDITION)
        channels = PATCH**2 * latent_shape[0]
        self.inner = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.outer = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, estimate: Tensor, c_noise: Tensor, class_labels: Tensor) -> Tensor:
        """Two latents [n, dim], log-sigma [n] and int64 labels [n] to [n, dim]; a label of -1 names no class."""
        angles = c_noise[:, None] * self.frequencies  # type: ignore[operator]
        times = torch.cat([c_noise[:, None], angles.sin(), angles.cos()], dim=1)
        classes = (class_labels[:, None] == torch.arange(self.num_classes, device=x.device)).to(x.dtype)
        condition = nn.functional.gelu(self.condition(torch.cat([times, classes], dim=1)))
        height, width = self.latent_shape[1:]
        small = torch.cat([t.unflatten(1, self.latent_shape) for t in (x, estimate)], dim=1)
        small = nn.functional.pad(small, (0, -width % PATCH, 0, -height % PATCH), mode="replicate")
        h = _channels_last(self.inner, nn.functional.pixel_unshuffle(small, PATCH).movedim(1, 3).contiguous())
        for block in self.blocks:
            h = block(h, condition)
        out = _channels_last(self.outer, nn.functional.gelu(h)).movedim(3, 1)
        return nn.functional.pixel_shuffle(out, PATCH)[:, :, :height, :width].flatten(1)


class Denoiser(nn.Module):
    """D(x; sigma, y) = prior estimate + c_out F_x(c_in x, prior estimate, c_noise, y).

    With F_x = 0 it samples the Gaussian prior exactly, so training can only start from there. Preconditioning: EDM,
    Karras et al. (2022), Table 1, with the prior's posterior mean in the place of c_skip x.

    Args:
        latent_shape: (channels, k, k) of the small image that a latent is.
        num_classes: Classes, 1 when there are no labels.
        width: Channels of the network.
        depth: Residual blocks.
        sigma_data: Standard deviation of a latent coordinate (a public constant, never measured).
        noise_std: Standard deviation of noise that the training latents carry themselves (mode noised_latents).
    """

    def __init__(
        self,
        *,
        latent_shape: tuple[int, int, int],
        num_classes: int,
        width: int,
        depth: int,
        sigma_data: float,
        noise_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_classes, self.noise_std = math.prod(latent_shape), num_classes, noise_std
        self.sigma_data = math.hypot(sigma_data, noise_std)
        self.prior = GaussianPrior(num_classes, self.dim)
        self.network = ResidualNetwork(latent_shape, num_classes, width, depth)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        """Clean estimate.

        Args:
            x: Noisy latents [n, dim].
            sigma: Noise standard deviations [n].
            class_labels: int64 [n].

        Returns:
            [n, dim].
        """
        return self.refine(x, sigma, self.prior.denoise(x, sigma, class_labels, self.noise_std**2), class_labels)

    def refine(self, x: Tensor, sigma: Tensor, estimate: Tensor, class_labels: Tensor) -> Tensor:
        """The clean estimate of some Gaussian, made better by the network.

        Args:
            x: Noisy latents [n, dim].
            sigma: Noise standard deviations [n].
            estimate: Posterior means [n, dim].
            class_labels: int64 [n]; -1 names no class.

        Returns:
            [n, dim].
        """
        scalings = edm_scalings(sigma, self.sigma_data)
        scaled = scalings.c_in[:, None] * x
        residual = self.network(scaled, estimate / self.sigma_data, scalings.c_noise, class_labels)
        return estimate + scalings.c_out[:, None] * residual
