"""Readers of the formats that own data may come in: local files in, :class:`RawRecords` out."""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dpldm_core.data.schema import RawRecords
from dpldm_core.errors import DataError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_IDX_IMAGES = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?")
_IGNORED = {"thumbs.db", "desktop.ini"}


def read_npz(path: Path) -> tuple[RawRecords, RawRecords | None]:
    """``images``, optional ``labels``, ``group``, ``class_names``; optional ``test_images`` with the same."""
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        arrays = dict(file.items())
    allowed = {"images", "labels", "group", "class_names", "test_images", "test_labels", "test_group"}
    if "images" not in arrays or set(arrays) - allowed:
        raise DataError(
            f"{path.name}: arrays {sorted(arrays)} found; images is needed, and of {sorted(allowed)} nothing else"
        )
    names = tuple(str(n) for n in arrays["class_names"]) if "class_names" in arrays else None
    train = RawRecords(arrays["images"], arrays.get("labels"), arrays.get("group"), names, path.name)
    if "test_images" not in arrays:
        return train, None
    if ("labels" in arrays) != ("test_labels" in arrays):
        raise DataError(f"{path.name}: labels are needed for both or for none of images and test_images")
    test = arrays["test_images"], arrays.get("test_labels"), arrays.get("test_group")
    return train, RawRecords(*test, names, f"{path.name} (test)")


def read_idx(path: Path) -> np.ndarray:
    """One IDX file of unsigned bytes, plain or gzipped (LeCun's format: magic, sizes big-endian, then the data)."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        raw = file.read()
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{path.name} is not an IDX file of unsigned bytes")
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if data.size != int(np.prod(shape)):
        raise DataError(f"{path.name} is cut off: {data.size} of {int(np.prod(shape))} bytes are there")
    return data.reshape(shape)


def is_idx_images(path: Path) -> bool:
    """Whether a file is named like the images of an IDX pair."""
    return _IDX_IMAGES.fullmatch(path.name) is not None


def read_idx_pair(path: Path) -> RawRecords:
    """``*images-idx3-ubyte[.gz]`` with ``*labels-idx1-ubyte[.gz]`` beside it, if that is there (or ``.idx``)."""
    found = _IDX_IMAGES.fullmatch(path.name)
    assert found is not None
    stem, dot = found[1], found[2]
    labels = [p for suffix in ("", ".gz") if (p := path.with_name(f"{stem}labels{dot}idx1-ubyte{suffix}")).exists()]
    if not labels and (others := sorted(path.parent.glob(f"{glob.escape(stem)}labels*"))):
        raise DataError(
            f"{path.name}: is {others[0].name} its labels? Name it {stem}labels{dot}idx1-ubyte, or move it away"
        )
    return RawRecords(read_idx(path), read_idx(labels[0]) if labels else None, None, None, path.name)


def read_parquet(paths: Iterable[Path]) -> RawRecords:
    """``image`` (Hugging Face struct, PNG bytes, pixel lists) or columns pixel0...; optional ``label``, ``group``."""
    files = sorted(paths)
    table = pa.concat_tables([pq.read_table(path) for path in files], promote_options="default")
    where = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    columns = set(table.column_names)
    pixel_columns = sorted((c for c in columns if re.fullmatch(r"pixel\d+", c)), key=lambda c: int(c[5:]))
    if "image" in columns:
        images: Any = [_parquet_image(value, where) for value in table["image"].to_pylist()]
    elif pixel_columns:
        flat = np.stack([table[c].to_numpy() for c in pixel_columns], axis=1)
        images = _square(flat, where)
    else:
        raise DataError(f"{where}: columns {sorted(columns)[:12]} found; image, or pixel0, pixel1, ... is needed")
    label = next((name for name in ("label", "labels") if name in columns), None)
    labels = _column(table, label, where) if label else None
    groups = _column(table, "group", where) if "group" in columns else None
    return RawRecords(images, labels, groups, _hugging_face_names(table, label), where)


def read_image_folder(folder: Path) -> RawRecords:
    """One folder per class, named like it; or images without folders, then without labels."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    sources = [(k, path) for k, c in enumerate(classes) for path in _image_files(c)] or [
        (0, path) for path in _image_files(folder)
    ]
    if not sources:
        raise DataError(
            f"{folder.name}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) found, in it or in folders per class"
        )
    if classes and (stray := _image_files(folder)):
        raise DataError(f"{folder.name}: {stray[0].name} lies beside the class folders; move it into one")
    images = [_decode(path.read_bytes(), path.name) for _, path in sources]
    labels = np.array([k for k, _ in sources], np.int64) if classes else None
    return RawRecords(images, labels, None, tuple(c.name for c in classes) or None, folder.name)


def _image_files(folder: Path) -> list[Path]:
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    files = [p for p in files if p.name.lower() not in _IGNORED]
    if other := [p for p in files if p.suffix.lower() not in IMAGE_SUFFIXES]:
        raise DataError(
            f"{folder.name}/{other[0].name} is no image ({', '.join(sorted(IMAGE_SUFFIXES))}); move it away"
        )
    return files


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # noqa: BLE001 - Pillow's decoders fail in many ways
        raise DataError(f"{name} cannot be read as an image: {error}") from None
    if image.mode in ("L", "1"):
        return np.asarray(image.convert("L"))
    if image.mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
        return np.asarray(image.convert("RGB"))
    raise DataError(f"{name} is of mode {image.mode}; 8-bit gray or RGB is needed")


def _parquet_image(value: Any, where: str) -> np.ndarray:
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return _decode(value, f"an image of {where}")
    if isinstance(value, list):
        array = np.asarray(value)
        return _square(array[None], where)[0] if array.ndim == 1 else array
    raise DataError(f"{where}: an image is missing or stored by path only; embed the image bytes")


def _square(flat: np.ndarray, where: str) -> np.ndarray:
    """Flat pixels [n, s s] or [n, s s 3] as images; the three colours of a pixel stand side by side."""
    for channels in (1, 3):
        side = round((flat.shape[1] / channels) ** 0.5)
        if side * side * channels == flat.shape[1]:
            return flat.reshape(len(flat), side, side, channels)
    raise DataError(
        f"{where}: {flat.shape[1]} pixels a row are no square gray or RGB image; store encoded images instead"
    )


def _column(table: pa.Table, name: str, where: str) -> np.ndarray:
    if table[name].null_count:
        raise DataError(f"{where}: {table[name].null_count} values of {name} are missing")
    return np.array(table[name].to_pylist())


def _hugging_face_names(table: pa.Table, label: str | None) -> tuple[str, ...] | None:
    """Class names of a Hugging Face ClassLabel, when the metadata holds them."""
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names = metadata.get("info", {}).get("features", {}).get(label, {}).get("names") if label else None
    return tuple(names) if names else None
