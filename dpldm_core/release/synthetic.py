"""Synthetic images as parquet that pandas and Hugging Face ``datasets`` open without being told how."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dpldm_core.errors import BundleError

_IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_COLUMNS = (["image"], ["image", "label"])


def write_synthetic_parquet(
    path: Path, images: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str], labelled: bool = True
) -> None:
    """Write images as PNG in the layout of a Hugging Face data set (features Image and ClassLabel).

    Args:
        path: File to write.
        images: uint8 [n, h, w, c], c 1 or 3.
        labels: int64 [n]; not looked at when ``labelled`` is false.
        class_names: Name of each class.
        labelled: Whether the data has labels; without, there is no ``label`` column.

    Raises:
        BundleError: The arrays do not fit each other.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise BundleError(f"synthetic images are {images.dtype} {list(images.shape)}, not uint8 [n, h, w, 1 or 3]")
    columns = {"image": pa.array([{"bytes": _png(image), "path": None} for image in images], _IMAGE_TYPE)}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if labelled:
        if labels is None or labels.shape != images.shape[:1]:
            raise BundleError(f"there is not one synthetic label for each of the {len(images)} images")
        if not np.isin(labels, np.arange(len(class_names))).all():
            raise BundleError(f"a synthetic label is none of the {len(class_names)} classes")
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"names": list(class_names), "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=1000)


def read_synthetic(
    source: Path | Sequence[Path], *, per_class: int | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 [n, h, w, c] and labels int64 [n], or None for labels when there are none.

    Args:
        source: A bundle, one parquet file, or several in order.
        per_class: Only the first so many images of each class, or of all when there are no labels; None: all.

    Raises:
        BundleError: There is nothing to read, it is damaged, or the images differ in size.
    """
    if isinstance(source, Path):
        source = sorted(source.glob("synthetic/*.parquet")) if source.is_dir() else [source]
    if not source:
        raise BundleError("there are no synthetic images to read: no synthetic/*.parquet")
    try:
        table = pa.concat_tables([pq.read_table(path) for path in source])
        if per_class is not None:
            table = table.take(_first_rows(table, per_class))
        decoded = [_pixels(value) for value in table["image"]]
        labels = table["label"].to_numpy() if "label" in table.column_names else None
    except Exception as error:  # damaged files fail in many ways inside pyarrow and Pillow
        raise BundleError(f"synthetic images cannot be read from {[str(p) for p in source]}: {error}") from error
    if len(shapes := {image.shape for image in decoded}) > 1:
        raise BundleError(f"synthetic images differ in size: {sorted(shapes)}")
    return (np.stack(decoded) if decoded else np.zeros((0, 1, 1, 1), np.uint8)), labels


class SyntheticFormat(NamedTuple):
    """What one parquet file of synthetic images says of itself.

    Args:
        num_images: Its rows.
        image_shape: (h, w, c) of its first image, which decodes; None: it has none.
        class_names: Of its labels; None: there are none.
    """

    num_images: int
    image_shape: tuple[int, ...] | None
    class_names: tuple[str, ...] | None


def synthetic_format(path: Path) -> SyntheticFormat:
    """Look at one parquet file without decoding more than its first image.

    Raises:
        BundleError: It is damaged, or holds other columns than image and label.
    """
    try:
        with pq.ParquetFile(path) as file:
            if file.schema_arrow.names not in _COLUMNS:
                raise BundleError(f"{path.name} holds the columns {file.schema_arrow.names}, not image and label")
            first = next(file.iter_batches(batch_size=1, columns=["image"]), None)
            features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
            return SyntheticFormat(
                num_images=int(file.metadata.num_rows),
                image_shape=_pixels(first["image"][0]).shape if first else None,
                class_names=tuple(features["label"]["names"]) if "label" in file.schema_arrow.names else None,
            )
    except BundleError:
        raise
    except Exception as error:  # as above
        raise BundleError(f"{path.name} cannot be read: {error}") from error


def _first_rows(table: pa.Table, per_class: int) -> np.ndarray:
    """The first rows of each label, in order."""
    labels = table["label"].to_numpy() if "label" in table.column_names else np.zeros(len(table), np.int64)
    kept = np.zeros(len(table), bool)
    for label in np.unique(labels):
        kept[np.flatnonzero(labels == label)[:per_class]] = True
    return np.flatnonzero(kept)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def _pixels(value: pa.StructScalar) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(value["bytes"].as_py())))
    return image if image.ndim == 3 else image[..., None]
