import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dpldm_core.config import PerformanceConfig
from dpldm_core.errors import CheckpointError
from dpldm_core.models.ema import Ema
from dpldm_core.privacy.engine import DpSgdEngine
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey
from dpldm_core.training.private import train_private
from dpldm_core.training.units import Units

KEY = SecretKey(bytes(range(32)))
STEPS, DIM = 7, 4
PLAN = DpSgdPlan(
    stage="s",
    sample_rate=0.4,
    num_steps=STEPS,
    max_grad_norm=0.5,
    noise_multiplier=1.2,
    truncation_probability=1e-12,
    max_batch_size=30,
)


class Net(nn.Module):
    """With a buffer, as normalising layers and released priors have."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(DIM, 6), nn.Linear(6, DIM)
        self.register_buffer("shift", torch.full((DIM,), 0.1))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x + self.shift)))


def loss(model, batch):
    per_record = (model(batch["values"] + batch["noise"]) - batch["values"]).square().mean(2)
    return (per_record * batch["weights"]).sum(1)


def draw(batch, generator):
    return batch | {"noise": torch.from_numpy(generator.standard_normal(batch["values"].shape, dtype=np.float32))}


def no_draw(batch, generator):
    return batch | {"noise": torch.zeros(batch["values"].shape)}


def units(n=20, seed=3):
    values = torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))
    return Units(values, torch.zeros(n, dtype=torch.int64), torch.arange(n)[:, None])


PERFORMANCE = {
    "physical_batch_size": 8,
    "clip_backend": "book_keeping",
    "matmul_precision": "float32",
    "checkpoint_every": 1,
}


def performance(**changes):
    return PerformanceConfig(**PERFORMANCE | changes)


def train(data=None, *, key=KEY, plan=PLAN, **options):
    torch.manual_seed(11)
    arguments = {
        "loss": loss,
        "draw": draw,
        "num_classes": 1,
        "learning_rate": 0.01,
        "ema_decay": 0.8,
        "performance": performance(**{k: options.pop(k) for k in PERFORMANCE if k in options}),
        "binding": "b1",
    }
    return train_private(Net(), data or units(), plan, key, **arguments | options)


def weights(model):
    return torch.cat([v.flatten() for v in model.state_dict().values()])


class KilledError(Exception):
    pass


def kill_after(count, then=lambda: None):
    calls = []

    def on_checkpoint():
        calls.append(1)
        then()
        if len(calls) == count:
            raise KilledError

    return on_checkpoint


@pytest.fixture(scope="module")
def uninterrupted():
    return weights(train())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("killed_at", range(1, STEPS))
def test_resuming_at_every_step_equals_the_uninterrupted_run(tmp_path, uninterrupted, killed_at, every):
    """Bit for bit: batches, draws and noise of a step are functions of (key, step)."""

    def on_step(done, total):
        if done == killed_at:
            raise KilledError

    with pytest.raises(KilledError):
        train(checkpoint=tmp_path, checkpoint_every=every, on_step=on_step)
    assert torch.equal(weights(train(checkpoint=tmp_path, checkpoint_every=every)), uninterrupted)


def test_resuming_an_older_checkpoint_forgets_no_step(tmp_path, uninterrupted, monkeypatch):
    """Reloading an older accountant state forgets steps: here the bill is the plan's, and lost steps are replayed."""
    old = []
    with pytest.raises(KilledError):
        train(
            checkpoint=tmp_path,
            on_checkpoint=kill_after(5, lambda: old.append((tmp_path / "state.safetensors").read_bytes())),
        )
    (tmp_path / "state.safetensors").write_bytes(old[1])
    steps = record_steps(monkeypatch)
    assert torch.equal(weights(train(checkpoint=tmp_path)), uninterrupted)
    assert steps == [2, 3, 4, 5, 6] and PLAN.event().count == STEPS


def record_steps(monkeypatch, gradient=None):
    steps, noisy_step = [], DpSgdEngine.noisy_step

    def recorded(self, step, num_units, fetch):
        steps.append(step)
        noisy_step(self, step, num_units, fetch)
        if gradient is not None:
            for p in self._model.parameters():
                p.grad = torch.full_like(p, gradient)

    monkeypatch.setattr(DpSgdEngine, "noisy_step", recorded)
    return steps


def test_exactly_the_steps_that_are_charged_are_run(monkeypatch):
    steps = record_steps(monkeypatch)
    train()
    assert steps == list(range(PLAN.event().count))


def test_a_killed_write_leaves_the_previous_checkpoint(tmp_path, uninterrupted, monkeypatch):
    calls = []

    def killed_on_the_third(tensors, path, metadata):
        calls.append(path)
        if len(calls) < 3:
            return save_file(tensors, path, metadata=metadata)
        path.write_bytes(b"half a checkpoint")
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("dpldm_core.training.state.save_file", killed_on_the_third)
        with pytest.raises(KilledError):
            train(checkpoint=tmp_path)
    assert torch.equal(weights(train(checkpoint=tmp_path)), uninterrupted)


@pytest.fixture
def checkpoint(tmp_path):
    with pytest.raises(KilledError):
        train(checkpoint=tmp_path, on_checkpoint=kill_after(3))
    return tmp_path


def test_a_checkpoint_of_another_binding_is_refused(checkpoint):
    """Same key with changed data or plan is refused: the noise of two runs would cancel."""
    with pytest.raises(CheckpointError, match="another plan or data set"):
        train(checkpoint=checkpoint, binding="b2")


def test_a_damaged_checkpoint_is_refused(checkpoint):
    path = checkpoint / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(checkpoint=checkpoint)


def test_a_checkpoint_holds_no_key_and_no_generator(checkpoint):
    """Models, their average, the optimizer; step and binding. Neither the key nor anything per record."""
    path = checkpoint / "state.safetensors"
    assert KEY.secret not in path.read_bytes()
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["dpldm"]) == {"step": 3, "binding": "b1"}
        names = set(file.keys())
    state = set(Net().state_dict())
    fields = {f"optimizer.{i}.{f}" for i in range(4) for f in ("step", "exp_avg", "exp_avg_sq")}
    assert names == {f"{part}.{k}" for part in ("model", "ema") for k in state} | fields


def test_callbacks_and_logs_get_public_numbers_alone(tmp_path, capfd, caplog):
    """Train loss, gradient norm, clip fraction or real batch size in logs: nothing differs between neighbours.

    Record and replay on D, D with a unit added, and D with a unit that is not finite.
    """
    records = units(20)
    broken = Units(records.values.clone(), records.class_labels, records.table)
    broken.values[19] = math.nan
    seen = []
    caplog.set_level(0)
    for i, data in enumerate((records, units(21), broken)):
        calls = []
        train(
            data,
            checkpoint=tmp_path / str(i),
            on_step=lambda *a, c=calls: c.append(a),
            on_checkpoint=lambda *a, c=calls: c.append(a),
        )
        seen.append(calls)
    assert seen[0] == seen[1] == seen[2]
    assert [c for c in seen[0] if c] == [(t + 1, STEPS) for t in range(STEPS)]
    assert seen[0].count(()) == STEPS - 1
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_the_model_depends_on_the_data_through_noisy_gradients_alone(monkeypatch):
    """With the gradients replaced by a constant, two different data sets give one model, buffers and all.

    A second un-noised optimizer, an average fed with clean gradients, data's statistics kept in a buffer: all fail.
    """
    record_steps(monkeypatch, gradient=0.3)
    assert torch.equal(weights(train(units(20, seed=3))), weights(train(units(9, seed=4))))


def test_the_returned_model_is_adam_and_average_of_the_noisy_gradients():
    """Slow reference: the loop by hand, with Adam written out (Kingma and Ba 2015)."""
    torch.manual_seed(11)
    model, data = Net(), units()
    average = Ema(model, 0.8)
    probe = no_draw(data.probe(1, generator=torch.Generator()), None)
    engine = DpSgdEngine(model, PLAN, KEY, loss=loss, probe=probe, physical_batch_size=8)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for t in range(STEPS):
        engine.noisy_step(t, 20, lambda i: no_draw(data.fetch(i), None))
        progress = (t + 1) / STEPS
        rate = 0.01 * min(1.0, progress / 0.05) * (1 - 0.9 * progress)
        with torch.no_grad():
            for p, (m, v) in zip(model.parameters(), moments, strict=True):
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                v.mul_(0.99).add_(p.grad.square(), alpha=0.01)
                p -= rate * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.99 ** (t + 1))).sqrt() + 1e-8)
        average.update(model, t)
    trained = train(draw=no_draw)
    torch.testing.assert_close(weights(trained), weights(average.model), rtol=1e-5, atol=1e-6)
    assert not trained.training and not any(p.requires_grad for p in trained.parameters())


def test_another_key_is_another_run(uninterrupted):
    """Fixed seed: global seeds are equal in both runs, so batches, draws and noise come from the key."""
    other = weights(train(key=SecretKey(bytes(32))))
    assert not torch.isclose(other, uninterrupted)[:-DIM].all()


def test_draws_change_from_step_to_step_and_repeat_with_the_key():
    streams = []

    def recorded(batch, generator):
        streams[-1].append(
            batch | {"noise": torch.from_numpy(generator.standard_normal(batch["values"].shape, dtype=np.float32))}
        )
        return streams[-1][-1]

    for key in (KEY, KEY, SecretKey(bytes(32))):
        streams.append([])
        train(key=key, draw=recorded)
    first, again, other = ([tuple(b["noise"].flatten().tolist()) for b in s[1:]] for s in streams)  # [0] is the probe
    assert first == again and not set(first) & set(other) and len(set(first)) == len(first)


def test_the_physical_batch_size_is_no_knob_of_the_guarantee():
    """Noise is per step, not per piece: any size gives the same model up to rounding."""
    sizes = [weights(train(physical_batch_size=p, draw=no_draw)) for p in (3, 30)]
    torch.testing.assert_close(*sizes, rtol=1e-3, atol=1e-4)


def test_no_private_data_is_read_by_the_check_before_training(monkeypatch):
    """The probe is made up: on data sets of the same shape it is the same, whatever they hold."""
    probes = []
    monkeypatch.setattr("dpldm_core.privacy.engine.check_bounded", lambda model, loss, probe: probes.append(probe))
    for data in (units(20, seed=3), units(25, seed=4)):
        train(data)
    assert probes[0].keys() == probes[1].keys()
    assert all(torch.equal(probes[0][k], probes[1][k]) for k in probes[0])


def test_draws_are_as_secret_as_the_key():
    """Rows shift when a unit leaves, and draws stay: the sensitivity argument needs them secret, bit by bit."""
    seen = []

    def remember(batch, generator):
        if isinstance(generator.bit_generator, np.random.Philox):  # not the probe's public generator
            seen.append(tuple(generator.bit_generator.state["state"]["key"].tolist()))
        return draw(batch, generator)

    for key in (KEY, SecretKey(bytes(32))):
        train(key=key, draw=remember, physical_batch_size=30)
    assert len(set(seen)) == len(seen) > 0, "neither a step's nor another key's"
    words = np.array(seen, dtype=np.uint64).flatten()
    bits = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(bits - 0.5) < 5 * 0.5 / (64 * len(words)) ** 0.5, "128 uniform bits each (false alarm below 1e-6)"


def test_processes_that_share_a_step_draw_independently(monkeypatch):
    """Equal draws in two processes would tie a row of one to a row of the other, and the clip would bound less."""

    def keys_of(rank):
        seen = []

        def remember(batch, generator):
            if isinstance(generator.bit_generator, np.random.Philox):
                seen.append(tuple(generator.bit_generator.state["state"]["key"].tolist()))
            return draw(batch, generator)

        monkeypatch.setattr("dpldm_core.training.private.process_rank", lambda: rank)
        train(draw=remember, physical_batch_size=30)
        return seen

    first, second, again = keys_of(0), keys_of(1), keys_of(0)
    assert first == again and len(first) == len(second) > 0
    assert not set(first) & set(second)
