"""A Gaussian per class in latent space, and its exact denoiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GaussianPrior(nn.Module):
    """Class-conditional Gaussians N(mean_y, V_y diag(variance_y) V_y^T), and the share of each class among the records.

    The shares move no image: a teacher needs them (:meth:`LabelTeacher.classify`).

    Args:
        num_classes: Classes, 1 when there are no labels.
        dim: Latent dimension d.
    """

    means: Tensor
    bases: Tensor
    variances: Tensor
    shares: Tensor

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(num_classes, dim))
        self.register_buffer("bases", torch.eye(dim).repeat(num_classes, 1, 1))
        self.register_buffer("variances", torch.ones(num_classes, dim))
        self.register_buffer("shares", torch.full((num_classes,), 1 / num_classes))

    @torch.no_grad()
    def set_moments(self, means: Tensor, covariances: Tensor, *, variance_floor: float) -> None:
        """Take means [classes, d] and symmetric covariances [classes, d, d]; eigenvalues are raised to the floor."""
        variances, bases = torch.linalg.eigh(covariances.double())
        self.means.copy_(means)
        self.variances.copy_(variances.clamp(min=variance_floor))
        self.bases.copy_(bases)

    @torch.no_grad()
    def transform(self, linear: Tensor) -> None:
        """Become the Gaussians of ``linear`` times the latent, [d, d]."""
        linear = linear.double()
        factors = linear @ (self.bases.double() * self.variances.double().sqrt()[:, None, :])
        self.set_moments(self.means.double() @ linear.T, factors @ factors.transpose(1, 2), variance_floor=0.0)

    def denoise(self, x: Tensor, sigma: Tensor, class_labels: Tensor, added_variance: float = 0.0) -> Tensor:
        """Posterior mean of the clean latent: the exact denoiser of a Gaussian (Karras et al. 2022, Eq. 3 and App. B).

        Args:
            x: Noisy latents [n, d].
            sigma: Noise standard deviations [n].
            class_labels: int64 [n].
            added_variance: Variance of noise that the clean latents carry themselves.

        Returns:
            Clean estimates [n, d].
        """
        out = torch.empty_like(x)
        for label in range(len(self.means)):
            rows = torch.nonzero(class_labels == label)[:, 0]
            if len(rows) == 0:
                continue
            variance, basis = self.variances[label] + added_variance, self.bases[label]
            gain = variance / (variance + sigma[rows, None].square())
            out[rows] = self.means[label] + (((x[rows] - self.means[label]) @ basis) * gain) @ basis.T
        return out

    def posterior(self, x: Tensor, sigma: Tensor, added_variance: float = 0.0) -> tuple[Tensor, Tensor]:
        """What every class says about noisy latents.

        Args:
            x: Noisy latents [n, d].
            sigma: Noise standard deviations [n].
            added_variance: Variance of noise that the clean latents carry themselves.

        Returns:
            Log densities of the noisy latents up to a constant [classes, n], and posterior means [classes, n, d].
        """
        log_densities, means = [], []
        for mean, basis, variance in zip(self.means, self.bases, self.variances + added_variance, strict=True):
            total = variance + sigma[:, None].square()
            inside = (x - mean) @ basis
            log_densities.append(-0.5 * (inside.square() / total + total.log()).sum(1))
            means.append(mean + (inside * variance / total) @ basis.T)
        return torch.stack(log_densities), torch.stack(means)

    def sample(self, noise: Tensor, class_labels: Tensor, added_variance: float = 0.0) -> Tensor:
        """A draw from the Gaussian of each row's class.

        Args:
            noise: Standard normal [n, d].
            class_labels: int64 [n].
            added_variance: Variance of noise that the latents carry themselves.

        Returns:
            [n, d].
        """
        out = self.means[class_labels]
        for label in range(len(self.means)):
            rows = torch.nonzero(class_labels == label)[:, 0]
            out[rows] += (noise[rows] * (self.variances[label] + added_variance).sqrt()) @ self.bases[label].T
        return out

    def posterior_sample(self, x: Tensor, sigma: float, class_labels: Tensor, noise: Tensor) -> Tensor:
        """A draw of the clean latent given a noisy one, under the Gaussian of its class.

        Args:
            x: Noisy latents [n, d].
            sigma: Their noise standard deviation.
            class_labels: int64 [n].
            noise: Standard normal [n, d].

        Returns:
            [n, d].
        """
        out = self.denoise(x, torch.full((len(x),), sigma, device=x.device), class_labels)
        for label in range(len(self.means)):
            rows = torch.nonzero(class_labels == label)[:, 0]
            spread = (self.variances[label] * sigma**2 / (self.variances[label] + sigma**2)).sqrt()
            out[rows] += (noise[rows] * spread) @ self.bases[label].T
        return out
