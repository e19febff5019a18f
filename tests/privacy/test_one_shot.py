import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from dpldm_core.privacy.class_statistics import (
    CLASS_MEANS,
    ClassMeans,
    class_contributions,
    noisy_class_covariances,
    noisy_class_means,
)
from dpldm_core.privacy.noise import GRID, SENSITIVITY_SLACK
from dpldm_core.privacy.one_shot import (
    MEAN,
    SECOND,
    clip_rows,
    histogram_counts,
    moment_contributions,
    noisy_histogram,
    noisy_mean,
    noisy_pca,
    noisy_records,
    noisy_sum,
    sum_contributions,
)
from dpldm_core.privacy.plan import GaussianRecordPlan, GaussianSumPlan, HistogramPlan
from dpldm_core.rng import SecretKey

KEY = SecretKey(bytes(range(32)))
CLASSES, DIM, R = 3, 4, 2.0
ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)


def sum_plan(noise_multiplier=1.5, **changes):
    return GaussianSumPlan(**{"stage": "s", "max_norm": 1.0, "noise_multiplier": noise_multiplier} | changes)


def record_plan(noise_multiplier=1.5, max_norm=2.0):
    return GaussianRecordPlan(stage="s", max_norm=max_norm, noise_multiplier=noise_multiplier)


def released(counts=None):
    """Counts and means as an earlier mechanism may have released them: public, and of no data at hand."""
    means = torch.linspace(-1.0, 1.0, CLASSES * DIM).view(CLASSES, DIM)
    return ClassMeans(torch.full((CLASSES,), 100.0) if counts is None else counts, means, 1.0, 1.0)


# What is taken off first, and the parts of a record's unit of norm
PARTS = {"means": (torch.zeros(CLASSES, DIM), CLASS_MEANS), "covariances": (released().means, SECOND)}
either = pytest.mark.parametrize("part", PARTS)


def contributions(part, vectors, labels, weights):
    centres, split = PARTS[part]
    return class_contributions(vectors, labels, weights, centres, clip_norm=R, split=split)


def class_means(plan, vectors, labels, weights=None, key=KEY):
    weights = torch.ones(len(vectors)) if weights is None else weights
    return noisy_class_means(plan, key, vectors, labels, weights, num_classes=CLASSES, clip_norm=R)


def class_covariances(plan, vectors, labels, weights=None, earlier=None):
    weights = torch.ones(len(vectors)) if weights is None else weights
    return noisy_class_covariances(plan, KEY, vectors, labels, weights, earlier or released(), clip_norm=R)


def data(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, DIM, generator=g), torch.randint(CLASSES, (n,), generator=g)


@either
@settings(derandomize=True)
@given(
    records=arrays(np.float32, (5, DIM), elements=ANY_FLOAT),
    labels=arrays(np.int64, 5, elements=st.integers(-2, CLASSES + 1)),
    count=st.integers(1, 5),
)
def test_one_unit_moves_the_sum_by_at_most_one(part, records, labels, count):
    """Any records, whatever they hold and claim to be, of a person with ``count`` of them, added to any data."""
    vectors, classes = data(20)
    weights = torch.ones(20)
    before = contributions(part, vectors, classes, weights)
    unit = torch.full((count,), 1.0) / count
    after = contributions(
        part,
        torch.cat([vectors, torch.from_numpy(records[:count])]),
        torch.cat([classes, torch.from_numpy(labels[:count])]),
        torch.cat([weights, unit]),
    )
    assert float((after - before).norm()) <= 1 + 1e-6


@either
def test_the_sensitivity_is_reached(part):
    """The bound is no looser than it must be: a vector at or beyond the clip norm moves the sum by exactly one."""
    for vector in (torch.tensor([R, 0, 0, 0]), torch.tensor([3.0, -40.0, 1.0, 5.0])):
        row = (PARTS[part][0][1] + vector)[None]
        assert float(contributions(part, row, torch.tensor([1]), torch.ones(1)).norm()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_record_that_is_not_finite_harms_nobody(bad):
    vectors, labels = data(6)
    vectors[2, 1] = bad
    means, covariances = class_means(sum_plan(), vectors, labels), class_covariances(sum_plan(), vectors, labels)
    assert all(bool(torch.isfinite(x).all()) for x in (means.counts, means.means, covariances.covariances))
    own_noise = noisy_records(record_plan(), KEY, vectors, 1)
    assert bool(torch.isfinite(own_noise).all())
    keep = torch.arange(6) != 2
    assert torch.equal(own_noise[keep], noisy_records(record_plan(), KEY, data(6)[0], 1)[keep])


def test_record_and_replay_on_neighbours():
    """With the noise replayed, what is released of D and of D' differs by what the record adds: nothing else moved."""
    vectors, labels = data(40)
    a, b = (class_means(sum_plan(), vectors[:n], labels[:n]) for n in (40, 39))
    added = CLASS_MEANS.count * torch.nn.functional.one_hot(labels[39], CLASSES)
    torch.testing.assert_close(CLASS_MEANS.count * (a.counts - b.counts), added.double(), atol=2 * GRID, rtol=0)
    assert (a.count_std, a.mean_std) == (b.count_std, b.mean_std)
    other_labels = torch.arange(CLASSES) != labels[39]
    assert torch.equal(a.means[other_labels], b.means[other_labels])
    c, d = (class_covariances(sum_plan(), vectors[:n], labels[:n]) for n in (40, 39))
    assert c.sum_std == d.sum_std
    assert torch.equal(c.covariances[other_labels], d.covariances[other_labels])
    row = clip_rows(vectors[39:] - released().means[labels[39]], R)
    moved = 100 * (c.covariances - d.covariances)[labels[39]]
    torch.testing.assert_close(moved, row.T @ row, atol=4 * R**2 * GRID, rtol=0)


def test_means_and_covariances_are_the_data_s_own_when_noise_is_negligible():
    """Slow reference, record by record, with records beyond the clip norm among them."""
    vectors, labels = data(300)
    vectors[:50] *= 5
    means = class_means(sum_plan(1e-6), vectors, labels)
    covariances = class_covariances(sum_plan(1e-6), vectors, labels, earlier=means)
    for y in range(CLASSES):
        own = vectors[labels == y].double().numpy()
        rows = [v * min(1.0, R / np.linalg.norm(v)) for v in own]
        assert float(means.counts[y]) == pytest.approx(len(rows), abs=1e-3)
        np.testing.assert_allclose(means.means[y], np.mean(rows, 0), atol=1e-5)
        centred = [v - means.means[y].numpy() for v in own]
        rows = [v * min(1.0, R / np.linalg.norm(v)) for v in centred]
        expected = np.mean([np.outer(v, v) for v in rows], 0)
        np.testing.assert_allclose(covariances.covariances[y], expected, atol=1e-5)


def test_weights_divide_a_unit_among_its_records():
    vectors, labels = data(30)
    double = [torch.cat([x, x]) for x in (vectors, labels)]
    for release in (class_means, class_covariances):
        once, twice = release(sum_plan(1e-6), vectors, labels), release(sum_plan(1e-6), *double, torch.full((60,), 0.5))
        for field in ("counts", "means", "covariances"):
            if hasattr(once, field):
                torch.testing.assert_close(getattr(once, field), getattr(twice, field), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def noise_only():
    """Zero vectors, each of a class of its own that counts a million, so that dividing by the noisy count is exact."""
    n, classes = 1e6, 10_000
    vectors, labels, weights = torch.zeros(classes, DIM), torch.arange(classes), torch.full((classes,), n)
    means = noisy_class_means(sum_plan(), KEY, vectors, labels, weights, num_classes=classes, clip_norm=R)
    zeros = ClassMeans(torch.full((classes,), n), vectors, 1.0, 1.0)
    found = noisy_class_covariances(sum_plan(), KEY.derive("2"), vectors, labels, weights, zeros, clip_norm=R)
    row, column = torch.triu_indices(DIM, DIM, 1)
    return {
        "counts": (means.counts - n) / means.count_std,
        "means": means.means * n / means.mean_std,
        "off_diagonal": found.covariances[:, row, column] * n / found.sum_std,
        "diagonal": found.covariances.diagonal(dim1=1, dim2=2) * n / found.sum_std / math.sqrt(2.0),
    }


@pytest.mark.parametrize(("factor", "accept"), [(1.0, True), (0.95, False), (1.05, False)])
@pytest.mark.parametrize("part", ["counts", "means", "off_diagonal", "diagonal"])
def test_every_statistic_carries_the_noise_that_it_states(noise_only, part, factor, accept):
    """Chi-square at 1e-4 with 10,000 to 60,000 draws: standard deviations are known to 0.7 % at least."""
    x = noise_only[part].flatten().numpy() / SENSITIVITY_SLACK
    cdf = stats.chi2.cdf(np.square(x / factor).sum(), x.size)
    assert (2 * min(cdf, 1 - cdf) > 1e-4) == accept
    assert len(np.unique(x)) > 0.999 * x.size  # nobody shares a draw; grid points repeat by chance
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / math.sqrt(x.size)


def test_the_noise_of_class_statistics_is_what_the_plan_charges():
    """Sensitivity 1 of the stacked sum, so its noise is the multiplier; each part is read back by its factor."""
    means, covariances = class_means(sum_plan(1.5), *data(5)), class_covariances(sum_plan(1.5), *data(5))
    assert means.count_std * CLASS_MEANS.count == pytest.approx(1.5)
    assert means.mean_std * CLASS_MEANS.mean / R == pytest.approx(1.5)
    assert covariances.sum_std * math.sqrt(2.0) / R**2 == pytest.approx(1.5)


@pytest.mark.parametrize("release", [class_means, class_covariances])
def test_class_statistics_of_another_sensitivity_are_refused(release):
    with pytest.raises(ValueError, match="sensitivity 1"):
        release(sum_plan(max_norm=2.0), *data(5))


def test_counts_of_empty_classes_are_noisy_too():
    """Class counts read from the data are a read: an empty class is as noisy as any other, and nothing is skipped."""
    vectors, labels = data(50)
    means = class_means(sum_plan(), vectors, torch.zeros_like(labels))
    assert len(torch.unique(means.counts)) == CLASSES and bool((means.counts != means.counts.round()).all())
    assert means.means.shape == (CLASSES, DIM)
    covariances = class_covariances(sum_plan(), vectors, torch.zeros_like(labels)).covariances
    assert covariances.shape == (CLASSES, DIM, DIM) and bool((covariances.flatten(1) != 0).all())


def test_a_class_of_nobody_is_not_blown_up_by_a_small_count():
    """Released counts may be negative or near 0: the divisor is at least 1."""
    nobody = torch.zeros(0, DIM), torch.zeros(0, dtype=torch.int64)
    few = released(torch.tensor([-7.0, 1e-3, 0.5]))
    found = class_covariances(sum_plan(), *nobody, earlier=few)
    assert float(found.covariances.abs().max()) < 6 * math.sqrt(2.0) * found.sum_std


# Records with noise of their own


@pytest.mark.parametrize("per_unit", [1, 3])
@pytest.mark.parametrize(("factor", "accept"), [(1.0, True), (0.95, False), (1.05, False)])
def test_every_record_has_its_own_noise_of_the_unit_s_norm(per_unit, factor, accept):
    """Chi-square at 1e-6 with 20,000 draws; the noise is the same for any number of records per unit."""
    x = noisy_records(record_plan(), KEY, torch.zeros(2000, 10), per_unit).double().numpy()
    cdf = stats.chi2.cdf(np.square(x / (factor * 1.5 * 2.0 * SENSITIVITY_SLACK)).sum(), x.size)
    assert (2 * min(cdf, 1 - cdf) > 1e-6) == accept
    assert len(np.unique(x)) > 0.999 * x.size  # float32 repeats by chance
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 5 / math.sqrt(x.size)


@settings(derandomize=True)
@given(arrays(np.float32, (3, DIM), elements=ANY_FLOAT), st.floats(0.1, 10.0))
def test_a_unit_of_many_records_stays_within_one_norm(records, max_norm):
    clipped = clip_rows(torch.from_numpy(records), max_norm / math.sqrt(3))
    assert float(clipped.norm()) <= max_norm * (1 + 1e-12)


def test_replacing_a_record_touches_its_own_row_alone():
    """Record and replay under replace-one: other rows are equal bit for bit, this one moves by at most 2 C."""
    vectors = data(20)[0]
    other = vectors.clone()
    other[7] = -1e6
    vectors[7] = 1e6
    a, b = (noisy_records(record_plan(), KEY, v, 1).double() for v in (vectors, other))
    moved = (a - b).norm(dim=1)
    assert bool((moved[torch.arange(20) != 7] == 0).all())
    assert 2 * 2.0 * 0.999 < float(moved[7]) <= 2 * 2.0 * (1 + 1e-3)


def test_released_records_are_the_clipped_ones_when_noise_is_negligible():
    vectors = data(20)[0] * 3
    got = noisy_records(record_plan(1e-6, max_norm=2.0), KEY, vectors, 4)
    expected = torch.stack([v * min(1.0, 1.0 / float(v.norm())) for v in vectors])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


# Sum, mean and principal axes

EXACT = {
    "sum": lambda v, w: sum_contributions(v, w, max_norm=R) / R,
    "mean": lambda v, w: moment_contributions(v, w, clip_norm=R, split=MEAN),
    "pca": lambda v, w: moment_contributions(v, w, clip_norm=R, split=SECOND),
}
RELEASED = {
    "sum": lambda v, w, z=1.5, key=KEY: noisy_sum(sum_plan(z, max_norm=R), key, v, w),
    "mean": lambda v, w, z=1.5, key=KEY: noisy_mean(sum_plan(z), key, v, w, clip_norm=R).mean,
    "pca": lambda v, w, z=1.5, key=KEY: noisy_pca(sum_plan(z), key, v, w, clip_norm=R, num_components=2).values,
}


@pytest.mark.parametrize("exact", EXACT.values(), ids=EXACT)
@settings(derandomize=True)
@given(records=arrays(np.float32, (5, DIM), elements=ANY_FLOAT), count=st.integers(1, 5))
def test_one_unit_moves_what_is_summed_by_at_most_its_sensitivity(exact, records, count):
    """Any records, whatever they hold, of a person with ``count`` of them, added to any data; and the bound is met."""
    vectors, weights = data(20)[0], torch.ones(20)
    unit = torch.from_numpy(records[:count])
    after = exact(torch.cat([vectors, unit]), torch.cat([weights, torch.full((count,), 1.0 / count)]))
    assert float((after - exact(vectors, weights)).norm()) <= 1 + 1e-6
    for vector in (torch.tensor([[R, 0, 0, 0]]), torch.tensor([[3.0, -40.0, 1.0, 5.0]])):
        assert float(exact(vector, torch.ones(1)).norm()) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("release", RELEASED.values(), ids=RELEASED)
def test_one_shot_mechanisms_survive_any_record_and_no_record(release):
    vectors = data(6)[0]
    vectors[2, 1] = math.nan
    kept = torch.arange(6) != 2
    assert bool(torch.isfinite(release(vectors, torch.ones(6))).all())
    if release is not RELEASED["mean"]:  # that one counts the record, as a zero
        torch.testing.assert_close(release(vectors, torch.ones(6)), release(vectors[kept], torch.ones(5)))
    nobody = release(torch.zeros(0, DIM), torch.zeros(0))
    assert bool(torch.isfinite(nobody).all()) and bool((nobody != 0).all())


@pytest.mark.parametrize("release", RELEASED.values(), ids=RELEASED)
def test_a_key_is_one_release(release):
    """Record and replay: the same key gives the same release, another key another one."""
    vectors, weights = data(40)[0], torch.ones(40)
    assert torch.equal(release(vectors, weights), release(vectors, weights))
    assert not torch.equal(release(vectors, weights), release(vectors, weights, key=KEY.derive("x")))


def test_record_and_replay_of_a_sum():
    vectors, weights = data(40)[0], torch.ones(40)
    moved = RELEASED["sum"](vectors, weights) - RELEASED["sum"](vectors[:39], weights[:39])
    torch.testing.assert_close(moved, clip_rows(vectors[39:], R)[0], atol=2 * R * GRID, rtol=0)


def test_sum_mean_and_axes_are_the_data_s_own_when_noise_is_negligible():
    """Slow reference, with records beyond the clip norm and unequal weights among them."""
    vectors = data(300)[0] * torch.tensor([3.0, 1.0, 0.5, 0.2])
    weights = torch.where(torch.arange(300) < 100, 0.5, 1.0)
    rows = [v * min(1.0, R / np.linalg.norm(v)) for v in vectors.double().numpy()]
    total = sum(w * v for w, v in zip(weights.tolist(), rows, strict=True))
    np.testing.assert_allclose(RELEASED["sum"](vectors, weights, 1e-7), total, atol=1e-4)
    mean = noisy_mean(sum_plan(1e-7), KEY, vectors, weights, clip_norm=R)
    assert mean.count == pytest.approx(250, abs=1e-4)
    np.testing.assert_allclose(mean.mean, total / 250, atol=1e-6)
    found = noisy_pca(sum_plan(1e-7), KEY, vectors, weights, clip_norm=R, num_components=3)
    second = sum(w * np.outer(v, v) for w, v in zip(weights.tolist(), rows, strict=True))
    values, basis = np.linalg.eigh(second)
    np.testing.assert_allclose(found.values, values[::-1][:3], rtol=1e-5)
    np.testing.assert_allclose(np.abs(found.axes.numpy().T @ basis[:, ::-1][:, :3]), np.eye(3), atol=1e-3)


@pytest.fixture(scope="module")
def one_shot_noise():
    """Releases of no records, each with a key of its own: nothing but noise, in units of what is stated."""
    keys, nobody = [KEY.derive(str(i)) for i in range(2500)], (torch.zeros(0, 8), torch.zeros(0))
    sums = torch.stack([noisy_sum(sum_plan(max_norm=R), k, *nobody) for k in keys])
    means = [noisy_mean(sum_plan(), k, *nobody, clip_norm=R) for k in keys]
    axes = [noisy_pca(sum_plan(), k, *nobody, clip_norm=R, num_components=8) for k in keys]
    matrices = torch.stack([a.axes @ torch.diag(a.values) @ a.axes.T / a.second_std for a in axes])
    row, column = torch.triu_indices(8, 8, 1)
    more = [KEY.derive("count", str(i)) for i in range(10_000)]
    alone = [noisy_mean(sum_plan(), k, torch.zeros(0, 1), torch.zeros(0), clip_norm=R) for k in more]
    return {
        "sum": sums / (1.5 * R),
        "mean": torch.stack([m.mean * max(m.count, 1.0) / m.mean_std for m in means]),
        "off_diagonal": matrices[:, row, column],
        "diagonal": matrices.diagonal(dim1=1, dim2=2) / math.sqrt(2.0),
        "count": torch.tensor([m.count / m.count_std for m in alone]),
    }


@pytest.mark.parametrize(("factor", "accept"), [(1.0, True), (0.95, False), (1.05, False)])
@pytest.mark.parametrize("part", ["sum", "mean", "off_diagonal", "diagonal", "count"])
def test_every_coordinate_carries_the_noise_that_is_stated(one_shot_noise, part, factor, accept):
    """Chi-square at 1e-6 with 10,000 draws or more: standard deviations are known to 0.7 % at least."""
    x = one_shot_noise[part].numpy().ravel() / SENSITIVITY_SLACK
    cdf = stats.chi2.cdf(np.square(x / factor).sum(), x.size)
    assert (2 * min(cdf, 1 - cdf) > 1e-6) == accept
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / math.sqrt(x.size)


def test_a_mean_of_nobody_is_not_blown_up_by_a_small_count():
    """Division by the noisy count, which may be negative or near 0: the divisor is at least 1."""
    found = [
        noisy_mean(sum_plan(), KEY.derive(str(i)), torch.zeros(0, 2), torch.zeros(0), clip_norm=R) for i in range(99)
    ]
    assert any(m.count < 0 for m in found) and any(m.count > 0 for m in found)
    assert max(float(m.mean.abs().max()) for m in found) < 6 * found[0].mean_std


@pytest.mark.parametrize("name", ["mean", "pca"])
def test_stacked_parts_of_another_sensitivity_are_refused(name):
    mechanism, extra = {"mean": (noisy_mean, {}), "pca": (noisy_pca, {"num_components": 1})}[name]
    with pytest.raises(ValueError, match="sensitivity 1"):
        mechanism(sum_plan(max_norm=R), KEY, data(5)[0], torch.ones(5), clip_norm=R, **extra)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_axes_that_do_not_exist_are_refused(k):
    with pytest.raises(ValueError, match="num_components"):
        noisy_pca(sum_plan(), KEY, data(5)[0], torch.ones(5), clip_norm=R, num_components=k)


# Histograms


def histogram_plan(records=3, bins=4, noise_multiplier=2.0):
    return HistogramPlan(stage="s", num_bins=bins, max_records_per_unit=records, noise_multiplier=noise_multiplier)


def table_of(sizes, width):
    """Units with the given numbers of records, in order."""
    rows, start = [], 0
    for size in sizes:
        rows.append([*range(start, start + size), *[-1] * (width - size)])
        start += size
    return np.array(rows, dtype=np.int64).reshape(len(sizes), width)


@settings(derandomize=True)
@given(st.lists(st.integers(-2, 6), min_size=1, max_size=3), st.lists(st.integers(-2, 6), min_size=1, max_size=3))
def test_one_unit_moves_the_counts_by_at_most_its_records(unit, other):
    """Any unit added: at most M in L2 (and in L1); replaced by any other: below 2 M, which the accountant charges.
    With the noise replayed, what is released moves by exactly that."""
    plan, bins = histogram_plan(), [0, 1, 1, 3]
    tables = [table_of([1] * 4 + [size] * (size > 0), 3) for size in (len(unit), len(other), 0)]
    datas = [np.array(bins + part) for part in (unit, other, [])]
    exact = [histogram_counts(plan, d, t) for d, t in zip(datas, tables, strict=True)]
    assert np.abs(exact[0] - exact[2]).sum() <= 3 and np.linalg.norm(exact[0] - exact[1]) <= 2 * 3
    released = [noisy_histogram(plan, KEY, d, t) for d, t in zip(datas, tables, strict=True)]
    assert np.array_equal(released[0] - released[2], exact[0] - exact[2])


def test_the_sensitivity_of_counts_is_reached():
    plan = histogram_plan()
    assert np.linalg.norm(histogram_counts(plan, np.array([2, 2, 2]), table_of([3], 3))) == 3


def test_counts_are_those_of_the_table():
    """Slow reference; records outside the table or without a bin are not counted."""
    bins = np.random.default_rng(0).integers(-1, 5, 40)
    table = table_of([3, 2, 1] * 5, 3)
    inside = [int(bins[i]) for i in table.ravel() if i >= 0]
    assert histogram_counts(histogram_plan(), bins, table).tolist() == [inside.count(k) for k in range(4)]
    assert histogram_counts(histogram_plan(), np.zeros(0, np.int64), table_of([], 3)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("factor", "accept"), [(1.0, True), (0.95, False), (1.05, False)])
def test_every_count_carries_the_noise_of_the_plan(factor, accept):
    """Chi-square at 1e-6 with 10,000 counts, whose standard deviation is known to 0.7 %; of empty bins too."""
    plan = histogram_plan(records=2, bins=1000, noise_multiplier=4.0)
    empty = np.zeros(0, np.int64), table_of([], 2)
    x = np.concatenate([noisy_histogram(plan, KEY.derive(str(i)), *empty) for i in range(10)])
    cdf = stats.chi2.cdf(np.square(x).sum() / (factor**2 * (8**2 + 2)), x.size)
    assert (2 * min(cdf, 1 - cdf) > 1e-6) == accept
    assert x.dtype == np.int64 and abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / math.sqrt(x.size)


@pytest.mark.parametrize("table", [np.zeros((2, 4), np.int64), np.arange(3)])
def test_more_records_of_a_unit_than_are_charged_for_are_refused(table):
    with pytest.raises(ValueError, match="charges for"):
        noisy_histogram(histogram_plan(), KEY, np.zeros(9, np.int64), table)
