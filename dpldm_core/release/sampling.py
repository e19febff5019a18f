"""Shards of synthetic images as parquet files, from the public models of a release."""

from __future__ import annotations

import json
from pathlib import Path

from dpldm_core.config import ReleaseConfig
from dpldm_core.data.schema import ImageSchema
from dpldm_core.errors import BundleError
from dpldm_core.release.bundle import CONFIG
from dpldm_core.release.synthetic import write_synthetic_parquet

_EXTRA = ("schema", "latent_noise_std")  # what config.json holds beside the configuration


def write_shard(
    folder: Path,
    shard: int,
    config: ReleaseConfig,
    schema_json: str,
    *,
    decoder: str | Path,
    denoiser: str | Path,
    noise_std: float,
    teacher: str | Path | None = None,
    num_shards: int | None = None,
) -> Path:
    """Draw one shard and write it.

    Args:
        folder: Where to write.
        shard: Number of the shard, from 0.
        config: The resolved configuration; seed and num_samples decide what is drawn.
        schema_json: Public schema.
        decoder: Public model file.
        denoiser: Public model file.
        noise_std: Noise of the latents that the denoiser was trained on.
        teacher: Public model file that names the classes, if the release has one.
        num_shards: Shards in all; the configuration's when not given.

    Returns:
        Path of the parquet file.
    """
    from dpldm_core.training.sampling import sample_images, shard_indices

    schema = ImageSchema.model_validate_json(schema_json)
    indices = shard_indices(config.num_samples, shard, num_shards or config.num_shards)
    judge = Path(teacher) if teacher else None
    images, labels = sample_images(
        Path(decoder), Path(denoiser), config, schema, indices, noise_std=noise_std, teacher=judge
    )
    path = folder / f"shard-{shard:05d}.parquet"
    write_synthetic_parquet(path, images, labels, schema.class_names, schema.labelled)
    return path


def public_config(config: ReleaseConfig, schema: ImageSchema, noise_std: float, dataset: str) -> dict[str, object]:
    """config.json of a bundle: all that is needed to sample again, and no path of the steward's."""
    return config.model_dump(mode="json") | {
        "dataset": dataset,
        "schema": schema.model_dump(mode="json"),
        "latent_noise_std": noise_std,
    }


def read_public_config(bundle: Path) -> tuple[ReleaseConfig, ImageSchema, float]:
    """The inverse of :func:`public_config`, from a bundle.

    Raises:
        BundleError: It is missing or damaged.
    """
    try:
        values = json.loads((bundle / CONFIG).read_text())
        extra = {name: values.pop(name) for name in _EXTRA}
        schema = ImageSchema.model_validate(extra["schema"])
        # Bundles from before decisions 20, 21 and 23 are read as if they had made these choices.
        values["prior"] = {"covariance_clip_norm": 0.65, "mean_share": 0.2} | values["prior"]
        teacher = {"fine_tuned": False, "num_copies": 0, "first_share": 0.0, "from_prior": False}
        values["teacher"] = teacher | values["teacher"]
        return ReleaseConfig.model_validate(values), schema, float(extra["latent_noise_std"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{bundle / CONFIG} cannot be read: {error}") from error
