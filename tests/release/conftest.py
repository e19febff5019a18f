"""A small but whole bundle, made from the same public functions as a real one."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpldm_core.data.schema import ImageSchema
from dpldm_core.presets import resolve_config
from dpldm_core.privacy.calibration import COVARIANCES, MEANS
from dpldm_core.privacy.plan import GaussianSumPlan, ReleasePlan
from dpldm_core.privacy.report import build_report
from dpldm_core.release.bundle import MANIFEST, canonical_json, digest, seal, write_bundle
from dpldm_core.release.card import render_card
from dpldm_core.release.figures import samples_grid_png
from dpldm_core.release.sampling import public_config
from dpldm_core.release.synthetic import write_synthetic_parquet

CLASSES = ["ankle boot", "bag", "coat"]
NUM_SAMPLES = 7
PRIVATE_MARKER = 918273645  # stands for a number that was read from private data; it may appear nowhere
_NONE = {"dp_sgd": {"budget_share": 0.0}}
CONFIG_VALUES = public_config(
    resolve_config(
        dataset="mnist5k",
        epsilon=1.0,
        delta=1e-5,
        preset="quick",
        num_samples=NUM_SAMPLES,
        latent_mechanism="dp_sgd",
        public_num_records=None,
        overrides={"prior": {"budget_share": 1.0}, "autoencoder": _NONE, "diffusion": _NONE, "teacher": _NONE},
    ),
    ImageSchema(height=8, width=8, channels=1, class_names=tuple(CLASSES), labelled=True, grouped=False),
    0.0,
    "mnist5k",
)


@pytest.fixture
def plan():
    """That of CONFIG_VALUES, cheap to account for: the byte-change tests verify dozens of bundles."""
    return ReleasePlan(
        mechanisms=(
            GaussianSumPlan(stage=MEANS, max_norm=1.0, noise_multiplier=6.0),
            GaussianSumPlan(stage=COVARIANCES, max_norm=1.0, noise_multiplier=8.0),
        ),
        delta=1e-5,
        relation="ADD_OR_REMOVE_ONE",
        unit_of_privacy="one record",
    )


@pytest.fixture
def parts(tmp_path, plan):
    """Keyword arguments of write_bundle for release ``r1``."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_SAMPLES, 8, 8, 1), dtype=np.uint8)
    labels = (np.arange(NUM_SAMPLES) % 3).astype(np.int64)
    source = tmp_path / "source"
    shards = [source / "a.parquet", source / "b.parquet"]
    write_synthetic_parquet(shards[0], images[:4], labels[:4], CLASSES)
    write_synthetic_parquet(shards[1], images[4:], labels[4:], CLASSES)
    models = {name: source / f"{name}.safetensors" for name in ("decoder", "denoiser")}
    for path in models.values():
        save_file({"weight": rng.normal(size=(3, 2)).astype(np.float32)}, path)
    report = build_report(
        plan,
        release_id="r1",
        account="mnist5k",
        entry="entry-1",
        latent_mechanism="dp_sgd",
        public_facts={"image_size": {"value": [8, 8, 1], "origin": "declared by the schema"}},
    )
    return {
        "synthetic": shards,
        "model_files": models,
        "config": CONFIG_VALUES,
        "report": report,
        "card": render_card(
            report,
            CONFIG_VALUES | {"num_records": PRIVATE_MARKER, "evaluation": {"accuracy": PRIVATE_MARKER}},
            dataset_title="MNIST, 5,000 images",
            num_samples=NUM_SAMPLES,
            class_names=CLASSES,
        ),
        "samples_png": samples_grid_png(images, labels, class_names=CLASSES, columns=3),
    }


@pytest.fixture
def folder(tmp_path, parts):
    """A written bundle."""
    return Path(write_bundle(tmp_path / "releases", "r1", **parts))


@pytest.fixture
def rewrite():
    """Change a JSON file or the text of a bundle and make every hash right again, as a forger would."""

    def apply(folder, name, change):
        path = folder / name
        if name.endswith(".json"):
            value = json.loads(path.read_bytes())
            path.write_bytes(canonical_json(change(value) or value))
        else:
            path.write_bytes(change(path.read_bytes()))
        manifest = json.loads((folder / MANIFEST).read_bytes())
        manifest["files"] = {
            p.relative_to(folder).as_posix(): digest(p) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST
        }
        (folder / MANIFEST).write_bytes(seal(manifest))

    return apply
