import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from dpldm_core.evaluation.features import DrawnFeatures
from dpldm_core.evaluation.precision_recall import NEIGHBOURHOOD, precision_recall


def drawn(synthetic, train, heldout):
    return DrawnFeatures("fd_test", *(part.astype(np.float32) for part in (synthetic, train, heldout)))


def share_within(points, centres):
    """Of the points, those that lie in the ball of some centre: by sorting, one point at a time."""
    radii = NearestNeighbors(n_neighbors=NEIGHBOURHOOD).fit(centres).kneighbors()[0][:, -1]  # without the centre itself
    return np.mean([(np.linalg.norm(centres - point, axis=1) <= radii).any() for point in points])


@pytest.fixture
def normal():
    return np.random.default_rng(0).normal(size=(3, 300, 2))


def test_it_is_the_paper_s_definition(normal):
    synthetic, train, heldout = (part.astype(np.float32).astype(float) for part in normal * [[[1.5]], [[1]], [[1]]])
    found = precision_recall(drawn(synthetic, train, heldout))
    assert found.precision == pytest.approx(share_within(synthetic, train))
    assert found.recall == pytest.approx(share_within(train, synthetic))
    assert found.heldout_precision == pytest.approx(share_within(heldout, train))
    assert found.heldout_recall == pytest.approx(share_within(train, heldout))
    assert (found.metric, found.num_images, found.neighbourhood) == ("fd_test", 300, 3)
    assert found.precision < found.heldout_precision - 0.05, "half of what is drawn too wide lies outside"


def test_one_mode_of_two_is_precise_and_recalls_half(normal):
    _, train, heldout = normal
    two_modes = np.where(np.arange(300)[:, None] % 2, 0.0, 50.0)
    found = precision_recall(drawn(heldout, train + two_modes, heldout + two_modes))
    assert found.precision > 0.9 and found.recall == pytest.approx(0.5, abs=0.05)
    assert found.heldout_precision > 0.9 and found.heldout_recall > 0.9


def test_far_features_that_differ_little(normal):
    """In float32, squared norms of 1e7 would swallow distances of 1."""
    synthetic, train, heldout = normal
    near, far = (
        precision_recall(drawn(*(part + shift for part in (synthetic, train, heldout)))) for shift in (0, 4096)
    )
    assert far.precision == pytest.approx(near.precision, abs=0.01)
    assert far.recall == pytest.approx(near.recall, abs=0.01)


def test_equal_sides_and_too_few_images(normal):
    synthetic, train, heldout = normal
    found = precision_recall(drawn(synthetic, train, heldout[:100]))
    assert found.num_images == 100
    assert found.recall == pytest.approx(share_within(train[:100], synthetic[:100]), abs=0.02)
    assert precision_recall(drawn(synthetic, train, heldout[:NEIGHBOURHOOD])) is None
    assert precision_recall(drawn(synthetic, train, heldout[: NEIGHBOURHOOD + 1])) is not None
