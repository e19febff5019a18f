"""The release workflow with publish_metrics: the accuracy on held-out records, paid for and published."""

import json
import math

import numpy as np
import pytest

from dpldm_core.data.schema import read_records
from dpldm_core.errors import BundleError, ConfigError, LedgerError
from dpldm_core.privacy.discrete import drawn_variance
from dpldm_core.release.bundle import CARD, METRICS
from dpldm_core.release.metrics import WORDS
from dpldm_core.release.verify import verify_bundle
from tests.tasks.conftest import drawings
from tests.tasks.test_release_pipeline import STAGES, public_text, release, runs
from workflows.release import resample_pipeline

STAGE = "released_accuracy"


def metrics_of(bundle):
    return json.loads((bundle / METRICS).read_text())


def test_an_accuracy_is_paid_for_published_and_verified(machine, own_data, ledger):
    result = release(own_data, publish_metrics=True)
    bundle = machine / "releases" / result.release_id
    report = verify_bundle(bundle, strict=True).report
    assert [e.stage for e in report.events] == [*STAGES, STAGE] and STAGE in report.statement
    assert 4.95 <= result.epsilon <= 5.0, "the asked epsilon covers it"

    books = ledger.books()
    [entry] = books.entries.values()
    assert entry.state == "published" and sorted(entry.stages) == sorted([*STAGES, STAGE])
    assert books.spent(own_data) == pytest.approx(result.epsilon, abs=1e-9)

    metrics = metrics_of(bundle)
    event = report.events[-1].event
    assert event == {"class_name": "GaussianDpEvent", "noise_multiplier": metrics["noise_multiplier"]}
    assert metrics["count_noise_std"] == math.sqrt(drawn_variance(event["noise_multiplier"], 1))
    card = (bundle / CARD).read_text()
    assert WORDS in card and f"{100 * metrics['accuracy']:.1f} %" in card
    assert json.loads((bundle / "config.json").read_text())["publish_metrics"] is True
    [parent] = [r for r in runs() if r.data.tags.get("dpldm.kind") == "release"]
    assert parent.data.metrics["released.accuracy"] == metrics["accuracy"]
    assert f"epsilon.{STAGE}" in parent.data.metrics

    _check_tampering_is_found(bundle)
    again = resample_pipeline(bundle=str(bundle), num_samples=5)
    second = machine / "releases" / again.release_id
    assert verify_bundle(second).report.epsilon == report.epsilon
    assert not (second / METRICS).exists() and WORDS not in (second / CARD).read_text(), "that was of other images"


def _check_tampering_is_found(bundle):
    honest = (bundle / METRICS).read_bytes()
    for damage in (honest.replace(b'"num_right": ', b'"num_right": 9'), b"{}", b"", honest + b"\n"):
        (bundle / METRICS).write_bytes(damage)
        with pytest.raises(BundleError, match=r"metrics\.json"):
            verify_bundle(bundle)
    (bundle / METRICS).unlink()
    with pytest.raises(BundleError, match=r"metrics\.json is missing"):
        verify_bundle(bundle)
    (bundle / METRICS).write_bytes(honest)
    verify_bundle(bundle)


def test_the_default_publishes_nothing_measured_on_private_data(machine, small_mnist, ledger):
    bundle = machine / "releases" / release(small_mnist).release_id
    assert not (bundle / METRICS).exists() and WORDS not in public_text(bundle)
    assert STAGE not in str(ledger.books().entries)
    (bundle / METRICS).write_text("{}\n")
    with pytest.raises(BundleError, match=r"metrics\.json is not listed"):
        verify_bundle(bundle)


@pytest.mark.parametrize("mechanism", ["dp_sgd", "noised_latents"])
def test_persons_are_counted_up_to_their_bound_under_both_relations(machine, ledger, mechanism):
    images, labels = drawings(500)
    np.savez(machine / "x.npz", images=images, labels=labels, group=np.arange(500) * 3 // 4)
    (machine / "c.yaml").write_text(
        "publish_metrics: true\nmax_records_per_group: 2\nevaluation: {metrics_share: 0.2}\n"
    )
    result = release(str(machine / "x.npz"), latent_mechanism=mechanism, config=str(machine / "c.yaml"))
    bundle = machine / "releases" / result.release_id
    report = verify_bundle(bundle).report
    assert report.unit_of_privacy == "one person (at most 2 records)" and report.events[-1].stage == STAGE
    metrics = metrics_of(bundle)
    assert metrics["max_records_per_unit"] == 2
    assert metrics["count_noise_std"] > 2 * report.events[-1].event["noise_multiplier"]
    assert 4.95 <= result.epsilon <= 5.0
    [entry] = ledger.books().entries.values()
    assert STAGE in entry.stages


def test_the_ledger_is_asked_before_the_held_out_records_are_read(machine, small_mnist, ledger, monkeypatch):
    """When the stage cannot be committed, nothing looks at the held-out records: not even the internal evaluation."""
    import dpldm_core.evaluation.internal
    from dpldm_core.privacy.ledger import Ledger

    begin, read = Ledger.begin_stage, []

    def refuse(self, entry_id, stage, **digests):
        if stage == STAGE:
            raise LedgerError("refused")
        return begin(self, entry_id, stage, **digests)

    monkeypatch.setattr(Ledger, "begin_stage", refuse)
    monkeypatch.setattr(
        "dpldm_core.release.measuring.read_records", lambda path: read.append(path) or read_records(path)
    )
    monkeypatch.setattr(dpldm_core.evaluation.internal, "evaluate_release", None)
    with pytest.raises(LedgerError, match="refused"):
        release(small_mnist, publish_metrics=True)
    assert read == []
    [entry] = ledger.books().entries.values()
    assert entry.state == "failed" and STAGE not in entry.stages


BAD_INPUTS = {
    "no labels": ("", {}, "publish_metrics=True releases an accuracy, which needs labels"),
    "one image": ("", {"num_samples": 1}, "num_samples must be 2 or more"),
    "no share": ("evaluation: {metrics_share: 0}", {}, r"evaluation\.metrics_share=0: .*greater than 0"),
    "all of it": ("evaluation: {metrics_share: 1.0}", {}, r"evaluation\.metrics_share=1\.0: .*less than 1"),
    "not a choice": ("publish_metrics: perhaps", {}, "publish_metrics='perhaps'"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_clear_error_before_anything_is_spent(machine, small_mnist, ledger, case):
    text, inputs, message = BAD_INPUTS[case]
    dataset = small_mnist
    if case == "no labels":
        dataset = str(machine / "x.npz")
        np.savez(dataset, images=drawings(400)[0])
    (machine / "c.yaml").write_text(text or "{}")
    with pytest.raises(ConfigError, match=message):
        release(dataset, publish_metrics=True, config=str(machine / "c.yaml"), **inputs)
    assert all(entry.state == "cancelled" for entry in ledger.books().entries.values())
    assert not (machine / "releases").exists()
