"""Full-run audit on a small plan: below the claim for the true engine, above it for engines with one fault."""

import pytest
import torch
from torch import nn

from dpldm_core.config import PerformanceConfig
from dpldm_core.privacy.engine import DpSgdEngine
from dpldm_core.privacy.plan import DpSgdPlan, ReleasePlan
from dpldm_core.rng import SecretKey
from dpldm_core.training import private
from dpldm_core.training.audited import CanaryAudit
from dpldm_core.training.units import Units
from tests.faulty_engines import (
    ClipTooWide,
    HalfNoise,
    NoiseAveragedOverTwoWorkers,
    NoNoiseOnOneLayer,
    RateDoubled,
    SameNoiseEveryStep,
)

pytestmark = pytest.mark.slow
STAGE = DpSgdPlan(
    stage="s",
    sample_rate=0.3,
    num_steps=60,
    max_grad_norm=0.5,
    noise_multiplier=2.0,
    truncation_probability=1e-12,
)
PLAN = ReleasePlan(mechanisms=(STAGE,), delta=1e-5, relation="ADD_OR_REMOVE_ONE", unit_of_privacy="one record")


def loss(model, batch):
    return ((model(batch["values"]) - batch["values"]).square().mean(2) * batch["weights"]).sum(1)


def audited(engine, monkeypatch, *, confidence, num_canaries=3000):
    monkeypatch.setattr(private, "DpSgdEngine", engine)
    audit = CanaryAudit(num_canaries, SecretKey(bytes(range(32))))
    torch.manual_seed(0)  # of data and first weights; canaries and noise come from the keys
    units = Units(torch.randn(200, 4), torch.zeros(200, dtype=torch.int64), torch.arange(200)[:, None])
    audit.train(
        nn.Linear(4, 4),
        units,
        STAGE,
        SecretKey(bytes(32)),
        loss=loss,
        draw=lambda batch, generator: batch,
        num_classes=1,
        learning_rate=0.01,
        ema_decay=0.9,
        performance=PerformanceConfig(
            physical_batch_size=512, clip_backend="book_keeping", matmul_precision="float32", checkpoint_every=100
        ),
        binding="",
    )
    return audit.bounds(PLAN, ["s"], confidence)


def test_true_engine_stays_below_its_claim(monkeypatch):
    """Seeded; each bound exceeds the claim with probability 1e-3 at most. The fit is near it: no blind audit."""
    found = audited(DpSgdEngine, monkeypatch, confidence=0.999)
    assert found.steinke <= found.f_dp < found.gdp_lower < found.claim
    assert found.f_dp > 0.2 * found.claim and found.gdp_fit > 0.75 * found.claim


@pytest.mark.parametrize(
    ("engine", "bounds"),
    [
        (HalfNoise, ("gdp_lower",)),
        (NoiseAveragedOverTwoWorkers, ("gdp_lower",)),
        (RateDoubled, ("gdp_lower",)),
        (NoNoiseOnOneLayer, ("f_dp", "gdp_lower")),
        (SameNoiseEveryStep, ("f_dp", "gdp_lower")),
        (ClipTooWide, ("f_dp", "gdp_lower")),
    ],
)
def test_faults_are_seen(engine, bounds, monkeypatch):
    found = audited(engine, monkeypatch, confidence=0.95)
    assert all(getattr(found, name) > found.claim for name in bounds), found
