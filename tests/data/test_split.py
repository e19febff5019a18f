import numpy as np
import pytest
from scipy.stats import binomtest

from dpldm_core.data.schema import ImageSchema, Records
from dpldm_core.data.split import HELDOUT_SHARE, split_records
from dpldm_core.errors import DataError


def records(images, groups=None):
    schema = ImageSchema(height=8, width=8, channels=1, class_names=("a",), labelled=False, grouped=groups is not None)
    return Records(images, np.zeros(len(images), np.int64), groups, schema)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (600, 8, 8, 1), dtype=np.uint8)


def content(part):
    return {image.tobytes() for image in part.images}


def test_share_and_key(images):
    train, heldout = split_records(records(images), key=b"k", by="content")
    assert len(train.images) + len(heldout.images) == 600
    assert binomtest(len(heldout.images), 600, HELDOUT_SHARE).pvalue > 1e-4
    again = split_records(records(images), key=b"k", by="content")[1]
    other = split_records(records(images), key=b"other", by="content")[1]
    assert content(again) == content(heldout) != content(other)


def test_removing_a_record_moves_no_other(images):
    """ADD_OR_REMOVE_ONE: the training sets of neighbours are neighbours."""
    train, heldout = split_records(records(images), key=b"k", by="content")
    less = records(np.delete(images, 17, axis=0))
    train2, heldout2 = split_records(less, key=b"k", by="content")
    assert len((content(train) | content(heldout)) - (content(train2) | content(heldout2))) == 1
    assert content(train2) <= content(train) and content(heldout2) <= content(heldout)


def test_replacing_a_record_keeps_the_sizes(images):
    """REPLACE_ONE: how many records each side has is the same for neighbours. By content it is not."""
    sizes = {"content": set(), "position": set()}
    for value in range(40):
        changed = images.copy()
        changed[17] = value
        for by, seen in sizes.items():
            seen.add(len(split_records(records(changed), key=b"k", by=by)[0].images))
    assert len(sizes["position"]) == 1 and len(sizes["content"]) == 2


@pytest.mark.parametrize("by", ["content", "position"])
def test_persons_stay_together(images, by):
    groups = np.array([f"p{i % 50}" for i in range(600)])
    train, heldout = split_records(records(images, groups), key=b"k", by=by)
    assert not set(train.groups) & set(heldout.groups)


def test_too_few_to_split(images):
    with pytest.raises(DataError, match="too few"):
        split_records(records(images[:1]), key=b"k", by="content")
