import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpldm_core.data.schema import ImageSchema, Records, group_table, read_records, write_records
from dpldm_core.errors import DataError


def records(n, *, groups=None, channels=1):
    rng = np.random.default_rng(n)
    schema = ImageSchema(
        height=8, width=9, channels=channels, class_names=("a", "b"), labelled=True, grouped=groups is not None
    )
    images = rng.integers(0, 256, (n, 8, 9, channels), dtype=np.uint8)
    return Records(images, rng.integers(0, 2, n), None if groups is None else np.asarray(groups), schema)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("groups", [None, ["p1", "p0", "p1"], [7, 3, 3]])
def test_round_trip(tmp_path, channels, groups):
    written = records(3, groups=groups, channels=channels)
    write_records(tmp_path / "r.parquet", written)
    back = read_records(tmp_path / "r.parquet")
    np.testing.assert_array_equal(back.images, written.images)
    np.testing.assert_array_equal(back.labels, written.labels)
    assert back.schema == written.schema
    assert back.groups is None if groups is None else back.groups.tolist() == [str(g) for g in groups]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    """The ledger binds a stage's key to the file's digest: a retry must find the same bytes."""
    for name in ("a", "b"):
        write_records(tmp_path / name, records(5))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"", lambda b: b"PAR1" + b[5:]])
def test_damaged_records_are_refused(tmp_path, damage):
    path = tmp_path / "r.parquet"
    write_records(path, records(5))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"r\.parquet"):
        read_records(path)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 4))
def test_group_table_holds_the_first_records_of_each_person_once(groups, max_records):
    table = group_table(records(len(groups), groups=groups), max_records)
    rows = [[i for i in row if i >= 0] for row in table.tolist()]
    slow = [[i for i, g in enumerate(groups) if g == person][:max_records] for person in dict.fromkeys(groups)]
    assert rows == slow


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_another_name_moves_no_row(groups, data):
    """Under REPLACE_ONE a person may become one of any name: what others release must stay in its place."""
    person = data.draw(st.sampled_from(groups))
    other = data.draw(st.sampled_from(["a", "z"]))  # before or behind all others in the alphabet
    renamed = [other if g == person else f"p{g}" for g in groups]
    tables = [group_table(records(len(groups), groups=names), 3) for names in ([f"p{g}" for g in groups], renamed)]
    assert np.array_equal(*tables)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.data())
def test_removing_a_person_changes_no_other_persons_row(groups, data):
    """Neighbour property of the unit of privacy."""
    person = data.draw(st.sampled_from(groups))
    kept = [i for i, g in enumerate(groups) if g != person]
    full = group_table(records(len(groups), groups=groups), 3)
    if not kept:
        return
    less = group_table(records(len(kept), groups=[groups[i] for i in kept]), 3)
    mapped = [[kept[i] for i in row if i >= 0] for row in less.tolist()]
    others = [[i for i in row if i >= 0] for row in full.tolist() if groups[row[0]] != person]
    assert mapped == others
