"""The benchmarks ask for the releases that they say they do. Nothing is trained here."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _baselines
import ablation
import fidelity
import quality
import readers
from quality import add_arguments, request_of

from dpldm_core.data.schema import ImageSchema, Records
from dpldm_core.evaluation.downstream import held_out_accuracy
from dpldm_core.evaluation.features import FeatureExtractor
from dpldm_core.models.classifier import train_classifier
from dpldm_core.overrides import merge
from dpldm_core.privacy import accounting
from dpldm_core.release.bundle import digest
from dpldm_core.release.synthetic import write_synthetic_parquet


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


def some_records(n=60, classes=2):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    images = rng.integers(0, 60, (n, 8, 8, 1), dtype=np.uint8) + 150 * labels[:, None, None, None].astype(np.uint8)
    schema = ImageSchema(height=8, width=8, channels=1, class_names=tuple("ab"), labelled=True, grouped=False)
    return Records(images, labels.astype(np.int64), None, schema)


@pytest.mark.parametrize("name", sorted(_baselines.BASELINES))
def test_another_method_draws_images_within_the_whole_epsilon(name, tmp_path, monkeypatch):
    """Every mechanism that it runs is of one plan, calibrated to the release's epsilon."""
    (tmp_path / "tiny.json").write_text(
        json.dumps({"diffusion": {"width": 8, "depth": 1, "dp_sgd": {"num_steps": 2}}, "num_records": 60})
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    asked = ["--preset", "smoke", "--epsilon", "8", "--delta", "1e-3", "--config", str(tmp_path / "tiny.json")]
    config = request_of(parser.parse_args([*asked, "--num-samples", "20"]), tmp_path).config
    plans, calibrated = [], _baselines.calibrate

    def calibrate(*args, **kwargs):
        plans.append(calibrated(*args, **kwargs))
        return plans[-1]

    used = []

    def noted(name, plans_of):
        run = getattr(_baselines, name)

        def with_note(*args, **kwargs):
            used.extend(plans_of(args))
            return run(*args, **kwargs)

        monkeypatch.setattr(_baselines, name, with_note)

    noted("noisy_sum", lambda args: [args[0]])
    noted("release_prior", lambda args: args[2])
    noted("train_denoiser", lambda args: [args[2]])
    monkeypatch.setattr(_baselines, "calibrate", calibrate)
    monkeypatch.setattr(_baselines, "_ITERATIONS", 2)
    images, labels = _baselines.BASELINES[name](some_records(), config)
    assert (images.dtype, images.shape, len(np.unique(labels))) == (np.uint8, (20, 8, 8, 1), 2)
    (plan,) = plans
    spent = accounting.epsilon(plan.events(), plan.delta, accounting.relation_from_name(plan.relation))
    assert 0.99 * 8 < spent <= 8 and plan.delta == 1e-3
    control = name == "pixel_dpdm_without_noise"
    assert used and ({m.stage for m in used} == {m.stage for m in plan.mechanisms})
    assert all(m in plan.mechanisms for m in used) is not control, "what ran is what was calibrated"


@pytest.mark.slow
def test_dpdm_on_pixels_learns_where_hardly_any_noise_is_in_the_way(tmp_path):
    """A control of that baseline, which at a release's epsilon and minutes draws nothing: its code is not at fault."""
    bunch = load_digits()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)[..., None]
    labels, order = bunch.target.astype(np.int64), np.random.default_rng(0).permutation(len(images))
    learnt, tested = order[:1437], order[1437:]
    schema = ImageSchema(height=8, width=8, channels=1, class_names=tuple("0123456789"), labelled=True, grouped=False)
    records = Records(images[learnt], labels[learnt], None, schema)
    changes = {"num_records": 1437, "diffusion": {"width": 32, "depth": 4, "dp_sgd": {"num_steps": 100}}}
    changes["diffusion"]["dp_sgd"]["sample_rate"] = 0.5
    (tmp_path / "own.json").write_text(json.dumps(changes))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    asked = ["--dataset", "mnist", "--epsilon", "8", "--num-samples", "2000", "--config", str(tmp_path / "own.json")]
    config = request_of(parser.parse_args(asked), tmp_path).config
    accuracy = {}
    for name in ("pixel_dpdm", "pixel_dpdm_without_noise"):
        drawn = _baselines.BASELINES[name](records, config)
        classifier = train_classifier(*drawn, num_classes=10, num_epochs=20, seed=0)
        accuracy[name] = held_out_accuracy(classifier, images[tested], labels[tested], num_classes=10).accuracy
    assert accuracy["pixel_dpdm_without_noise"] > 0.7
    assert accuracy["pixel_dpdm"] < accuracy["pixel_dpdm_without_noise"] - 0.3


def coarse(pixels):
    return torch.nn.functional.avg_pool2d(pixels.float() / 255, 4).flatten(1)


def test_fidelity_measures_the_images_that_a_run_kept(tmp_path):
    records, names = some_records(), ["a", "b"]
    write_synthetic_parquet(tmp_path / "kept" / "release.parquet", records.images, records.labels, names)
    write_synthetic_parquet(tmp_path / "kept" / "dp_merf.parquet", 255 - records.images, records.labels, names)
    known = {name: digest(tmp_path / "kept" / f"{name}.parquet")["sha256"] for name in ("release", "dp_merf")}
    files = fidelity.kept_files({"images_sha256": known}, tmp_path / "kept")
    real = records.images[:40], records.images[20:]
    found = fidelity.measure(files, real, FeatureExtractor("fd_coarse", coarse), num_images=40)
    assert (found["metric"], found["num_images"]) == ("fd_coarse", 40)
    assert found["release"]["distance"] < found["dp_merf"]["distance"]
    assert found["release"]["precision"] > found["dp_merf"]["precision"]
    with pytest.raises(SystemExit, match="from 10 to 40"):
        fidelity.measure(files, real, FeatureExtractor("fd_coarse", coarse), num_images=50)
    with pytest.raises(SystemExit, match="not what the result was measured on"):
        fidelity.kept_files({"images_sha256": known | {"release": "0"}}, tmp_path / "kept")
    with pytest.raises(SystemExit, match="not what the result was measured on"):
        fidelity.kept_files({"images_sha256": {"release": known["release"]}}, tmp_path / "kept")
    with pytest.raises(SystemExit, match="holds no images"):
        fidelity.kept_files({}, tmp_path / "nothing")


def test_readers_answers_are_counted_by_source():
    key = [{"class": c, "source": s} for c, s in (("a", "real"), ("b", "synthetic"), ("c", "synthetic"), ("a", "real"))]
    answers = {1: ("a", "real"), 2: ("c", "real"), 3: ("?", "synthetic"), 4: ("b", "synthetic")}
    found = readers.score(key, answers, {"b", "c"})
    assert found["synthetic"] == {"images": 2, "named": 0, "named_alike": 1, "unknown": 1, "taken_for_real": 1}
    assert found["real"] == {"images": 2, "named": 1, "named_alike": 1, "unknown": 0, "taken_for_real": 1}
    for wrong in ({}, answers | {2: ("d", "real")}, answers | {2: ("b", "no idea")}):
        with pytest.raises(SystemExit, match="image "):
            readers.score(key, wrong, set())


def test_a_sheet_shows_all_images_in_their_order():
    images = np.zeros((23, 28, 28, 1), dtype=np.uint8)
    images[14] = 200
    sheet = np.array(readers.draw_sheet(images))
    gray = np.argwhere((sheet == 200).all(2))
    assert len(gray) == 84 * 84
    tile = (28 * 3 + readers._GAP, 28 * 3 + readers._NUMBER + readers._GAP)  # the fifteenth: row 1, column 4
    assert gray.min(0).tolist() == [readers._GAP + tile[1] + readers._NUMBER, readers._GAP + 4 * tile[0]]


def test_a_stage_s_peak_of_memory_is_its_own():
    clock = quality.Clock()
    with clock.stage("large"):
        large = np.ones(50_000_000)
    del large
    with clock.stage("small"):
        pass
    if not quality._forget_peak():
        pytest.skip("this system cannot forget a peak")
    assert clock.stages["small"]["peak_memory_gb"] < clock.stages["large"]["peak_memory_gb"] - 0.2
