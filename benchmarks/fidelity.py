"""Frechet distance, precision and recall of images that benchmarks/quality.py kept: one result file per release.

python benchmarks/quality.py --dataset mnist --epsilon 1 --preset cpu --data-root FOLDER --keep IMAGES
python benchmarks/fidelity.py mnist-eps1-cpu-dp_sgd --images IMAGES --data-root FOLDER
python benchmarks/fidelity.py mnist-eps1-cpu-dp_sgd --images IMAGES --data-root FOLDER --inception-weights FILE \
    --num-images 1000

On the features of a classifier of the real training images, or on those of Inception: with the file of all layers the
metric is ``fid``, with that of the layers up to Mixed_6e ``fd_inception768``. One core takes some tenths of a second an
image there. All three move with the number of images, so compare rows of equal numbers, and with what real test images
reach. Computed from real data, so internal; public data sets protect nobody.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _machine import describe_machine
from quality import RESULTS as QUALITY

from dpldm_core.data.schema import Records
from dpldm_core.data.sources import load_dataset
from dpldm_core.evaluation.features import DrawnFeatures, FeatureExtractor, classifier_extractor, inception_extractor
from dpldm_core.evaluation.frechet import frechet_distances
from dpldm_core.evaluation.precision_recall import precision_recall
from dpldm_core.models.classifier import train_classifier
from dpldm_core.release.bundle import digest
from dpldm_core.release.figures import samples_grid_png
from dpldm_core.release.measuring import FIRST_SEED
from dpldm_core.release.synthetic import read_synthetic
from dpldm_core.threads import settle_on_cpu

RESULTS = Path(__file__).parent / "results" / "fidelity"


def measure(
    files: dict[str, Path], real: tuple[np.ndarray, np.ndarray], extractor: FeatureExtractor, *, num_images: int
) -> dict[str, Any]:
    """Every set of images beside real training images, and what real test images reach.

    Args:
        files: Parquet file of each set of synthetic images by name.
        real: Real training and test images, uint8 [n, h, w, c].
        extractor: The features.
        num_images: Images a side.

    Returns:
        The metric, the number of images a side, the floor, precision and recall of ``real_test``, and distance,
        precision and recall of each set by its name.

    Raises:
        SystemExit: A side holds fewer images than asked for.
    """
    train, test = (_features(extractor, images, num_images) for images in real)
    result: dict[str, Any] = {"metric": extractor.metric, "num_images": num_images}
    for name, path in files.items():
        synthetic = _features(extractor, read_synthetic([path])[0], num_images)
        drawn = DrawnFeatures(extractor.metric, synthetic, train, test)
        distances, shares = frechet_distances(drawn), precision_recall(drawn)
        assert shares is not None  # None with a handful of images
        result["floor"] = distances.floor
        result["real_test"] = {"precision": shares.heldout_precision, "recall": shares.heldout_recall}
        result[name] = {"distance": distances.distance, "precision": shares.precision, "recall": shares.recall}
        print(name, result[name], flush=True)
    return result


def _features(extractor: FeatureExtractor, images: np.ndarray, num_images: int) -> np.ndarray:
    """Of images chosen by a fixed permutation."""
    if not 10 <= num_images <= len(images):
        raise SystemExit(f"--num-images {num_images}: from 10 to {len(images)}, the images of the smallest side")
    return extractor(images[np.random.default_rng(0).permutation(len(images))[:num_images]])


def kept_files(release: dict, folder: Path) -> dict[str, Path]:
    """The images that a run kept, by name.

    Args:
        release: Its result file.
        folder: What it kept.

    Raises:
        SystemExit: There are none, or they are not those that this result was measured on.
    """
    if not (files := {path.stem: path for path in sorted(folder.glob("*.parquet"))}):
        raise SystemExit(f"--images: {folder} holds no images; run benchmarks/quality.py --keep {folder.parent} first")
    known = release.get("images_sha256", {})  # results of before there was such a field cannot tell
    for name, path in files.items():
        if known and digest(path)["sha256"] != known.get(name):
            raise SystemExit(f"--images: {path} is not what the result was measured on; keep the images of that run")
    return files


def kept_release(name: str, *, images: str, data_root: str | None) -> tuple[dict, dict[str, Path], Records, Records]:
    """A release that was kept, and the real data beside it.

    Args:
        name: Of its result file, without .json.
        images: What ``quality.py --keep`` was given.
        data_root: Folder with MNIST and Fashion-MNIST.

    Returns:
        The result file, files of images by name, and real training and test records.

    Raises:
        SystemExit: Nothing was kept, or there are no test images.
    """
    release = json.loads((QUALITY / f"{name}.json").read_text())
    config = release["config"]
    files = kept_files(release, Path(images) / name)
    loaded = load_dataset(config["dataset"], data_root=data_root, cache_dir=None, num_classes=config["num_classes"])
    if loaded.test is None:
        raise SystemExit(f"{config['dataset']} has no test images to compare with")
    return release, files, loaded.train, loaded.test


def main() -> None:
    """Measure kept releases and write a result file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="result files of benchmarks/quality.py, without .json")
    parser.add_argument("--images", required=True, help="folder that quality.py --keep was given")
    parser.add_argument("--inception-weights", default="", help="file with Inception weights; else a classifier's")
    parser.add_argument("--data-root", help="folder with MNIST and Fashion-MNIST")
    parser.add_argument("--num-images", type=int, default=10_000, help="images a side")
    parser.add_argument("--pictures", default="", help="folder for the first images of each class of each release")
    arguments = parser.parse_args()
    settle_on_cpu()
    extractors: dict[str, FeatureExtractor] = {}
    for name in arguments.names:
        release, files, train, test = kept_release(name, images=arguments.images, data_root=arguments.data_root)
        config = release["config"]
        if config["dataset"] in extractors:
            pass
        elif arguments.inception_weights:
            extractors[config["dataset"]] = inception_extractor(arguments.inception_weights)
        else:
            settings = {"num_classes": train.schema.num_classes, "num_epochs": config["evaluation"]["num_epochs"]}
            judge = train_classifier(train.images, train.labels, seed=FIRST_SEED, **settings)
            extractors[config["dataset"]] = classifier_extractor(judge)
        extractor = extractors[config["dataset"]]
        if arguments.pictures:
            images, labels = read_synthetic(files["release"], per_class=10)
            picture = Path(arguments.pictures) / f"{name}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(samples_grid_png(images, labels, class_names=train.schema.class_names))
        found = measure(files, (train.images, test.images), extractor, num_images=arguments.num_images)
        kept = {key: release[key] for key in ("dataset", "preset", "config", "images_sha256")}
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{name}-{extractor.metric}.json"
        path.write_text(json.dumps(kept | found | {"machine": describe_machine()}, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
