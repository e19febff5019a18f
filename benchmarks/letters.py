"""A data set that nothing here was tuned on: python benchmarks/letters.py FILE.

The letters A to J, large and small, in the fonts that matplotlib carries: slanted, stretched, bent, in many weights.
60,000 training and 10,000 test images of 28x28 gray pixels; the fonts are the same in both, the draws are not.
Then: python benchmarks/quality.py --dataset letters.npz --config FILE --epsilon 1 --preset cpu, where FILE says
num_records: 60000 (a public fact about this set, as it is of MNIST).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional

CLASSES = "ABCDEFGHIJ"
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"),
)
_SIZE, _CANVAS = 28, 56


def draw(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One image of each label.

    Args:
        labels: Classes, [n].
        generator: Of font, case, size and weight; torch's default generator bends.

    Returns:
        Images, uint8 [n, 28, 28].
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [[ImageFont.truetype(folder / f"{name}.ttf", size) for size in (32, 36, 40, 44)] for name in FONTS]
    pages = np.empty((len(labels), _CANVAS, _CANVAS), np.uint8)
    for page, label in zip(pages, labels, strict=True):
        canvas = Image.new("L", (_CANVAS, _CANVAS))
        letter = CLASSES[label] if generator.random() < 0.5 else CLASSES[label].lower()
        font = fonts[generator.integers(len(fonts))][generator.integers(4)]
        weight, middle = int(generator.integers(3)), (_CANVAS / 2, _CANVAS / 2)
        ImageDraw.Draw(canvas).text(middle, letter, fill=255, font=font, anchor="mm", stroke_width=weight)
        page[:] = np.asarray(canvas)
    parts = np.array_split(pages, len(pages) // 500 + 1)
    return np.concatenate([bend(torch.from_numpy(part)).numpy() for part in parts])


def bend(pages: torch.Tensor) -> torch.Tensor:
    """Pages turned, stretched, moved and bent, each its own way: uint8 [n, 56, 56] to [n, 28, 28]."""
    count = len(pages)
    turns = torch.eye(2) + 0.12 * torch.randn(count, 2, 2)
    affine = torch.cat([turns, 0.06 * torch.randn(count, 2, 1)], 2)
    grid = functional.affine_grid(affine, [count, 1, _CANVAS, _CANVAS], align_corners=False)
    waves = functional.interpolate(0.035 * torch.randn(count, 2, 5, 5), size=(_CANVAS, _CANVAS), mode="bicubic")
    moved = functional.grid_sample(pages[:, None] / 255, grid + waves.movedim(1, -1), align_corners=False)
    return (functional.avg_pool2d(moved, _CANVAS // _SIZE)[:, 0] * 255).round().to(torch.uint8)


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="where to write it, .npz")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    arrays = {}
    for prefix, count in (("", 60_000), ("test_", 10_000)):
        labels = generator.integers(len(CLASSES), size=count)
        arrays |= {f"{prefix}images": draw(labels, generator), f"{prefix}labels": labels}
    np.savez_compressed(arguments.file, class_names=np.array(list(CLASSES)), **arrays)


if __name__ == "__main__":
    main()
