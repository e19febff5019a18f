"""Evaluation of a release from its files, internal and released: what the Flyte task calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpldm_core.config import EvaluationConfig, ReleaseConfig
from dpldm_core.data.schema import group_table, read_records
from dpldm_core.privacy.calibration import METRICS
from dpldm_core.privacy.plan import HistogramPlan, ReleasePlan
from dpldm_core.release.metrics import metrics_of
from dpldm_core.release.synthetic import read_synthetic
from dpldm_core.rng import SecretKey
from dpldm_core.threads import settle_on_cpu

if TYPE_CHECKING:
    from dpldm_core.models.classifier import SmallCnn

FIRST_SEED = 0


def release_accuracy(
    synthetic: Sequence[str | Path],
    heldout: str | Path,
    config: ReleaseConfig,
    plan: ReleasePlan,
    key_of: Callable[[str], SecretKey],
) -> tuple[str, SmallCnn | None]:
    """The accuracy that ``publish_metrics`` asks for, from noisy counts of right and wrong predictions.

    Args:
        synthetic: Parquet files of synthetic images (public).
        heldout: Held-out records (private); read after ``key_of`` was asked for the stage's key.
        config: The resolved configuration.
        plan: The release's plan.
        key_of: Secret key of a stage.

    Returns:
        (metrics, classifier): metrics.json, public, and the classifier that was trained on the synthetic images with
        the first seed; an empty text and None when nothing was asked for.
    """
    if not config.publish_metrics:
        return "", None
    from dpldm_core.evaluation.downstream import predicted_right
    from dpldm_core.models.classifier import train_classifier
    from dpldm_core.privacy.one_shot import noisy_histogram

    settle_on_cpu()
    mechanism = plan.mechanism(METRICS)
    assert isinstance(mechanism, HistogramPlan)
    key = key_of(METRICS)
    test = read_records(Path(heldout))
    images, labels = read_synthetic([Path(part) for part in synthetic])
    assert labels is not None  # calibration refuses images without labels
    classifier = train_classifier(
        images, labels, num_classes=test.schema.num_classes, num_epochs=config.evaluation.num_epochs, seed=FIRST_SEED
    )
    wrong = ~predicted_right(classifier, test.images, test.labels)
    table = group_table(test, mechanism.max_records_per_unit)
    right_count, wrong_count = noisy_histogram(mechanism, key, wrong.astype(np.int64), table).tolist()
    metrics = metrics_of(METRICS, right_count, wrong_count, mechanism.noise_multiplier, mechanism.max_records_per_unit)
    return metrics.model_dump_json(), classifier


def evaluate_files(
    synthetic: Sequence[str | Path],
    train: str | Path,
    heldout: str | Path,
    folder: Path,
    config: EvaluationConfig,
    *,
    inception_weights: str | None,
    synthetic_classifier: SmallCnn | None = None,
    real_classifier: SmallCnn | None = None,
) -> tuple[Path, dict[str, float]]:
    """Measure a release. The result is private: it was computed from private records.

    Args:
        synthetic: Parquet files of synthetic images (public).
        train: Training records (private).
        heldout: Held-out records (private).
        folder: Where to write.
        config: Epochs, seeds and sizes.
        inception_weights: File with the Inception weights of FID, if there is one.
        synthetic_classifier: From :func:`release_accuracy`, so that it is not trained twice.
        real_classifier: One on all of ``train`` with the first seed, likewise.

    Returns:
        The JSON file with everything, and its plain numbers by dotted name.
    """
    from dpldm_core.evaluation.internal import evaluate_release

    settle_on_cpu()
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
        seeds=list(range(FIRST_SEED, FIRST_SEED + config.num_seeds)),
        inception_weights=inception_weights,
        max_frechet_images=config.max_frechet_images,
        synthetic_classifier=synthetic_classifier,
        real_classifier=real_classifier,
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
