import json
from pathlib import Path

import pytest

from dpldm_core.errors import ConfigError
from dpldm_core.privacy.audit import AuditReport
from dpldm_core.release.auditing import audit_release, write_report
from dpldm_core.release.opening import check_request, read_audit_note

COMMITTED = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "audit").glob("*.json"))
RESULT = {
    "dataset": "mnist5k",
    "preset": "quick",
    "epsilon": 10.0,
    "num_canaries": 5000,
    "confidence": 0.95,
    "claim": 6.9,
    "epsilon_lower_bound": 2.8,
    "method": "white box",
    "runs": [],
}


def request(tmp_path, **changes):
    (tmp_path / "audit.json").write_text(json.dumps(RESULT | changes))
    (tmp_path / "config.json").write_text(json.dumps({"audit": str(tmp_path / "audit.json")}))
    return check_request(
        dataset="mnist",
        epsilon=1.0,
        delta=1e-6,
        preset="quick",
        num_samples=0,
        latent_mechanism="dp_sgd",
        budget_epsilon=0.0,
        out=str(tmp_path / "releases"),
        config=str(tmp_path / "config.json"),
    )


def test_result_becomes_part_of_the_configuration_and_its_path_does_not(tmp_path):
    resolved = request(tmp_path).config
    assert (resolved.audit.dataset, resolved.audit.epsilon_lower_bound) == ("mnist5k", 2.8)
    assert "audit.json" not in resolved.model_dump_json() and "runs" not in resolved.model_dump()["audit"]


def test_there_are_committed_audits():
    assert len(COMMITTED) >= 2


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_audits_clear_the_code_convict_the_mutants_and_can_be_shown(path, tmp_path):
    """``seen_by`` is recomputed. At epsilon 1 a few thousand canaries do not see noise that is half as large."""
    result = json.loads(path.read_text())

    def seen(run):
        return [name for name in ("steinke", "f_dp", "gdp_lower") if run[name] > run["claim"]]

    assert not any(seen(run) for run in result["runs"])
    assert all(step["epsilon_lower_bound"] <= step["claim"] for step in result["steps"])
    assert all(seen(run) == run["seen_by"] for run in result["mutants"].values())
    convicted = {name for name, run in result["mutants"].items() if seen(run)}
    assert convicted >= {"NoNoiseOnOneLayer", "SameNoiseEveryStep", "ClipTooWide", "RateDoubled"}
    assert result["epsilon"] < 10 or len(convicted) >= 5
    assert request(tmp_path, **result).config.audit.epsilon_lower_bound == result["epsilon_lower_bound"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "scans.npz"}, "nobody may see it"),
        ({"preset": "cpu"}, "Audit that one"),
        ({"epsilon_lower_bound": 7.0}, "the code is at fault"),
    ],
)
def test_result_that_may_not_be_shown_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        request(tmp_path, **changes)


@pytest.mark.parametrize("inline", [False, True])
def test_other_file_is_refused(tmp_path, inline):
    audit = RESULT if inline else str(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"audit": audit}))
    message = "must be the path of an audit's result" if inline else "is not the result of an audit"
    with pytest.raises(ConfigError, match=message):
        check_request(
            dataset="mnist",
            epsilon=1.0,
            delta=1e-6,
            preset="quick",
            num_samples=0,
            latent_mechanism="dp_sgd",
            budget_epsilon=0.0,
            out=str(tmp_path / "releases"),
            config=str(tmp_path / "config.json"),
        )


@pytest.mark.parametrize("place", ["memory://audits", "{}/a/b/", "file://{}/c"])
def test_result_is_written_anywhere_and_read_back(place, tmp_path):
    values = {name: RESULT[name] for name in RESULT if name != "runs"}
    report = AuditReport(**values, delta=1e-5, runs=(), steps=())
    for _ in range(2):
        path = write_report(place.format(tmp_path), "x.json", report)
    assert read_audit_note(path, "quick") == values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "scans.npz"}, "runs on public data only"),
        ({"num_canaries": 99}, "num_canaries=99"),
        ({"preset": "quik"}, "did you mean 'quick'"),
    ],
)
def test_request_for_an_audit_is_checked_first(tmp_path, changes, message):
    inputs = {
        "dataset": "mnist5k",
        "epsilon": 1.0,
        "delta": 1e-5,
        "preset": "quick",
        "num_canaries": 5000,
        "out": str(tmp_path),
    }
    with pytest.raises(ConfigError, match=message):
        audit_release(**inputs | changes, work=tmp_path, data_root=None, cache_dir=None)
