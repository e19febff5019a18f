"""The autoencoder of stage 1: a bounded, fixed-scale, spatial latent around a discrete cosine transform.

An untrained codec is already sensible: the encoder keeps the k x k lowest frequencies of every channel and shows them
as a k x k image, and the decoder enlarges that without loss. The encoder has no weights. Training moves a small
convolutional network behind the enlarged image, whose last layer starts at zero: it takes off the ringing of the cut
and sharpens. So the private data pays only for what a transform cannot know.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PATCH = 2  # pixels per side
LATENT_BOUND = 4.0  # every latent coordinate lies in (-4, 4), whatever the data


class Refiner(nn.Module):
    """Images plus a small convolutional correction on patches, zero at the start. Any height and width.

    Few, shared weights: the noise that DP-SGD adds to them is small next to what a batch teaches. Patches of 2x2 pixels
    become channels: a quarter of the positions.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(PATCH**2 * channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, PATCH**2 * channels, 3, padding=1),
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, c, h, w] to images of the same shape."""
        height, width = images.shape[2:]
        padded = nn.functional.pad(images, (0, -width % PATCH, 0, -height % PATCH), mode="replicate")
        patches = nn.functional.pixel_unshuffle(padded, PATCH)
        correction = nn.functional.pixel_shuffle(self.layers(patches), PATCH)
        return images + correction[:, :, :height, :width]


class Encoder(nn.Module):
    """Images [n, c, h, w] in [-1, 1] to latents [n, latent_dim], each coordinate in (-4, 4). No weights."""

    def __init__(self, transform: FrequencyTransform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, c, h, w] to latents [n, latent_dim], the flattened small image [c, k, k]."""
        return LATENT_BOUND * torch.tanh(self.transform.shrink(images).flatten(1) / LATENT_BOUND)


class Decoder(nn.Module):
    """Latents [n, latent_dim] to images [n, c, h, w], float32, about [-1, 1] (clamp before showing)."""

    def __init__(self, transform: FrequencyTransform, refiner_channels: int) -> None:
        super().__init__()
        self.transform = transform
        self.refiner = Refiner(transform.shape[0], refiner_channels)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [n, latent_dim] to images [n, c, h, w]."""
        unbounded = LATENT_BOUND * torch.atanh((latents / LATENT_BOUND).clamp(-0.999, 0.999))
        return self.refiner(self.transform.enlarge(unbounded.unflatten(1, self.transform.latent_shape)))


class Autoencoder(nn.Module):
    """Encoder and decoder of one image format.

    Args:
        channels: 1 or 3.
        height: Pixels.
        width: Pixels.
        frequencies: Cosine frequencies kept per axis; latent_dim = channels * frequencies^2 (at most the pixels).
        refiner_channels: Width of the convolutions in the decoder.
    """

    def __init__(self, *, channels: int, height: int, width: int, frequencies: int, refiner_channels: int) -> None:
        super().__init__()
        transform = FrequencyTransform(channels, height, width, frequencies)
        self.encoder = Encoder(transform)
        self.decoder = Decoder(transform, refiner_channels)

    @property
    def latent_dim(self) -> int:
        """Coordinates of a latent."""
        return self.encoder.transform.dim

    def forward(self, images: Tensor) -> Tensor:
        """Images to their reconstructions, [n, c, h, w]."""
        return self.decoder(self.encoder(images))


class FrequencyTransform(nn.Module):
    """Small images that hold the low frequencies of an orthonormal 2-D DCT-II of large ones, at the same brightness.

    RGB is first turned into luminance and two colour differences by an orthonormal matrix.

    Args:
        channels: 1 or 3.
        height: Pixels of the large image.
        width: Pixels of the large image.
        frequencies: Kept per axis, at most the pixels: the size of the small image.
    """

    colour: Tensor
    rows: Tensor
    cols: Tensor

    def __init__(self, channels: int, height: int, width: int, frequencies: int) -> None:
        super().__init__()
        self.shape = (channels, height, width)
        kh, kw = min(frequencies, height), min(frequencies, width)
        self.latent_shape = (channels, kh, kw)
        self.dim = channels * kh * kw
        colour = torch.eye(channels)
        if channels == 3:
            s = torch.tensor([3.0, 2.0, 6.0]).rsqrt()
            colour = s[:, None] * torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
        self.register_buffer("colour", colour, persistent=False)
        self.register_buffer("rows", _dct(kh).T @ _dct(height)[:kh] * math.sqrt(kh / height), persistent=False)
        self.register_buffer("cols", _dct(kw).T @ _dct(width)[:kw] * math.sqrt(kw / width), persistent=False)

    def shrink(self, images: Tensor) -> Tensor:
        """Images [n, c, h, w] to small ones [n, c, k, k]."""
        return self.rows @ torch.einsum("dc,nchw->ndhw", self.colour, images) @ self.cols.T

    def enlarge(self, small: Tensor) -> Tensor:
        """Small images [n, c, k, k] to images [n, c, h, w]; the inverse on images that hold low frequencies only."""
        _, height, width = self.shape
        scale = height * width / (self.latent_shape[1] * self.latent_shape[2])
        return torch.einsum("dc,ndhw->nchw", self.colour, scale * (self.rows.T @ small @ self.cols))


def whitening(latent_shape: tuple[int, int, int]) -> Tensor:
    """Map of latents to coordinates of about unit variance: cosines over the 1/f amplitude law of images (Field 1987).

    Args:
        latent_shape: (channels, k, k) of the small image that a latent is.

    Returns:
        [dim, dim]; its inverse leads back.
    """
    channels, height, width = latent_shape
    radius = torch.hypot(*torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij"))
    amplitude = 0.35 * math.sqrt(height * width) / (1.0 + radius)
    cosines = torch.kron(_dct(height), _dct(width)) / amplitude.flatten()[:, None]
    return torch.block_diag(*[cosines] * channels)


def unwhitening(latent_shape: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`whitening`, [dim, dim]: noise of one size in all coordinates looks like an image there."""
    return torch.linalg.inv(whitening(latent_shape).double()).float()


def _dct(size: int) -> Tensor:
    """Orthonormal DCT-II matrix [size, size]; row u is the cosine of frequency u (Ahmed et al. 1974)."""
    positions = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (positions[None] + 0.5) * positions[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
