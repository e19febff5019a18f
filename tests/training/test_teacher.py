import copy
import dataclasses

import numpy as np
import pytest
import torch

from dpldm_core.config import PerformanceConfig, TeacherConfig
from dpldm_core.models.classifier import train_classifier
from dpldm_core.privacy.clipping import BookKeeping
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey
from dpldm_core.training.private import train_private
from dpldm_core.training.teacher import build_teacher, learn_features, teacher_loss, train_head
from dpldm_core.training.units import Units
from tests.tasks.conftest import drawings

N, STEPS = 400, 40
KEY, ALIKE = SecretKey(bytes(range(32))), torch.full((3,), 1 / 3)
LOOP = {
    "num_classes": 3,
    "performance": PerformanceConfig(
        physical_batch_size=64, clip_backend="book_keeping", matmul_precision="float32", checkpoint_every=10
    ),
    "binding": "b",
}
CONFIG = TeacherConfig.model_validate(
    {
        "num_synthetic": 200,
        "num_epochs": 1,
        "deformation": 0.0,
        "num_views": 1,
        "num_features": 16,
        "ridge": 1.0,
        "expected_batch_size": 200,
        "dp_sgd": {
            "sample_rate": 0.5,
            "num_steps": STEPS,
            "max_grad_norm": 0.5,
            "learning_rate": 30.0,
            "ema_decay": 0.9,
            "budget_share": 0.5,
        },
    }
)


def plan_of(sigma=1.0):
    return DpSgdPlan(
        stage="train_teacher",
        sample_rate=0.5,
        num_steps=STEPS,
        max_grad_norm=0.5,
        noise_multiplier=sigma,
        truncation_probability=1e-12,
        max_batch_size=N,
    )


@pytest.fixture(scope="module")
def learnt():
    """A teacher that has learnt its features, and units whose true classes are not those it was shown."""
    images, labels = drawings(N)
    teacher = build_teacher(CONFIG, images.shape[1:], 3)
    learn_features(teacher, images[:200], labels[:200], CONFIG, seed=0)
    private = torch.from_numpy((labels + 1) % 3)
    return teacher, images, Units(teacher.features(images), private, torch.arange(N)[:, None])


@pytest.fixture
def setting(learnt):
    teacher, images, units = learnt
    return copy.deepcopy(teacher), images, units


def accuracy(teacher, images, units):
    return (teacher.classify(images, ALIKE) == units.class_labels.numpy()).mean()


def test_the_head_learns_what_the_private_labels_say(setting):
    teacher, images, units = setting
    train_head(teacher, units, plan_of(sigma=1.0), KEY, CONFIG, **LOOP)
    assert accuracy(teacher, images, units) > 0.9


def test_noise_that_drowns_the_gradients_teaches_nothing(setting):
    """The negative control: the head depends on the data through the noisy sums alone."""
    teacher, images, units = setting
    train_head(teacher, units, plan_of(sigma=3000.0), KEY, CONFIG, **LOOP)
    assert accuracy(teacher, images, units) < 0.7


def test_features_are_those_of_the_synthetic_images_alone(setting):
    """The network is that which the public trainer makes of them, whatever the private images are."""
    images, labels = drawings(200)
    teacher = build_teacher(CONFIG, images.shape[1:], 3)
    learn_features(teacher, images, labels, CONFIG, seed=5)
    before = {name: value.clone() for name, value in teacher.state_dict().items() if not name.startswith("head")}
    same = train_classifier(images, labels, num_classes=3, num_epochs=CONFIG.num_epochs, seed=5).state_dict()
    assert all(torch.equal(teacher.network.state_dict()[name], value) for name, value in same.items())
    features = teacher.features(images)
    units = Units(features, torch.from_numpy(labels), torch.arange(len(labels))[:, None])
    train_head(teacher, units, plan_of().model_copy(update={"max_batch_size": 200}), KEY, CONFIG, **LOOP)
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())


def test_the_network_learns_from_deformed_images(setting):
    images, labels = drawings(60)
    config = CONFIG.model_copy(update={"num_epochs": 2, "deformation": 1.5})
    teacher = build_teacher(config, images.shape[1:], 3)
    learn_features(teacher, images, labels, config, seed=5)
    same = train_classifier(images, labels, num_classes=3, num_epochs=2, seed=5, deformation=1.5).state_dict()
    plain = train_classifier(images, labels, num_classes=3, num_epochs=2, seed=5).state_dict()
    assert all(torch.equal(teacher.network.state_dict()[name], value) for name, value in same.items())
    assert not all(torch.equal(plain[name], value) for name, value in same.items())


def test_neighbours_differ_by_one_clipped_gradient(setting):
    teacher, _, units = setting
    plan = plan_of()
    book = BookKeeping(teacher.head, max_norm=plan.max_grad_norm)

    def clipped(chosen):
        batch = chosen.fetch(torch.arange(chosen.num_units))
        everybody = torch.ones(chosen.num_units, dtype=torch.bool)
        return torch.cat([s.flatten() for s in book.clipped_sum(lambda: teacher_loss(teacher.head, batch), everybody)])

    everybody = clipped(units)
    for left_out in (0, 7, 399):
        kept = torch.tensor([i for i in range(N) if i != left_out])
        without = clipped(dataclasses.replace(units, table=units.table[kept]))
        assert float((everybody - without).norm()) <= plan.max_grad_norm * (1 + 1e-4)
        assert float((everybody - without).norm()) > 0


def test_the_step_is_that_of_momentum_on_the_mean_gradient(setting):
    """The public expected batch divides the sum: the number of records is nowhere in the step."""
    teacher, _, units = setting
    sigma = 1e-6
    seen = {}

    def spy(model, private, plan, key, **options):
        seen.update(options)
        return train_private(model, private, plan, key, **options)

    train_head(teacher, units, plan_of(sigma=sigma), KEY, CONFIG, train=spy, **LOOP)
    assert seen["momentum"] == 0.9
    assert seen["learning_rate"] == pytest.approx(30.0 * sigma * 0.5 / 200)


def test_a_killed_head_resumes_bit_for_bit(setting, tmp_path):
    teacher, images, units = setting

    def fresh():
        return copy.deepcopy(teacher)

    class KilledError(Exception):
        pass

    def kill(done, total):
        if done == 25:
            raise KilledError

    whole, parts = fresh(), fresh()
    train_head(whole, units, plan_of(), KEY, CONFIG, **LOOP)
    with pytest.raises(KilledError):
        train_head(parts, units, plan_of(), KEY, CONFIG, checkpoint=tmp_path, on_step=kill, **LOOP)
    resumed = fresh()
    train_head(resumed, units, plan_of(), KEY, CONFIG, checkpoint=tmp_path, **LOOP)
    assert torch.equal(whole.head.weight, resumed.head.weight)
    assert np.array_equal(whole.classify(images, ALIKE), resumed.classify(images, ALIKE))
