import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpldm_core.errors import ConfigError, DataError
from dpldm_core.evaluation import internal
from dpldm_core.evaluation.features import FeatureExtractor
from dpldm_core.evaluation.internal import evaluate_release
from dpldm_core.models.classifier import train_classifier

SETTINGS = {"num_classes": 10, "num_epochs": 8, "seeds": [0, 1], "inception_weights": None, "max_frechet_images": 400}


@pytest.fixture(scope="module")
def parts(digits):
    """Synthetic stand-ins (fresh digits), training and held-out records."""
    images, labels = digits
    return (images[:500], labels[:500]), (images[500:1200], labels[500:1200]), (images[1200:], labels[1200:])


@pytest.fixture(scope="module")
def result(parts):
    (images, labels), train, heldout = parts
    return evaluate_release(images, labels, train, heldout, **SETTINGS)


def test_everything_is_there_as_plain_json(result):
    values = result.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)).keys() == values.keys()
    assert set(values) == {
        "num_images",
        "train_on_synthetic_accuracy",
        "ceiling_accuracy",
        "fd_real_classifier",
        "precision_recall",
        "memorisation",
    }
    assert values["num_images"] == {"synthetic": 500, "training": 700, "heldout": 597}
    accuracy = values["train_on_synthetic_accuracy"]
    assert (accuracy["num_seeds"], accuracy["num_epochs"], accuracy["num_images"]) == (2, 8, 500)
    assert len(accuracy["per_class"]) == 10
    assert values["ceiling_accuracy"]["num_images"] == 700
    assert values["fd_real_classifier"]["num_images"] == 400
    assert values["memorisation"]["num_records"] == 597


def test_seeds_are_summarised(result):
    """Of two values a and b: max - mean = |a - b| / 2 and the standard deviation is |a - b| / sqrt 2."""
    summary, ceiling = result.train_on_synthetic, result.ceiling
    assert summary.std == pytest.approx(np.sqrt(2) * (summary.max - summary.mean)) and summary.std > 0
    assert (summary.num_seeds, ceiling.num_seeds, ceiling.std) == (2, 1, None), "one classifier is ceiling enough"
    assert 0.8 < summary.mean <= 1 and 0.8 < ceiling.mean <= 1


def test_wrong_labels_and_noise_are_seen(parts, result):
    """Negative control of the whole: bad images must look bad."""
    (images, labels), train, heldout = parts
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, images.shape, dtype=np.uint8)
    bad = evaluate_release(noise, labels, train, heldout, **SETTINGS | {"seeds": [0]})
    assert bad.train_on_synthetic.mean < 0.3
    assert bad.train_on_synthetic.std is None
    assert bad.ceiling.mean > 0.8
    assert bad.frechet.distance > 5 * bad.frechet.floor
    assert result.frechet.distance < 5 * result.frechet.floor
    copied = evaluate_release(*train, train, heldout, **SETTINGS | {"num_classes": 1})
    assert copied.memorisation.share_closer_to_training > 0.75
    assert copied.memorisation.duplicates_of_any_training == 700
    assert abs(result.memorisation.share_closer_to_training - 0.5) < 4 * result.memorisation.standard_error


def test_unlabelled_images_have_no_accuracy(parts, monkeypatch):
    (images, _), train, heldout = parts
    zeros = np.zeros(len(images), np.int64)
    unlabelled = evaluate_release(images, zeros, train, heldout, **SETTINGS | {"num_classes": 1})
    assert unlabelled.train_on_synthetic is unlabelled.ceiling is unlabelled.frechet is None
    assert unlabelled.memorisation.num_images == 500
    json.dumps(unlabelled.to_dict(), allow_nan=False)
    extractor = FeatureExtractor("fid", lambda pixels: pixels.float().mean((1, 2))[:, ::4])
    monkeypatch.setattr(internal, "inception_extractor", lambda path: extractor)
    settings = SETTINGS | {"num_classes": 1, "inception_weights": "file"}
    values = evaluate_release(images, zeros, train, heldout, **settings).to_dict()
    assert values["fid"]["num_images"] == 400
    assert "fd_real_classifier" not in values


def test_a_given_classifier_measures_the_distance_of_unlabelled_images(parts, result):
    (images, _), (train, labels), heldout = parts
    judge = train_classifier(train, labels, num_classes=10, num_epochs=8, seed=0)
    zeros, settings = np.zeros(len(images), np.int64), SETTINGS | {"num_classes": 1, "real_classifier": judge}
    found = evaluate_release(images, zeros, (train, np.zeros(len(train), np.int64)), heldout, **settings)
    assert found.train_on_synthetic is None
    assert found.frechet == result.frechet, "the same classifier as the ceiling's"


def test_a_class_without_held_out_records_has_no_accuracy(parts):
    (images, labels), train, (test_images, test_labels) = parts
    kept = test_labels != 3
    heldout = test_images[kept], test_labels[kept]
    found = evaluate_release(images, labels, train, heldout, **SETTINGS | {"num_epochs": 1})
    assert [share is None for share in found.ceiling.per_class] == [k == 3 for k in range(10)]


def test_wrong_input_is_refused_before_training(parts, monkeypatch):
    (images, labels), train, heldout = parts
    monkeypatch.setattr(internal, "train_classifier", None)
    with pytest.raises(ConfigError, match="DPLDM_INCEPTION_WEIGHTS"):
        evaluate_release(images, labels, train, heldout, **SETTINGS | {"inception_weights": "/no/such/file"})
    with pytest.raises(DataError, match=r"synthetic.*\(7, 8, 1\).*training.*\(8, 8, 1\)"):
        evaluate_release(images[:, 1:], labels, train, heldout, **SETTINGS)


@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_tiny_releases_are_measured_as_far_as_they_can_be(parts, num_images):
    """The budget is spent by then: a release of one image must not end in an error."""
    (images, labels), train, heldout = parts
    small = images[:num_images], labels[:num_images]
    values = evaluate_release(*small, train, heldout, **SETTINGS | {"num_epochs": 1, "seeds": [0]}).to_dict()
    json.dumps(values, allow_nan=False)
    assert (values["memorisation"] is None) == (values["train_on_synthetic_accuracy"] is None) == (num_images == 1)


def test_the_room_is_imported_without_torch():
    code = "import sys, dpldm_core.evaluation; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
