"""What a plan was made for is what the stages read."""

import numpy as np
import pytest

from dpldm_core.data.ingest import ingest_dataset
from dpldm_core.data.schema import read_records
from dpldm_core.data.sources import load_dataset
from dpldm_core.errors import DataError


def write(path, **changes):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    arrays = {"images": images, "labels": np.arange(40) % 4, "group": np.arange(40) // 2} | changes
    np.savez(path, **{name: values for name, values in arrays.items() if values is not None})
    return str(path)


def ingest(dataset, folder, schema, relation="ADD_OR_REMOVE_ONE"):
    options = {"data_root": None, "cache_dir": None, "num_classes": None}
    return ingest_dataset(dataset, folder, split_key=b"k", relation=relation, schema=schema, **options)


@pytest.mark.parametrize("relation", ["ADD_OR_REMOVE_ONE", "REPLACE_ONE"])
def test_neighbours_of_the_plans_relation_stay_neighbours_in_the_split(tmp_path, relation):
    """Removed, an image moves no other; replaced, it leaves the sizes, which released latents tell, as they are."""
    whole = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)

    def training(images):
        path = write(tmp_path / "x.npz", images=images, labels=np.zeros(len(images), int), group=None)
        records = read_records(ingest(path, tmp_path, None, relation)[0])
        return [image.tobytes() for image in records.images]

    before = training(whole)
    for row in range(12):
        if relation == "REPLACE_ONE":
            assert len(training(np.concatenate([whole[:row], 255 - whole[row : row + 1], whole[row + 1 :]]))) == len(
                before
            )
        else:
            left = training(np.delete(whole, row, axis=0))
            assert left == [image for image in before if image != whole[row].tobytes()]


@pytest.mark.parametrize("changes", [{"group": None}, {"labels": np.arange(40) % 2}, {"labels": None}])
def test_data_whose_format_changed_since_it_was_planned_for_are_refused(tmp_path, changes):
    """Without its column of persons, each record would be clipped by itself and the promise be that of a person."""
    dataset = write(tmp_path / "x.npz")
    schema = load_dataset(dataset, data_root=None, cache_dir=None, num_classes=None).train.schema
    assert len(ingest(dataset, tmp_path, schema)) == 2
    write(tmp_path / "x.npz", **changes)
    with pytest.raises(DataError, match="changed since the release was opened"):
        ingest(dataset, tmp_path / "again", schema)
    assert not (tmp_path / "again").exists()
