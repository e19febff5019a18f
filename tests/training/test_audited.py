import numpy as np
import pytest
import torch
from torch import nn

from dpldm_core.config import PerformanceConfig
from dpldm_core.privacy.audit import recording
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey
from dpldm_core.training.audited import CanaryAudit, CanaryUnits
from dpldm_core.training.private import train_private
from dpldm_core.training.units import Units

KEY = SecretKey(bytes(range(32)))
C, DIM, M = 0.5, 4, 60
PLAN = DpSgdPlan(
    stage="s",
    sample_rate=0.4,
    num_steps=5,
    max_grad_norm=C,
    noise_multiplier=1.2,
    truncation_probability=1e-12,
    max_batch_size=30,
)
LOOP = {
    "draw": lambda batch, generator: batch,
    "num_classes": 1,
    "learning_rate": 0.01,
    "ema_decay": 0.8,
    "performance": PerformanceConfig(
        physical_batch_size=8, clip_backend="book_keeping", matmul_precision="float32", checkpoint_every=1
    ),
    "binding": "",
}


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(DIM, 6), nn.Tanh(), nn.Linear(6, DIM))


def loss(model, batch):
    return ((model(batch["values"]) - batch["values"]).square().mean(2) * batch["weights"]).sum(1)


def units(n=20, per_unit=2):
    values = torch.randn(n * per_unit, DIM, generator=torch.Generator().manual_seed(3))
    table = torch.arange(n * per_unit).view(n, per_unit)
    table[::3, 1] = -1
    return Units(values, torch.zeros(n * per_unit, dtype=torch.int64), table)


def test_a_canary_moves_its_own_coordinate_by_c_and_nothing_else():
    """The network's part of the first sum is that of a run without canaries; the canaries' is C for those drawn."""
    with recording() as plain:
        train_private(network(), units(), PLAN, KEY, loss=loss, **LOOP)
    audit = CanaryAudit(M, KEY)
    with recording() as audited:
        trained = audit.train(network(), units(), PLAN, KEY, loss=loss, **LOOP)
    size = plain.sums[0].size
    assert np.abs(audited.sums[0][:size] - plain.sums[0]).max() < 1e-6
    moved = np.stack([total[size:] for total in audited.sums]) / C
    assert np.all((moved == 0) | (np.abs(moved - 1) < 1e-4))
    assert not moved[:, ~audit.included].any() and moved[:, audit.included].any()
    assert 0.25 < moved[:, audit.included].mean() < 0.55
    assert len(list(trained.parameters())) == 4 and isinstance(trained, nn.Sequential)


def test_scores_are_those_of_the_released_gradients():
    """Rebuilt from the exact sums and the plan's own noise."""
    audit = CanaryAudit(M, KEY)
    with recording() as seen:
        audit.train(network(), units(), PLAN, KEY, loss=loss, **LOOP)
    noise = PLAN.noise(KEY.derive("noise"))
    released = [noise.add(s, noise.draw(t, s.size))[-M:] / (1.2 * C) for t, s in enumerate(seen.sums)]
    ratio = np.log(0.6 + 0.4 * np.exp(np.stack(released) / 1.2 - 0.5 / 1.44)).sum(0)
    assert audit.scores["s"].attacks()["likelihood_ratio"] == pytest.approx(ratio, abs=1e-4)


def test_half_of_the_canaries_are_included_by_the_key():
    included = CanaryAudit(10_000, KEY).included
    assert abs(included.mean() - 0.5) < 0.02  # four standard deviations
    assert np.array_equal(included, CanaryAudit(10_000, KEY).included)
    assert not np.array_equal(included, CanaryAudit(10_000, SecretKey(bytes(32))).included)


@pytest.mark.parametrize("included", [[4, 9], []])
def test_fetch_puts_canaries_behind_the_records(included):
    real = units()
    riding = CanaryUnits(real.values, real.class_labels, real.table, torch.tensor(included, dtype=torch.int64))
    assert riding.num_units == 20 + len(included)
    batch = riding.fetch(torch.tensor([0, 19, *range(20, riding.num_units)]))
    assert batch["canary"].tolist() == [-1, -1, *included]
    assert not batch["values"][2:].any() and not batch["weights"][2:].any()
    plain = real.fetch(torch.tensor([0, 19]))
    assert all(torch.equal(batch[name][:2], plain[name]) for name in plain)
