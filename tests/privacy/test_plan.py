import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy import stats

from dpldm_core.errors import AccountingError, ConfigError, DataError
from dpldm_core.privacy.accounting import NeighboringRelation, epsilon
from dpldm_core.privacy.noise import SENSITIVITY_SLACK
from dpldm_core.privacy.plan import (
    DpSgdPlan,
    GaussianRecordPlan,
    GaussianSumPlan,
    HistogramPlan,
    LabelPlan,
    ReleasePlan,
    check_expected_batch,
    chernoff_cap,
)
from dpldm_core.rng import SecretKey

KEY = SecretKey(bytes(range(32)))
FIELDS = {
    DpSgdPlan: {
        "stage": "s",
        "sample_rate": 0.1,
        "num_steps": 20,
        "max_grad_norm": 0.5,
        "noise_multiplier": 1.5,
        "truncation_probability": 1e-12,
    },
    GaussianSumPlan: {"stage": "s", "max_norm": 1.0, "noise_multiplier": 2.0},
    HistogramPlan: {"stage": "s", "num_bins": 3, "max_records_per_unit": 2, "noise_multiplier": 2.0},
    GaussianRecordPlan: {"stage": "s", "max_norm": 3.0, "noise_multiplier": 2.0},
    LabelPlan: {"stage": "s", "num_classes": 4, "labels_per_unit": 1, "noise_parameter": 0.4},
}
ALL = [(cls, field) for cls, fields in FIELDS.items() for field in fields]


def make(cls=DpSgdPlan, **changes):
    return cls(**FIELDS[cls] | changes)


class Draws(SecretKey):
    """A key whose uniform 64-bit draws are given."""

    def __init__(self, *draws):
        super().__init__(bytes(32))
        object.__setattr__(self, "draws", [np.array(d, dtype=np.uint64) for d in draws])

    def uint64(self, step, size):
        return self.draws[step]


@pytest.mark.parametrize(("cls", "field"), ALL)
def test_nothing_that_moves_epsilon_has_a_default(cls, field):
    with pytest.raises(ValidationError, match=field):
        cls(**{k: v for k, v in FIELDS[cls].items() if k != field})


@pytest.mark.parametrize("cls", FIELDS)
def test_plans_are_frozen_and_closed(cls):
    plan = make(cls)
    with pytest.raises(ValidationError, match="frozen"):
        plan.stage = "other"
    with pytest.raises(ValidationError, match="noise_multiplierr"):
        make(cls, noise_multiplierr=1.0)
    assert not any("num_units" in name or "key" in name for name in cls.model_fields)  # arguments, never fields


@pytest.mark.parametrize(
    ("cls", "field", "bad"),
    [(c, f, b) for c, f in ALL if f != "stage" for b in (0, -1, math.nan, math.inf)]
    + [(DpSgdPlan, "sample_rate", 1.01), (DpSgdPlan, "truncation_probability", 1e-8), (LabelPlan, "num_classes", 1)]
    + [(HistogramPlan, "num_bins", 1001), (HistogramPlan, "max_records_per_unit", 1.5)],
)
def test_values_out_of_range_are_refused(cls, field, bad):
    with pytest.raises(ValidationError, match=field):
        make(cls, **{field: bad})


@pytest.mark.parametrize("cls", [DpSgdPlan, GaussianSumPlan, GaussianRecordPlan])
def test_noise_and_event_read_the_same_fields(cls):
    """sigma C, never sigma: the noise drawn is what the event charges for, times the clip norm."""
    plan = make(cls)
    event = plan.event()
    inner = event.event.event if cls is DpSgdPlan else event
    norm = plan.max_grad_norm if cls is DpSgdPlan else plan.max_norm
    noise = plan.noise(KEY)
    x = noise.add(np.zeros(100_000), noise.draw(0, 100_000))
    assert x.std() == pytest.approx(inner.noise_multiplier * norm * SENSITIVITY_SLACK, rel=0.01)  # 4.5 sigma
    if cls is DpSgdPlan:
        assert (event.count, event.event.sampling_probability) == (plan.num_steps, plan.sample_rate)


# Poisson batches


@given(st.floats(2.0**-60, 1.0))
def test_a_unit_is_in_the_batch_when_its_draw_is_below_q(q):
    """The boundary in exact integers: included with the largest multiple of 2^-64 that does not exceed q."""
    edge = int(q * 2.0**64)
    assert Fraction(edge, 2**64) <= Fraction(q) < Fraction(edge + 1, 2**64)
    draws = [edge - 1, min(edge, 2**64 - 1), 0, 2**64 - 1]
    batch = make(sample_rate=q, max_batch_size=4).sample_batch(Draws(draws), 0, 4)
    assert set(batch[batch >= 0]) == {i for i, d in enumerate(draws) if d < edge}


def poisson_batches(steps, n):
    return [make(num_steps=steps).sample_batch(KEY, t, n) for t in range(steps)]


def shuffled_batches(steps, n):
    rng = np.random.default_rng(0)
    return np.concatenate([rng.permutation(n).reshape(-1, n // 10) for _ in range(steps // 10)])


@pytest.mark.parametrize(("sampler", "accept"), [(poisson_batches, True), (shuffled_batches, False)])
def test_batches_are_poisson(sampler, accept):
    """Shuffled batches reported as Poisson understate epsilon: their sizes do not vary, and units exclude each other.

    Tests at 1e-6 with 4,000 steps of 50 units, whose variance of sizes is known to 2.2 %.
    """
    steps, n, q = 4000, 50, 0.1
    member = np.zeros((n, steps))
    for t, batch in enumerate(sampler(steps, n)):
        member[batch[batch >= 0], t] = 1
    assert all(stats.binomtest(int(k), steps, q).pvalue > 1e-6 for k in member.sum(1))
    sizes = stats.chi2.cdf(np.square(member.sum(0) - q * n).sum() / (n * q * (1 - q)), steps)
    next_step = np.corrcoef(member[0, :-1], member[0, 1:])[0, 1]
    together = np.abs(np.corrcoef(member) - np.eye(n)).max()
    assert (1e-6 < sizes < 1 - 1e-6 and max(abs(next_step), together) < 6 / math.sqrt(steps)) == accept


def test_neighbours_get_the_same_batch_but_for_the_unit_added():
    """Batch size or sample rate computed from the private N: nothing changes for anybody when a unit joins."""
    plan = make(max_batch_size=60)
    joined = 0
    for step in range(50):
        small, large = (plan.sample_batch(KEY, step, n) for n in (100, 101))
        assert small.shape == large.shape == (60,)
        assert list(small[small >= 0]) == list(large[(large >= 0) & (large < 100)])
        joined += 100 in large
    assert 0 < joined < 20
    assert plan.event() == make(max_batch_size=60).event()


def test_empty_batches_stay_empty():
    """Replacing an empty batch by a random record, or skipping it, breaks the sensitivity."""
    batch = make(sample_rate=1e-9).sample_batch(KEY, 0, 100)
    assert len(batch) >= 1 and (batch == -1).all()


def test_full_rate_takes_everybody():
    assert list(make(sample_rate=1.0).sample_batch(KEY, 0, 30)) == list(range(30))


def test_steps_and_keys_have_their_own_batches():
    plan = make(sample_rate=0.5)
    batches = {tuple(plan.sample_batch(k, t, 200)) for k in (KEY, KEY.derive("x")) for t in range(5)}
    assert len(batches) == 10
    assert np.array_equal(plan.sample_batch(KEY, 3, 200), plan.sample_batch(KEY, 3, 200))  # a resumed run repeats them


def test_a_cut_batch_keeps_the_smallest_draws():
    """Independent of the records, and uniform: the draws below the threshold are exchangeable."""
    plan = make(sample_rate=2.0**-20)
    cap = plan.batch_cap(1000)
    draws = np.random.default_rng(0).permutation(1000)  # all far below q 2^64
    batch = plan.sample_batch(Draws(draws), 0, 1000)
    assert len(batch) == cap < 1000 and list(batch) == sorted(np.argsort(draws)[:cap])


@pytest.mark.parametrize("n", [1, 20, 1000, 60_000])
@pytest.mark.parametrize("q", [1e-4, 0.02, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("tau", [1e-9, 1e-18])
def test_the_cap_is_exceeded_as_rarely_as_claimed(n, q, tau):
    """Not below the exact binomial quantile, and not far above it."""
    cap = chernoff_cap(n, q, tau)
    assert stats.binom.sf(cap, n, q) <= tau
    assert cap <= stats.binom.isf(tau, n, q) + math.sqrt(n * q * (1 - q)) + 5


def test_a_cap_that_cuts_too_often_is_refused():
    needed = make().batch_cap(2000)
    assert make(max_batch_size=needed).batch_cap(2000) == needed
    with pytest.raises(ConfigError, match=f"Raise it to {needed}"):
        make(max_batch_size=needed - 1).batch_cap(2000)
    assert make(max_batch_size=10).batch_cap(8) == 10  # can never be exceeded; the shape stays the public one


def test_too_small_data_are_refused():
    check_expected_batch(make(), 160, 16)
    with pytest.raises(DataError, match="too few records"):
        check_expected_batch(make(), 159, 16)


# Labels


@pytest.mark.parametrize(("factor", "accept"), [(1.0, True), (0.95, False), (1.05, False)])
@pytest.mark.parametrize("label", [0, 3])
def test_labels_are_replaced_as_charged(label, factor, accept):
    """Chi-square at 1e-6 with 200,000 labels."""
    plan = make(LabelPlan)
    counts = np.bincount(plan.randomize(KEY, np.full(200_000, label)), minlength=4)
    p = factor * plan.noise_parameter
    expected = np.full(4, p / 4) + (1 - p) * np.eye(4)[label]
    assert (stats.chisquare(counts, 200_000 * expected).pvalue > 1e-6) == accept


def test_every_label_has_its_own_coin():
    plan = make(LabelPlan, noise_parameter=0.5)
    kept = np.array([plan.randomize(k, np.zeros(5000, int)) == 0 for k in (KEY, KEY.derive("x"))]).astype(float)
    limit = 5 / math.sqrt(5000)
    assert abs(np.corrcoef(kept)[0, 1]) < limit and abs(np.corrcoef(kept[0, :-1], kept[0, 1:])[0, 1]) < limit
    assert np.array_equal(plan.randomize(KEY, np.arange(9) % 4), plan.randomize(KEY, np.arange(9) % 4))


def test_the_coin_at_its_edges():
    half = make(LabelPlan, noise_parameter=0.5)
    coins = Draws([0, 2**63 - 1, 2**63, 2**64 - 1], [5, 6, 7, 8])
    assert list(half.randomize(coins, np.full(4, 3))) == [1, 2, 3, 3]
    assert list(make(LabelPlan, noise_parameter=1.0).randomize(Draws([2**64 - 2], [6]), np.array([3]))) == [2]


@pytest.mark.parametrize("p", [0.05, 0.4, 0.95])
@pytest.mark.parametrize("k", [2, 10])
def test_the_likelihood_ratio_of_labels_is_the_epsilon_charged(p, k):
    """Warner (1965): epsilon = ln(1 + k (1 - p) / p); the accountant finds it at any small delta."""
    plan = make(LabelPlan, num_classes=k, noise_parameter=p)
    exact = math.log((1 - p + p / k) / (p / k))
    assert exact - 1e-6 <= epsilon([plan.event()], 1e-12, NeighboringRelation.REPLACE_ONE) <= exact + 2e-3


@pytest.mark.parametrize("label", [-1, 4, 2**40])
def test_a_label_out_of_range_never_appears(label):
    assert set(make(LabelPlan).randomize(KEY, np.full(100, label))) <= set(range(4))


# The release


def release(*mechanisms, relation="ADD_OR_REMOVE_ONE"):
    return ReleasePlan(mechanisms=mechanisms, delta=1e-5, relation=relation, unit_of_privacy="one record")


def test_every_mechanism_is_charged():
    parts = (make(stage="a"), make(GaussianSumPlan, stage="b"), make(stage="c", noise_multiplier=3.0))
    plan = release(*parts)
    assert plan.stage_events() == [(m.stage, m.event()) for m in parts]
    assert plan.epsilon() == epsilon([m.event() for m in parts], 1e-5, NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert plan.epsilon(NeighboringRelation.REPLACE_ONE) > plan.epsilon() > release(*parts[:2]).epsilon()
    assert plan.mechanism("c") is parts[2]
    with pytest.raises(KeyError):
        plan.mechanism("d")


@pytest.mark.parametrize(
    "change",
    [
        {"mechanisms": (make(noise_multiplier=1.6),)},
        {"mechanisms": (make(num_steps=21),)},
        {"mechanisms": (make(sample_rate=0.11),)},
        {"mechanisms": (make(max_grad_norm=0.6),)},
        {"mechanisms": (make(stage="t"),)},
        {"mechanisms": (make(), make(GaussianSumPlan))},
        {"delta": 2e-5},
        {"relation": "REPLACE_ONE"},
        {"unit_of_privacy": "one person"},
    ],
)
def test_the_digest_names_the_whole_plan(change):
    plan = release(make())
    again = ReleasePlan.model_validate_json(plan.model_dump_json())
    assert again == plan and again.digest() == plan.digest()
    assert plan.model_copy(update=change).digest() != plan.digest()


@pytest.mark.parametrize("cls", FIELDS)
def test_a_stored_plan_comes_back_as_the_mechanism_it_was(cls):
    plan = release(make(cls), relation="REPLACE_ONE")
    back = TypeAdapter(ReleasePlan).validate_json(plan.model_dump_json()).mechanisms[0]
    assert type(back) is cls and back == plan.mechanisms[0] and back.event() == plan.mechanisms[0].event()


@pytest.mark.parametrize("mechanism", [make(LabelPlan), make(GaussianRecordPlan)], ids=["labels", "records"])
def test_outputs_that_show_their_number_have_no_add_or_remove_statement(mechanism):
    plan = release(mechanism)
    with pytest.raises(AccountingError):
        plan.epsilon()
    assert release(mechanism, relation="REPLACE_ONE").epsilon() > 0
