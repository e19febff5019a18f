"""Deformed images, which a teacher's network learns from."""

import pytest
import torch

from dpldm_core.models.classifier import deform


def bright_squares(n, side=28, channels=1):
    pixels = torch.zeros(n, channels, side, side, dtype=torch.uint8)
    pixels[:, :, side // 4 : side // 2, side // 4 : side // 2] = 255
    return pixels


def deformed(pixels, deformation, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return deform(pixels, deformation).double()


def test_deformation_moves_each_image_a_little_by_itself():
    pixels = bright_squares(400)
    moved = deformed(pixels, 1.0)
    assert moved.shape == pixels.shape and float(moved.min()) >= 0 and float(moved.max()) <= 255
    mass = moved.sum((1, 2, 3)) / pixels.double().sum((1, 2, 3))
    assert 0.7 < mass.min() < 0.95 and 1.05 < mass.max() < 1.4, "scaled by up to 8 % a side"
    places = torch.arange(28, dtype=torch.double) + 0.5
    for axis in (2, 3):  # rows, columns
        centre = (moved.sum((1, 5 - axis)) @ places) / moved.sum((1, 2, 3))
        offset = centre - 10.5
        assert abs(float(offset.mean())) < 0.2, "to all sides alike"
        assert 0.3 < float(offset.std()) < 1.0 and float(offset.abs().max()) < 3
    assert len(torch.unique(moved, dim=0)) == 400


def test_a_stronger_deformation_moves_further_and_0_does_nothing():
    pixels = bright_squares(50)
    distances = [float((deformed(pixels, d) - pixels).abs().mean()) for d in (0.0, 0.5, 1.0, 2.0)]
    assert distances[0] == 0 and distances == sorted(distances) and distances[1] > 0


def test_given_draws_deform_all_images_alike():
    pixels = torch.rand(5, 1, 28, 28).expand(5, -1, -1, -1) * 255
    way = torch.tensor([1.0, 0.3, 0.6, 0.2, 0.9, 0.1])
    before = torch.random.get_rng_state()
    moved = deform(pixels, 1.0, way)
    assert torch.equal(torch.random.get_rng_state(), before), "no draw of its own"
    for i in range(5):
        assert torch.equal(deform(pixels[i : i + 1], 1.0, way)[0], moved[i])
    assert not torch.equal(deform(pixels, 1.0, 1 - way), moved)
    middle = deform(pixels, 1.0, torch.full((6,), 0.5))  # no turn, no scale, no shift
    assert float((middle - pixels).abs().max()) < 0.01


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (64, 3)])
def test_deformation_fits_any_image_and_moves_all_channels_alike(side, channels):
    pixels = bright_squares(12, side, channels)
    moved = deformed(pixels, 1.0)
    assert moved.shape == pixels.shape and not torch.equal(moved, pixels.double())
    assert all(torch.equal(moved[:, c], moved[:, 0]) for c in range(channels))
    assert torch.equal(deformed(pixels, 1.0), moved) and not torch.equal(deformed(pixels, 1.0, seed=1), moved)
