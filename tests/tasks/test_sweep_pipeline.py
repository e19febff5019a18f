"""Several releases of one data set, and the curve that they make."""

import json
import re
from pathlib import Path

import pytest

from dpldm_core.errors import ConfigError
from dpldm_core.release.sweeping import check_sweep
from dpldm_core.release.verify import verify_bundle
from workflows.sweep import sweep_pipeline


def check(dataset, epsilons, **changed):
    inputs = {
        "delta": 1e-5,
        "preset": "smoke",
        "num_samples": 0,
        "budget_epsilon": 0.0,
        "out": "releases",
        "config": "",
    }
    return check_sweep(dataset=dataset, epsilons=epsilons, **inputs | changed)


def test_a_sweep_is_one_release_for_each_epsilon_charged_together(machine, own_data, ledger):
    asked = {"dataset": own_data, "epsilons": [6.0, 3.0], "delta": 1e-4, "preset": "smoke", "num_samples": 40}
    with pytest.raises(ConfigError, match="charged together, about") as refused:
        check(own_data, [6.0, 3.0], delta=1e-4, budget_epsilon=6.5)
    enough = float(re.search(r"about ([\d.]+)\. Set", str(refused.value))[1])
    assert enough < 9, "releases together cost less than their sum"
    done = sweep_pipeline(**asked, budget_epsilon=enough)
    points = json.loads((machine / done.curve).read_text())["points"]
    reports = [verify_bundle(machine / bundle).report for bundle in done.bundles]
    assert [p["epsilon"] for p in points] == [r.epsilon for r in reports]
    assert 2.9 < points[0]["epsilon"] <= 3.0 and 5.9 < points[1]["epsilon"] <= 6.0
    for point, bundle in zip(points, done.bundles, strict=True):
        assert point["release_id"] == Path(bundle).name
        assert point["accuracy"] == json.loads((machine / bundle / "metrics.json").read_text())["accuracy"]
    entries = ledger.books().entries
    assert len(entries) == 2 and len({e.account for e in entries.values()}) == 1


@pytest.mark.parametrize(
    ("epsilons", "changed", "message"),
    [
        ([], {}, "epsilons="),
        ([1.0, 1.0], {"budget_epsilon": 2.0}, "epsilons="),
        ([1.0, -2.0], {"budget_epsilon": 9.0}, "epsilon=-2.0"),
        ([1.0, 3.0], {}, r"charged together, about 3\.\d+\. Set"),
        ([1.0, 3.0], {"budget_epsilon": 3.5}, r"charged together, about 3\.\d+\. Set"),
        ([0.2, 10.0], {"budget_epsilon": 10.2}, r"charged together, about 11\.\d+\. Set budget_epsilon to that"),
        ([2.0], {"budget_epsilon": 1.9}, "charged together, about 2"),
        ([1.0], {"budget_epsilon": 1.0, "preset": "quik"}, "quick"),
    ],
)
def test_bad_input_is_refused_before_the_first_release(machine, own_data, ledger, epsilons, changed, message):
    with pytest.raises(ConfigError, match=message):
        check(own_data, epsilons, **changed)
    assert not ledger.books().entries


def test_one_name_for_several_releases_is_refused(machine, own_data):
    (machine / "config.json").write_text(json.dumps({"release_id": "mine"}))
    with pytest.raises(ConfigError, match="release_id"):
        check(own_data, [1.0, 2.0], budget_epsilon=3.0, config=str(machine / "config.json"))


def test_public_data_needs_no_budget(machine, small_mnist):
    assert check(small_mnist, [3.0, 1.0]) == [1.0, 3.0]
