"""Other ways to spend the same epsilon on the same records, for benchmarks/quality.py. All through the real mechanisms.

Each takes the private records and the release's configuration, is calibrated alone to the release's whole epsilon, and
returns synthetic images uint8 [n, h, w, c] with labels int64 [n].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpldm_core.config import DiffusionConfig, ReleaseConfig
from dpldm_core.data.schema import Records
from dpldm_core.diffusion.sampler import dpm_sampler, sample_noise
from dpldm_core.diffusion.schedule import sampling_sigmas
from dpldm_core.models.autoencoder import whitening
from dpldm_core.models.prior import GaussianPrior
from dpldm_core.privacy.calibration import COVARIANCES, DIFFUSION, MEANS, calibrate, relation_of
from dpldm_core.privacy.one_shot import noisy_sum
from dpldm_core.privacy.plan import DpSgdPlan, GaussianSumPlan, MechanismPlan
from dpldm_core.rng import SecretKey
from dpldm_core.threads import multiply_in_bfloat16, settle_on_cpu
from dpldm_core.training.autoencoder import build_autoencoder, encode
from dpldm_core.training.building import to_tensor, to_uint8
from dpldm_core.training.diffusion import build_denoiser, train_denoiser
from dpldm_core.training.prior import release_prior
from dpldm_core.training.stages import Run
from dpldm_core.training.units import Units

Drawn = tuple[np.ndarray, np.ndarray]

_FEATURES, _LENGTH_SCALE = 2_000, 10.0  # of DP-MERF's random features, on pixels in [0, 1]
_STEPS, _SIGMA_MIN, _SIGMA_MAX = 20, 0.3, 10.0  # of DPDM's sampler: from noise that drowns all to what it can learn
_CODE, _ITERATIONS = 5, 1_500  # of its generator
_BATCH = 500  # images at a time


def one_shot_prior(records: Records, config: ReleaseConfig) -> Drawn:
    """The class Gaussians of the latents alone, shown by the fixed transform: no learnt part."""
    schema = records.schema
    codec = build_autoencoder(
        config.autoencoder, channels=schema.channels, height=schema.height, width=schema.width, seed=config.seed
    )
    units = _units(records, encode(codec, to_tensor(records.images)))
    prior = GaussianPrior(schema.num_classes, codec.latent_dim)
    share = config.prior.mean_share
    plans = _calibrated(config, (_gaussian_sum(MEANS), share), (_gaussian_sum(COVARIANCES), 1.0 - share))
    white = whitening(codec.encoder.transform.latent_shape)
    release_prior(prior, units, (plans[0], plans[1]), lambda stage: SecretKey.generate(), config.prior, white)
    labels = torch.arange(config.num_samples) % schema.num_classes
    noise = torch.randn(len(labels), codec.latent_dim, generator=torch.Generator().manual_seed(config.seed))
    with torch.no_grad():
        chunks = zip(noise.split(_BATCH), labels.split(_BATCH), strict=True)
        images = [to_uint8(codec.decoder(prior.sample(*chunk))) for chunk in chunks]
    return np.concatenate(images), labels.numpy()


def dp_merf(records: Records, config: ReleaseConfig) -> Drawn:
    """DP-MERF: one noisy mean of random Fourier features per class, and a generator that matches them.

    Harder, Adamczewski and Park (2021), Algorithm 1; its convolutional generator for 28x28 images, with a fixed length
    scale in the place of one that is read from the data.
    """
    settle_on_cpu()
    schema = records.schema
    generator = torch.Generator().manual_seed(config.seed)
    pixels = torch.from_numpy(records.images).flatten(1).float() / 255
    frequencies = torch.randn(pixels.shape[1], _FEATURES // 2, generator=generator) / _LENGTH_SCALE

    def features(x: Tensor) -> Tensor:
        angles = x @ frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(_FEATURES // 2)  # rows of norm 1

    (plan,) = _calibrated(config, (_gaussian_sum("dp_merf"), 1.0))
    key, labels = SecretKey.generate(), torch.from_numpy(records.labels)
    sums = []
    for label in range(schema.num_classes):  # a record is in one class: the stacked sums move by at most 1
        own = features(pixels[labels == label])
        sums.append(noisy_sum(plan, key.derive(str(label)), own, torch.ones(len(own))).float())
    wanted = torch.stack(sums) / len(pixels)  # the number of records is public here, as in the paper

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _Generator(schema.num_classes, schema.channels, schema.height, schema.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _ITERATIONS)
    for _ in range(_ITERATIONS):
        drawn = torch.randint(schema.num_classes, (_BATCH,), generator=generator)
        classes = nn.functional.one_hot(drawn, schema.num_classes).float()
        made = model(torch.randn(_BATCH, _CODE, generator=generator), classes).flatten(1)
        loss = (classes.T @ features(made) / _BATCH - wanted).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    named = torch.arange(config.num_samples) % schema.num_classes
    images = []
    with torch.no_grad():
        for chunk in named.split(_BATCH):
            classes = nn.functional.one_hot(chunk, schema.num_classes).float()
            images.append(to_uint8(2 * model(torch.randn(len(chunk), _CODE, generator=generator), classes) - 1))
    return np.concatenate(images), named.numpy()


def pixel_dpdm(records: Records, config: ReleaseConfig, *, noise_multiplier: float | None = None) -> Drawn:
    """DPDM (Dockhorn et al. 2023) in a plain configuration: EDM on pixels, trained from scratch by DP-SGD alone.

    The release's kind of network, 32 channels wide, on all pixels in patches of 4x4, with the preconditioning of Karras
    et al. (2022) in the place of a prior, two noise draws a record, and the whole epsilon. It learns for about
    as long as the release takes: beside preset cpu 2,000 steps of a batch of 256 (DPDM's own takes GPU-hours).

    Args:
        records: Private records.
        config: The release's.
        noise_multiplier: In the place of the calibrated one: for a control without noise, on public data.
    """
    settle_on_cpu()
    schema, settings = records.schema, _pixel_settings(config)
    height, width = (side + side % 2 for side in (schema.height, schema.width))
    images = nn.functional.pad(
        to_tensor(records.images), (0, width - schema.width, 0, height - schema.height), value=-1
    )
    shape = 4 * schema.channels, height // 2, width // 2
    model = build_denoiser(settings, latent_shape=shape, num_classes=schema.num_classes, seed=config.seed)
    model.prior.variances.fill_(settings.sigma_data**2)  # mean 0: its denoiser is c_skip x
    (plan,) = _calibrated(config, (_pixel_plan(settings), 1.0))
    if noise_multiplier is not None:
        plan = plan.model_copy(update={"noise_multiplier": noise_multiplier})
    units = _units(records, nn.functional.pixel_unshuffle(images, 2).flatten(1))
    run = Run(None).loop(config, schema.num_classes)  # type: ignore[arg-type]
    trained = train_denoiser(model, units, plan, SecretKey.generate(), settings, **run)  # type: ignore[arg-type]
    multiply_in_bfloat16(trained.network)
    sigmas = sampling_sigmas(_STEPS, sigma_min=_SIGMA_MIN, sigma_max=_SIGMA_MAX)
    labels, drawn = torch.arange(config.num_samples) % schema.num_classes, []
    for rows in torch.arange(config.num_samples).split(_BATCH):
        noise = sample_noise(config.seed, rows.tolist(), num_draws=_STEPS, dim=model.dim)
        start = torch.zeros_like(noise[0])
        pixels = dpm_sampler(trained, start, noise, labels[rows], sigmas=sigmas, eta=1.0).unflatten(1, shape)
        drawn.append(to_uint8(nn.functional.pixel_shuffle(pixels, 2)[:, :, : schema.height, : schema.width]))
    return np.concatenate(drawn), labels.numpy()


def pixel_dpdm_without_noise(records: Records, config: ReleaseConfig) -> Drawn:
    """A control, in no way private: :func:`pixel_dpdm` with next to no noise on gradients, to see that it learns."""
    return pixel_dpdm(records, config, noise_multiplier=0.01)


BASELINES: dict[str, Callable[[Records, ReleaseConfig], Drawn]] = {
    "one_shot_prior": one_shot_prior,
    "dp_merf": dp_merf,
    "pixel_dpdm": pixel_dpdm,
    "pixel_dpdm_without_noise": pixel_dpdm_without_noise,
}


class _Generator(nn.Module):
    """Code and class to images in [0, 1]: two dense layers, two enlargements with convolutions."""

    def __init__(self, num_classes: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.size, self.small = (height, width), (16, math.ceil(height / 4), math.ceil(width / 4))
        hidden = math.prod(self.small)
        self.dense = nn.Sequential(
            nn.Linear(_CODE + num_classes, 200),
            nn.BatchNorm1d(200),
            nn.ReLU(),
            nn.Linear(200, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
        )
        enlarge = nn.Upsample(scale_factor=2, mode="bilinear")
        self.convolutions = nn.Sequential(
            enlarge, nn.Conv2d(16, 8, 5, padding=2), nn.ReLU(), enlarge, nn.Conv2d(8, channels, 5, padding=2)
        )

    def forward(self, code: Tensor, classes: Tensor) -> Tensor:
        small = self.dense(torch.cat([code, classes], dim=1)).unflatten(1, self.small)
        return self.convolutions(small)[:, :, : self.size[0], : self.size[1]].sigmoid()


def _units(records: Records, values: Tensor) -> Units:
    return Units(values, torch.from_numpy(records.labels), torch.arange(len(values))[:, None])


def _gaussian_sum(stage: str) -> GaussianSumPlan:
    return GaussianSumPlan(stage=stage, max_norm=1.0, noise_multiplier=1.0)


def _pixel_settings(config: ReleaseConfig) -> DiffusionConfig:
    """Of :func:`pixel_dpdm`: pixels lie in [-1, 1], and nothing but private records teaches the network."""
    learning = {"learning_rate": 3e-3, "ema_decay": 0.99, "max_grad_norm": 0.5}
    changes = {"width": min(32, config.diffusion.width), "sigma_data": 1.0, "P_mean": -0.3, "P_std": 1.2}
    dp_sgd = config.diffusion.dp_sgd.model_copy(update=learning)
    return config.diffusion.model_copy(update=changes | {"noise_multiplicity": 2, "dp_sgd": dp_sgd})


def _pixel_plan(settings: DiffusionConfig) -> DpSgdPlan:
    """An eighth of the release's batch and ten times its steps."""
    return DpSgdPlan(
        stage=DIFFUSION,
        sample_rate=settings.dp_sgd.sample_rate / 8,
        num_steps=10 * settings.dp_sgd.num_steps,
        max_grad_norm=settings.dp_sgd.max_grad_norm,
        noise_multiplier=1.0,
        truncation_probability=1e-12,
    )


def _calibrated(config: ReleaseConfig, *mechanisms: tuple[MechanismPlan, float]) -> list[Any]:
    """The mechanisms with these shares of the budget, together at the release's whole epsilon and delta."""
    plan = calibrate(
        mechanisms,
        target_epsilon=config.epsilon,
        delta=config.delta,
        relation=relation_of(config.latent_mechanism),
        unit_of_privacy="one record",
        num_records=config.num_records,
    )
    return list(plan.mechanisms)
