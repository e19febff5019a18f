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
from dpldm_core.evaluation.features import inception_extractor
from dpldm_core.evaluation.frechet import frechet_distance
from dpldm_core.release.synthetic import read_synthetic

RESULTS = Path(__file__).parent / "results" / "inception"


def measure(
    kept: Path, dataset: str, *, weights: str, data_root: str | None, num_images: int
) -> dict[str, float | str | int]:
    """Distances of every kept set of images to real training images, and of those to the test images.

    Args:
        kept: Folder of parquet files of synthetic images.
        dataset: Name of the real data.
        weights: File with Inception weights.
        data_root: Folder with the real data.
        num_images: Images a side at most.

    Returns:
        The metric, the number of images a side, the floor, and a distance for each file by its name.
    """
    extractor = inception_extractor(weights)
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
        train, test = (read_records(path).images for path in paths)
    drawn = {path.stem: read_synthetic([path])[0] for path in sorted(kept.glob("*.parquet"))}
    size = min(num_images, len(train), len(test), *map(len, drawn.values()))
    rng, features = np.random.default_rng(0), {}
    for name, images in {"train": train, "test": test, **drawn}.items():
        features[name] = extractor(images[rng.permutation(len(images))[:size]])
        print(name, flush=True)
    distances = {name: frechet_distance(features[name], features["train"]) for name in ("test", *drawn)}
    return {"metric": extractor.metric, "num_images": size, "floor": distances.pop("test"), **distances}


def main() -> None:
    """Measure one kept release and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="result file of benchmarks/quality.py, without .json")
    parser.add_argument("--images", required=True, help="folder that quality.py --keep was given")
    parser.add_argument("--inception-weights", required=True, help="file with Inception weights")
    parser.add_argument("--data-root", help="folder with MNIST and Fashion-MNIST")
    parser.add_argument("--num-images", type=int, default=2_000, help="images a side")
    arguments = parser.parse_args()
    release = json.loads((QUALITY / f"{arguments.name}.json").read_text())
    result = {"dataset": release["dataset"], "epsilon": release["config"]["epsilon"], "preset": release["preset"]}
    result |= measure(
        Path(arguments.images) / arguments.name,
        release["dataset"],
        weights=arguments.inception_weights,
        data_root=arguments.data_root,
        num_images=arguments.num_images,
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{arguments.name}.json"
    path.write_text(json.dumps(result | {"machine": describe_machine()}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
