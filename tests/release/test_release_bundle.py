import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpldm_core.errors import BundleError
from dpldm_core.release import bundle, synthetic
from dpldm_core.release.synthetic import read_synthetic, write_synthetic_parquet
from dpldm_core.release.verify import verify_bundle


def test_bundle_holds_exactly_the_contract(folder):
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "synthetic/part-00000-of-00002.parquet",
        "synthetic/part-00001-of-00002.parquet",
        "model/decoder.safetensors",
        "model/denoiser.safetensors",
        "config.json",
        "privacy_report.json",
        "README.md",
        "samples.png",
        "manifest.json",
    }
    assert [p.name for p in folder.parent.iterdir()] == ["r1"]  # no temporary folder is left


def test_same_parts_give_the_same_bytes(tmp_path, folder, parts):
    again = Path(bundle.write_bundle(tmp_path / "elsewhere", "r1", **parts))
    assert (again / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labelled", [True, False])
def test_parquet_round_trip(tmp_path, channels, labelled):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (5, 9, 12, channels), dtype=np.uint8)
    labels = np.array([0, 2, 1, 1, 0])
    path = tmp_path / "x.parquet"
    write_synthetic_parquet(path, images, labels, ["a", "b", "c"], labelled)
    back, back_labels = read_synthetic(path)
    np.testing.assert_array_equal(back, images)
    if labelled:
        np.testing.assert_array_equal(back_labels, labels)
    else:
        assert back_labels is None
        assert pq.read_schema(path).names == ["image"]


@pytest.mark.parametrize("labelled", [True, False])
def test_only_the_first_images_of_each_class_are_decoded_when_no_more_are_asked_for(tmp_path, monkeypatch, labelled):
    images = np.random.default_rng(1).integers(0, 256, (9, 9, 12, 1), dtype=np.uint8)
    labels, decoded, pixels = np.array([0, 2, 0, 0, 2, 0, 1, 2, 2]), [], synthetic._pixels
    monkeypatch.setattr(synthetic, "_pixels", lambda value: decoded.append(1) or pixels(value))
    for part, rows in enumerate((slice(0, 4), slice(4, 9))):
        write_synthetic_parquet(tmp_path / f"{part}", images[rows], labels[rows], ["a", "b", "c", "d"], labelled)
    some, their_labels = read_synthetic([tmp_path / "0", tmp_path / "1"], per_class=2)
    kept = [0, 1, 2, 4, 6] if labelled else [0, 1]
    np.testing.assert_array_equal(some, images[kept])
    assert their_labels is None if not labelled else their_labels.tolist() == labels[kept].tolist()
    assert len(decoded) == len(kept)


def test_reading_a_bundle_joins_its_parts_in_order(folder, parts):
    images, labels = read_synthetic(folder)
    shards = [read_synthetic(path) for path in parts["synthetic"]]
    np.testing.assert_array_equal(images, np.concatenate([s[0] for s in shards]))
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1, 2, 0])


def test_parquet_carries_hugging_face_features(tmp_path):
    """As ``datasets`` 4 writes them: schema metadata 'huggingface', features Image and ClassLabel."""
    path = tmp_path / "x.parquet"
    write_synthetic_parquet(path, np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1]), ["cat", "dog"])
    schema = pq.read_schema(path)
    assert json.loads(schema.metadata[b"huggingface"]) == {
        "info": {
            "features": {
                "image": {"_type": "Image"},
                "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
            }
        }
    }
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert str(schema.field("label").type) == "int64"
    assert pq.read_table(path)["image"][0].as_py()["bytes"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (np.zeros((2, 8, 8, 1), np.float32), np.zeros(2, np.int64), "float32"),
        (np.zeros((2, 8, 8, 2), np.uint8), np.zeros(2, np.int64), "1 or 3"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(3, np.int64), "one synthetic label"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 2]), "none of the 2 classes"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.array([0, -1]), "none of the 2 classes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, images, labels, says):
    with pytest.raises(BundleError, match=says):
        write_synthetic_parquet(tmp_path / "x.parquet", images, labels, ["a", "b"])


def test_unreadable_sources_are_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(BundleError, match=r"x\.parquet"):
        read_synthetic(tmp_path / "x.parquet")
    with pytest.raises(BundleError, match="no synthetic images"):
        read_synthetic(tmp_path)
    write_synthetic_parquet(tmp_path / "a.parquet", np.zeros((1, 8, 8, 1), np.uint8), None, [], False)
    write_synthetic_parquet(tmp_path / "b.parquet", np.zeros((1, 9, 8, 1), np.uint8), None, [], False)
    with pytest.raises(BundleError, match="differ in size"):
        read_synthetic([tmp_path / "a.parquet", tmp_path / "b.parquet"])


def test_an_existing_release_is_never_overwritten(folder, parts):
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match=r"r1 already exists\. Choose another out"):
        bundle.check_target(folder.parent, "r1")
    with pytest.raises(BundleError, match="already exists"):
        bundle.write_bundle(folder.parent, "r1", **parts | {"card": "another card"})
    assert (folder / "manifest.json").read_bytes() == before
    assert bundle.write_bundle(folder.parent, "r1", **parts) == str(folder), "a retry finds its own bundle"
    assert [p.name for p in folder.parent.iterdir()] == ["r1"]
    bundle.check_target(folder.parent, "r2")
    bundle.check_target(folder.parent / "not" / "there" / "yet", "r1")


def test_bad_targets_are_refused_before_anything_is_spent(tmp_path, parts):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        bundle.check_target(tmp_path / "file", "r1")
    for name in ("", "../up", "a/b", ".hidden", "a b"):
        with pytest.raises(BundleError, match="plain name"):
            bundle.check_target(tmp_path, name)
    with pytest.raises(BundleError, match="no-such-protocol"):
        bundle.check_target("no-such-protocol://x", "r1")
    with pytest.raises(BundleError, match="not of 'r2'"):
        bundle.write_bundle(tmp_path, "r2", **parts)
    with pytest.raises(BundleError, match="model names"):
        bundle.write_bundle(tmp_path, "r1", **parts | {"model_files": {"../encoder": tmp_path / "file"}})
    with pytest.raises(BundleError, match=r"cannot be written under .*gone"):
        bundle.write_bundle(tmp_path, "r1", **parts | {"model_files": {"decoder": tmp_path / "gone"}})
    assert not (tmp_path / "r1").exists()


@pytest.mark.parametrize("function", ["rename", "fsync"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_a_failed_write_leaves_nothing(tmp_path, parts, monkeypatch, function, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises((KeyboardInterrupt, BundleError)):
        bundle.write_bundle(tmp_path / "releases", "r1", **parts)
    assert list((tmp_path / "releases").iterdir()) == []


@pytest.mark.parametrize("when", ["fsync", "rename"])
def test_a_killed_write_leaves_no_half_bundle_and_the_next_one_cleans_up(tmp_path, parts, when):
    """The process dies at the third fsync, or right before the rename."""
    out = tmp_path / "releases"
    arguments = {k: v for k, v in parts.items() if k != "report"}
    script = f"""
import os, sys
from pathlib import Path
from types import SimpleNamespace
sys.modules["dpldm_core.privacy.report"] = SimpleNamespace(PrivacyReport=None)  # spares the accountant's import
from dpldm_core.release import bundle
calls = []
def die(*args):
    calls.append(args)
    if len(calls) == {3 if when == "fsync" else 1}:
        os._exit(9)
os.{when} = die
PosixPath = Path
report = SimpleNamespace(release_id="r1", model_dump=lambda mode: {{}})
bundle.write_bundle({str(out)!r}, "r1", report=report, **{arguments!r})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    left = [p.name for p in out.iterdir()]
    assert len(left) == 1 and left[0].startswith(".r1.tmp-")
    written = Path(bundle.write_bundle(out, "r1", **parts))
    assert [p.name for p in out.iterdir()] == ["r1"]
    verify_bundle(written)


def test_a_remote_bundle_is_complete_once_its_manifest_is_there(parts, monkeypatch):
    import fsspec

    store = fsspec.filesystem("memory")
    uploaded = []
    put = type(store).put_file
    monkeypatch.setattr(type(store), "put_file", lambda self, a, b, **k: (uploaded.append(b), put(self, a, b, **k)))
    uri = bundle.write_bundle("memory://releases", "r1", **parts)
    try:
        assert uri == "memory://releases/r1"
        assert uploaded[-1].endswith("r1/manifest.json")
        assert verify_bundle(uri).num_files == 9
        with pytest.raises(BundleError, match="already holds a release"):
            bundle.check_target("memory://releases", "r1")
        with store.open("memory://releases/r1/samples.png", "ab") as file:
            file.write(b"x")
        with pytest.raises(BundleError, match=r"samples\.png was changed"):
            verify_bundle(uri)
    finally:
        store.rm("/releases", recursive=True)
