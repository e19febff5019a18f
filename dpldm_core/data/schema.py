"""The public schema of image records, their validation, and the one private parquet layout that the stages read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from dpldm_core.config import Frozen
from dpldm_core.errors import DataError

MIN_SIDE, MAX_SIDE = 8, 64  # pixels
_NOBODY = {"", "nan", "None", "<NA>"}  # what pandas and numpy write for a missing name
MAX_CLASSES = 1000
_METADATA = b"dpldm_schema"


class ImageSchema(Frozen):
    """What is treated as public about the images: format and classes, never a count."""

    height: int = Field(ge=MIN_SIDE, le=MAX_SIDE, description="pixels")
    width: int = Field(ge=MIN_SIDE, le=MAX_SIDE, description="pixels")
    channels: int = Field(ge=1, le=3, description="1 for gray, 3 for RGB")
    class_names: tuple[str, ...] = Field(min_length=1, description="one name when there are no labels")
    labelled: bool
    grouped: bool = Field(description="whether records name the person that they belong to")

    @property
    def num_classes(self) -> int:
        """Classes, 1 when there are no labels."""
        return len(self.class_names)


@dataclass(frozen=True)
class Records:
    """Validated private records.

    Args:
        images: uint8 [n, h, w, c].
        labels: int64 [n], zeros when there are no labels.
        groups: Person of each record, int64 [n] or str [n]; None when a record is its own unit.
        schema: Their public schema.
    """

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None
    schema: ImageSchema

    @property
    def num_units(self) -> int:
        """Private number of units of privacy: persons, or records."""
        return len(self.images) if self.groups is None else len(np.unique(self.groups))

    def take(self, rows: np.ndarray) -> Records:
        """The records at the given rows."""
        groups = None if self.groups is None else self.groups[rows]
        return Records(self.images[rows], self.labels[rows], groups, self.schema)


@dataclass(frozen=True)
class RawRecords:
    """What a reader found, before validation.

    Args:
        images: [n, h, w] or [n, h, w, c], or a list of such images that may differ in size.
        labels: One per image, integers or names; None when there are none.
        groups: One per image; None when there are none.
        class_names: Declared by the source (folder names, metadata), if it does.
        where: The place, for messages.
    """

    images: np.ndarray | Sequence[np.ndarray]
    labels: np.ndarray | None
    groups: np.ndarray | None
    class_names: tuple[str, ...] | None
    where: str


def validate(raw: RawRecords, *, num_classes: int | None, class_names: tuple[str, ...] | None = None) -> Records:
    """Check everything that would break or falsify a release. Messages are for the steward alone.

    Args:
        raw: What a reader found.
        num_classes: Declared public number of classes, if any.
        class_names: Classes of the training set, when this is its test set.

    Returns:
        Records with their public schema.

    Raises:
        DataError: Names the field, the value and the way out.
    """
    images = _check_images(raw)
    labels, names = _check_labels(raw, len(images), num_classes, class_names)
    groups = None if raw.groups is None else np.asarray(raw.groups)
    if groups is not None and groups.shape != (len(images),):
        raise DataError(
            f"{raw.where}: group holds {groups.shape} values for {len(images)} images; one per image is needed"
        )
    if groups is not None and groups.dtype.kind not in "iu":
        groups = _person_names(groups, raw.where)
    schema = ImageSchema(
        height=images.shape[1],
        width=images.shape[2],
        channels=images.shape[3],
        class_names=names,
        labelled=raw.labels is not None,
        grouped=groups is not None,
    )
    return Records(images, labels, groups, schema)


def _person_names(groups: np.ndarray, where: str) -> np.ndarray:
    """Names as text; those that are missing, in any of the ways in which tables say so, are refused."""
    values = [g.decode(errors="backslashreplace") if isinstance(g, bytes) else g for g in groups.tolist()]
    missing = [str(value).strip() in _NOBODY for value in values]
    if any(missing):
        raise DataError(
            f"{where}: group is missing for {sum(missing)} images, and whom they belong to is what is protected. "
            "Name every person, or drop those images"
        )
    return np.array([str(value) for value in values])


def _check_images(raw: RawRecords) -> np.ndarray:
    images, where = raw.images, raw.where
    if len(images) == 0:
        raise DataError(f"{where}: there are no images")
    if not isinstance(images, np.ndarray):
        if len(shapes := {np.asarray(image).shape for image in images}) > 1:
            raise DataError(
                f"{where}: images differ in size or channels: {sorted(shapes)[:4]}. Convert them to one format"
            )
        images = np.stack(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise DataError(
            f"{where}: images have shape {images.shape}; [n, height, width] or [n, height, width, c] is needed"
        )
    height, width, channels = images.shape[1:]
    if channels not in (1, 3):
        raise DataError(f"{where}: images have {channels} channels (last axis); 1 (gray) or 3 (RGB) is needed")
    if not (MIN_SIDE <= height <= MAX_SIDE and MIN_SIDE <= width <= MAX_SIDE):
        raise DataError(
            f"{where}: images are {height}x{width}; sides from {MIN_SIDE} to {MAX_SIDE} are supported. Resize them"
        )
    if images.dtype.kind == "f":
        if not np.isfinite(images).all():
            raise DataError(
                f"{where}: {int((~np.isfinite(images)).sum())} pixels are NaN or infinite. Repair or drop those images"
            )
        low, high = float(images.min()), float(images.max())
        if low < 0.0 or high > 1.0:
            raise DataError(
                f"{where}: float pixels range from {low:g} to {high:g}; [0, 1] is needed, or integers from 0 to 255"
            )
        images = np.rint(images * 255.0)
    elif images.dtype.kind == "b":
        images = images.astype(np.uint8) * 255
    elif images.dtype.kind not in "iu":
        raise DataError(
            f"{where}: images are of type {images.dtype}; uint8 from 0 to 255, float from 0 to 1 or bool is needed"
        )
    elif images.dtype != np.uint8 and (int(images.min()) < 0 or int(images.max()) > 255):
        raise DataError(f"{where}: pixels range from {images.min()} to {images.max()}; 0 to 255 is needed")
    return np.ascontiguousarray(images.astype(np.uint8))


def _check_labels(
    raw: RawRecords, count: int, num_classes: int | None, known: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    where = raw.where
    if raw.labels is None:
        if num_classes not in (None, 1):
            raise DataError(f"{where}: num_classes={num_classes} is declared, but there are no labels")
        return np.zeros(count, np.int64), ("all",)
    labels = np.asarray(raw.labels)
    if known and raw.class_names not in (None, known) and labels.dtype.kind in "iuf":  # they number other names
        labels = np.array(raw.class_names)[_check_labels(raw, count, len(raw.class_names or ()), None)[0]]
    if labels.shape != (count,):
        raise DataError(f"{where}: labels have shape {labels.shape} for {count} images; one label per image is needed")
    names = known or raw.class_names
    if labels.dtype.kind in "iu" or (labels.dtype.kind == "f" and bool((labels == np.rint(labels)).all())):
        numbers = labels.astype(np.int64)
        names = names or tuple(str(k) for k in range(num_classes or min(max(int(numbers.max()), 0), MAX_CLASSES) + 1))
    elif labels.dtype.kind in "USO":
        texts = labels.astype(str)
        names = names or tuple(sorted(set(texts)))
        if unknown := sorted(set(texts.tolist()) - set(names))[:3]:
            raise DataError(f"{where}: labels {unknown} are not among the classes {list(names)[:12]}")
        numbers = np.array([names.index(text) for text in texts], dtype=np.int64)
    else:
        raise DataError(f"{where}: labels are of type {labels.dtype}; whole numbers or names are needed")
    if num_classes is not None and len(names) != num_classes:
        raise DataError(f"{where}: num_classes={num_classes} is declared, but there are {len(names)} class names")
    if len(names) > MAX_CLASSES:
        raise DataError(f"{where}: more than {MAX_CLASSES} classes; are the labels really classes?")
    if int(numbers.min()) < 0 or int(numbers.max()) >= len(names):
        raise DataError(
            f"{where}: labels range from {numbers.min()} to {numbers.max()}; 0 to {len(names) - 1} is needed for "
            f"{len(names)} classes"
        )
    empty = [names[k] for k in np.flatnonzero(np.bincount(numbers, minlength=len(names)) == 0)]
    if empty and known is None and num_classes is None:
        raise DataError(
            f"{where}: no image of class {empty[:5]}. Number the classes from 0 without gaps and drop empty ones, or "
            "declare num_classes in the config file to keep them"
        )
    return numbers, names


def write_records(path: Path, records: Records) -> None:
    """Write private records as one parquet file with a fixed layout: image (raw pixels), label, group."""
    size = int(np.prod(records.images.shape[1:]))
    pixels = pa.py_buffer(records.images.reshape(-1))
    groups = [""] * len(records.images) if records.groups is None else [str(g) for g in records.groups]
    table = pa.table(
        {
            "image": pa.Array.from_buffers(pa.binary(size), len(records.images), [None, pixels]),
            "label": pa.array(records.labels, pa.int64()),
            "group": pa.array(groups, pa.string()),
        }
    )
    metadata = {_METADATA: json.dumps(records.schema.model_dump(mode="json"))}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)


def read_records(path: Path) -> Records:
    """The inverse of :func:`write_records`.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        table = pq.read_table(path)
        schema = ImageSchema.model_validate_json(table.schema.metadata[_METADATA])
        pixels = np.frombuffer(bytearray().join(value.as_py() for value in table["image"]), dtype=np.uint8)
        images = pixels.reshape(-1, schema.height, schema.width, schema.channels)
        groups = np.array(table["group"].to_pylist()) if schema.grouped else None
        return Records(images, table["label"].to_numpy().astype(np.int64), groups, schema)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"the ingested records {path} cannot be read: {error}") from error


def group_table(records: Records, max_records: int) -> np.ndarray:
    """Which records belong to which unit: int64 [units, M], -1 where a unit has fewer.

    A unit's row depends on its own records alone: of a person with more than ``max_records``, the first ones are used.
    Persons stand in the order of their first record, so that another name moves no row.

    Args:
        records: Private records.
        max_records: Public bound M on the records of one person; a record that is its own unit takes 1.

    Returns:
        Rows of records, int64 [units, M].
    """
    if records.groups is None:
        return np.arange(len(records.images), dtype=np.int64)[:, None]
    units, first, unit_of = np.unique(records.groups, return_index=True, return_inverse=True)
    unit_of = np.argsort(np.argsort(first))[unit_of]
    order = np.argsort(unit_of, kind="stable")
    sorted_units = unit_of[order]
    starts = np.searchsorted(sorted_units, np.arange(len(units)))
    position = np.arange(len(order)) - starts[sorted_units]
    table = np.full((len(units), max_records), -1, dtype=np.int64)
    kept = position < max_records
    table[sorted_units[kept], position[kept]] = order[kept]
    return table
