import copy

import numpy as np
import pytest
import torch

from dpldm_core.models.classifier import SmallCnn, train_classifier
from dpldm_core.models.teacher import LinearTeacher
from tests.tasks.conftest import drawings

ALIKE = torch.full((3,), 1 / 3)


@pytest.fixture(scope="module")
def fitted():
    images, labels = drawings(240)
    network = train_classifier(images, labels, num_classes=3, num_epochs=1, seed=0)
    teacher = LinearTeacher(images.shape[1:], 3, num_features=20, ridge=1.0)
    teacher.take(network, images)
    return teacher, network, images


def test_hidden_layers_end_with_the_features_before_the_logits(fitted):
    _, network, images = fitted
    pixels = torch.from_numpy(images[:5]).permute(0, 3, 1, 2)
    with torch.no_grad():
        hidden = network.hidden(pixels)
        assert hidden.shape == (5, network.num_hidden)
        assert torch.equal(hidden[:, -128:], network.features(pixels))


def test_features_have_unit_norm_and_do_not_depend_on_the_batch(fitted):
    teacher, _, images = fitted
    features = teacher.features(images)
    assert features.shape == (len(images), 21)
    assert torch.allclose(features.norm(dim=1), torch.ones(len(images)), atol=1e-5)
    assert torch.allclose(teacher.features(images[3:5]), features[3:5], atol=1e-5)


def test_kept_directions_are_the_strongest_and_are_scaled_by_the_ridge(fitted):
    """Closed form: a direction of variance v has variance v / (v + ridge mean v) afterwards."""
    teacher, _, images = fitted
    standard = ((teacher._hidden(images) - teacher.mean) * teacher.scale).double()
    everything = torch.linalg.eigvalsh(standard.T @ standard / len(standard))[-20:]
    projected = standard @ teacher.basis.double()
    expected = everything / (everything + teacher.ridge * everything.mean())
    assert torch.allclose(projected.square().mean(0), expected, rtol=1e-3, atol=1e-6)


def test_only_the_head_is_trainable(fitted):
    teacher, _, _ = fitted
    assert [name for name, p in teacher.named_parameters() if p.requires_grad] == ["head.weight"]


def test_fewer_hidden_units_than_features_keep_them_all():
    shape = (8, 8, 1)
    teacher = LinearTeacher(shape, 2, num_features=10_000, ridge=1.0)
    hidden = SmallCnn(shape, 2).num_hidden
    assert teacher.head.weight.shape == (2, hidden + 1)
    assert teacher.features(np.zeros((3, *shape), np.uint8)).shape == (3, hidden + 1)


def test_an_image_that_is_not_clear_is_named_by_all_of_its_views(fitted):
    """By the average of what the teacher says of each; a small image has no room to move in."""
    small, _, tiny = fitted
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 1), dtype=np.uint8)
    teacher = LinearTeacher(images.shape[1:], 3, num_features=20, ridge=1.0)
    teacher.take(teacher.network, images)
    teacher.head.weight.data.normal_(std=12.0, generator=torch.Generator().manual_seed(0))
    wide = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    side = images.shape[1]
    views = [wide[:, y : y + side, x : x + side] for y, x in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))]
    said = torch.stack([teacher.head(teacher.features(view)).softmax(1) for view in views]).detach()
    alone, votes = said[0].argmax(1).numpy(), said.sum(0).argmax(1).numpy()
    ranked = said[0].sort(dim=1).values
    clear = (ranked[:, -1] - ranked[:, -2] >= 0.95).numpy()
    assert (alone != votes)[clear].any() and (alone != votes)[~clear].any()
    assert np.array_equal(teacher.classify(images, ALIKE, num_views=5), np.where(clear, alone, votes))
    assert np.array_equal(teacher.classify(images, ALIKE), alone)
    assert np.array_equal(teacher.classify(images[clear], ALIKE, num_views=5), alone[clear]), "none is left to look at"
    assert np.array_equal(small.classify(tiny, ALIKE, num_views=5), small.classify(tiny, ALIKE))


@pytest.mark.parametrize("num_views", [1, 5])
def test_a_class_is_not_named_more_often_for_being_frequent(fitted, num_views):
    """A head whose logits grew by the logarithms of some shares names every image as the head without them does."""
    images = np.random.default_rng(0).integers(0, 256, (200, 28, 28, 1), dtype=np.uint8)
    teacher = LinearTeacher(images.shape[1:], 3, num_features=20, ridge=1.0)
    teacher.take(teacher.network, images)
    teacher.head.weight.data.normal_(std=4.0, generator=torch.Generator().manual_seed(0))
    shares, head = torch.tensor([0.9, 0.09, 0.01]), copy.deepcopy(teacher.head)
    alike = teacher.classify(images, ALIKE, num_views=num_views)
    teacher.head = torch.nn.Sequential(head, Shifted(shares.log()))
    assert np.array_equal(teacher.classify(images, shares, num_views=num_views), alike)
    frequent = teacher.classify(images, ALIKE, num_views=num_views)
    assert (frequent == 0).sum() > (alike == 0).sum() > 0 and (frequent == 2).sum() < (alike == 2).sum()


class Shifted(torch.nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, logits):
        return logits + self.by
