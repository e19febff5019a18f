import re

import numpy as np
import pytest
import yaml
from PIL import Image

from dpldm_core.config import AuditNote
from dpldm_core.privacy.plan import DpSgdPlan, GaussianRecordPlan, LabelPlan, ReleasePlan
from dpldm_core.privacy.report import build_report
from dpldm_core.provenance import code_digest
from dpldm_core.release.card import render_card
from dpldm_core.release.figures import samples_grid_png

CONFIG = {"epsilon": 10.0, "preset": "quick", "num_records": 918273645, "evaluation": {"accuracy": 918273645}}


def card(plan, *, mechanism="dp_sgd", classes=("cat", "dog | wolf"), title="Pets", parent=None, audit=None):
    report = build_report(
        plan,
        release_id="r1",
        account="pets",
        entry="e1",
        latent_mechanism=mechanism,
        public_facts={"classes": {"value": list(classes), "origin": "declared by the owner"}},
    ).model_copy(update={"parent_release_id": parent})
    return render_card(report, CONFIG, dataset_title=title, num_samples=2500, class_names=classes, audit=audit)


@pytest.fixture
def local_plan():
    return ReleasePlan(
        mechanisms=(
            GaussianRecordPlan(stage="latents", max_norm=1.0, noise_multiplier=2.0),
            LabelPlan(stage="labels", num_classes=2, labels_per_unit=3, noise_parameter=0.5),
        ),
        delta=1e-5,
        relation="REPLACE_ONE",
        unit_of_privacy="one person",
    )


def test_card_states_the_promise_and_nothing_private(plan):
    text = card(plan)
    report_line = re.search(r"^> (This release is .*)$", text, re.M)
    assert report_line and "ADD_OR_REMOVE_ONE (adding or removing one record)" in report_line[1]
    assert "918273645" not in text
    assert "| latent_means | Gaussian mechanism, once | 6 |" in text
    assert "python -m dpldm_core.release.verify" in text
    assert f"Made by dpldm, SHA-256 of its sources {code_digest()}, with torch " in text
    assert "What is not promised" in text and "Ge, Zhang and Sun, 2024" in text


def test_front_matter_is_yaml_that_hugging_face_knows(plan):
    text = card(plan, title='Pets: "cute"\n---\nevil: yes')
    front = yaml.safe_load(text.split("---\n")[1])
    assert {"synthetic", "differential-privacy"} <= set(front["tags"])
    assert front["size_categories"] == ["1K<n<10K"]
    assert front["configs"] == [{"config_name": "default", "data_files": "synthetic/*.parquet"}]
    assert "evil" not in front and front["pretty_name"].startswith('Pets: "cute" --- evil')
    unlabelled = yaml.safe_load(card(plan, classes=()).split("---\n")[1])
    assert unlabelled["task_categories"] == ["unconditional-image-generation"]


def test_card_of_noised_latents(local_plan):
    text = card(local_plan, mechanism="noised_latents", parent="r0")
    assert "but for one person, replaced by any other" in text
    assert "Randomized response over 2 classes, 3 times; a label is replaced with probability 0.5" in text
    assert "sampled again from `r0`" in text
    assert "dog \\| wolf" in text  # a class name cannot break the table


def test_card_says_how_sure_an_attacker_can_become():
    """Worst-case posterior of two equally likely worlds is e^eps / (1 + e^eps): 73.11 % at epsilon 1."""
    plan = ReleasePlan(
        mechanisms=(
            DpSgdPlan(
                stage="diffusion",
                sample_rate=0.01,
                num_steps=1200,
                max_grad_norm=1.0,
                noise_multiplier=2.0,
                truncation_probability=1e-12,
            ),
        ),
        delta=1e-5,
        relation="ADD_OR_REMOVE_ONE",
        unit_of_privacy="one record",
    )
    text = card(plan)
    epsilon = plan.epsilon()
    sure = float(re.search(r"become ([\d.]+) % sure", text)[1])
    assert 0 <= sure - 100 / (1 + np.exp(-epsilon)) < 0.04  # rounded up: epsilon to 0.001, then the percentage
    assert "| diffusion | DP-SGD: 1,200 steps, sample rate 0.01 | 2 |" in text


def test_audit_appears_only_when_there_is_one(plan):
    note = AuditNote(
        dataset="mnist5k",
        preset="quick",
        epsilon=1.0,
        num_canaries=10_000,
        confidence=0.95,
        claim=0.7004,
        epsilon_lower_bound=0.41,
        method="white box",
    )
    text = " ".join(card(plan, audit=note.model_dump()).split())
    assert "public data (`mnist5k`, preset `quick`, for a release of epsilon 1). 10,000 canaries; white box." in text
    assert "epsilon = 0.701 there. The attack shows that it is at least 0.41, with 95% confidence" in text
    assert "attack" not in card(plan)


def test_pandas_example_of_the_card_runs(folder, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[0]
    monkeypatch.chdir(folder)
    scope = {}
    exec(code, scope)
    assert scope["image"].size == (8, 8) and list(scope["frame"].columns) == ["image", "label"]
    assert len(scope["frame"]) == 7


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_the_first_of_each_class_pixel_for_pixel(channels):
    import io

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 28, 28, channels), dtype=np.uint8)
    labels = np.array([1, 0] * 6)
    png = samples_grid_png(images, labels, class_names=["a", "b"], columns=4)
    assert png == samples_grid_png(images, labels, class_names=["a", "b"], columns=4)
    grid = np.asarray(Image.open(io.BytesIO(png)))
    first_of_a = np.broadcast_to(images[1], (28, 28, 3)).repeat(3, 0).repeat(3, 1)
    windows = [grid[16:100, x : x + 84] for x in range(grid.shape[1] - 84)]
    assert any(np.array_equal(window, first_of_a) for window in windows)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_grid_without_labels_or_with_few_images(count):
    images = np.zeros((count, 8, 8, 1), np.uint8)
    assert samples_grid_png(images).startswith(b"\x89PNG")
    assert samples_grid_png(images, np.zeros(count, np.int64), class_names=["a" * 80, "b"]).startswith(b"\x89PNG")
