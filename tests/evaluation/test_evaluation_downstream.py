import numpy as np
import pytest
import torch

from dpldm_core.evaluation.downstream import held_out_accuracy, predicted_right
from dpldm_core.models.classifier import SmallCnn, train_classifier


def accuracy_of_training(images, labels, test_images, test_labels, *, num_classes, **settings):
    classifier = train_classifier(images, labels, num_classes=num_classes, **settings)
    return held_out_accuracy(classifier, test_images, test_labels, num_classes=num_classes)


def test_it_learns_digits_and_not_shuffled_labels(digits):
    """Chance is 0.1, known to 0.012 on 597 test images; the control must stay below 0.2."""
    images, labels = digits
    test = images[1200:], labels[1200:]
    settings = {"num_classes": 10, "num_epochs": 8, "seed": 0}
    learnt = accuracy_of_training(images[:1200], labels[:1200], *test, **settings)
    shuffled = np.random.default_rng(1).permutation(labels[:1200])
    control = accuracy_of_training(images[:1200], shuffled, *test, **settings)
    assert learnt.accuracy > 0.93
    assert control.accuracy < 0.2
    assert min(learnt.per_class) > 0.8


def test_it_sees_colour():
    """Gray means are equal: only the channel tells the classes apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    images = rng.integers(0, 60, (600, 8, 8, 3), dtype=np.uint8)
    images[np.arange(600), :, :, labels] += 120
    settings = {"num_classes": 3, "num_epochs": 5, "seed": 0}
    halves = images[:300], labels[:300], images[300:], labels[300:]
    assert accuracy_of_training(*halves, **settings).accuracy > 0.98


def test_read_only_arrays_as_parquet_gives_them_are_taken(digits):
    images, labels = digits[0][:20], digits[1][:20]
    for array in (images, labels):
        array.setflags(write=False)
    accuracy_of_training(images, labels, images, labels, num_classes=10, num_epochs=1, seed=0)


def test_equal_seeds_give_equal_weights_and_leave_the_global_state_alone(digits):
    images, labels = digits[0][:300], digits[1][:300]
    before = torch.random.get_rng_state()
    first, again, other = (
        train_classifier(images, labels, num_classes=10, num_epochs=1, seed=seed).state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


class Constant(SmallCnn):
    def forward(self, pixels):
        return torch.tensor([0.0, 1.0, 0.0]).expand(len(pixels), 3)


def test_per_class_accuracy_of_a_constant_guess():
    labels = np.array([1, 1, 1, 0])
    result = held_out_accuracy(Constant((8, 8, 1), 3), np.zeros((4, 8, 8, 1), np.uint8), labels, num_classes=3)
    assert result.accuracy == 0.75
    assert result.per_class == (0.0, 1.0, None)


@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 31, 3), (28, 28, 1), (64, 64, 3)])
@pytest.mark.parametrize("num_images", [2, 129])
def test_every_size_of_image_and_set_works(shape, num_images):
    """129 is one more than a batch: no batch may hold a single image."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, *shape), dtype=np.uint8)
    labels = rng.integers(0, 4, num_images)
    model = train_classifier(images, labels, num_classes=4, num_epochs=1, seed=0)
    pixels = torch.from_numpy(images[:2]).permute(0, 3, 1, 2)
    assert not model.training
    assert model(pixels).shape == (2, 4)
    assert model.features(pixels).shape == (2, 128)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_prediction_is_a_function_of_its_record_alone(digits):
    """Bit for bit in any company and order; what a released count sees of another record is nothing."""
    images, labels = digits
    classifier = train_classifier(images[:1000], labels[:1000], num_classes=10, num_epochs=4, seed=0)
    test, truth = images[1000:1200], labels[1000:1200]
    right = predicted_right(classifier, test, truth)
    seen = []
    classifier.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    order = np.random.default_rng(0).permutation(200)[:90]
    assert np.array_equal(predicted_right(classifier, test[order], truth[order]), right[order])
    assert seen == [1] * 90
    assert right.dtype == bool and 0.5 < right.mean() < 1
    assert right.mean() == held_out_accuracy(classifier, test, truth, num_classes=10).accuracy
    assert len(predicted_right(classifier, test[:0], truth[:0])) == 0
