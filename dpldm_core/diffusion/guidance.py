"""Guidance: clearer samples, by the class Gaussians that a release pays for anyway."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpldm_core.diffusion.loss import DenoiserFn

PosteriorFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_PLAIN = 0.5  # share of images that are not guided: those between two classes teach a classifier most
_MOST = 8.0  # largest shift of a clean estimate, in noise standard deviations: wrong guesses would feed themselves


def image_strengths(guidance: float, uniform: Tensor) -> Tensor:
    """Strength of each image's guidance: half of the images are plain, the others lie evenly around the setting.

    >>> image_strengths(8.0, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist()
    [0.0, 0.0, 4.0, 8.0, 12.0]

    Args:
        guidance: Mean strength of those that are guided, 0 or more.
        uniform: A number in [0, 1] for each image, [n].

    Returns:
        [n]: 0, or between half and one and a half times ``guidance``.
    """
    place = (uniform - _PLAIN) / (1 - _PLAIN)
    return torch.where(place < 0, torch.zeros_like(place), guidance * (0.5 + place))


def guide(denoiser: DenoiserFn, posterior: PosteriorFn, strengths: Tensor, *, highest: float) -> DenoiserFn:
    """A denoiser that steps away from what the other classes would have made of the same noisy latent.

    Classifier guidance (Dhariwal and Nichol 2021, Eq. 10) with the prior as the classifier: its posterior mean for the
    class minus that for an unknown class is sigma^2 times the gradient of log p(class | x, sigma). Post-processing of
    released models; with one class nothing moves.

    Args:
        denoiser: D(x, sigma, class_labels).
        posterior: (x, sigma) to log densities [classes, n] and posterior means [classes, n, d] of the class Gaussians.
        strengths: Factor of each sample's gradient, [n]; 0 leaves the denoiser as it is.
        highest: Noise level above which nothing is guided: the classes are not yet told apart there.

    Returns:
        A denoiser of the same n samples.
    """
    rows = torch.nonzero(strengths)[:, 0]
    if len(rows) == 0:
        return denoiser

    def guided(x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        clean = denoiser(x, sigma, class_labels)
        if float(sigma.max()) > highest:
            return clean
        log_density, means = posterior(x[rows], sigma[rows])
        unknown = torch.einsum("cn,cnd->nd", log_density.softmax(0), means)
        own = means[class_labels[rows], torch.arange(len(rows), device=x.device)]
        shift = strengths[rows, None] * (own - unknown)
        shift *= (_MOST * sigma[rows] / shift.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0)[:, None]
        return clean.index_add(0, rows, shift)

    return guided


def sharpen(denoiser: DenoiserFn, rough: DenoiserFn, sharpness: float, *, highest: float) -> DenoiserFn:
    """A denoiser that goes further than the denoiser does, in the direction in which it is better than a rough one.

    Autoguidance (Karras et al. 2024, Eq. 3) with the class Gaussian's exact denoiser as the inferior model: few private
    steps leave the network's correction of it too small, and images too smooth. Post-processing of released models.

    Args:
        denoiser: D(x, sigma, class_labels).
        rough: The same of the inferior model.
        sharpness: Step beyond the denoiser, in units of its distance from the rough one; 0 leaves it as it is.
        highest: Noise level above which nothing is sharpened: what belongs where is decided there, not how sharp it is.
    """
    if sharpness == 0:
        return denoiser

    def sharpened(x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        clean = denoiser(x, sigma, class_labels)
        if float(sigma.max()) > highest:
            return clean
        return clean + sharpness * (clean - rough(x, sigma, class_labels))

    return sharpened
