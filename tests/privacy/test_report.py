import json
from importlib.metadata import version

import pytest
from pydantic import ValidationError

from dpldm_core import provenance
from dpldm_core.errors import AccountingError
from dpldm_core.privacy.plan import DpSgdPlan, GaussianRecordPlan, GaussianSumPlan, ReleasePlan
from dpldm_core.privacy.report import PrivacyReport, build_report, promise, recompute, round_up


def sgd(stage, noise_multiplier, num_steps):
    return DpSgdPlan(
        stage=stage,
        sample_rate=4096 / 60000,
        num_steps=num_steps,
        max_grad_norm=1.0,
        noise_multiplier=noise_multiplier,
        truncation_probability=1e-12,
    )


def release(*mechanisms, relation="ADD_OR_REMOVE_ONE", unit="one record"):
    return ReleasePlan(mechanisms=mechanisms, delta=1e-5, relation=relation, unit_of_privacy=unit)


def report_of(plan, **changes):
    arguments = {
        "release_id": "r1",
        "account": "mnist",
        "entry": "e1",
        "latent_mechanism": "dp_sgd",
        "public_facts": {"image_size": {"value": [28, 28, 1], "origin": "the data set's documentation"}},
    }
    return build_report(plan, **arguments | changes)


@pytest.fixture(scope="module")
def anchor():
    """Three mechanisms, whose epsilon dp-accounting alone gave."""
    return report_of(
        release(
            sgd("autoencoder", 2.0, 1000),
            sgd("diffusion", 1.5, 3000),
            GaussianSumPlan(stage="prior", max_norm=1.0, noise_multiplier=5.0),
        )
    )


def test_anchor_numbers(anchor):
    """PLD 17.011 end to end, 37.16 under REPLACE_ONE, at delta 1e-5."""
    assert anchor.epsilon == pytest.approx(17.011, abs=1e-3)
    assert anchor.epsilon_replace_one == pytest.approx(37.16, abs=5e-3)
    assert anchor.neighboring_relation == "ADD_OR_REMOVE_ONE" and anchor.delta == 1e-5
    assert anchor.statement == (
        "This release is (epsilon = 17.012, delta = 1e-05)-differentially private under ADD_OR_REMOVE_ONE (adding or "
        "removing one record), end to end, over every stage that read the private data: autoencoder, diffusion, prior."
    )


def test_epsilon_comes_back_from_the_events_alone(anchor):
    stored = json.loads(json.dumps(anchor.model_dump(mode="json")))
    stored["epsilon"] = stored["epsilon_replace_one"] = 0.0  # not looked at
    again = recompute(stored)
    assert again == pytest.approx((anchor.epsilon, anchor.epsilon_replace_one), rel=1e-12)
    assert stored["events"][0] == {
        "stage": "autoencoder",
        "event": {
            "class_name": "SelfComposedDpEvent",
            "count": 1000,
            "event": {
                "class_name": "PoissonSampledDpEvent",
                "sampling_probability": 4096 / 60000,
                "event": {"class_name": "GaussianDpEvent", "noise_multiplier": 2.0},
            },
        },
    }


def test_report_holds_what_the_contract_names(anchor):
    stored = anchor.model_dump(mode="json")
    assert stored["ledger"] == {"account": "mnist", "entry": "e1"}
    assert stored["accountant"]["published"].startswith("dp-accounting ")
    assert stored["public_facts"]["image_size"]["value"] == [28, 28, 1]
    assert stored["parent_release_id"] is None and stored["latent_mechanism"] == "dp_sgd"
    assert stored["not_covered"] and all(isinstance(line, str) for line in stored["not_covered"])
    with pytest.raises(ValidationError):
        anchor.epsilon = 1.0


def test_replace_one_statement_has_one_epsilon():
    plan = release(
        GaussianRecordPlan(stage="latents", max_norm=1.0, noise_multiplier=5.0),
        relation="REPLACE_ONE",
        unit="all records of one group",
    )
    report = report_of(plan, latent_mechanism="noised_latents")
    assert report.epsilon == report.epsilon_replace_one == recompute(report.model_dump(mode="json"))[0]
    assert "REPLACE_ONE (replacing all records of one group by any other)" in report.statement


def test_noised_latents_cannot_be_stated_under_add_or_remove():
    plan = release(GaussianRecordPlan(stage="latents", max_norm=1.0, noise_multiplier=5.0))
    with pytest.raises(AccountingError, match="REPLACE_ONE"):
        report_of(plan, latent_mechanism="noised_latents")


def test_a_report_cannot_say_something_else_than_its_fields(anchor):
    for change in ({"statement": "All is well."}, {"epsilon": 1.0}, {"delta": 1e-9}, {"unit_of_privacy": "a pixel"}):
        with pytest.raises(ValidationError, match="statement"):
            type(anchor).model_validate(anchor.model_dump() | change)
    with pytest.raises(ValidationError, match="epsilonn"):
        type(anchor).model_validate(anchor.model_dump() | {"epsilonn": 1.0})


def test_rounding_never_understates():
    for value in (0.0, 0.0001, 9.9999, 17.01157477961124, 10.0, 1e3 + 1e-9):
        assert value <= round_up(value) <= value + 1.001e-3
        assert f"epsilon = {round_up(value):.3f}," in promise(value, 1e-5, "REPLACE_ONE", "one record", ["a"])


@pytest.mark.parametrize(
    "event",
    [
        {"class_name": "SecretDpEvent"},
        {"class_name": "GaussianDpEvent"},
        {"class_name": "GaussianDpEvent", "noise_multiplier": [1.0]},
        {"class_name": "PoissonSampledDpEvent", "sampling_probability": 0.1, "event": 5},
        {"class_name": "UnsupportedDpEvent"},
        5,
        None,
    ],
)
def test_unknown_or_malformed_events_are_errors_never_guesses(anchor, event):
    stored = anchor.model_dump(mode="json")
    stored["events"] = [{"stage": "x", "event": event}]
    with pytest.raises(AccountingError):
        recompute(stored)


def test_a_report_names_the_code_that_made_it(anchor, tmp_path, monkeypatch):
    assert anchor.software == {"code_digest": provenance.code_digest(), "torch": version("torch")}
    monkeypatch.setattr(provenance, "_CORE", tmp_path)
    found = set()
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("room/b.py", "x = 2"), ("room/b.txt", "x = 2")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        found.add(provenance.code_digest.__wrapped__())
    assert len(found) == 3, "every source counts, and nothing else"


def test_a_report_from_before_the_code_was_named_is_read(anchor):
    values = anchor.model_dump(mode="json")
    del values["software"]
    assert PrivacyReport.model_validate(values).software == {}
    assert recompute(values)[0] == anchor.epsilon
