"""Internal evaluation of a release from its files: what the Flyte task calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpldm_core.config import EvaluationConfig
from dpldm_core.data.schema import read_records
from dpldm_core.release.synthetic import read_synthetic
from dpldm_core.threads import choose_threads


def evaluate_files(
    synthetic: Sequence[str | Path],
    train: str | Path,
    heldout: str | Path,
    folder: Path,
    config: EvaluationConfig,
    *,
    inception_weights: str | None,
) -> tuple[Path, dict[str, float]]:
    """Measure a release. The result is private: it was computed from private records.

    Args:
        synthetic: Parquet files of synthetic images (public).
        train: Training records (private).
        heldout: Held-out records (private).
        folder: Where to write.
        config: Epochs, seeds and sizes.
        inception_weights: File with the Inception weights of FID, if there is one.

    Returns:
        The JSON file with everything, and its plain numbers by dotted name.
    """
    from dpldm_core.evaluation.internal import evaluate_release

    choose_threads()
    images, labels = read_synthetic([Path(part) for part in synthetic])
    labels = np.zeros(len(images), np.int64) if labels is None else labels
    real, test = read_records(Path(train)), read_records(Path(heldout))
    result = evaluate_release(
        images,
        labels,
        (real.images, real.labels),
        (test.images, test.labels),
        num_classes=real.schema.num_classes,
        num_epochs=config.num_epochs,
        seeds=list(range(config.num_seeds)),
        inception_weights=inception_weights,
        max_frechet_images=config.max_frechet_images,
    ).to_dict()
    path = folder / "evaluation.json"
    path.write_text(json.dumps(result, indent=2))
    return path, dict(flatten(result))


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Numbers of nested mappings by dotted name; lists and texts are left out.

    >>> flatten({"a": {"b": 1, "c": [2]}, "d": "x"})
    [('a.b', 1.0)]
    """
    pairs = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            pairs.append((prefix + name, float(value)))
    return pairs
