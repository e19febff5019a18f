"""Pictures of a release, drawn with Pillow: pixels are shown as they are, enlarged by a whole factor."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_TILE = 84  # pixels that a side is enlarged towards
_GAP, _MARGIN, _FONT_SIZE = 4, 16, 18
_PAPER, _INK = (255, 255, 255), (55, 60, 70)
_LONGEST_NAME = 24


def samples_grid_png(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    class_names: Sequence[str] = (),
    columns: int = 10,
    max_rows: int = 20,
) -> bytes:
    """The first images of each class, one class a row with its name; nothing is picked by its looks.

    Args:
        images: Synthetic uint8 [n, h, w, c], c 1 or 3.
        labels: int64 [n]; None: rows without names.
        class_names: Name of each class.
        columns: Images a row.
        max_rows: Classes after these are left out.

    Returns:
        The picture as PNG.
    """
    if labels is None:
        starts = range(0, min(len(images), columns * min(columns, max_rows)), columns)
        rows = [("", images[start : start + columns]) for start in starts]
    else:
        named = list(enumerate(class_names))[:max_rows]
        rows = [(_shorten(name), images[np.flatnonzero(labels == k)[:columns]]) for k, name in named]
    font = ImageFont.load_default(_FONT_SIZE)
    height, width = images.shape[1:3]
    scale = max(1, round(_TILE / max(height, width)))
    gutter = max((round(font.getlength(name)) + 12 for name, _ in rows if name), default=0)
    step_x, step_y = width * scale + _GAP, height * scale + _GAP
    canvas = Image.new(
        "RGB", (2 * _MARGIN + gutter + columns * step_x - _GAP, 2 * _MARGIN + max(1, len(rows)) * step_y - _GAP), _PAPER
    )
    draw = ImageDraw.Draw(canvas)
    for r, (name, row) in enumerate(rows):
        top = _MARGIN + r * step_y
        draw.text((_MARGIN + gutter - 12, top + height * scale // 2), name, fill=_INK, font=font, anchor="rm")
        for c, image in enumerate(row):
            canvas.paste(enlarge(image, scale), (_MARGIN + gutter + c * step_x, top))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def enlarge(image: np.ndarray, scale: int) -> Image.Image:
    """Whole-factor enlargement without smoothing, as RGB."""
    rgb = np.broadcast_to(image, (*image.shape[:2], 3))
    return Image.fromarray(np.ascontiguousarray(rgb.repeat(scale, axis=0).repeat(scale, axis=1)))


def _shorten(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
