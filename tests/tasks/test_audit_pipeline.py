"""The audit workflow in one process, on small public data, and its result on the card of a release."""

import json

import pytest

from dpldm_core.errors import ConfigError
from dpldm_core.release import auditing
from dpldm_core.release.verify import verify_bundle
from workflows.audit import audit_pipeline
from workflows.release import release_pipeline

STAGES = ["train_autoencoder", "train_diffusion", "train_teacher"]


def test_audit_writes_bounds_releases_nothing_and_its_result_is_shown(machine, small_mnist, ledger, monkeypatch):
    steps = auditing.step_bounds
    monkeypatch.setattr(auditing, "step_bounds", lambda *inputs, trials: steps(*inputs, trials=trials // 500))
    done = audit_pipeline(dataset=small_mnist, epsilon=5.0, preset="smoke", num_canaries=200)
    result = json.loads((machine / done.result).read_text())
    assert [p.name for p in (machine / "audits").iterdir()] == ["mnist-eps5-smoke.json"]
    assert not ledger.books().entries and not (machine / "releases").exists()
    assert [run["stages"] for run in result["runs"]] == [*([s] for s in STAGES), STAGES]
    claims = [run["claim"] for run in result["runs"]]
    assert max(claims[:-1]) < claims[-1] == result["claim"] == done.claim < 5.0
    assert [(s["stage"], s["trials"]) for s in result["steps"]] == [(s, 40) for s in STAGES]
    for run in result["runs"]:
        assert all(0 <= run[name] < run["claim"] for name in ("steinke", "f_dp"))

    (machine / "config.json").write_text(json.dumps({"audit": str(machine / done.result)}))
    released = release_pipeline(
        dataset=small_mnist, epsilon=5.0, preset="smoke", num_samples=40, config=str(machine / "config.json")
    )
    bundle = machine / "releases" / released.release_id
    verify_bundle(bundle)
    card = " ".join((bundle / "README.md").read_text().split())
    assert "was attacked on public data (`mnist`, preset `smoke`, for a release of epsilon 5). 200 canaries" in card
    assert f"at least {done.epsilon_lower_bound:.3g}, with 95% confidence" in card
    assert str(machine) not in (bundle / "config.json").read_text()


def test_private_data_is_refused_unread(machine, own_data, ledger):
    with pytest.raises(ConfigError, match="public data only"):
        audit_pipeline(dataset=own_data, preset="smoke")
    assert not ledger.books().entries
