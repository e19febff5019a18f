"""Synthetic images from the public models of a release: post-processing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dpldm_core.config import ReleaseConfig
from dpldm_core.data.schema import ImageSchema
from dpldm_core.diffusion.guidance import guide, image_strengths, sharpen
from dpldm_core.diffusion.sampler import dpm_sampler, sample_noise
from dpldm_core.diffusion.schedule import sampling_sigmas
from dpldm_core.models.autoencoder import Autoencoder, unwhitening
from dpldm_core.models.denoiser import Denoiser
from dpldm_core.threads import map_on_cores, multiply_in_bfloat16, settle_on_cpu
from dpldm_core.training.building import new_autoencoder, new_denoiser, new_teacher, to_uint8
from dpldm_core.training.state import load_model


def sample_images(
    decoder: Path,
    denoiser: Path,
    config: ReleaseConfig,
    schema: ImageSchema,
    indices: Sequence[int],
    *,
    noise_std: float = 0.0,
    teacher: Path | None = None,
    batch_size: int = 1000,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw synthetic images: the prior decides what the largest noise level leaves open, the denoiser all below it.

    Sample i depends on (seed, i) alone, whatever shard or batch it is drawn in, up to rounding: other processors round
    otherwise, those with bfloat16 by a gray level or two.

    Images are drawn for every class alike, whatever the proportions of the private data.

    Args:
        decoder: Public model file.
        denoiser: Public model file.
        config: The resolved configuration.
        schema: Public schema.
        indices: Which samples, from 0.
        noise_std: Noise of the latents that the denoiser was trained on.
        teacher: Public model file that names the class of each image; None: the class that it was drawn for.
        batch_size: Samples at a time.

    Returns:
        Images uint8 [n, h, w, c] and labels int64 [n].
    """
    autoencoder, model, device = _load(decoder, denoiser, config, schema, noise_std)
    scale = model.sigma_data / config.diffusion.sigma_data
    settings = config.sampling
    sigmas = scale * sampling_sigmas(settings.num_steps, sigma_min=settings.sigma_min, sigma_max=settings.sigma_max)
    back = unwhitening(autoencoder.encoder.transform.latent_shape).to(device)  # whitened before they were released

    @torch.no_grad()
    def draw(chunk: Sequence[int]) -> np.ndarray:
        classes = torch.tensor(chunk, device=device) % schema.num_classes
        noise = sample_noise(config.seed, chunk, num_draws=settings.num_steps + 3, dim=model.dim).to(device)
        prior_draws = model.prior.sample(noise[-1], classes, noise_std**2)
        denoiser_fn = guide(
            model,
            partial(model.prior.posterior, added_variance=noise_std**2),
            image_strengths(settings.guidance, torch.special.ndtr(noise[-3, :, 0])),
            highest=scale * settings.guided_below,
        )
        rough = partial(model.prior.denoise, added_variance=noise_std**2)
        denoiser_fn = sharpen(denoiser_fn, rough, settings.sharpness, highest=scale * settings.sharpened_below)
        latents = dpm_sampler(
            denoiser_fn,
            prior_draws,
            noise[:-3],
            classes,
            sigmas=sigmas,
            eta=settings.eta,
            S_noise=settings.S_noise,
        )
        if noise_std > 0:
            latents = model.prior.posterior_sample(latents, noise_std, classes, noise[-2]) @ back.T
        return to_uint8(autoencoder.decoder(latents))

    drawn = _in_chunks(draw, indices, batch_size)
    if teacher is None:
        return drawn, np.array(indices, dtype=np.int64) % schema.num_classes
    judge = new_teacher(config, schema)
    load_model(judge, teacher)
    return drawn, judge.classify(drawn, model.prior.shares, num_views=config.teacher.num_views)


def sample_prior(
    decoder: Path,
    denoiser: Path,
    config: ReleaseConfig,
    schema: ImageSchema,
    indices: Sequence[int],
    *,
    batch_size: int = 1000,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the prior alone, decoded: blurred images, each of the class that it was drawn for.

    Args:
        decoder: Public model file.
        denoiser: Public model file, which holds the prior.
        config: The resolved configuration.
        schema: Public schema.
        indices: Which samples, from 0.
        batch_size: Samples at a time.

    Returns:
        Images uint8 [n, h, w, c] and labels int64 [n].
    """
    autoencoder, model, device = _load(decoder, denoiser, config, schema, 0.0)

    @torch.no_grad()
    def draw(chunk: Sequence[int]) -> np.ndarray:
        classes = torch.tensor(chunk, device=device) % schema.num_classes
        noise = sample_noise(config.seed, chunk, num_draws=1, dim=model.dim).to(device)
        return to_uint8(autoencoder.decoder(model.prior.sample(noise[0], classes)))

    return _in_chunks(draw, indices, batch_size), np.array(indices, dtype=np.int64) % schema.num_classes


def _load(
    decoder: Path, denoiser: Path, config: ReleaseConfig, schema: ImageSchema, noise_std: float
) -> tuple[Autoencoder, Denoiser, str]:
    """The public models of a release, ready to sample, and where."""
    settle_on_cpu()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder, model = new_autoencoder(config, schema), new_denoiser(config, schema, noise_std)
    load_model(autoencoder.decoder, decoder)
    load_model(model, denoiser)
    autoencoder.decoder.eval().to(device)
    model.eval().to(device)
    for network in (model.network, autoencoder.decoder.refiner):
        multiply_in_bfloat16(network)
    return autoencoder, model, device


def _in_chunks(draw: Callable[[Sequence[int]], np.ndarray], indices: Sequence[int], batch_size: int) -> np.ndarray:
    """What ``draw`` makes of all indices, some at a time: on a CPU a chunk for each core."""
    chunks = [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
    return np.concatenate([draw(c) for c in chunks] if torch.cuda.is_available() else map_on_cores(draw, chunks))


def shard_indices(num_samples: int, shard: int, num_shards: int) -> range:
    """The samples of one shard: consecutive, sizes as equal as can be.

    >>> [list(shard_indices(5, s, 2)) for s in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(shard * num_samples // num_shards, (shard + 1) * num_samples // num_shards)
