"""What a smaller release of the same models would have been worth: the first images of one that was kept.

python benchmarks/quality.py --dataset mnist --epsilon 10 --preset long --num-samples 600000 --name mnist-eps10-long \
    --data-root FOLDER --keep IMAGES
python benchmarks/fewer.py mnist-eps10-long --images IMAGES --data-root FOLDER

Sample i of a release depends on its seed and on i alone, so its first images are those of a release of so many.
Computed from real data, so internal; public data sets protect nobody.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _machine import describe_machine
from fidelity import kept_release

from dpldm_core.evaluation.internal import evaluate_release
from dpldm_core.release.measuring import FIRST_SEED
from dpldm_core.release.synthetic import read_synthetic
from dpldm_core.threads import settle_on_cpu

RESULTS = Path(__file__).parent / "results" / "fewer"


def main() -> None:
    """Measure the first images of kept releases, and write a result file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="result files of benchmarks/quality.py, without .json")
    parser.add_argument("--images", required=True, help="folder that quality.py --keep was given")
    parser.add_argument("--num-images", type=int, default=60_000, help="how many of the first images")
    parser.add_argument("--seeds", type=int, default=3, help="classifiers trained")
    parser.add_argument("--data-root", help="folder with MNIST and Fashion-MNIST")
    arguments = parser.parse_args()
    settle_on_cpu()
    for name in arguments.names:
        release, files, train, test = kept_release(name, images=arguments.images, data_root=arguments.data_root)
        config = release["config"]
        images, labels = read_synthetic(files["release"])
        if labels is None or not 2 <= arguments.num_images <= len(images):
            parser.error(f"--num-images {arguments.num_images}: from 2 to {len(images)}, with labels")
        found = evaluate_release(
            images[: arguments.num_images],
            labels[: arguments.num_images],
            (train.images, train.labels),
            (test.images, test.labels),
            num_classes=train.schema.num_classes,
            num_epochs=config["evaluation"]["num_epochs"],
            seeds=range(FIRST_SEED, FIRST_SEED + arguments.seeds),
            inception_weights=None,
            max_frechet_images=release["measured"]["fd_real_classifier"]["num_images"],
        ).to_dict()
        kept = {key: release[key] for key in ("dataset", "preset", "config", "images_sha256")}
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{name}-{arguments.num_images}.json"
        path.write_text(json.dumps(kept | {"measured": found, "machine": describe_machine()}, indent=1) + "\n")
        print(path, found["train_on_synthetic_accuracy"])


if __name__ == "__main__":
    main()
