import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance

from dpldm_core.evaluation.features import FeatureExtractor, draw_features
from dpldm_core.evaluation.frechet import frechet_distance, frechet_distances


def gaussian(rng, mean, covariance, n=200):
    """Draws moved and stretched to have exactly this mean and covariance."""
    x = rng.normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x, rowvar=False)), x.T)
    return (np.linalg.cholesky(covariance) @ x).T + mean


def test_diagonal_covariances():
    """|m1 - m2|^2 + sum (s1 - s2)^2."""
    rng = np.random.default_rng(0)
    a = gaussian(rng, np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    b = gaussian(rng, np.array([1.0, 1.0, 0.0]), np.diag([4.0, 4.0, 25.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=1e-12)


def test_covariances_that_do_not_commute():
    """For 2x2 matrices the trace of sqrt(M) is sqrt(tr M + 2 sqrt(det M))."""
    rng = np.random.default_rng(1)
    p, q = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    a, b = gaussian(rng, np.zeros(2), p), gaussian(rng, np.array([3.0, -1.0]), q)
    root = np.sqrt(np.trace(p @ q) + 2 * np.sqrt(np.linalg.det(p @ q)))
    assert frechet_distance(a, b) == pytest.approx(10 + 5 + 6 - 2 * root, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_fewer_images_than_features():
    """Points m +- u have covariance 2uu', so the distance is |m1 - m2|^2 + 2|u|^2 + 2|v|^2 - 4|u.v|."""
    u, v, shift = np.random.default_rng(2).normal(size=(3, 50))
    a, b = np.stack([u, -u]), np.stack([shift + v, shift - v])
    expected = shift @ shift + 2 * u @ u + 2 * v @ v - 4 * abs(u @ v)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(a, a) < 1e-12


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_agrees_with_pytorch_fid():
    rng = np.random.default_rng(3)
    a = (rng.normal(size=(400, 30)) @ rng.normal(size=(30, 30))).astype(np.float32)
    b = (rng.normal(size=(300, 30)) @ rng.normal(size=(30, 30)) + 1).astype(np.float32)
    moments = [m for x in (a, b) for m in (x.astype(float).mean(0), np.cov(x.astype(float), rowvar=False))]
    assert frechet_distance(a, b) == pytest.approx(calculate_frechet_distance(*moments), rel=1e-9)


def coarse(pixels):
    """Means of 2x2 squares: 16 features."""
    return torch.nn.functional.avg_pool2d(pixels.float() / 255, 2).flatten(1)


def distances_of(*images, max_images):
    drawn = draw_features(FeatureExtractor("fd_coarse", coarse), *images, max_images=max_images, seed=0)
    return frechet_distances(drawn)


def test_fresh_real_images_reach_the_floor_and_noisy_ones_do_not(digits):
    images, _ = digits
    fresh, train, heldout = images[:500], images[500:1200], images[1200:]
    noise = np.random.default_rng(0).integers(0, 40, fresh.shape, dtype=np.uint8)
    good = distances_of(fresh, train, heldout, max_images=5000)
    bad = distances_of(np.maximum(fresh, noise), train, heldout, max_images=5000)
    assert (good.metric, good.num_features, good.num_images, good.num_images_all) == ("fd_coarse", 16, 500, 500)
    assert 0.5 * good.floor < good.distance < 2 * good.floor
    assert 0.5 * good.floor < good.distance_to_heldout < 2 * good.floor
    assert bad.floor == good.floor
    assert bad.distance > 5 * good.floor
    assert bad.distance_to_heldout > 5 * good.floor


def test_sizes_are_equal_and_the_larger_distance_is_apart(digits):
    images, _ = digits
    result = distances_of(images[:800], images[800:1600], images[1600:1700], max_images=500)
    assert (result.num_images, result.num_images_all) == (100, 500)
    assert result.distance_all < result.distance  # the bias of few images
    few = distances_of(images[:800], images[800:1600], images[1600:1700], max_images=50)
    assert (few.num_images, few.num_images_all) == (50, 50)
    assert few.distance_all == few.distance
