"""Every source format, and one clear error for every way that it can be wrong."""

import gzip
import io
import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpldm_core.data.sources import BUILTIN_DATASETS, load_dataset
from dpldm_core.errors import ConfigError, DataError


def load(path, **options):
    arguments = {"data_root": None, "cache_dir": None, "num_classes": None}
    return load_dataset(str(path), **arguments | options)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (12, 10, 9), dtype=np.uint8)


@pytest.fixture
def labels():
    return np.arange(12) % 3


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_npz(tmp_path, images, labels, **more):
    np.savez(tmp_path / "x.npz", images=images, labels=labels, **more)
    return tmp_path / "x.npz"


def write_idx(tmp_path, images, labels):
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(idx(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path / "train-images-idx3-ubyte.gz"


def write_parquet_struct(tmp_path, images, labels):
    """As Hugging Face datasets writes it."""
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    table = pa.table({"image": [{"bytes": png(i), "path": None} for i in images], "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def write_parquet_png(tmp_path, images, labels):
    pq.write_table(pa.table({"image": [png(i) for i in images], "label": labels}), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def write_parquet_pixels(tmp_path, images, labels):
    pq.write_table(pa.table({"image": [i.tolist() for i in images], "label": labels}), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def write_folder(tmp_path, images, labels):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "folder" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(png(image))
    (tmp_path / "folder" / "class 0" / ".DS_Store").write_bytes(b"x")
    return tmp_path / "folder"


WRITERS = [write_npz, write_idx, write_parquet_struct, write_parquet_png, write_parquet_pixels, write_folder]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_records(tmp_path, images, labels, write):
    loaded = load(write(tmp_path, images, labels))
    order = np.lexsort(loaded.train.images.reshape(12, -1).T)
    expected = np.lexsort(images.reshape(12, -1).T)
    np.testing.assert_array_equal(loaded.train.images[order][..., 0], images[expected])
    np.testing.assert_array_equal(loaded.train.labels[order], labels[expected])
    schema = loaded.train.schema
    assert (schema.height, schema.width, schema.channels, schema.num_classes) == (10, 9, 1, 3)
    assert schema.labelled and not schema.grouped and loaded.test is None


@pytest.mark.parametrize(
    "write", [write_npz, write_parquet_struct, write_parquet_png, write_parquet_pixels, write_folder]
)
def test_rgb(tmp_path, labels, write):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    assert load(write(tmp_path, images, labels)).train.schema.channels == 3


def test_class_names_come_from_folders_and_metadata(tmp_path, images, labels):
    assert load(write_folder(tmp_path, images, labels)).train.schema.class_names == ("class 0", "class 1", "class 2")
    assert load(write_parquet_struct(tmp_path, images, labels)).train.schema.class_names == ("a", "b", "c")


def test_labels_by_name(tmp_path, images, labels):
    names = np.array(["cat", "ant", "bee"])[labels]
    records = load(write_npz(tmp_path, images, names)).train
    assert records.schema.class_names == ("ant", "bee", "cat")
    np.testing.assert_array_equal(np.array(records.schema.class_names)[records.labels], names)


def test_flat_pixel_columns_are_square_images(tmp_path, labels):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    columns = {f"pixel{k}": images.reshape(12, -1)[:, k] for k in range(64)}
    pq.write_table(pa.table({"label": labels, **columns}), tmp_path / "x.parquet")
    np.testing.assert_array_equal(load(tmp_path / "x.parquet").train.images[..., 0], images)


@pytest.mark.parametrize("scale", ["unit", "float32"])
def test_float_pixels_lie_in_the_unit_interval(tmp_path, images, labels, scale):
    values = (images / 255.0).astype(np.float32 if scale == "float32" else np.float64)
    np.testing.assert_array_equal(load(write_npz(tmp_path, values, labels)).train.images[..., 0], images)


def test_no_labels(tmp_path, images):
    np.savez(tmp_path / "x.npz", images=images)
    schema = load(tmp_path / "x.npz").train.schema
    assert not schema.labelled and schema.num_classes == 1
    (tmp_path / "flat").mkdir()
    for i, image in enumerate(images):
        (tmp_path / "flat" / f"{i}.png").write_bytes(png(image))
    assert not load(tmp_path / "flat").train.schema.labelled


def test_group_column(tmp_path, images, labels):
    records = load(write_npz(tmp_path, images, labels, group=np.arange(12) // 4)).train
    assert records.schema.grouped and records.num_units == 3
    table = pa.table({"image": [png(i) for i in images], "label": labels, "group": [f"p{i // 2}" for i in range(12)]})
    pq.write_table(table, tmp_path / "y.parquet")
    assert load(tmp_path / "y.parquet").train.num_units == 6
    given = {"test_images": images, "test_labels": labels, "test_group": np.arange(12) // 6}
    loaded = load(write_npz(tmp_path, images, labels, group=np.arange(12) // 4, **given))
    assert (loaded.train.num_units, loaded.test.num_units) == (3, 2)


def test_given_test_sets(tmp_path, images, labels):
    npz = write_npz(tmp_path, images[:9], labels[:9], test_images=images[9:], test_labels=labels[9:])
    assert len(load(npz).test.images) == 3
    for part, rows in (("train", slice(0, 9)), ("test", slice(9, 12))):
        write_folder(tmp_path / "split" / part, images[rows], labels[rows]).rename(tmp_path / "split" / part / "x")
        inner = tmp_path / "split" / part / "x"
        for folder in inner.iterdir():
            folder.rename(tmp_path / "split" / part / folder.name)
        inner.rmdir()
    loaded = load(tmp_path / "split")
    assert (len(loaded.train.images), len(loaded.test.images)) == (9, 3)
    hub = tmp_path / "hub"
    hub.mkdir()
    for part, rows in (("train", slice(0, 9)), ("test", slice(9, 12))):
        write_parquet_png(tmp_path, images[rows], labels[rows]).rename(hub / f"{part}-00000-of-00001.parquet")
    assert len(load(hub).test.images) == 3


def test_classes_of_a_test_set_go_by_their_names(tmp_path, images):
    """Its folders (or a ClassLabel) may lack a class, or number them in another order."""
    names = {"train": ("cat", "dog", "fox"), "test": ("dog", "fox")}
    for part, classes in names.items():
        for name in classes:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(png(images[0]))
    loaded = load(tmp_path)
    assert loaded.train.labels.tolist() == [0, 1, 2] and loaded.test.labels.tolist() == [1, 2]
    (tmp_path / "test" / "fox").rename(tmp_path / "test" / "hen")
    with pytest.raises(DataError, match=r"labels \['hen'\] are not among the classes"):
        load(tmp_path)


@pytest.mark.parametrize("dot", "-.")
def test_labels_beside_idx_images_are_never_overlooked(tmp_path, images, labels, dot):
    (tmp_path / f"train-images{dot}idx3-ubyte").write_bytes(idx(images))
    (tmp_path / f"train-labels{dot}idx1-ubyte").write_bytes(idx(labels))
    assert load(tmp_path).train.labels.tolist() == labels.tolist()
    (tmp_path / f"train-labels{dot}idx1-ubyte").rename(tmp_path / "train-labels.idx")
    with pytest.raises(DataError, match=r"is train-labels\.idx its labels\?"):
        load(tmp_path)


def test_bool_images_are_black_and_white(tmp_path, images, labels):
    found = load(write_npz(tmp_path, images > 127, labels)).train.images
    assert sorted(np.unique(found)) == [0, 255]


def test_a_remote_source_is_read_through_fsspec(images, labels):
    import fsspec

    buffer = io.BytesIO()
    np.savez(buffer, images=images, labels=labels)
    fsspec.filesystem("memory").pipe("/bucket/x.npz", buffer.getvalue())
    assert len(load("memory://bucket/x.npz").train.images) == 12
    with pytest.raises(DataError, match=r"memory://bucket/y\.npz"):
        load("memory://bucket/y.npz")


def test_embedded_mnist_has_a_fixed_stratified_split():
    loaded = load("mnist5k")
    assert np.bincount(loaded.train.labels).tolist() == [400] * 10
    assert np.bincount(loaded.test.labels).tolist() == [100] * 10
    assert len(loaded.train.images) == BUILTIN_DATASETS["mnist5k"].num_records
    again = load("mnist5k")
    np.testing.assert_array_equal(again.train.images, loaded.train.images)


@pytest.mark.parametrize("layout", ["mnist", "MNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_data_root_in_both_layouts(tmp_path, images, labels, layout, suffix):
    folder = tmp_path / layout
    folder.mkdir(parents=True)
    images, digits = np.concatenate([images] * 2), np.arange(24) % 10
    pack = gzip.compress if suffix else bytes
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(digits)))
    loaded = load("mnist", data_root=str(tmp_path))
    np.testing.assert_array_equal(loaded.test.images[..., 0], images)
    assert len(load("mnist", data_root=str(folder)).test.images) == 24, "the very folder of the set will do"
    for root in (tmp_path, folder):  # there the other set's files would have the same names
        with pytest.raises(DataError, match=r"DPLDM_DATA_ROOT.*Fashion-MNIST"):
            load("fashion_mnist", data_root=str(root))


def test_unknown_name_says_the_nearest():
    with pytest.raises(ConfigError, match="dataset='minst' is unknown; did you mean 'mnist'"):
        load("minst")


NAN = np.full((12, 8, 8), np.nan)
BAD = {
    "nan": (lambda i, y: {"images": NAN, "labels": y}, "768 pixels are NaN"),
    "range": (lambda i, y: {"images": i.astype(np.float64), "labels": y}, "float pixels range from"),
    "negative": (lambda i, y: {"images": i.astype(np.int16) - 300, "labels": y}, "pixels range from"),
    "text": (lambda i, y: {"images": np.full((3, 8, 8), "x"), "labels": y}, "of type"),
    "rank": (lambda i, y: {"images": i[0], "labels": y}, "3 channels|shape"),
    "channels": (lambda i, y: {"images": np.zeros((12, 8, 8, 2), np.uint8), "labels": y}, "2 channels"),
    "small": (lambda i, y: {"images": i[:, :4], "labels": y}, "4x9; sides from 8 to 64"),
    "large": (lambda i, y: {"images": np.zeros((2, 65, 65), np.uint8), "labels": y}, "65x65"),
    "label count": (lambda i, y: {"images": i, "labels": y[:-1]}, "one label per image"),
    "fractional label": (lambda i, y: {"images": i, "labels": y + 0.5}, "whole numbers"),
    "negative label": (lambda i, y: {"images": i, "labels": y - 1}, "labels range from -1"),
    "gap": (lambda i, y: {"images": i, "labels": y * 2}, r"no image of class \['1', '3'\]"),
    "no images": (lambda i, y: {"images": i[:0], "labels": y[:0]}, "no images"),
    "stray array": (lambda i, y: {"images": i, "labels": y, "x": y}, "arrays .* found"),
    "no array": (lambda i, y: {"pictures": i}, "images is needed"),
    "group count": (lambda i, y: {"images": i, "labels": y, "group": y[:3]}, "one per image is needed"),
    "missing persons": (
        lambda i, y: {"images": i, "labels": y, "group": np.where(y, y, np.nan)},
        "missing for 4 images",
    ),
    "blank persons": (
        lambda i, y: {"images": i, "labels": y, "group": np.array([b" ", b"p"] * 6)},
        "missing for 6 images",
    ),
    "persons out of pandas": (
        lambda i, y: {"images": i, "labels": y, "group": np.array(["nan", "p", "None"] * 4)},
        "missing for 8 images",
    ),
    "nameless persons": (
        lambda i, y: {"images": i, "labels": y, "group": np.array(["", "p"] * 6)},
        "missing for 6 images",
    ),
    "test without persons": (
        lambda i, y: {"images": i, "labels": y, "group": y, "test_images": i, "test_labels": y},
        r"group names the persons of the training records alone, .* \(test_group in an \.npz\)",
    ),
    "half labelled test": (lambda i, y: {"images": i, "labels": y, "test_images": i}, "for both or for none"),
    "other test format": (
        lambda i, y: {"images": i, "labels": y, "test_images": i[:, :8], "test_labels": y},
        "differs from the training set",
    ),
    "new test class": (
        lambda i, y: {"images": i, "labels": y, "test_images": i, "test_labels": y + 1},
        "0 to 2 is needed",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_refused(tmp_path, images, labels, case):
    make, message = BAD[case]
    np.savez(tmp_path / "x.npz", **make(images, labels))
    with pytest.raises(DataError, match=message):
        load(tmp_path / "x.npz")


def test_declared_classes_must_fit_and_may_be_empty(tmp_path, images, labels):
    """With numbered classes declared, whether somebody is in one is nobody's business; without, a gap is a slip."""
    with pytest.raises(DataError, match="labels range from 0 to 2"):
        load(write_npz(tmp_path, images, labels), num_classes=2)
    assert load(write_npz(tmp_path, images, labels), num_classes=4).train.schema.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("write", WRITERS)
def test_damaged_files_are_refused(tmp_path, images, labels, write):
    path = write(tmp_path, images, labels)
    target = next(path.rglob("*.png")) if path.is_dir() else path
    target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    with pytest.raises(DataError, match=target.name.replace(".", r"\.")):
        load(path)


def test_mixed_sizes_and_modes_are_refused(tmp_path, images, labels):
    folder = write_folder(tmp_path, images, labels)
    extra = folder / "class 1" / "extra.png"
    extra.write_bytes(png(images[0][:8]))
    with pytest.raises(DataError, match="differ in size"):
        load(folder)
    extra.write_bytes(png(np.zeros((10, 9, 3), np.uint8)))
    with pytest.raises(DataError, match="differ in size or channels"):
        load(folder)
    extra.write_bytes(png(np.zeros((10, 9), np.uint16)))
    with pytest.raises(DataError, match="of mode I;16"):
        load(folder)


def test_stray_files_are_refused(tmp_path, images, labels):
    folder = write_folder(tmp_path, images, labels)
    (folder / "beside.png").write_bytes(png(images[0]))
    with pytest.raises(DataError, match=r"beside\.png lies beside"):
        load(folder)
    (folder / "beside.png").rename(folder / "class 0" / "notes.txt")
    with pytest.raises(DataError, match=r"class 0/notes\.txt is no image"):
        load(folder)


@pytest.mark.parametrize("name", ["nothing.npz", "x.csv", "images-by-path.parquet", "nulls.parquet"])
def test_what_cannot_be_read_is_named(tmp_path, images, name):
    path = tmp_path / name
    if name == "x.csv":
        path.write_text("1,2")
    if name.startswith("images-by-path"):
        pq.write_table(pa.table({"image": [{"bytes": None, "path": "a.png"}]}), path)
    if name.startswith("nulls"):
        pq.write_table(pa.table({"image": [png(i) for i in images], "label": [None, *range(11)]}), path)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load(path)
