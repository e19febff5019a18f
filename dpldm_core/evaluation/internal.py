"""All internal measurements of a release in one call. Each reads real records: the result is private.

None of it is covered by the epsilon of the release, and none of it may steer one: nothing here is a choice.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from dpldm_core.errors import DataError
from dpldm_core.evaluation.downstream import held_out_accuracy
from dpldm_core.evaluation.features import classifier_extractor, draw_features, inception_extractor
from dpldm_core.evaluation.frechet import FrechetResult, frechet_distances
from dpldm_core.evaluation.memorisation import Memorisation, measure_memorisation
from dpldm_core.evaluation.precision_recall import PrecisionRecall, precision_recall
from dpldm_core.models.classifier import SmallCnn, train_classifier

Records = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class AccuracySummary:
    """Accuracy on held-out real records over seeds. Private.

    Args:
        mean: Over seeds.
        std: Sample standard deviation over seeds; None for one seed.
        max: Over seeds.
        num_seeds: Classifiers trained.
        num_epochs: Epochs of each.
        num_images: Images each was trained on.
        per_class: Mean over seeds, [num_classes]; None: no held-out record of that class.
    """

    mean: float
    std: float | None
    max: float
    num_seeds: int
    num_epochs: int
    num_images: int
    per_class: tuple[float | None, ...]


@dataclass(frozen=True)
class InternalEvaluation:
    """Everything measured about a release. Private.

    Args:
        num_images: Of each side: ``synthetic``, ``training``, ``heldout``.
        train_on_synthetic: Accuracy after training on synthetic images; None without labels or below 2 images a side.
        ceiling: The same classifier trained on the real training records; None likewise.
        frechet: Frechet distances; None with neither labels nor Inception weights, or below 2 images a side.
        precision_recall: On the features of the Frechet distances; None likewise, or below 4 images a side.
        memorisation: Nearest neighbours in pixel space; None below 2 images a side.
    """

    num_images: dict[str, int]
    train_on_synthetic: AccuracySummary | None
    ceiling: AccuracySummary | None
    frechet: FrechetResult | None
    precision_recall: PrecisionRecall | None
    memorisation: Memorisation | None

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values for JSON; the Frechet distances are under the name of their metric."""
        values = asdict(self)
        frechet = values.pop("frechet")
        return {
            "train_on_synthetic_accuracy": values.pop("train_on_synthetic"),
            "ceiling_accuracy": values.pop("ceiling"),
            **({frechet["metric"]: frechet} if frechet else {}),
            **values,
        }


def evaluate_release(
    images: np.ndarray,
    labels: np.ndarray,
    train: Records,
    heldout: Records,
    *,
    num_classes: int,
    num_epochs: int,
    seeds: Sequence[int],
    inception_weights: str | None,
    max_frechet_images: int,
    synthetic_classifier: SmallCnn | None = None,
    real_classifier: SmallCnn | None = None,
) -> InternalEvaluation:
    """Measure utility, fidelity and memorisation of synthetic images against real records.

    Args:
        images: Synthetic uint8 [n, h, w, c], h and w 8 to 64, c 1 or 3. Public.
        labels: int64 [n]; not read when num_classes is 1. Public.
        train: Real training images uint8 [m, h, w, c] and labels int64 [m]. Private.
        heldout: Real held-out images uint8 [k, h, w, c] and labels int64 [k]. Private.
        num_classes: Number of classes; 1: no labels, hence no accuracy.
        num_epochs: Epochs of each classifier.
        seeds: One classifier on synthetic images for each; the first also makes the ceiling and draws the subsets.
        inception_weights: File with weights of the Inception network; None: features of the ceiling classifier.
        max_frechet_images: Images a side in Frechet distances at most.
        synthetic_classifier: The classifier of the first seed on the synthetic images, if it is trained already.
        real_classifier: One on the real training records, likewise; without labels, it gives the features at least.

    Returns:
        All measurements. Private.

    Raises:
        ConfigError: The weights file is missing or unknown; found before anything is trained.
        DataError: Images differ in size.
    """
    sides = {"synthetic": images, "training": train[0], "heldout": heldout[0]}
    sizes = _sizes(sides)
    enough = min(sizes.values()) >= 2  # below, there is no covariance
    extractor = inception_extractor(inception_weights) if inception_weights else None
    if extractor is None and real_classifier is not None:
        extractor = classifier_extractor(real_classifier)
    synthetic = ceiling = frechet = shares = None
    if enough and num_classes > 1:
        measure = partial(_accuracy, heldout=heldout, num_classes=num_classes, num_epochs=num_epochs)
        synthetic, _ = measure((images, labels), seeds=seeds, first=synthetic_classifier)
        ceiling, classifier = measure(train, seeds=seeds[:1], first=real_classifier)
        extractor = extractor or classifier_extractor(classifier)
    if enough and extractor:
        drawn = draw_features(extractor, *sides.values(), max_images=max_frechet_images, seed=seeds[0])
        frechet, shares = frechet_distances(drawn), precision_recall(drawn)
    memorisation = measure_memorisation(*sides.values(), seed=seeds[0]) if enough else None
    return InternalEvaluation(sizes, synthetic, ceiling, frechet, shares, memorisation)


def _sizes(sides: dict[str, np.ndarray]) -> dict[str, int]:
    """Number of images of each side, after a check that all images have one size in pixels."""
    shapes = {side: images.shape[1:] for side, images in sides.items()}
    if len(set(shapes.values())) != 1:
        raise DataError(f"images differ in size [h, w, c]: {shapes}")
    return {side: len(images) for side, images in sides.items()}


def _accuracy(
    records: Records,
    *,
    heldout: Records,
    num_classes: int,
    num_epochs: int,
    seeds: Sequence[int],
    first: SmallCnn | None = None,
) -> tuple[AccuracySummary, SmallCnn]:
    """Accuracy over seeds after training on records, and the classifier of the first seed."""
    train = partial(train_classifier, *records, num_classes=num_classes, num_epochs=num_epochs)
    classifiers = [first or train(seed=seeds[0]), *(train(seed=s) for s in seeds[1:])]
    results = [held_out_accuracy(classifier, *heldout, num_classes=num_classes) for classifier in classifiers]
    values = [result.accuracy for result in results]
    by_class = zip(*(result.per_class for result in results), strict=True)
    summary = AccuracySummary(
        mean=statistics.fmean(values),
        std=statistics.stdev(values) if len(values) > 1 else None,
        max=max(values),
        num_seeds=len(seeds),
        num_epochs=num_epochs,
        num_images=len(records[0]),
        per_class=tuple(None if shares[0] is None else statistics.fmean(shares) for shares in by_class),
    )
    return summary, classifiers[0]
