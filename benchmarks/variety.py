"""One preset on other kinds of data: python benchmarks/variety.py --data-root FOLDER [--json].

Fewer and more records, smaller and larger epsilons, classes of very different size, images without labels, colour at
32x32 pixels, and a data set that nothing was tuned on (the 1,797 digits of 8x8 pixels that scikit-learn carries). Every
point is a whole release through the real mechanisms, measured as in benchmarks/quality.py beside the one-shot prior.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from quality import add_arguments, release_and_measure

from dpldm_core.data.sources import load_dataset
from dpldm_core.models.classifier import train_classifier
from dpldm_core.release.measuring import FIRST_SEED

RESULT = Path(__file__).parent / "results" / "variety.json"
_KEPT = 0.6  # share of the class before that a class keeps: the last of ten is a hundredth of the first
_HELD_OUT = 360  # of scikit-learn's digits
_EPOCHS = {"digits8x8": 20}  # of the classifiers, where the usual 4 are too few for so few real images


@dataclass(frozen=True)
class Point:
    """One release.

    Args:
        kind: ``plain``, ``imbalanced``, ``unlabelled``, ``rgb32`` or ``digits8x8``.
        num_records: Training records that the data set is cut to, before ``imbalanced`` drops some.
        epsilon: Of the release.
    """

    kind: str
    num_records: int
    epsilon: float

    @property
    def name(self) -> str:
        """Key in the result file."""
        return f"{self.kind}, N={self.num_records}, epsilon={self.epsilon:g}"


POINTS = [
    Point("plain", 60_000, 0.2),
    *(Point(kind, 10_000, 10.0) for kind in ("rgb32", "imbalanced", "unlabelled")),
    *(Point("digits8x8", 1_797 - _HELD_OUT, epsilon) for epsilon in (10.0, 3.0)),
    *(Point("plain", num_records, 10.0) for num_records in (1_000, 10_000)),
    Point("plain", 10_000, 1.0),
    *(Point("plain", 60_000, epsilon) for epsilon in (1.0, 10.0, 3.0)),
]

Arrays = dict[str, np.ndarray]


def arrays_of(point: Point, dataset: str, data_root: str | None) -> tuple[Arrays, np.ndarray]:
    """Training and test images and labels of a point, as an .npz holds them, and the true training labels."""
    generator = np.random.default_rng(0)
    if point.kind == "digits8x8":
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = generator.permutation(len(digits.images))
        images, labels = (digits.images[order] * (255 / 16)).round().astype(np.uint8), digits.target[order]
        parts = (images[_HELD_OUT:], labels[_HELD_OUT:], images[:_HELD_OUT], labels[:_HELD_OUT])
    else:
        loaded = load_dataset(dataset, data_root=data_root, cache_dir=None, num_classes=None)
        assert loaded.test is not None
        rows = generator.permutation(len(loaded.train.images))[: point.num_records]
        if point.kind == "imbalanced":
            rows = rows[generator.random(len(rows)) < _KEPT ** loaded.train.labels[rows]]
        chosen = loaded.train.take(rows)
        parts = (chosen.images, chosen.labels, loaded.test.images, loaded.test.labels)
    images, labels, test_images, test_labels = parts
    if point.kind == "rgb32":
        images, test_images = _coloured(images, generator), _coloured(test_images, generator)
    found = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
    if point.kind == "unlabelled":
        del found["labels"], found["test_labels"]
    return found, labels


def _coloured(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Gray [n, 28, 28, 1] to RGB [n, 32, 32, 3]: each image between two colours of its own."""
    share = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))).astype(np.float32) / 255
    dark = generator.uniform(0, 100, (len(images), 1, 1, 3)).astype(np.float32)
    light = generator.uniform(130, 255, (len(images), 1, 1, 3)).astype(np.float32)
    return (dark + share * (light - dark)).round().astype(np.uint8)


def measure(point: Point, arguments: argparse.Namespace) -> dict:
    """The release of a point and its measurement."""
    arrays, labels = arrays_of(point, arguments.dataset, arguments.data_root)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        np.savez(work / "data.npz", **arrays)  # type: ignore[arg-type]
        epochs = _EPOCHS.get(point.kind, 4)
        overrides = {"num_records": point.num_records, "evaluation": {"num_epochs": epochs}}
        (work / "config.json").write_text(json.dumps(overrides))
        changed = {"dataset": str(work / "data.npz"), "config": str(work / "config.json"), "epsilon": point.epsilon}
        own = argparse.Namespace(**vars(arguments) | changed)
        images = arrays["images"] if arrays["images"].ndim == 4 else arrays["images"][..., None]
        judge = train_classifier(images, labels, num_classes=10, num_epochs=epochs, seed=FIRST_SEED)
        return release_and_measure(own, work, judge)


def main() -> None:
    """Measure the points and write the result file after each; with --points, into the file that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(dataset="fashion_mnist", seeds=1)
    names = [point.name for point in POINTS]
    parser.add_argument("--points", nargs="+", choices=names, default=names, metavar="POINT", help="default: all")
    parser.add_argument("--json", action="store_true", help="print the result last")
    arguments = parser.parse_args()
    result = {"dataset": arguments.dataset, "preset": arguments.preset, "points": {}}
    if RESULT.exists() and set(arguments.points) != set(names):
        result = json.loads(RESULT.read_text())
    for point in (point for point in POINTS if point.name in arguments.points):
        print(point.name, flush=True)
        found = measure(point, arguments)
        kept = ("epsilon", "delta", "measured", "baselines", "release_minutes", "stages", "config", "machine")
        result["points"][point.name] = vars(point) | {key: found[key] for key in kept}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
