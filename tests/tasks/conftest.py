"""A steward's machine: her own home, stores and small data sets."""

import dataclasses
import gzip

import numpy as np
import pytest

from dpldm_core.data.sources import BUILTIN_DATASETS
from dpldm_core.privacy.ledger import Ledger

NUM_RECORDS = 347  # appears nowhere in public


def drawings(num_images, shape=(8, 8, 1), num_classes=3, seed=0):
    """Strokes whose place is their class, with noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % num_classes
    images = rng.integers(0, 60, (num_images, *shape), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image.reshape(-1)[5 * label : 5 * label + 15] += 180
    return images, labels


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Environment of one steward: a ledger, an MLflow store and a folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DPLDM_LEDGER_URL", f"sqlite:///{tmp_path / 'ledger.db'}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.delenv("DPLDM_DATA_ROOT", raising=False)
    return tmp_path


@pytest.fixture
def ledger(machine):
    return Ledger(f"sqlite:///{machine / 'ledger.db'}")


@pytest.fixture
def own_data(machine):
    images, labels = drawings(NUM_RECORDS)
    np.savez(machine / "scans.npz", images=images, labels=labels)
    return str(machine / "scans.npz")


@pytest.fixture
def small_mnist(machine, monkeypatch):
    """A built-in data set in DPLDM_DATA_ROOT, with few images."""
    folder = machine / "root" / "mnist"
    folder.mkdir(parents=True)
    for part, count in (("train", 400), ("t10k", 80)):
        images, labels = drawings(count, (8, 8), 10, seed=count)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
    monkeypatch.setenv("DPLDM_DATA_ROOT", str(folder.parent))
    known = dataclasses.replace(BUILTIN_DATASETS["mnist"], num_records=400)
    monkeypatch.setitem(BUILTIN_DATASETS, "mnist", known)
    return "mnist"
