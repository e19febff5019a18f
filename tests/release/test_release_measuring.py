"""The released accuracy on neighbouring held-out records: record and replay through the very function of the task."""

import json

import numpy as np
import pytest

from dpldm_core.data.schema import ImageSchema, Records, write_records
from dpldm_core.presets import resolve_config
from dpldm_core.privacy.calibration import METRICS
from dpldm_core.privacy.plan import HistogramPlan, ReleasePlan
from dpldm_core.release import measuring
from dpldm_core.release.measuring import evaluate_files, release_accuracy
from dpldm_core.release.synthetic import write_synthetic_parquet
from dpldm_core.rng import SecretKey

KEY = SecretKey(bytes(range(32)))
CLASSES = ("a", "b", "c")


def strokes(count, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 120, (count, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image.reshape(-1)[5 * label : 5 * label + 15] += 130
    return images, labels


def config_of(publish=True):
    return resolve_config(
        dataset="d",
        epsilon=1.0,
        delta=1e-5,
        preset="smoke",
        num_samples=60,
        latent_mechanism="dp_sgd",
        public_num_records=None,
        publish_metrics=publish,
        overrides={"evaluation": {"num_epochs": 40}},
    )


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Released counts of held-out records, of a plan for units of ``most`` records."""
    # Another number of threads, chosen by the clock, would change the last bits of what two calls must agree on.
    monkeypatch.setattr("dpldm_core.release.measuring.settle_on_cpu", lambda: 1)
    synthetic = tmp_path / "part.parquet"
    write_synthetic_parquet(synthetic, *strokes(60, 0), CLASSES)

    def run(images, labels, groups=None, most=1, noise_multiplier=3.0, asked=None):
        schema = ImageSchema(
            height=8, width=8, channels=1, class_names=CLASSES, labelled=True, grouped=groups is not None
        )
        write_records(tmp_path / "heldout.parquet", Records(images, labels, groups, schema))
        histogram = HistogramPlan(
            stage=METRICS, num_bins=2, max_records_per_unit=most, noise_multiplier=noise_multiplier
        )
        plan = ReleasePlan(
            mechanisms=(histogram,), delta=1e-5, relation="ADD_OR_REMOVE_ONE", unit_of_privacy="one record"
        )

        def key_of(stage):
            if asked is not None:
                asked.append(stage)
            return KEY

        metrics, classifier = release_accuracy([synthetic], tmp_path / "heldout.parquet", config_of(), plan, key_of)
        run.classifier = classifier
        values = json.loads(metrics)
        return np.array([values["num_right"], values["num_wrong"]])

    return run


def test_one_record_moves_one_count_by_one(measure):
    images, labels = strokes(40, 1)
    whole = measure(images, labels)
    for i in (0, 17, 39):
        kept = np.arange(40) != i
        moved = whole - measure(images[kept], labels[kept])
        assert sorted(moved) == [0, 1]
    replaced = labels.copy()
    replaced[5] = (labels[5] + 1) % 3
    assert np.abs(whole - measure(images, replaced)).sum() in (0, 2)


def test_a_person_moves_the_counts_by_her_bound_at_most(measure):
    images, labels = strokes(40, 1)
    groups = np.minimum(np.arange(40), 30)  # the last ten records are one person's
    whole, without = measure(images, labels, groups, most=4), measure(images[:30], labels[:30], groups[:30], most=4)
    assert (whole - without).min() >= 0 and (whole - without).sum() == 4


def test_the_counts_are_those_of_the_classifier_that_the_internal_evaluation_uses(measure, tmp_path):
    """Slow reference: noise of the same key taken off, the share is the internal accuracy of the first seed."""
    images, labels = strokes(300, 1)
    asked = []
    counts = measure(images, labels, asked=asked)
    assert asked == [METRICS]
    noise = HistogramPlan(stage=METRICS, num_bins=2, max_records_per_unit=1, noise_multiplier=3.0).noise(KEY).draw(2)
    right, wrong = counts - noise
    assert right + wrong == 300 and right > 200
    path, numbers = evaluate_files(
        [tmp_path / "part.parquet"],
        tmp_path / "heldout.parquet",
        tmp_path / "heldout.parquet",
        tmp_path,
        config_of().evaluation,
        inception_weights=None,
    )
    assert numbers["train_on_synthetic_accuracy.mean"] == right / 300
    again = evaluate_files(
        [tmp_path / "part.parquet"],
        tmp_path / "heldout.parquet",
        tmp_path / "heldout.parquet",
        tmp_path,
        config_of().evaluation,
        inception_weights=None,
        synthetic_classifier=measure.classifier,
    )
    assert again == (path, numbers)


def test_no_held_out_record_is_no_special_case(measure):
    """An empty held-out set is as noisy as any other, so that nobody learns that it is empty."""
    counts = measure(np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, np.int64))
    assert (counts != 0).any()


def test_nothing_is_read_when_nothing_is_asked_for(monkeypatch):
    monkeypatch.setattr(measuring, "read_records", None)
    plan = ReleasePlan(mechanisms=(), delta=1e-5, relation="ADD_OR_REMOVE_ONE", unit_of_privacy="one record")
    assert release_accuracy([], "nowhere", config_of(publish=False), plan, None) == ("", None)
