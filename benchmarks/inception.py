"""Frechet distances on Inception features of images that benchmarks/quality.py kept: one result file per release.

python benchmarks/quality.py --dataset mnist --epsilon 1 --preset cpu --data-root FOLDER --keep IMAGES
python benchmarks/inception.py mnist-eps1-cpu-dp_sgd --images IMAGES --inception-weights FILE --data-root FOLDER

With the file of all layers the metric is ``fid``, with that of the layers up to Mixed_6e ``fd_inception768``. One core
takes some tenths of a second an image, hence few images by default: distances fall with their number, so compare rows
of equal numbers, and with the floor. Computed from real data, so internal; public data sets protect nobody.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _machine import describe_machine
from quality import RESULTS as QUALITY

from dpldm_core.data.ingest import ingest_dataset
from dpldm_core.data.schema import read_records
from dpldm_core.evaluation.features import FeatureExtractor, inception_extractor
from dpldm_core.evaluation.frechet import frechet_distance
from dpldm_core.release.synthetic import read_synthetic

RESULTS = Path(__file__).parent / "results" / "inception"


def real_features(
    dataset: str, extractor: FeatureExtractor, *, data_root: str | None, num_images: int
) -> dict[str, np.ndarray]:
    """Features [n, d] of real images, of ``train`` and of ``test``.

    Args:
        dataset: Name of the real data.
        extractor: The network.
        data_root: Folder with the real data.
        num_images: Images of each at most.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = ingest_dataset(
            dataset,
            Path(folder),
            split_key=b"benchmark",
            data_root=data_root,
            cache_dir=folder,
            num_classes=None,
            split_by="content",
        )
        parts = {name: read_records(path).images for name, path in zip(("train", "test"), paths, strict=True)}
    return {name: _features(extractor, images, num_images) for name, images in parts.items()}


def measure(
    kept: Path, real: dict[str, np.ndarray], extractor: FeatureExtractor, *, num_images: int
) -> dict[str, float | str | int]:
    """Distances of every kept set of images to real training images, and of those to the test images.

    Args:
        kept: Folder of parquet files of synthetic images.
        real: From :func:`real_features`, with the same number of images.
        extractor: The network.
        num_images: Images a side.

    Returns:
        The metric, the number of images a side, the floor, and a distance for each file by its name.

    Raises:
        SystemExit: There is no file, or one holds fewer images than asked for.
    """
    result = {"metric": extractor.metric, "num_images": num_images}
    result["floor"] = frechet_distance(real["test"], real["train"])
    if not (files := sorted(kept.glob("*.parquet"))):
        raise SystemExit(f"--images: {kept} holds no images; run benchmarks/quality.py --keep {kept.parent} first")
    for path in files:
        images = read_synthetic([path])[0]
        result[path.stem] = frechet_distance(_features(extractor, images, num_images), real["train"])
        print(kept.name, path.stem, result[path.stem], flush=True)
    return result


def _features(extractor: FeatureExtractor, images: np.ndarray, num_images: int) -> np.ndarray:
    """Of images chosen by a fixed permutation."""
    if len(images) < num_images:
        raise SystemExit(f"--num-images {num_images}: there are only {len(images)} images on one side; ask for fewer")
    return extractor(images[np.random.default_rng(0).permutation(len(images))[:num_images]])


def main() -> None:
    """Measure kept releases and write a result file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="result files of benchmarks/quality.py, without .json")
    parser.add_argument("--images", required=True, help="folder that quality.py --keep was given")
    parser.add_argument("--inception-weights", required=True, help="file with Inception weights")
    parser.add_argument("--data-root", help="folder with MNIST and Fashion-MNIST")
    parser.add_argument("--num-images", type=int, default=2_000, help="images a side")
    arguments = parser.parse_args()
    extractor, real = inception_extractor(arguments.inception_weights), {}
    for name in arguments.names:
        release = json.loads((QUALITY / f"{name}.json").read_text())
        dataset = release["config"]["dataset"]  # a name, or the file that quality.py was given
        if dataset not in real:
            limits = {"data_root": arguments.data_root, "num_images": arguments.num_images}
            real[dataset] = real_features(dataset, extractor, **limits)
        found = measure(Path(arguments.images) / name, real[dataset], extractor, num_images=arguments.num_images)
        kept = {key: release[key] for key in ("dataset", "preset", "config")}
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps(kept | found | {"machine": describe_machine()}, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
