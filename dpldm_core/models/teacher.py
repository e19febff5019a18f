"""Label teachers: classifiers that learn from synthetic images first, and then, but for one, from private ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dpldm_core.models.batches import in_equal_batches
from dpldm_core.models.classifier import SmallCnn, device, to_pixels

_BATCH_SIZE = 500
_SCALE_FLOOR = 0.1  # of the largest standard deviation, added to every feature's own
_SIDE = 28  # pixels for each one that a view is moved by
_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))
_CLEAR = 0.95  # probability of the likeliest class minus that of the next
_CONSTANT = 0.2  # of a typical feature vector's norm: the input of the bias


class LabelTeacher(nn.Module, ABC):
    """Names the class of an image: fixed features, and a head behind them, which alone ever meets private data.

    Args:
        image_shape: (h, w, c).
        num_classes: Outputs, 2 or more.
    """

    head: nn.Module

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.network = SmallCnn(image_shape, num_classes).requires_grad_(False).eval()

    def take(self, network: SmallCnn, images: np.ndarray) -> None:
        """Start from a trained network.

        Args:
            network: Trained on synthetic images.
            images: Synthetic, uint8 [n, h, w, c].
        """
        self.network.load_state_dict(network.state_dict())

    @abstractmethod
    def features(self, images: np.ndarray) -> Tensor:
        """The head's inputs, float32 [n, .], of uint8 images [n, h, w, c]; each depends on its image alone."""

    @torch.no_grad()
    def classify(self, images: np.ndarray, shares: Tensor, *, num_views: int = 1) -> np.ndarray:
        """Class labels, int64 [n], of images among which all classes are alike.

        The head learnt from private records, where they are not: it expects a class as often as it met it there. So the
        logarithm of each class's share is taken off its logit (Menon et al. 2021, logit adjustment).

        Args:
            images: uint8 [n, h, w, c].
            shares: Released shares of the classes among the private records, [num_classes], all above 0.
            num_views: 1, or up to 9: an image that is not clear by itself is moved to its sides and corners, too, and
                what the teacher says of each is averaged.
        """
        votes = self._probabilities(images, shares)
        first, second = votes.topk(2, dim=1).values.T
        unclear = np.flatnonzero(first - second < _CLEAR)
        if num_views > 1 and len(unclear) > 0:
            step = round(images.shape[1] / _SIDE), round(images.shape[2] / _SIDE)
            padded = np.pad(images[unclear], [(0, 0), *((s, s) for s in step), (0, 0)], mode="edge")
            for down, right in _MOVES[: num_views - 1]:
                top, left = (step[0] * (1 + down), step[1] * (1 + right))
                moved = padded[:, top : top + images.shape[1], left : left + images.shape[2]]
                votes[unclear] += self._probabilities(moved, shares)
        return votes.argmax(1).numpy()

    def _probabilities(self, images: np.ndarray, shares: Tensor) -> Tensor:
        self.to(device())
        logits = _in_batches(lambda some: self.head(self.features(some)), images)
        return (logits - shares.to(logits).log()).softmax(1).cpu()

    def _through(self, layers: Callable[[Tensor], Tensor], images: np.ndarray) -> Tensor:
        where = device()
        self.to(where)
        self.network.eval()
        return _in_batches(lambda some: layers(to_pixels(some, where)), images)


class LinearTeacher(LabelTeacher):
    """A linear head on a few scaled features (after Tramer and Boneh 2021: few weights need little privacy budget).

    Args:
        image_shape: (h, w, c).
        num_classes: Outputs, 2 or more.
        num_features: Principal directions of the network's hidden layers that are kept.
        ridge: Added to the variance of each direction, in units of their mean, before it is scaled to one.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    constant: Tensor

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, *, num_features: int, ridge: float) -> None:
        super().__init__(image_shape, num_classes)
        self.ridge = ridge
        hidden = self.network.num_hidden
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("scale", torch.ones(hidden))
        self.register_buffer("basis", torch.eye(hidden)[:, : min(num_features, hidden)].clone())
        self.register_buffer("constant", torch.ones(()))
        self.head = nn.Linear(min(num_features, hidden) + 1, num_classes, bias=False)
        nn.init.zeros_(self.head.weight)

    @torch.no_grad()
    def take(self, network: SmallCnn, images: np.ndarray) -> None:
        """Take a trained network, and the principal directions of its hidden layers on synthetic images."""
        super().take(network, images)
        hidden = self._hidden(images).double()
        deviation = hidden.std(0)
        mean, scale = hidden.mean(0), 1 / (deviation + _SCALE_FLOOR * deviation.max())
        standard = (hidden - mean) * scale
        variances, directions = torch.linalg.eigh(standard.T @ standard / len(standard))
        kept = self.basis.shape[1]
        variances, directions = variances[-kept:].clamp(min=0), directions[:, -kept:]
        basis = directions * (variances + self.ridge * variances.mean()).rsqrt()
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.basis.copy_(basis)
        self.constant.copy_(_CONSTANT * (standard @ basis).norm(dim=1).mean())

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """Feature vectors of unit norm, float32 [n, num_features + 1], of uint8 images [n, h, w, c]."""
        found = ((self._hidden(images) - self.mean) * self.scale) @ self.basis
        found = torch.cat([found, self.constant.expand(len(found), 1)], dim=1)
        return nn.functional.normalize(found, dim=1)

    def _hidden(self, images: np.ndarray) -> Tensor:
        return self._through(self.network.hidden, images)


class FineTunedTeacher(LabelTeacher):
    """The network's own dense layers go on from what synthetic images taught them, behind its fixed convolutions.

    Many weights that start well need a large budget, and records of every class (docs/decisions/0020).

    Args:
        image_shape: (h, w, c).
        num_classes: Outputs, 2 or more.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(image_shape, num_classes)
        self.head = self.network.dense().requires_grad_(True)

    def take(self, network: SmallCnn, images: np.ndarray) -> None:
        """Take a trained network, whose dense layers become the head."""
        super().take(network, images)
        self.head = self.network.dense().requires_grad_(True)

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """What the convolutions find, float32 [n, .], of uint8 images [n, h, w, c]."""
        return self._through(self.network.convolved, images)


class PriorTeacher(LabelTeacher):
    """A whole network that learnt from samples of the released prior: no private record teaches it.

    A sample of a class's Gaussian is blurred, but hardly ever of another class; what the denoiser makes of one may be
    (docs/decisions/0023).

    Args:
        image_shape: (h, w, c).
        num_classes: Outputs, 2 or more.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(image_shape, num_classes)
        self.head = nn.Identity()

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """Logits, float32 [n, num_classes], of uint8 images [n, h, w, c]."""
        return self._through(self.network, images)

    def _probabilities(self, images: np.ndarray, shares: Tensor) -> Tensor:
        return super()._probabilities(images, torch.ones_like(shares))  # it met as many samples of every class


def _in_batches(function: Callable[[np.ndarray], Tensor], images: np.ndarray) -> Tensor:
    return in_equal_batches(lambda some: function(some.numpy()), torch.from_numpy(images), _BATCH_SIZE)
