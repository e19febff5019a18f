"""Procedural images: strokes, blobs and gradients drawn from formulas.

They hold nobody's data, so training on them is free. They are the only images besides the private ones that dpldm ever
sees, and a release says so on its card.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Uniform = Callable[..., Tensor]
_POINTS = 40  # dots along a stroke
_STROKES = 3
_CHUNK = 256


def procedural_images(num_images: int, channels: int, height: int, width: int, *, generator: torch.Generator) -> Tensor:
    """Random drawings of smooth strokes and filled blobs with random contrast, softness and shading.

    Args:
        num_images: How many.
        channels: 1 or 3.
        height: Pixels.
        width: Pixels.
        generator: Source of randomness (CPU).

    Returns:
        float32 [num_images, channels, height, width] in [-1, 1].
    """
    chunks = [
        _draw(min(_CHUNK, num_images - start), channels, height, width, generator)
        for start in range(0, num_images, _CHUNK)
    ]
    return torch.cat(chunks)


def _draw(n: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    x, y = torch.linspace(0, 1, width), torch.linspace(0, 1, height)
    pixels = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)  # [h w, 2]
    ink = torch.maximum(_strokes(x, y, n, uniform), _blobs(pixels, n, uniform))
    shading = 1 - uniform(n, 1, high=0.6) * _waves(pixels, n, uniform)
    foreground, background = uniform(n, channels, 1, low=0.4), uniform(n, channels, 1, high=0.3)
    plain = (uniform(n, 1, 1) < 0.5).float()  # half of the images lie on plain black, as scans and products often do
    background = background * (1 - plain)
    gray = background + (foreground - background) * (ink * shading)[:, None]
    inverted = torch.where(uniform(n, 1, 1) < 0.15, 1 - gray, gray)
    return (2 * inverted - 1).reshape(n, channels, height, width).clamp(-1, 1)


def _strokes(x: Tensor, y: Tensor, n: int, uniform: Uniform) -> Tensor:
    """Soft ink along cubic Bezier curves, [n, h w]. Dots are Gaussians, so an image is a product of two matrices."""
    control = uniform(n, _STROKES, 4, 2, low=0.12, high=0.88)
    control[:, 1:, 0] = torch.where(uniform(n, _STROKES - 1, 1) < 0.6, control[:, :-1, 3], control[:, 1:, 0])
    t = torch.linspace(0, 1, _POINTS)
    basis = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])  # [4, points]
    dots = torch.einsum("nsqd,qt->nstd", control, basis).flatten(1, 2)  # [n, strokes * points, 2]
    present = (uniform(n, _STROKES) < torch.tensor([0.9, 0.6, 0.4])).repeat_interleave(_POINTS, dim=1)
    thickness = uniform(n, 1, 1, low=0.018, high=0.06)
    columns = torch.exp(-((x - dots[..., 0:1]) / thickness).square())  # [n, dots, w]
    rows = torch.exp(-((y - dots[..., 1:2]) / thickness).square()) * present[..., None]
    density = (rows.transpose(1, 2) @ columns).flatten(1)
    hardness = uniform(n, 1, low=1.0, high=6.0)
    return 1 - torch.exp(-((1.5 * density) ** hardness.clamp(max=3.0)))


def _blobs(pixels: Tensor, n: int, uniform: Uniform) -> Tensor:
    """Soft boxes and ellipses (superellipses), turned at random, [n, p]; absent in half of the images."""
    total = torch.zeros(n, len(pixels))
    for probability in (0.4, 0.25, 0.2):
        centre, radius = uniform(n, 1, 2, low=0.2, high=0.8), uniform(n, 1, 2, low=0.06, high=0.42)
        angle = uniform(n, 1, low=-0.5, high=0.5)
        offset = pixels - centre
        turned = torch.stack(
            [
                offset[..., 0] * angle.cos() - offset[..., 1] * angle.sin(),
                offset[..., 0] * angle.sin() + offset[..., 1] * angle.cos(),
            ],
            dim=2,
        )
        power = uniform(n, 1, low=1.5, high=8.0)
        level = ((turned.abs() / radius).clamp(max=8.0) ** power[..., None]).sum(2)
        blob = torch.sigmoid((1 - level.clamp(min=1e-6) ** (1 / power)) * uniform(n, 1, low=8.0, high=40.0))
        total = torch.maximum(total, blob * (uniform(n, 1) < probability).float() * uniform(n, 1, low=0.4))
    return total


def _waves(pixels: Tensor, n: int, uniform: Uniform) -> Tensor:
    """A plane wave or a slow gradient in [0, 1], [n, p]."""
    frequency = 25.0 * uniform(n, 2, low=-1.0) * uniform(n, 1)
    return 0.5 + 0.5 * torch.sin(frequency @ pixels.T + uniform(n, 1, high=6.3))
