"""Named feature extractors, and features of both sides of a comparison. Only the full Inception is called ``fid``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dpldm_core.errors import ConfigError
from dpldm_core.models.classifier import SmallCnn, device, to_pixels

_BATCH_SIZE = 50

# Metric by the sha256 of its weights file.
# fid: pt_inception-2015-12-05-6726825d.pth of pytorch-fid. Its publisher states the first 8 digits, in the file's name;
# the other 56 are as several independent projects that pin this file record them (none of them hashed here).
# fd_inception768: the layers of the same network up to Mixed_6e, in a file of their own, hashed here.
_METRICS = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "fid",
    "976486bbab6dbc4f512c80d0c421532a87ec309951d0b85c8b5de6f7b9f8ae28": "fd_inception768",
}
_WAY_OUT = (
    "Point it at pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid/releases, or unset it: "
    "Frechet distances are then taken on a classifier trained on the real records."
)


@dataclass(frozen=True)
class FeatureExtractor:
    """Turns images into feature vectors.

    Args:
        metric: Name of the Frechet distance on these features.
        features: Maps uint8 pixels [b, c, h, w] to features [b, d].
    """

    metric: str
    features: Callable[[torch.Tensor], torch.Tensor]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features of images.

        Args:
            images: uint8 [n, h, w, c].

        Returns:
            float32 [n, d]; private when the images are.
        """
        batches = [images[i : i + _BATCH_SIZE] for i in range(0, len(images), _BATCH_SIZE)]
        return np.concatenate([self.features(to_pixels(batch, device())).float().cpu().numpy() for batch in batches])


@dataclass(frozen=True)
class DrawnFeatures:
    """Features of equally many images a side. Private: real records are in them.

    Args:
        metric: Name of the Frechet distance on these features.
        synthetic: [n, d].
        train: Of real training images, [n, d].
        heldout: Of real held-out images, [k, d], k at most n; whatever compares with them takes k of each.
    """

    metric: str
    synthetic: np.ndarray
    train: np.ndarray
    heldout: np.ndarray


def draw_features(
    extractor: FeatureExtractor,
    images: np.ndarray,
    train_images: np.ndarray,
    heldout_images: np.ndarray,
    *,
    max_images: int,
    seed: int,
) -> DrawnFeatures:
    """Features of random images of each side.

    Args:
        extractor: The features.
        images: Synthetic uint8 [n, h, w, c], n from 2.
        train_images: Real training images, uint8 [m, h, w, c], m from 2. Private.
        heldout_images: Real held-out images, uint8 [k, h, w, c], k from 2. Private.
        max_images: Images a side at most, drawn without replacement.
        seed: Of the draw.

    Returns:
        The features. Private.
    """
    rng = np.random.default_rng(seed)
    num_all = min(len(images), len(train_images), max_images)
    sides = (images, num_all), (train_images, num_all), (heldout_images, min(num_all, len(heldout_images)))
    drawn = [extractor(part[rng.permutation(len(part))[:size]]) for part, size in sides]
    return DrawnFeatures(extractor.metric, *drawn)


def classifier_extractor(classifier: SmallCnn) -> FeatureExtractor:
    """Last hidden layer of a classifier that was trained on the real training records (private): the fallback.

    Such a classifier has seen the training images, so the floor does not vanish with more images, and perfect images
    come nearer to the held-out ones than to the training ones: compare ``distance`` with the floor, not the other.

    Args:
        classifier: From ``train_classifier``.

    Returns:
        The extractor of ``fd_real_classifier``, 128 features.
    """
    return FeatureExtractor("fd_real_classifier", classifier.features)


def inception_metric(path: str | Path) -> str:
    """Check a weights file without loading it, for use before any budget is spent.

    Args:
        path: The file that DPLDM_INCEPTION_WEIGHTS names.

    Returns:
        ``fid`` or ``fd_inception768``.

    Raises:
        ConfigError: There is no such file, or its sha256 is unknown.
    """
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"DPLDM_INCEPTION_WEIGHTS={str(path)!r} cannot be read ({error.strerror}). {_WAY_OUT}"
        ) from None
    if found not in _METRICS:
        raise ConfigError(
            f"DPLDM_INCEPTION_WEIGHTS={str(path)!r} has sha256 {found}, which is none of the known files "
            f"({', '.join(f'{metric}: {digest[:8]}...' for digest, metric in _METRICS.items())}). {_WAY_OUT}"
        )
    return _METRICS[found]


def inception_extractor(path: str | Path) -> FeatureExtractor:
    """The Inception network of 5 December 2015 that FID is defined on, with weights from a file. Never downloads.

    Args:
        path: The file that DPLDM_INCEPTION_WEIGHTS names.

    Returns:
        The extractor of ``fid`` (2,048 features) or, for the partial file, of ``fd_inception768`` (768 features).

    Raises:
        ConfigError: There is no such file, or its sha256 is unknown.
    """
    metric = inception_metric(path)
    network = inception_network(torch.load(path, map_location="cpu", weights_only=True), partial=metric != "fid")
    return FeatureExtractor(metric, network.to(memory_format=torch.channels_last).to(device()))


def inception_network(weights: dict[str, torch.Tensor], *, partial: bool) -> nn.Module:
    """The Inception of torchvision with the four blocks that pytorch-fid patches, cut off after the average pool.

    Args:
        weights: State of the network, as pytorch-fid names it.
        partial: Cut after Mixed_6e, and let the weights after it be missing.

    Returns:
        A module that maps uint8 pixels [b, c, h, w] to features, [b, 768] if partial, else [b, 2048].
    """
    # Imported here because torchvision takes seconds, and most releases are measured without it.
    from pytorch_fid.inception import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for name, block in {
        "Mixed_5b": FIDInceptionA(192, pool_features=32),
        "Mixed_5c": FIDInceptionA(256, pool_features=64),
        "Mixed_5d": FIDInceptionA(288, pool_features=64),
        "Mixed_6b": FIDInceptionC(768, channels_7x7=128),
        "Mixed_6c": FIDInceptionC(768, channels_7x7=160),
        "Mixed_6d": FIDInceptionC(768, channels_7x7=160),
        "Mixed_6e": FIDInceptionC(768, channels_7x7=192),
        "Mixed_7b": FIDInceptionE_1(1280),
        "Mixed_7c": FIDInceptionE_2(2048),
    }.items():
        setattr(net, name, block)
    cut = ("fc", "Mixed_7a", "Mixed_7b", "Mixed_7c") if partial else ("fc",)
    for name in cut:
        setattr(net, name, nn.Identity())
    net.load_state_dict({name: value for name, value in weights.items() if name.split(".")[0] not in cut})
    return _Inception(net).eval()


class _Inception(nn.Module):
    """Pixels in, features out: gray repeated to three channels, resized to 299x299, scaled to [-1, 1]."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        rgb = pixels.float().div(255).expand(-1, 3, -1, -1)
        return self.net(F.interpolate(rgb, size=(299, 299), mode="bilinear", align_corners=False).mul(2).sub(1))
