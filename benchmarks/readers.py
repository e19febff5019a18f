"""Blind readers: do they name the class of a release's images, and do they take them for real ones?

python benchmarks/quality.py --dataset mnist --epsilon 1 --preset long --name mnist-eps1-long --data-root FOLDER \
    --keep IMAGES
python benchmarks/readers.py sheet mnist-eps1-long --images IMAGES --data-root FOLDER --out SHEETS
python benchmarks/readers.py score mnist-eps1-long --out SHEETS --readers "two people"

``sheet`` draws numbered pictures in SHEETS, half of whose images are the release's first of each class, half real test
images, in random order, and writes beside each what its images are. A reader sees a picture alone and writes a file
SHEETS/NAME-0.csv with a line for each number: ``number,class,real`` or ``number,class,synthetic``, ``?`` for a class
that cannot be told. ``score`` counts. Real images are the control: nobody names all of them either.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _machine import describe_machine
from fidelity import kept_release
from quality import RESULTS as QUALITY

from dpldm_core.release.figures import enlarge
from dpldm_core.release.synthetic import read_synthetic

RESULTS = Path(__file__).parent / "results" / "readers"
ALIKE = {"fashion_mnist": {"Pullover", "Coat", "Shirt"}}  # classes that readers of real images mix up, too
_COLUMNS, _TILE, _GAP, _NUMBER = 10, 84, 10, 18
UNKNOWN = "?"


def draw_sheet(images: np.ndarray) -> Image.Image:
    """Numbered images, ten a row, enlarged by a whole factor.

    Args:
        images: uint8 [n, h, w, c].
    """
    scale = max(1, round(_TILE / max(images.shape[1:3])))
    height, width = scale * images.shape[1] + _NUMBER + _GAP, scale * images.shape[2] + _GAP
    rows = -(-len(images) // _COLUMNS)
    sheet = Image.new("RGB", (_GAP + _COLUMNS * width, _GAP + rows * height), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, image in enumerate(images):
        left, top = _GAP + i % _COLUMNS * width, _GAP + i // _COLUMNS * height
        draw.text((left + (width - _GAP) // 2, top + _NUMBER // 2), str(i + 1), fill=(0, 0, 0), font=font, anchor="mm")
        sheet.paste(enlarge(image, scale), (left, top + _NUMBER))
    return sheet


def score(key: list[dict], answers: dict[int, tuple[str, str]], alike: set[str]) -> dict[str, dict[str, int]]:
    """Counts of a sheet's synthetic and real images.

    Args:
        key: Class and source of each image, in the order of the numbers.
        answers: Class and source that the reader gave to each number, from 1.
        alike: Classes that count as one in ``named_alike``.

    Returns:
        For each source: ``images``, ``named`` as the release or the data set names them, ``named_alike``, ``unknown``
        and ``taken_for_real``.

    Raises:
        SystemExit: A number is missing, or an answer is not one of those that were asked for.
    """
    classes = {item["class"] for item in key}
    sources = ("synthetic", "real")
    counts = {s: dict.fromkeys(("images", "named", "named_alike", "unknown", "taken_for_real"), 0) for s in sources}
    for number, item in enumerate(key, start=1):
        name, source = answers.get(number, ("", ""))
        if name not in classes | {UNKNOWN} or source not in sources:
            raise SystemExit(f"image {number}: class {name!r}, source {source!r}; see --help for what a line holds")
        found = counts[item["source"]]
        found["images"] += 1
        found["named"] += name == item["class"]
        found["named_alike"] += name == item["class"] or {name, item["class"]} <= alike
        found["unknown"] += name == UNKNOWN
        found["taken_for_real"] += source == "real"
    return counts


def _make_sheets(name: str, arguments: argparse.Namespace) -> None:
    """Numbered pictures of a kept release and their keys."""
    _, files, _, test = kept_release(name, images=arguments.images, data_root=arguments.data_root)
    half = arguments.per_class
    synthetic, names = read_synthetic(files["release"], per_class=half * arguments.sheets)
    generator = np.random.default_rng()
    places = lambda labels, k: np.flatnonzero(labels == k)  # noqa: E731
    for sheet in range(arguments.sheets):
        images, key = [], []
        for k, label in enumerate(test.schema.class_names):
            drawn = {
                "synthetic": synthetic[places(names, k)[half * sheet : half * (sheet + 1)]],
                "real": test.images[generator.choice(places(test.labels, k), half, replace=False)],
            }
            for source, part in drawn.items():
                images += list(part)
                key += [{"class": label, "source": source}] * len(part)
        order = generator.permutation(len(images))
        out = Path(arguments.out) / f"{name}-{sheet}"
        if out.with_suffix(".csv").exists():
            raise SystemExit(f"--out: {out}.csv answers another sheet of that name; take another folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(np.stack([images[i] for i in order])).save(out.with_suffix(".png"))
        out.with_suffix(".json").write_text(json.dumps([key[i] for i in order]))
        print(out.with_suffix(".png"))


def _score_sheets(name: str, arguments: argparse.Namespace) -> None:
    """Counts over all sheets of a release, and a result file."""
    release = json.loads((QUALITY / f"{name}.json").read_text())
    totals: dict[str, dict[str, int]] = {}
    files = sorted(Path(arguments.out).glob(f"{name}-*.csv"))
    if not files:
        raise SystemExit(f"--out: {arguments.out} holds no answers {name}-*.csv")
    for path in files:
        with path.open(newline="") as lines:
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row]
        answers = {int(number): (told, source) for number, told, source in rows}
        key = json.loads(path.with_suffix(".json").read_text())
        for source, counts in score(key, answers, ALIKE.get(release["config"]["dataset"], set())).items():
            before = totals.setdefault(source, dict.fromkeys(counts, 0))
            totals[source] = {count: before[count] + number for count, number in counts.items()}
    kept = {key: release[key] for key in ("dataset", "preset", "config", "images_sha256")}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    told = {"readers": arguments.readers, "sheets": len(files)}
    told |= {"machine": describe_machine()}
    path.write_text(json.dumps(kept | told | totals, indent=1) + "\n")
    print(path, totals)


def main() -> None:
    """Draw sheets, or count answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("sheet", "score"))
    parser.add_argument("name", help="result file of benchmarks/quality.py, without .json")
    parser.add_argument("--out", default=str(RESULTS / "sheets"), help="folder of the sheets")
    parser.add_argument("--images", help="folder that quality.py --keep was given")
    parser.add_argument("--data-root", help="folder with MNIST and Fashion-MNIST")
    parser.add_argument("--sheets", type=int, default=2, help="how many")
    parser.add_argument("--per-class", type=int, default=5, help="images of a class and source on a sheet")
    parser.add_argument("--readers", help="who read, for the result file")
    arguments = parser.parse_args()
    if needed := [o for o in {"sheet": ["images"], "score": ["readers"]}[arguments.step] if not getattr(arguments, o)]:
        parser.error(f"{arguments.step} needs --{needed[0]}")
    {"sheet": _make_sheets, "score": _score_sheets}[arguments.step](arguments.name, arguments)


if __name__ == "__main__":
    main()
