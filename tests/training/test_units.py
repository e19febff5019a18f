import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from dpldm_core.data.schema import ImageSchema, Records, write_records
from dpldm_core.presets import resolve_config
from dpldm_core.privacy.clipping import BookKeeping
from dpldm_core.privacy.plan import GaussianRecordPlan, LabelPlan, ReleasePlan
from dpldm_core.rng import SecretKey
from dpldm_core.training.building import new_autoencoder
from dpldm_core.training.stages import Run, extract_latents
from dpldm_core.training.state import save_model
from dpldm_core.training.units import Units

TABLE = torch.tensor([[0, 1, 2], [3, -1, -1], [4, 5, -1], [7, -1, -1]])  # record 6 is left out


def make_units(seed=0, table=TABLE):
    g = torch.Generator().manual_seed(seed)
    return Units(torch.randn(8, 4, generator=g), torch.arange(8) % 3, table)


def test_fetch_gives_each_unit_its_own_records():
    units = make_units()
    batch = units.fetch(torch.tensor([2, 0, 2]))
    assert torch.equal(batch["values"][1], units.values[:3])
    assert torch.equal(batch["values"][0, :2], units.values[4:6]) and torch.equal(
        batch["values"][2], batch["values"][0]
    )
    assert torch.equal(batch["class_labels"][1], units.class_labels[:3])
    third = 1 / 3
    torch.testing.assert_close(batch["weights"], torch.tensor([[0.5, 0.5, 0], [third] * 3, [0.5, 0.5, 0]]))
    assert units.num_units == 4


def test_copies_stay_with_their_record_and_give_its_unit_no_more_weight():
    units = make_units()
    copies = torch.cat([units.values + 10, units.values + 20])
    more = units.with_copies(copies)
    assert more.num_units == units.num_units and torch.equal(units.table, TABLE)
    batch, plain = more.fetch(torch.arange(4)), units.fetch(torch.arange(4))
    torch.testing.assert_close(batch["weights"], plain["weights"].repeat(1, 3) / 3)
    for turn, columns in enumerate(batch["values"].split(3, dim=1)):
        there = plain["weights"] > 0
        torch.testing.assert_close(columns[there], plain["values"][there] + 10 * turn)
        assert (columns[~there] == 0).all()
    assert torch.equal(batch["class_labels"], plain["class_labels"].repeat(1, 3))


def clipped(units, model, i):
    """Clipped gradient of unit i, as it goes into the sum when all units are in the batch."""
    book = BookKeeping(model, max_norm=0.1)
    batch = units.fetch(torch.arange(units.num_units))
    mask = torch.arange(units.num_units) == i

    def loss():
        return (model(batch["values"]).square().mean(2) * batch["weights"]).sum(1)

    return torch.cat([s.flatten() for s in book.clipped_sum(loss, mask)])


@pytest.mark.parametrize("value", [0.0, 1e6, math.nan, math.inf, 3e38], ids=str)
def test_what_a_unit_holds_moves_no_other_unit(value):
    """Neighbour property: unit 0 is replaced by anything; what the others contribute stays, bit for bit."""
    torch.manual_seed(0)
    model, before, after = nn.Linear(4, 2), make_units(), make_units()
    after.values[:3] = value
    for i in (1, 2, 3):
        assert torch.equal(clipped(before, model, i), clipped(after, model, i)), f"unit {i}"
        assert float(clipped(after, model, i).norm()) == pytest.approx(0.1, rel=1e-3)


def test_a_unit_of_many_records_is_clipped_as_one():
    torch.manual_seed(0)
    for i in range(4):
        assert float(clipped(make_units(), nn.Linear(4, 2), i).norm()) <= 0.1 * (1 + 1e-6)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_the_weights_of_a_unit_sum_to_one(sizes):
    """In float32, and never beyond what the noise's slack covers."""
    table = torch.full((len(sizes), 9), -1)
    starts = np.cumsum([0, *sizes])
    for i, size in enumerate(sizes):
        table[i, :size] = torch.arange(starts[i], starts[i + 1])
    units = Units(torch.zeros(starts[-1] + 2, 1), torch.zeros(starts[-1] + 2, dtype=torch.int64), table)
    weights = units.record_weights().double()
    sums = [float(weights[starts[i] : starts[i + 1]].sum()) for i in range(len(sizes))]
    assert sums == pytest.approx([1.0] * len(sizes), abs=1e-6)
    assert float(weights[-2:].abs().sum()) == 0.0  # records beyond the bound on a person are not used
    fetched = units.fetch(torch.arange(len(sizes)))["weights"].double().sum(1)
    torch.testing.assert_close(fetched, torch.ones(len(sizes)).double(), atol=1e-6, rtol=0)


def test_the_probe_holds_nothing_private():
    """It has the shapes of the units and the values of a public generator, whatever the units hold."""
    probes = []
    for units in (make_units(0), make_units(1, table=TABLE[:2])):
        units.values[5] = math.nan
        probes.append(units.probe(3, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(probes[0][k], probes[1][k]) for k in ("values", "class_labels", "weights"))
    batch = make_units().fetch(torch.arange(4))
    assert {k: (v.shape, v.dtype) for k, v in probes[0].items()} == {k: (v.shape, v.dtype) for k, v in batch.items()}
    torch.testing.assert_close(probes[0]["weights"].sum(1), torch.ones(4))
    assert 0 in probes[0]["weights"] and float(probes[0]["weights"].max()) == 1.0  # padded units are checked as well


def test_to_moves_everything():
    moved = make_units().to("meta")
    assert {t.device.type for t in (moved.values, moved.class_labels, moved.table)} == {"meta"}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Releases latents of persons with the given numbers of records (mode noised_latents, replace-one)."""
    folder = tmp_path_factory.mktemp("released")
    config = resolve_config(
        dataset="d",
        epsilon=8.0,
        delta=1e-5,
        preset="smoke",
        num_samples=0,
        latent_mechanism="noised_latents",
        public_num_records=None,
        overrides={"max_records_per_group": 3},
    )
    schema = ImageSchema(height=8, width=8, channels=1, class_names=("a", "b"), labelled=True, grouped=True)
    model = new_autoencoder(config, schema)
    save_model(model, folder / "autoencoder")
    plan = ReleasePlan(
        mechanisms=(
            GaussianRecordPlan(stage="extract_latents", max_norm=2.0, noise_multiplier=1.0),
            LabelPlan(stage="extract_labels", num_classes=2, labels_per_unit=3, noise_parameter=0.5),
        ),
        delta=1e-5,
        relation="REPLACE_ONE",
        unit_of_privacy="one person",
    )

    def release(sizes, seed=0):
        rng = np.random.default_rng(seed)
        n = sum(sizes)
        groups = np.repeat(np.arange(len(sizes)), sizes)
        images = rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
        write_records(folder / "records", Records(images, np.zeros(n, np.int64), groups, schema))
        key = SecretKey(bytes(range(32)))
        path, noise_std = extract_latents(
            folder / "records", folder / "autoencoder", config, plan, lambda s: key.derive(s), Run(folder)
        )
        return load_file(path), noise_std

    return release


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 2), (3, 3, 3), (5, 1, 9)])
def test_released_latents_do_not_tell_how_many_records_a_person_has(released, sizes):
    """Replace-one keeps the number of persons; everything else about a person may change, their records' number too."""
    tensors, noise_std = released(sizes)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {"latents": (9, 16), "labels": (9,), "table": (9, 1)}
    assert noise_std == 2.0


def test_replacing_a_person_moves_their_own_rows_alone(released):
    """Record and replay under replace-one: person 2 gets other images, more of them, and the others' rows stay."""
    a, b = (released(sizes)[0]["latents"].double() for sizes in ((3, 2, 1), (3, 2, 3)))
    assert torch.equal(a[:6], b[:6])
    assert 0 < float((a[6:] - b[6:]).norm()) <= 2 * 2.0 * 1.001
