"""The small classifier that the field uses for 28x28 images: it measures utility, and its features serve a teacher."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

_BATCH_SIZE = 128
_LEARNING_RATE = 3e-3
_WARMUP = 0.1  # share of the steps in which the learning rate rises
_WIDTHS = (32, 48, 96)
_NUM_FEATURES = 128
_TURN, _SCALE, _SHEAR, _SHIFT = math.radians(8), 0.08, 0.08, 1 / 14  # most at deformation 1; 2 is a whole side
_DENSE = 3  # modules of the body after the flattened convolutions: dropout, linear, ReLU


class SmallCnn(nn.Module):
    """Three convolutions and a hidden layer, the size that the field uses for 28x28 images.

    Pooling comes before normalisation: a ReLU is monotone, so that computes nearly the same on a quarter of the pixels.

    Args:
        image_shape: (h, w, c) of the images, h and w from 8, c 1 or 3.
        num_classes: Outputs.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        height, width, channels = image_shape
        a, b, c = _WIDTHS
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, a, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(a), nn.ReLU()),
            *(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(b), nn.ReLU()),
            *(nn.Conv2d(b, c, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(c), nn.ReLU()),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(c * math.prod((side + 1) // 2 // 4 for side in (height, width)), _NUM_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(_NUM_FEATURES, num_classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits [b, num_classes] of uint8 pixels [b, c, h, w]."""
        return self.head(self.features(pixels))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The layer before the logits, [b, 128], of uint8 pixels [b, c, h, w]."""
        return self.body(pixels.float().div(127.5).sub(1))

    def convolved(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the convolutions find, flattened, of uint8 pixels [b, c, h, w]."""
        return self.body[:-_DENSE](pixels.float().div(127.5).sub(1))

    def hidden(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the convolutions find, and the layer before the logits, side by side: [b, num_hidden]."""
        found = self.convolved(pixels)
        return torch.cat([found, self.body[-_DENSE:](found)], dim=1)

    def dense(self) -> nn.Sequential:
        """A copy of all layers behind :meth:`convolved`, without dropout."""
        _, *rest = self.body[-_DENSE:]
        return copy.deepcopy(nn.Sequential(*rest, self.head))

    @property
    def num_hidden(self) -> int:
        """Width of :meth:`hidden`."""
        dense = self.body[-2]
        assert isinstance(dense, nn.Linear)
        return dense.in_features + dense.out_features


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_pixels(images: np.ndarray, where: torch.device) -> torch.Tensor:
    """uint8 [n, h, w, c] copied to a tensor [n, c, h, w] that keeps the layout in memory (channels last)."""
    return torch.tensor(np.ascontiguousarray(images)).to(where).permute(0, 3, 1, 2)


def train_classifier(
    images: np.ndarray, labels: np.ndarray, *, num_classes: int, num_epochs: int, seed: int, deformation: float = 0.0
) -> SmallCnn:
    """Train a SmallCnn for a fixed number of epochs with AdamW and a cosine schedule.

    Equal arguments give equal weights on one machine with one number of threads. The global random state of torch is
    left as it was.

    Args:
        images: uint8 [n, h, w, c], n from 2. Synthetic; for the ceiling the real training records (private).
        labels: int64 [n], 0 to num_classes - 1.
        num_classes: Number of classes.
        num_epochs: Passes over the images.
        seed: Of initial weights, order, dropout and deformation.
        deformation: How much the images of each batch are moved, see :func:`deform`.

    Returns:
        The classifier of the last step, in evaluation mode. Private when the images are.
    """
    where = device()
    pixels, targets = to_pixels(images, where), torch.tensor(labels).to(where)
    steps_per_epoch = math.ceil(len(images) / _BATCH_SIZE)
    total = num_epochs * steps_per_epoch
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with torch.random.fork_rng(range(torch.cuda.device_count())), cudnn:
        torch.manual_seed(seed)
        model = SmallCnn(images.shape[1:], num_classes).to(memory_format=torch.channels_last).to(where)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step / total))
        for _ in range(num_epochs):
            for batch in torch.randperm(len(images)).to(where).tensor_split(steps_per_epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(deform(pixels[batch], deformation)), targets[batch]).backward()
                optimizer.step()
                scheduler.step()
    return model.eval()


def deform(pixels: torch.Tensor, deformation: float, draws: torch.Tensor | None = None) -> torch.Tensor:
    """Each image turned, scaled, sheared and moved a little: what moves a real one within its class.

    Args:
        pixels: [b, c, h, w] between 0 and 255.
        deformation: At most 8 degrees, 8 % and a 28th of a side, times this; 0 leaves the images as they are.
        draws: Numbers between 0 and 1 that say how, [6]: the same for every image. None: each gets its own, from
            torch's global generator.

    Returns:
        As many images, float32.
    """
    if deformation == 0:
        return pixels
    chosen = torch.rand(6, len(pixels)) if draws is None else draws[:, None].expand(6, len(pixels))
    uniform = (chosen * 2 - 1) * deformation
    turn, wide, high, shear, right, down = uniform * torch.tensor(
        [[_TURN], [_SCALE], [_SCALE], [_SHEAR], [_SHIFT], [_SHIFT]]
    )
    cos, sin = turn.cos(), turn.sin()
    rows = [cos * (1 + wide), shear - sin * (1 + high), right], [sin * (1 + wide), cos * (1 + high), down]
    maps = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).to(pixels.device)
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels.float(), grid, mode="bicubic", padding_mode="border", align_corners=False)
    return moved.clamp(0, 255)


def _schedule(progress: float) -> float:
    """Factor of the learning rate: a linear rise, then a half cosine to zero.

    >>> [round(_schedule(p), 3) for p in (0.0, 0.1, 0.55, 1.0)]
    [0.01, 1.0, 0.5, 0.0]
    """
    if progress < _WARMUP:
        return max(0.01, progress / _WARMUP)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))
