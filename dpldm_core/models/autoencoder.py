"""The autoencoder of stage 1: a bounded, fixed-scale latent around a discrete cosine transform.

An untrained codec is already sensible: the encoder keeps the k x k lowest frequencies of every channel, scaled by the
1/f amplitude law of images (Field 1987), and the decoder inverts that. The encoder has no weights. Training moves a
small convolutional network behind the inverse transform, whose last layer starts at zero: it takes off the ringing of
the cut and sharpens. So the private data pays only for what a transform cannot know.
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
        """Images [n, c, h, w] to latents [n, latent_dim]."""
        return LATENT_BOUND * torch.tanh(self.transform.analyse(images) / LATENT_BOUND)


class Decoder(nn.Module):
    """Latents [n, latent_dim] to images [n, c, h, w], float32, about [-1, 1] (clamp before showing)."""

    def __init__(self, transform: FrequencyTransform, refiner_channels: int) -> None:
        super().__init__()
        self.transform = transform
        self.refiner = Refiner(transform.shape[0], refiner_channels)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [n, latent_dim] to images [n, c, h, w]."""
        unbounded = LATENT_BOUND * torch.atanh((latents / LATENT_BOUND).clamp(-0.999, 0.999))
        return self.refiner(self.transform.synthesise(unbounded))


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
    """Low frequencies of an orthonormal 2-D DCT-II, scaled to about unit variance by a fixed 1/f law.

    RGB is first turned into luminance and two colour differences by an orthonormal matrix.
    """

    colour: Tensor
    rows: Tensor
    cols: Tensor
    amplitude: Tensor

    def __init__(self, channels: int, height: int, width: int, frequencies: int) -> None:
        super().__init__()
        self.shape = (channels, height, width)
        kh, kw = min(frequencies, height), min(frequencies, width)
        self.grid = (kh, kw)
        self.dim = channels * kh * kw
        colour = torch.eye(channels)
        if channels == 3:
            s = torch.tensor([3.0, 2.0, 6.0]).rsqrt()
            colour = s[:, None] * torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
        radius = torch.hypot(*torch.meshgrid(torch.arange(float(kh)), torch.arange(float(kw)), indexing="ij"))
        amplitude = 0.35 * math.sqrt(height * width) / (1.0 + radius)
        self.register_buffer("colour", colour, persistent=False)
        self.register_buffer("rows", _dct(height)[:kh], persistent=False)
        self.register_buffer("cols", _dct(width)[:kw], persistent=False)
        self.register_buffer("amplitude", amplitude, persistent=False)

    def analyse(self, images: Tensor) -> Tensor:
        """Images [n, c, h, w] to coefficients [n, dim]."""
        opponent = torch.einsum("dc,nchw->ndhw", self.colour, images)
        return ((self.rows @ opponent @ self.cols.T) / self.amplitude).flatten(1)

    def synthesise(self, coefficients: Tensor) -> Tensor:
        """Coefficients [n, dim] to images [n, c, h, w]; the inverse on images that hold low frequencies only."""
        scaled = coefficients.unflatten(1, (self.shape[0], *self.grid)) * self.amplitude
        return torch.einsum("dc,ndhw->nchw", self.colour, self.rows.T @ scaled @ self.cols)


def _dct(size: int) -> Tensor:
    """Orthonormal DCT-II matrix [size, size]; row u is the cosine of frequency u (Ahmed et al. 1974)."""
    positions = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (positions[None] + 0.5) * positions[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
