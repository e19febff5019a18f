"""What the two private stages hand to the engine: losses of units alone, and batches that no other unit moves."""

import numpy as np
import pytest
import torch

from dpldm_core.data.schema import ImageSchema, Records, write_records
from dpldm_core.models.autoencoder import unwhitening
from dpldm_core.presets import resolve_config
from dpldm_core.privacy.clipping import BookKeeping
from dpldm_core.privacy.engine import DpSgdEngine
from dpldm_core.privacy.plan import DpSgdPlan, ReleasePlan
from dpldm_core.rng import SecretKey
from dpldm_core.training import building, stages
from dpldm_core.training.autoencoder import draw_codec, reconstruction_loss, train_autoencoder
from dpldm_core.training.diffusion import diffusion_loss, draw_diffusion, train_denoiser
from dpldm_core.training.units import Units

KEY = SecretKey(bytes(range(32)))
SCHEMA = ImageSchema(height=8, width=8, channels=1, class_names=("a", "b"), labelled=True, grouped=True)
TABLE = torch.tensor([[0, 1, 2], [3, -1, -1], [4, 5, -1], [6, 7, 8], [9, -1, -1]])
STAGES = ["autoencoder", "denoiser"]


@pytest.fixture(scope="module")
def config():
    return resolve_config(
        dataset="d",
        epsilon=8.0,
        delta=1e-5,
        preset="smoke",
        num_samples=0,
        latent_mechanism="dp_sgd",
        public_num_records=None,
        overrides={"max_records_per_group": 3, "diffusion": {"noise_multiplicity": 4}},
    )


def plan(stage="s"):
    return DpSgdPlan(
        stage=stage,
        sample_rate=0.5,
        num_steps=2,
        max_grad_norm=0.1,
        noise_multiplier=1.0,
        truncation_probability=1e-12,
        max_batch_size=24,
    )


def units_of(stage, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = (
        torch.rand(10, 1, 8, 8, generator=g) * 2 - 1 if stage == "autoencoder" else torch.randn(10, 16, generator=g)
    )
    return Units(values, torch.arange(10) % 2, TABLE)


def model_of(stage, config):
    """With random weights: a layer that starts at zero would hide what is before it."""
    model = (
        building.new_autoencoder(config, SCHEMA)
        if stage == "autoencoder"
        else building.new_denoiser(config, SCHEMA, 0.0)
    )
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / max(p[0].numel(), 1) ** 0.5)
    return model


def alone(model, loss, batch, i, max_norm):
    """Slow reference: the clipped gradient of one unit by plain autograd, float64."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(model, {k: v[i : i + 1] for k, v in batch.items()}).sum(), trained)
    g = torch.cat([p.flatten() for p in gradients]).double()
    return g * min(1.0, max_norm / float(g.norm()))


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
@pytest.mark.parametrize("stage", STAGES)
def test_the_sum_is_that_of_units_clipped_alone(config, stage, max_norm):
    """Persons of one to three records, each with K noise draws in the denoiser: still one clip for each person."""
    model, batch = model_of(stage, config), units_of(stage).fetch(torch.arange(5))
    if stage == "denoiser":
        batch = draw_diffusion(batch, np.random.default_rng(0), config.diffusion, 0.5)
    else:
        spread = unwhitening(model.encoder.transform.latent_shape)
        batch = draw_codec(batch, np.random.default_rng(0), config.autoencoder, spread)
    loss = reconstruction_loss if stage == "autoencoder" else diffusion_loss
    book = BookKeeping(model, max_norm=max_norm)
    sums = book.clipped_sum(lambda: loss(model, batch), torch.ones(5, dtype=torch.bool))
    expected = sum(alone(model, loss, batch, i, max_norm) for i in range(5))
    got = torch.cat([s.flatten() for s in sums]).double()
    assert float((got - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_the_batch_of_a_unit_does_not_depend_on_another_unit(config, stage, monkeypatch):
    """Scale factors, minima or means read from the data, and draws that follow its size: all would show here."""
    seen = []

    def spying_step(self, step, num_units, fetch):
        seen[-1].append(fetch(torch.tensor([0, 1, 2, 3, 2, 0])))
        for p in self._model.parameters():
            p.grad = torch.full_like(p, 0.1)

    monkeypatch.setattr(DpSgdEngine, "noisy_step", spying_step)
    loop = stages.Run(None).loop(config, 2)
    weights = []
    for value in (None, 30.0, -1e6):
        units = units_of(stage)
        if value is not None:
            units.values[9] = value  # the last unit, which is not in the batch
        seen.append([])
        if stage == "autoencoder":
            model = train_autoencoder(model_of(stage, config), units, plan(), KEY, config.autoencoder, **loop)
        else:
            model = train_denoiser(model_of(stage, config), units, plan(), KEY, config.diffusion, **loop)
        weights.append(torch.cat([v.flatten() for v in model.state_dict().values()]))
    assert len(seen[0]) == 2
    for other in seen[1:]:
        for before, after in zip(seen[0], other, strict=True):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def write_people(path, seed=0, sizes=(3, 1, 2, 5, 1, 1, 3, 2)):
    rng = np.random.default_rng(seed)
    people = np.repeat(np.arange(len(sizes)), sizes)
    images = rng.integers(0, 256, (len(people), 8, 8, 1), dtype=np.uint8)
    write_records(path, Records(images, np.arange(len(people)) % 2, people, SCHEMA))
    return path


def test_a_person_is_one_unit_in_both_stages(config, tmp_path, monkeypatch):
    """Eight persons with 18 records: no stage ever sees more than eight units."""
    counted, noisy_step = [], DpSgdEngine.noisy_step

    def counting_step(self, step, num_units, fetch):
        counted.append(num_units)
        noisy_step(self, step, num_units, fetch)

    monkeypatch.setattr(DpSgdEngine, "noisy_step", counting_step)
    train, run = write_people(tmp_path / "train"), stages.Run(tmp_path)
    release = ReleasePlan(
        mechanisms=(plan("train_autoencoder"),), delta=1e-5, relation="ADD_OR_REMOVE_ONE", unit_of_privacy="one person"
    )
    autoencoder, _, _ = stages.train_codec(train, config, release, lambda s: KEY, run)
    latents, _ = stages.extract_latents(train, autoencoder, config, release, lambda s: KEY, run)
    table = stages.load_file(latents)["table"]
    assert counted == [8, 8]
    assert table.shape == (8, 3) and (table >= 0).sum(1).tolist() == [3, 1, 2, 3, 1, 1, 3, 2]


def test_a_checkpoint_is_bound_to_the_private_file_and_the_plan(tmp_path):
    (tmp_path / "a").write_bytes(b"records")
    (tmp_path / "b").write_bytes(b"recordz")
    bindings = {stages.binding_of(tmp_path / data, text) for data in "ab" for text in ("plan", "plam")}
    assert len(bindings) == 4
    assert stages.binding_of(tmp_path / "a", "plan") in bindings
