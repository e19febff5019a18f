import numpy as np
import pytest
from scipy.stats import binomtest

from dpldm_core.evaluation.memorisation import measure_memorisation


@pytest.fixture(scope="module")
def three(digits):
    """599 digits each: fresh, training, held-out."""
    return digits[0][:599], digits[0][599:1198], digits[0][1198:]


def test_fresh_images_are_not_flagged(three):
    """Negative control. |z| < 4 has a false-alarm rate of 6e-5."""
    fresh, train, heldout = three
    result = measure_memorisation(fresh, train, heldout, seed=0)
    assert (result.num_images, result.num_records) == (599, 599)
    assert abs(result.share_closer_to_training - 0.5) < 4 * result.standard_error
    assert 0.01 < result.standard_error < 0.05
    assert result.p_value > 6e-5
    assert result.duplicates_of_training == result.duplicates_of_heldout == result.duplicates_of_any_training == 0
    assert result.median_distance_to_training == pytest.approx(result.median_distance_to_heldout, rel=0.05)


def test_a_copy_of_the_training_set_is_flagged(three):
    _, train, heldout = three
    result = measure_memorisation(train, train, heldout, seed=0)
    assert result.share_closer_to_training == pytest.approx(1)
    assert result.p_value < 1e-12
    assert result.duplicates_of_training == result.duplicates_of_any_training == 599
    assert result.duplicates_of_heldout == 0
    assert result.median_distance_to_training == 0


def test_a_noisy_copy_is_flagged_though_nothing_is_equal(three):
    fresh, train, heldout = three
    noisy = (0.8 * train + 0.2 * fresh).astype(np.uint8)
    result = measure_memorisation(noisy, train, heldout, seed=0)
    assert result.share_closer_to_training > 0.95
    assert result.p_value < 1e-12
    assert result.duplicates_of_training == 0


def test_sides_are_not_mixed_up(three):
    _, train, heldout = three
    result = measure_memorisation(heldout[:400], train, heldout, seed=0)
    assert result.share_closer_to_training == 0
    assert (result.duplicates_of_heldout, result.duplicates_of_training) == (400, 0)


def test_ties_count_half(three):
    fresh, train, _ = three
    result = measure_memorisation(fresh, train, train, seed=0)
    assert result.share_closer_to_training == pytest.approx(0.5)
    assert result.p_value == pytest.approx(1)


def test_distances_are_exact(three):
    fresh, train, heldout = (part[:60] for part in three)
    result = measure_memorisation(fresh, train, heldout, seed=0)

    def nearest(records):
        gaps = fresh[:, None].astype(np.int64) - records[None]
        return np.sqrt(np.square(gaps).sum(axis=(2, 3, 4)).min(axis=1))

    to_train, to_heldout = nearest(train), nearest(heldout)
    assert result.share_closer_to_training == pytest.approx((to_train < to_heldout).mean())
    assert result.median_distance_to_training == pytest.approx(np.median(to_train) / 255, rel=1e-12)
    assert result.median_distance_to_heldout == pytest.approx(np.median(to_heldout) / 255, rel=1e-12)


def test_a_copy_outside_the_subset_is_still_counted(three):
    _, train, heldout = three
    result = measure_memorisation(train[:50], train, heldout[:10], seed=0)
    assert result.num_records == 10
    assert result.duplicates_of_any_training == 50
    assert result.duplicates_of_training < 10


def test_subsets_are_seeded(three):
    fresh, train, heldout = three
    first, again, other = (measure_memorisation(fresh, train, heldout, seed=s, max_images=200) for s in (0, 0, 1))
    assert (first.num_images, first.num_records) == (200, 200)
    assert first == again != other


def test_another_source_of_held_out_records_is_not_taken_for_memorisation(digits):
    """Held-out records are darker. Fresh images lie nearer to training records then; the reference tells why."""
    images, _ = digits
    dark = (0.7 * images[:250]).astype(np.uint8)
    fresh, train = images[250:750], images[750:]
    result = measure_memorisation(fresh, train, dark, seed=0)
    assert result.share_closer_to_training > 0.7
    assert abs(result.share_closer_to_training - result.reference_share) < 4 * result.standard_error
    copied = measure_memorisation(train[:500], train, dark, seed=0)
    assert copied.duplicates_of_any_training == 500
    alone = measure_memorisation(fresh, train[:499], dark, seed=0)
    assert alone.reference_share == 0.5  # 249 records are left over for 250: too few
    assert alone.p_value < 1e-6


def test_copies_are_flagged_against_the_reference_too(digits):
    images, _ = digits
    train, heldout = images[:1200], images[1200:]
    result = measure_memorisation(train[:600], train, heldout, seed=0)
    assert 0.4 < result.reference_share < 0.6
    assert result.share_closer_to_training > result.reference_share + 0.15
    assert result.p_value < 1e-6


def test_p_values_hold_where_a_binomial_test_does_not():
    """Images crowd around 30 places, so they share nearest records; no record is memorised.

    At level 0.05 over 300 runs the rejections have standard deviation 3.8: 15 +- 4 of these. The binomial test, which
    takes the images for independent, is the negative control.
    """
    rng = np.random.default_rng(0)
    found, binomial = 0, 0
    for seed in range(300):
        records = rng.integers(0, 256, (200 + 150 * (seed % 2), 2, 2, 1), dtype=np.uint8)  # with and without a rest
        places = rng.integers(0, 250, (30, 2, 2, 1), dtype=np.uint8)
        images = places[rng.integers(0, 30, 600)] + rng.integers(0, 6, (600, 2, 2, 1), dtype=np.uint8)
        result = measure_memorisation(images, records[100:], records[:100], seed=seed)
        found += result.p_value < 0.05
        binomial += binomtest(round(600 * result.share_closer_to_training), 600).pvalue < 0.05
    assert found <= 30
    assert binomial > 100
