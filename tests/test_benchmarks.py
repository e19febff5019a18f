"""The benchmarks ask for the releases that they say they do. Nothing is trained here."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import ablation
from quality import add_arguments, request_of

from dpldm_core.overrides import merge


def config_of(folder, changes):
    """As :func:`ablation.main` asks for a release: MNIST at epsilon 1, single fields from a file."""
    (folder / "changes.json").write_text(json.dumps(changes))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(["--dataset", "mnist", "--epsilon", "1", "--config", str(folder / "changes.json")])
    return request_of(arguments, folder).config.model_dump()


def shares_of(config):
    return {s: (config[s][path[0]] if path else config[s])["budget_share"] for s, path in ablation.SHARES.items()}


def without_shares(config):
    if not isinstance(config, dict):
        return config
    return {name: without_shares(value) for name, value in config.items() if name != "budget_share"}


@pytest.mark.parametrize("arm", ablation.ARMS)
def test_an_arm_of_the_ablation_leaves_out_its_part_and_nothing_else(arm, tmp_path):
    left_out, fields = ablation.ARMS[arm]
    whole = config_of(tmp_path, {})
    found = config_of(tmp_path, ablation.overrides(left_out, fields, whole))
    before, after = shares_of(whole), shares_of(found)
    assert before["teacher"] > 0, "60,000 records have a teacher at epsilon 1"
    if left_out is None:
        assert after == before
        (section, values), *none = fields.items() or [("sampling", {})]
        assert not none and found[section] == whole[section] | values
        assert {k: v for k, v in found.items() if k != section} == {k: v for k, v in whole.items() if k != section}
    else:
        assert without_shares(found) == without_shares(merge(whole, fields))
        assert after[left_out] == 0
        rest = {s: share for s, share in before.items() if s != left_out}
        assert {s: after[s] for s in rest} == pytest.approx({s: v / sum(rest.values()) for s, v in rest.items()})
