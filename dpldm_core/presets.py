"""Presets: named sets of public constants, and how a user's inputs become one resolved configuration.

A preset depends on public facts only: the declared or well-known number of records, never the counted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import PositiveInt, TypeAdapter, ValidationError

from dpldm_core.config import LatentMechanism, ReleaseConfig
from dpldm_core.errors import ConfigError, unknown_name
from dpldm_core.overrides import explain, merge

# Assumed when own data comes without a declared num_records: it moves speed and quality, never the guarantee.
REFERENCE_RECORDS = 4_000
MECHANISMS: tuple[str, ...] = get_args(LatentMechanism)
_INPUTS = {"dataset", "epsilon", "delta", "preset", "latent_mechanism", "num_samples"}  # checked alone
_MOST = 0.5  # largest sample rate
_FEW = 5_000  # records up to which preset quick takes half as long (docs/research.md)
_TEACHABLE = 20_000.0  # records times epsilon; with less, a teacher names worse than the prior draws (decision 18)
_PLENTY = 300_000.0  # records times epsilon from which preset long can afford more (decisions 20 and 24)


def _dp_sgd(batch: int, num_records: int, **values: float) -> dict[str, Any]:
    """A DP-SGD block whose rate gives about ``batch`` units a step when there are ``num_records`` of them."""
    return {"sample_rate": min(_MOST, batch / num_records), **values}


def _batch(batch: int, num_records: int) -> int:
    """What such a rate really gives."""
    return max(1, round(min(_MOST * num_records, batch)))


def _quick(num_records: int) -> dict[str, Any]:
    """The embedded data in about two minutes on two cores; more records take longer, and teach more."""
    values: dict[str, Any] = {
        "max_records_per_group": 4,
        "autoencoder": {
            "frequencies": 14,
            "refiner_channels": 32,
            "procedural_steps": 300,
            "procedural_batch_size": 128,
            "latent_noise": 0.2,
            "dp_sgd": _dp_sgd(
                256, num_records, num_steps=40, max_grad_norm=0.1, learning_rate=2e-3, ema_decay=0.9, budget_share=0.05
            ),
        },
        "prior": {
            "clip_norm": 0.9,
            "covariance_clip_norm": 0.65,
            "mean_share": 0.2,
            "variance_floor": 0.01,
            "class_weight": 0.2,
            "budget_share": 0.5,
        },
        "diffusion": {
            "width": 32,
            "depth": 4,
            "procedural_steps": 300,
            "procedural_batch_size": 256,
            "sigma_data": 0.5,
            "P_mean": 0.2,
            "P_std": 1.0,
            "noise_multiplicity": 1,
            "dp_sgd": _dp_sgd(
                1024,
                num_records,
                num_steps=100,
                max_grad_norm=0.5,
                learning_rate=4e-3,
                ema_decay=0.95,
                budget_share=0.3,
            ),
        },
        "teacher": {
            "num_synthetic": 10_000,
            "num_epochs": 3,
            "deformation": 0.0,
            "num_views": 1,
            "num_copies": 0,
            "fine_tuned": False,
            "num_features": 256,
            "ridge": 1.0,
            "expected_batch_size": _batch(2048, num_records),
            "first_share": 0.0,
            "from_prior": True,
            "dp_sgd": _dp_sgd(
                2048, num_records, num_steps=60, max_grad_norm=0.5, learning_rate=60.0, ema_decay=0.9, budget_share=0.15
            ),
        },
        "noised_latents": {"autoencoder_share": 0.1, "label_share": 0.3, "num_steps": 200, "batch_size": 512},
        "sampling": {
            "num_samples": 10_000,
            "num_steps": 6,
            "sigma_min": 0.12,
            "sigma_max": 2.5,
            "eta": 3.0,
            "S_noise": 1.0,
            "guidance": 8.0,
            "guided_below": 2.0,
            "sharpness": 0.4,
            "sharpened_below": 0.6,
            "num_shards": 2,
        },
        "evaluation": {"num_epochs": 4, "num_seeds": 1, "max_frechet_images": 5_000, "metrics_share": 0.01},
        "performance": {
            "physical_batch_size": 256,
            "clip_backend": "book_keeping",
            "matmul_precision": "float32",
            "checkpoint_every": 50,
        },
    }
    if num_records <= _FEW:
        values["autoencoder"]["procedural_steps"] = 150
        values["diffusion"]["procedural_steps"] = 250
        values["diffusion"]["dp_sgd"] |= _dp_sgd(512, num_records, num_steps=60, learning_rate=6e-3)
        values["teacher"]["num_synthetic"] = 6_000
    return values


def _leave_out_teacher(values: dict[str, Any]) -> None:
    """No private record teaches a teacher; its share, and a third of the denoiser's, go to the prior, which names."""
    values["prior"]["budget_share"] = 0.75
    values["diffusion"]["dp_sgd"]["budget_share"] = 0.2
    values["teacher"]["dp_sgd"]["budget_share"] = 0.0


def _spend_plenty(values: dict[str, Any]) -> None:
    """Finer latents, and two teachers with many weights, taught at length; half of the prior's budget pays."""
    values["autoencoder"]["frequencies"] = 20
    values["prior"]["budget_share"] = 0.25
    values["diffusion"]["dp_sgd"] |= {"num_steps": 400, "ema_decay": 0.98, "budget_share": 0.4}
    values["teacher"] |= {"num_synthetic": 180_000, "num_epochs": 6, "deformation": 0.5, "num_copies": 2}
    values["teacher"] |= {"fine_tuned": True, "first_share": 0.1}
    values["teacher"]["dp_sgd"] |= {"learning_rate": 3e-3, "budget_share": 0.2}


def _cpu(num_records: int) -> dict[str, Any]:
    """60,000 images in half an hour on two cores."""
    values = _quick(num_records)
    values["autoencoder"] |= {
        "procedural_steps": 500,
        "dp_sgd": _dp_sgd(
            1024, num_records, num_steps=150, max_grad_norm=0.1, learning_rate=2e-3, ema_decay=0.9, budget_share=0.05
        ),
    }
    values["diffusion"] |= {
        "width": 96,
        "procedural_steps": 1_000,
        "dp_sgd": _dp_sgd(
            2048, num_records, num_steps=200, max_grad_norm=0.5, learning_rate=4e-3, ema_decay=0.97, budget_share=0.3
        ),
    }
    values["teacher"] |= {
        "num_synthetic": 20_000,
        "num_epochs": 9,
        "deformation": 1.0,
        "num_views": 5,
        "expected_batch_size": _batch(4096, num_records),
        "dp_sgd": _dp_sgd(
            4096, num_records, num_steps=100, max_grad_norm=0.5, learning_rate=30.0, ema_decay=0.9, budget_share=0.15
        ),
    }
    values["sampling"] |= {"num_samples": 60_000, "num_shards": 4, "S_noise": 1.1}
    values["evaluation"] = {"num_epochs": 4, "num_seeds": 3, "max_frechet_images": 10_000, "metrics_share": 0.01}
    return values


def _long(num_records: int) -> dict[str, Any]:
    """More images than cpu, better named, in twice the time; :func:`_spend_plenty` adds to it."""
    values = _cpu(num_records)
    values["autoencoder"] |= {"frequencies": 16, "procedural_steps": 3_000}
    values["diffusion"]["procedural_steps"] = 3_000
    values["teacher"] |= {"num_synthetic": 60_000, "num_epochs": 6}
    values["sampling"] |= {"num_samples": 300_000, "num_steps": 12, "eta": 6.0, "sharpness": 0.2}
    return values


def _gpu(num_records: int) -> dict[str, Any]:
    """A wider denoiser with more steps, for one GPU; not measured."""
    values = _cpu(num_records)
    values["diffusion"] |= {
        "width": 128,
        "depth": 6,
        "procedural_steps": 5_000,
        "noise_multiplicity": 4,
        "dp_sgd": _dp_sgd(
            4096, num_records, num_steps=1_500, max_grad_norm=0.5, learning_rate=2e-3, ema_decay=0.99, budget_share=0.3
        ),
    }
    values["performance"] |= {"physical_batch_size": 1024}
    return values


def _smoke(num_records: int) -> dict[str, Any]:
    """Two steps of everything: for tests of the plumbing."""
    values = _quick(num_records)
    values["autoencoder"] |= {
        "frequencies": 4,
        "refiner_channels": 4,
        "procedural_steps": 3,
        "procedural_batch_size": 8,
    }
    values["autoencoder"]["dp_sgd"] |= {"num_steps": 2}
    values["diffusion"] |= {"width": 8, "depth": 1, "procedural_steps": 3, "noise_multiplicity": 2}
    values["diffusion"] |= {"procedural_batch_size": 8}
    values["diffusion"]["dp_sgd"] |= {"num_steps": 2}
    values["teacher"] |= {"num_synthetic": 64, "num_epochs": 1, "num_features": 8}
    values["teacher"]["dp_sgd"] |= {"num_steps": 2}
    values["noised_latents"] |= {"num_steps": 2, "batch_size": 32}
    values["sampling"] |= {"num_samples": 64, "num_steps": 3}
    values["evaluation"] = {"num_epochs": 1, "num_seeds": 1, "max_frechet_images": 64, "metrics_share": 0.01}
    return values


PRESETS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "quick": _quick,
    "cpu": _cpu,
    "long": _long,
    "gpu": _gpu,
    "smoke": _smoke,
}


def preset_values(preset: str, num_records: int, epsilon: float) -> dict[str, Any]:
    """Values of a preset for a public number of records and an epsilon.

    Args:
        preset: Name in ``PRESETS``.
        num_records: Declared, well-known or assumed.
        epsilon: Asked for the whole release.

    Returns:
        Fields of :class:`ReleaseConfig`, but for the workflow's inputs.
    """
    values = PRESETS[preset](num_records)
    if preset != "smoke" and num_records * epsilon < _TEACHABLE:
        _leave_out_teacher(values)
    if preset == "long" and num_records * epsilon >= _PLENTY:
        _spend_plenty(values)
    return values


def resolve_config(
    *,
    dataset: str,
    epsilon: float,
    delta: float,
    preset: str,
    num_samples: int,
    latent_mechanism: str,
    public_num_records: int | None,
    publish_metrics: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> ReleaseConfig:
    """One frozen configuration from the workflow's inputs, a preset and a file of overrides.

    Args:
        dataset: Built-in name, path or URI; only recorded here.
        epsilon: Asked for the whole release, > 0.
        delta: Asked for the whole release, in (0, 1) and below 1 / (public number of records).
        preset: Name in ``PRESETS``.
        num_samples: 0 for the preset's own.
        latent_mechanism: ``dp_sgd`` or ``noised_latents``.
        public_num_records: Well-known number of training records of a built-in set; None for own data.
        publish_metrics: Whether the accuracy on held-out private records is released too, as part of epsilon.
        overrides: Single fields, nested like :class:`ReleaseConfig`.

    Returns:
        The configuration.

    Raises:
        ConfigError: A value out of range or an unknown name, with the nearest valid one.
    """
    overrides = dict(overrides or {})
    if taken := sorted(_INPUTS & set(overrides)):
        raise ConfigError(f"config: {', '.join(taken)} cannot stand in the file. Give --{' --'.join(taken)} instead")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"epsilon={epsilon} must be a finite number above 0; 1 is strong, 10 is common")
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta} must lie in (0, 1), well below 1 / (number of records); 1e-5 suits 60,000")
    if num_samples < 0:
        raise ConfigError(f"num_samples={num_samples} must be 0 (the preset's own) or more")
    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    if latent_mechanism not in MECHANISMS:
        raise unknown_name("latent_mechanism", latent_mechanism, MECHANISMS)
    num_records = _declared_records(overrides.get("num_records")) or public_num_records
    if num_records:
        check_delta(delta, num_records)
    assumed = num_records or REFERENCE_RECORDS
    values = preset_values(preset, assumed, epsilon)
    if latent_mechanism == "noised_latents":  # noise grows with the latent's norm: keep few coordinates
        values["autoencoder"]["frequencies"] = min(6, values["autoencoder"]["frequencies"])
    values |= {
        "dataset": dataset,
        "epsilon": epsilon,
        "delta": delta,
        "preset": preset,
        "latent_mechanism": latent_mechanism,
        "num_samples": num_samples or values["sampling"]["num_samples"],
        "publish_metrics": publish_metrics,
        "num_records": num_records,
        "seed": 0,
    }
    try:
        return ReleaseConfig.model_validate(merge(values, overrides))
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def _declared_records(value: Any) -> int | None:
    """The number that a file of overrides declares, however it is spelled there (60000, 6e4, "60000")."""
    try:
        return TypeAdapter(PositiveInt | None).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"num_records={value!r}: {error.errors()[0]['msg']}") from None


def check_delta(delta: float, num_records: int) -> None:
    """Refuse a delta that would allow to publish somebody's record outright.

    Raises:
        ConfigError: delta >= 1 / num_records.
    """
    if delta >= 1.0 / num_records:
        raise ConfigError(
            f"delta={delta} must be below 1 / (number of records) = {1.0 / num_records:.2g}: a larger one would allow "
            f"a mechanism that publishes one person's record. Use {0.1 / num_records:.0e} or less"
        )
