"""metrics.json: what follows from the two counts, what a bundle may carry, and what a forger is told."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from dpldm_core.errors import BundleError
from dpldm_core.presets import resolve_config
from dpldm_core.privacy.calibration import COVARIANCES, MEANS
from dpldm_core.privacy.calibration import METRICS as STAGE
from dpldm_core.privacy.plan import GaussianSumPlan, HistogramPlan, ReleasePlan
from dpldm_core.privacy.report import build_report
from dpldm_core.release.bundle import CONFIG, METRICS, canonical_json, write_bundle
from dpldm_core.release.card import render_card
from dpldm_core.release.metrics import WORDS, ReleasedMetrics, in_words, metrics_of
from dpldm_core.release.sampling import public_config, read_public_config
from dpldm_core.release.verify import verify_bundle
from dpldm_core.rng import SecretKey
from tests.release.conftest import CLASSES, CONFIG_VALUES, NUM_SAMPLES

Z = 9.0
HISTOGRAM = HistogramPlan(stage=STAGE, num_bins=2, max_records_per_unit=1, noise_multiplier=Z)
FOUND = metrics_of(STAGE, 880, 120, Z, 1)


@pytest.fixture
def paid(tmp_path, parts):
    """Keyword arguments of write_bundle for a release that paid for its accuracy."""
    sums = (GaussianSumPlan(stage=stage, max_norm=1.0, noise_multiplier=9.0) for stage in (MEANS, COVARIANCES))
    mechanisms = (*sums, HISTOGRAM)
    plan = ReleasePlan(mechanisms=mechanisms, delta=1e-5, relation="ADD_OR_REMOVE_ONE", unit_of_privacy="one record")
    report = build_report(
        plan, release_id="r1", account="mnist5k", entry="e", latent_mechanism="dp_sgd", public_facts={}
    )
    config = CONFIG_VALUES | {"publish_metrics": True}
    shown = {"dataset_title": "MNIST", "num_samples": NUM_SAMPLES, "class_names": CLASSES}
    card = render_card(report, config, metrics=FOUND, **shown)
    return parts | {"config": config, "report": report, "card": card, "metrics": FOUND.model_dump(mode="json")}


@pytest.fixture
def honest(tmp_path, paid):
    return Path(write_bundle(tmp_path / "paid", "r1", **paid))


def problems(folder):
    with pytest.raises(BundleError) as caught:
        verify_bundle(folder)
    return str(caught.value)


def test_a_paid_accuracy_verifies_and_is_on_the_card(honest):
    assert verify_bundle(honest).num_files == 10
    card = (honest / "README.md").read_text()
    assert in_words(FOUND) in card and WORDS in card
    assert "released through a mechanism that is part of epsilon" in card
    assert f"| {STAGE} | Gaussian mechanism, once | 9 |" in card
    assert verify_bundle(honest).report.events[-1].stage == STAGE


@pytest.mark.parametrize("offset", [0, 40, 120, -2])
def test_any_changed_byte_is_found(honest, offset):
    content = bytearray((honest / METRICS).read_bytes())
    content[offset] ^= 1
    (honest / METRICS).write_bytes(bytes(content))
    assert METRICS in problems(honest)


def better(metrics):
    metrics["accuracy"] = 0.99


def surer(metrics):
    metrics["accuracy_noise_std"] /= 2


def quieter(metrics):
    """Consistent in itself, but with less noise than the event was charged for."""
    return metrics_of(STAGE, 880, 120, Z / 2, 1).model_dump(mode="json")


def of_another_stage(metrics):
    return metrics_of("prior", 880, 120, Z, 1).model_dump(mode="json")


def other_counts(metrics):
    """Consistent in itself; the card says something else."""
    return metrics_of(STAGE, 990, 10, Z, 1).model_dump(mode="json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (better, "do not follow from the counts"),
        (surer, "do not follow from the counts"),
        (quieter, "its noise is not that of stage"),
        (of_another_stage, "its noise is not that of stage"),
        (other_counts, "does not carry the accuracy"),
        (lambda m: m.update(num_right=880.0), "num_right"),
        (lambda m: m.update(num_right=10**400), "num_right"),
        (lambda m: m.update(noise_multiplier=1e300), "noise_multiplier"),
        (lambda m: m.update(max_records_per_unit=0), "max_records_per_unit"),
        (lambda m: m.update(per_class=[1.0]), "per_class"),
        (lambda m: m.pop("accuracy") and None, "accuracy"),
        (lambda m: m.update(num_right=-5, num_wrong=5), "do not follow from the counts"),
    ],
)
def test_a_forged_accuracy_fails_with_every_hash_right(honest, rewrite, change, says):
    rewrite(honest, METRICS, change)
    said = problems(honest)
    assert says in said and "SHA-256" not in said


def test_an_accuracy_that_nobody_paid_for_is_refused(folder, rewrite):
    (folder / METRICS).write_bytes(canonical_json(FOUND.model_dump(mode="json")))
    rewrite(folder, "README.md", lambda text: text)  # lists the new file
    assert "no mechanism of it paid for it" in problems(folder)


def test_a_paid_accuracy_may_not_be_left_out(honest, rewrite):
    (honest / METRICS).unlink()
    rewrite(honest, "README.md", lambda text: text)
    assert "metrics.json is missing" in problems(honest)


@pytest.mark.parametrize("value", [False, None])
def test_the_choice_and_the_report_must_agree(honest, rewrite, value):
    rewrite(honest, CONFIG, lambda config: config.update(publish_metrics=value))
    assert f"publish_metrics is {value}" in problems(honest)


def test_a_choice_without_its_mechanism_is_found(folder, rewrite):
    rewrite(folder, CONFIG, lambda config: config.update(publish_metrics=True))
    assert "publish_metrics is True" in problems(folder)


# Numbers


def test_the_standard_error_is_that_of_the_mechanism():
    """Monte Carlo: 4,000 releases of the same counts know a standard deviation to 1.1 %; 6 % is 5 of those."""
    noise = np.concatenate([HISTOGRAM.noise(SecretKey(bytes([i] * 32))).draw(1000) for i in range(8)]).reshape(-1, 2)
    found = [metrics_of(STAGE, 880 + int(a), 120 + int(b), Z, 1) for a, b in noise]
    spread = np.std([m.accuracy for m in found])
    assert spread == pytest.approx(FOUND.accuracy_noise_std, rel=0.06)
    assert np.mean([m.accuracy for m in found]) == pytest.approx(0.88, abs=5 * spread / math.sqrt(4000) + 1e-4)
    assert FOUND.count_noise_std == math.sqrt(Z**2 + 2) == math.sqrt(HISTOGRAM.variance)


@pytest.mark.parametrize(
    ("right", "wrong", "accuracy"), [(0, 0, 0.0), (-5, 3, 0.0), (12, -4, 1.0), (-2, 9, 0.0), (3, -3, 1.0), (1, 0, 1.0)]
)
def test_counts_that_noise_has_turned_over_still_give_a_share(right, wrong, accuracy):
    found = metrics_of(STAGE, right, wrong, Z, 1)
    assert found.accuracy == accuracy and 0 < found.accuracy_noise_std < math.inf
    assert ReleasedMetrics.model_validate_json(found.model_dump_json()) == found
    assert re.search(r"right on \d+\.0 % of held-out private records", in_words(found))


def test_numbers_that_do_not_follow_are_refused():
    with pytest.raises(ValidationError, match="do not follow"):
        ReleasedMetrics(**FOUND.model_dump() | {"accuracy": 0.9})


# The configuration in a bundle


def test_bundles_from_before_the_choice_are_sampled_again(tmp_path):
    from dpldm_core.data.schema import ImageSchema

    config = resolve_config(
        dataset="d",
        epsilon=1.0,
        delta=1e-5,
        preset="smoke",
        num_samples=5,
        latent_mechanism="dp_sgd",
        public_num_records=None,
    )
    schema = ImageSchema(height=8, width=8, channels=1, class_names=("a", "b"), labelled=True, grouped=False)
    values = public_config(config, schema, 0.0, "d")
    (tmp_path / CONFIG).write_text(json.dumps(values))
    assert read_public_config(tmp_path) == (config, schema, 0.0)
    del values["prior"]["covariance_clip_norm"], values["prior"]["mean_share"]
    del values["teacher"]["fine_tuned"], values["teacher"]["num_copies"], values["teacher"]["first_share"]
    (tmp_path / CONFIG).write_text(json.dumps(values))
    assert read_public_config(tmp_path)[0] == config
    del values["teacher"]["from_prior"]
    (tmp_path / CONFIG).write_text(json.dumps(values))
    assert not read_public_config(tmp_path)[0].teacher.from_prior, "classes were as drawn"
    (tmp_path / CONFIG).write_text(json.dumps(values | {"evaluation": 3}))
    with pytest.raises(BundleError, match="cannot be read"):
        read_public_config(tmp_path)


def test_counts_whose_noise_hides_fewer_records_than_a_person_has_are_refused(honest, rewrite):
    rewrite(honest, CONFIG, lambda c: c["schema"].update(grouped=True))
    assert "its noise hides 1 records of a unit, config.json has 4" in problems(honest)
