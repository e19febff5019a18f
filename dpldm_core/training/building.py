"""From a configuration to untrained models, and between image files and tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dpldm_core.config import ReleaseConfig
from dpldm_core.data.schema import ImageSchema
from dpldm_core.models.autoencoder import Autoencoder
from dpldm_core.models.denoiser import Denoiser
from dpldm_core.models.teacher import LabelTeacher
from dpldm_core.training.autoencoder import build_autoencoder
from dpldm_core.training.diffusion import build_denoiser
from dpldm_core.training.teacher import build_teacher


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [n, h, w, c] to float32 [n, c, h, w] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def to_uint8(images: Tensor) -> np.ndarray:
    """float32 [n, c, h, w] in [-1, 1] to uint8 [n, h, w, c]; the inverse of :func:`to_tensor`."""
    return images.clamp(-1, 1).add(1.0).mul(127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def new_autoencoder(config: ReleaseConfig, schema: ImageSchema) -> Autoencoder:
    """The untrained autoencoder of a release."""
    return build_autoencoder(
        config.autoencoder, channels=schema.channels, height=schema.height, width=schema.width, seed=config.seed
    )


def new_denoiser(config: ReleaseConfig, schema: ImageSchema, noise_std: float) -> Denoiser:
    """The untrained denoiser of a release."""
    return build_denoiser(
        config.diffusion,
        latent_shape=new_autoencoder(config, schema).encoder.transform.latent_shape,
        num_classes=schema.num_classes,
        seed=config.seed,
        noise_std=noise_std,
    )


def new_teacher(config: ReleaseConfig, schema: ImageSchema) -> LabelTeacher:
    """The untrained label teacher of a release."""
    shape = schema.height, schema.width, schema.channels
    return build_teacher(config.teacher, shape, schema.num_classes)
