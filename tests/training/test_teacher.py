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
from dpldm_core.training.teacher import build_teacher, deformed_copies, learn_features, teacher_loss, train_head
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
        "num_copies": 0,
        "fine_tuned": False,
        "num_features": 16,
        "ridge": 1.0,
        "expected_batch_size": 200,
        "first_share": 0.0,
        "from_prior": True,
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
TUNED = CONFIG.model_copy(
    update={"fine_tuned": True, "dp_sgd": CONFIG.dp_sgd.model_copy(update={"learning_rate": 0.01})}
)


FREE = CONFIG.model_copy(update={"num_epochs": 3, "dp_sgd": CONFIG.dp_sgd.model_copy(update={"budget_share": 0.0})})


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


def learnt(config):
    """A teacher that has learnt its features, and units whose true classes are not those it was shown."""
    images, labels = drawings(N)
    teacher = build_teacher(config, images.shape[1:], 3)
    learn_features(teacher, images[:200], labels[:200], config, seed=0)
    private = torch.from_numpy((labels + 1) % 3)
    return teacher, images, Units(teacher.features(images), private, torch.arange(N)[:, None])


@pytest.fixture
def setting():
    return learnt(CONFIG)


@pytest.fixture(params=[CONFIG, TUNED], ids=["linear", "fine_tuned"])
def either(request):
    return request.param, *learnt(request.param)


def accuracy(teacher, images, units):
    return (teacher.classify(images, ALIKE) == units.class_labels.numpy()).mean()


def test_the_head_learns_what_the_private_labels_say(either):
    config, teacher, images, units = either
    before = accuracy(teacher, images, units)
    train_head(teacher, units, plan_of(sigma=1.0), KEY, config, **LOOP)
    assert before < 0.5 and accuracy(teacher, images, units) > 0.9


def test_noise_that_drowns_the_gradients_teaches_nothing(either):
    """The negative control: the head depends on the data through the noisy sums alone."""
    config, teacher, images, units = either
    train_head(teacher, units, plan_of(sigma=3000.0), KEY, config, **LOOP)
    assert accuracy(teacher, images, units) < 0.7


def test_a_teacher_that_no_record_teaches_says_what_its_network_says_whatever_the_shares():
    images, labels = drawings(200)
    teacher = build_teacher(FREE, images.shape[1:], 3)
    learn_features(teacher, images, labels, FREE, seed=5)
    network = train_classifier(images, labels, num_classes=3, num_epochs=3, seed=5)
    with torch.no_grad():
        expected = network(torch.from_numpy(images).permute(0, 3, 1, 2)).argmax(1).numpy()
    assert not list(teacher.head.parameters()), "nothing that private steps could move"
    for shares in (ALIKE, torch.tensor([0.98, 0.01, 0.01])):
        assert np.array_equal(teacher.classify(images, shares), expected)
    assert (expected == labels).mean() > 0.7, "of three classes"


def test_a_fine_tuned_network_starts_from_what_synthetic_images_taught_it(setting):
    """It says what the public trainer's network says; private steps move all dense weights and no other."""
    images, labels = drawings(200)
    teacher = build_teacher(TUNED, images.shape[1:], 3)
    learn_features(teacher, images, labels, TUNED, seed=5)
    network = train_classifier(images, labels, num_classes=3, num_epochs=TUNED.num_epochs, seed=5)
    with torch.no_grad():
        logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
        assert torch.allclose(teacher.head(teacher.features(images)), logits, atol=1e-4)
        assert torch.allclose(teacher.head.train()(teacher.features(images[7:8])), logits[7:8], atol=1e-4)
    before = copy.deepcopy(teacher.state_dict())
    units = Units(teacher.features(images), torch.from_numpy(labels), torch.arange(len(labels))[:, None])
    train_head(teacher, units, plan_of().model_copy(update={"max_batch_size": 200}), KEY, TUNED, **LOOP)
    moved = {name for name, value in teacher.state_dict().items() if not torch.equal(before[name], value)}
    assert moved == {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    with torch.no_grad():
        assert torch.equal(teacher.network(torch.from_numpy(images).permute(0, 3, 1, 2)), logits)


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


def test_a_copy_is_a_function_of_its_record_alone():
    """Neighbour property: without a record, the copies of all others are what they were, bit for bit."""
    images = np.random.default_rng(0).integers(0, 256, (1003, 12, 12, 1), dtype=np.uint8)  # more than one batch
    config = CONFIG.model_copy(update={"deformation": 1.0, "num_copies": 3})
    copies = deformed_copies(images, config, seed=4).reshape(3, *images.shape)
    assert copies.dtype == np.uint8 and not any(np.array_equal(a, b) for a, b in ((copies[0], images), copies[1:]))
    for left_out in (0, 7, 1002):
        fewer = deformed_copies(np.delete(images, left_out, axis=0), config, seed=4)
        assert np.array_equal(fewer.reshape(3, 1002, 12, 12, 1), np.delete(copies, left_out, axis=1))
    assert deformed_copies(images, CONFIG, seed=4).shape == (0, 12, 12, 1)


@pytest.mark.parametrize("num_copies", [0, 2])
def test_neighbours_differ_by_one_clipped_gradient(either, num_copies):
    _, teacher, _, units = either
    if num_copies > 0:
        moves = torch.randn(num_copies, *units.values.shape, generator=torch.Generator().manual_seed(0))
        units = units.with_copies((units.values + 0.5 * moves).flatten(0, 1))
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


def test_a_killed_head_resumes_bit_for_bit(either, tmp_path):
    config, teacher, images, units = either

    def fresh():
        return copy.deepcopy(teacher)

    class KilledError(Exception):
        pass

    def kill(done, total):
        if done == 25:
            raise KilledError

    whole, parts = fresh(), fresh()
    train_head(whole, units, plan_of(), KEY, config, **LOOP)
    with pytest.raises(KilledError):
        train_head(parts, units, plan_of(), KEY, config, checkpoint=tmp_path, on_step=kill, **LOOP)
    resumed = fresh()
    train_head(resumed, units, plan_of(), KEY, config, checkpoint=tmp_path, **LOOP)
    pairs = zip(whole.head.parameters(), resumed.head.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert np.array_equal(whole.classify(images, ALIKE), resumed.classify(images, ALIKE))
