"""No second place states q, sigma, T or C: the source is scanned, and what a plan's mechanism does is measured."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dpldm_core.config import PerformanceConfig
from dpldm_core.privacy.engine import DpSgdEngine
from dpldm_core.privacy.noise import SENSITIVITY_SLACK
from dpldm_core.privacy.one_shot import noisy_records
from dpldm_core.privacy.plan import DpSgdPlan, GaussianRecordPlan, LabelPlan
from dpldm_core.rng import SecretKey
from dpldm_core.training.private import train_private
from dpldm_core.training.units import Units

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(p for room in ("dpldm_core", "tasks", "workflows") for p in (ROOT / room).rglob("*.py"))
PLANS = {"DpSgdPlan", "GaussianSumPlan", "GaussianRecordPlan", "LabelPlan", "HistogramPlan"}
NOISES = {"GaussianNoise", "DiscreteGaussianNoise"}
EVENTS = {"gaussian_event", "poisson_gaussian_event", "randomized_response_event"}
FACTS = {"sample_rate", "noise_multiplier", "max_grad_norm", "max_norm", "noise_parameter"}
COPIED = FACTS | {"num_steps", "max_batch_size", "truncation_probability"}
# Where plans are made, from a configuration.
MAKERS = {"dpldm_core/privacy/plan.py", "dpldm_core/privacy/calibration.py"}
CONFIGURATION = {"dpldm_core/config.py", "dpldm_core/presets.py"}
# Attacks on one step, or on small batches, of a plan: they release nothing.
AUDITS = {"dpldm_core/privacy/audit.py", "dpldm_core/training/audited.py"}
ALLOWED = {
    # The stand-in for a plan that is not made yet: a hold in the ledger, no mechanism.
    ("dpldm_core/privacy/budget.py", "placeholder", "gaussian_event"),
    # The check before training clips made-up units.
    ("dpldm_core/privacy/engine.py", "check_bounded", "max_norm"),
    # The noise of the plan, drawn.
    ("dpldm_core/privacy/noise.py", "draw", "key.normal"),
}


def passed_on(name, value):
    """Whether a value is a plan's field, an argument of the same name handed down, or a field without a default."""
    field = isinstance(value, ast.Attribute) and ast.unparse(value.value) in ("plan", "self.plan", "mechanism")
    declared = isinstance(value, ast.Call) and ast.unparse(value.func) == "Field" and not value.args
    no_default = declared and "default" not in {k.arg for k in value.keywords}
    return field or no_default or (isinstance(value, ast.Name) and value.id == name)


def stated(node):
    """What one node of the syntax tree states of a private mechanism by itself."""
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rsplit(".", 1)[-1]
        if name in PLANS | NOISES | EVENTS:
            yield name
        if name == "normal" and "key" in ast.unparse(node.func):
            yield "key.normal"
        yield from (k.arg for k in node.keywords if k.arg in FACTS and not passed_on(k.arg, k.value))
        if name == "model_copy":
            constants = {n.value for k in node.keywords for n in ast.walk(k.value) if isinstance(n, ast.Constant)}
            yield from constants & COPIED
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = {getattr(t, "id", getattr(t, "attr", "")) for t in targets}
        yield from (name for name in names & FACTS if not passed_on(name, node.value))


def statements(tree, function=""):
    """(function around it, what it states) of everything in a file."""
    for node in ast.iter_child_nodes(tree):
        yield from ((function, what) for what in stated(node))
        yield from statements(node, node.name if isinstance(node, ast.FunctionDef) else function)


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in FILES if relative(p) not in MAKERS | CONFIGURATION], ids=relative)
def test_nothing_is_stated_beside_the_plan(path):
    name = relative(path)
    found = {(name, *statement) for statement in statements(ast.parse(path.read_text()))}
    if name in AUDITS:
        found = {f for f in found if f[2] not in ("num_steps", "max_batch_size")}
    assert found - ALLOWED == set()
    assert {a for a in ALLOWED if a[0] == name} <= found, "an exception that nobody needs"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("noise = GaussianNoise(key, noise_multiplier=plan.noise_multiplier, max_norm=plan.max_norm)", "GaussianNoise"),
        ("def f():\n    return accounting.poisson_gaussian_event(0.1, 1.0, 10)", "poisson_gaussian_event"),
        ("BookKeeping(model, max_norm=0.1)", "max_norm"),
        ("BookKeeping(model, max_norm=config.max_grad_norm)", "max_norm"),
        ("step(sample_rate=batch_size / len(data))", "sample_rate"),
        ("noise_multiplier = 1.0", "noise_multiplier"),
        ("noise_multiplier: float = Field(default=1.0)", "noise_multiplier"),
        ("self.max_grad_norm = 2 * plan.max_grad_norm", "max_grad_norm"),
        ("plan.model_copy(update={'noise_multiplier': 0.1})", "noise_multiplier"),
        ("DpSgdPlan(**fields)", "DpSgdPlan"),
        ("z = self._key.normal(0, 10)", "key.normal"),
    ],
)
def test_the_scan_sees(source, what):
    assert what in {found for _, found in statements(ast.parse(source))}


@pytest.mark.parametrize(
    "source",
    [
        "BookKeeping(model, max_norm=plan.max_grad_norm)",
        "self.max_norm = max_norm",
        "f(max_norm=max_norm)",
        "max_norm: float = Field(gt=0)",
    ],
)
def test_the_scan_lets_a_plan_be_read(source):
    assert not list(statements(ast.parse(source)))


# Measured: what the mechanism does is what its event says.


KEY = SecretKey(bytes(range(32)))
FIELDS = {
    "stage": "s",
    "sample_rate": 0.2,
    "num_steps": 6,
    "max_grad_norm": 0.5,
    "noise_multiplier": 1.5,
    "truncation_probability": 1e-12,
    "max_batch_size": 60,
}
CHANGES = [
    {},
    {"sample_rate": 0.35},
    {"num_steps": 9},
    {"max_grad_norm": 2.0},
    {"noise_multiplier": 0.7},
]


def engine_of(plan, loss):
    torch.manual_seed(0)
    model = nn.Linear(40, 50)
    probe = {"x": torch.randn(4, 40)}
    return model, DpSgdEngine(model, plan, KEY, loss=loss, probe=probe, physical_batch_size=64)


def sums(plan, num_units, loss, steps=1):
    """Noisy sums of the first steps, [steps, coordinates], with the scale that the optimizer sees taken off."""
    model, engine = engine_of(plan, loss)
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(1))
    found = []
    for t in range(steps):
        engine.noisy_step(t, num_units, lambda i: {"x": x[i]})
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy()
        found.append(gradient * plan.noise_multiplier * plan.max_grad_norm)
    return np.stack(found)


def nothing(model, batch):
    return 0.0 * model(batch["x"]).sum(1)


def huge(model, batch):
    return 1e6 * model(batch["x"]).square().sum(1)


def steps_taken(plan):
    """Steps of the training loop."""
    taken = []
    units = Units(torch.zeros(20, 40), torch.zeros(20, dtype=torch.int64), torch.arange(20)[:, None])
    performance = PerformanceConfig(
        physical_batch_size=64, clip_backend="book_keeping", matmul_precision="float32", checkpoint_every=100
    )
    train_private(
        nn.Linear(40, 50),
        units,
        plan,
        KEY,
        loss=lambda m, b: m(b["values"]).square().mean((1, 2)),
        draw=lambda batch, generator: batch,
        num_classes=1,
        learning_rate=0.01,
        ema_decay=0.5,
        performance=performance,
        binding="",
        on_step=lambda done, total: taken.append((done, total)),
    )
    assert taken == [(t + 1, plan.num_steps) for t in range(plan.num_steps)]
    return len(taken)


def measure(plan):
    """(sample rate, noise over the movement by one unit, steps, movement by one unit) of the running mechanism."""
    alone = plan.model_copy(update={"sample_rate": 1.0})  # so that the unit is in the batch
    movement = np.linalg.norm(sums(alone, 30, huge)[0] - sums(alone, 29, huge)[0])
    noise = sums(plan, 30, nothing, steps=plan.num_steps).std()
    many = plan.model_copy(update={"max_batch_size": None})
    _, engine = engine_of(many, nothing)
    rate = np.mean([(engine.batch_indices(t, 4000) >= 0).sum() / 4000 for t in range(20)])
    return rate, noise / movement, steps_taken(plan), movement


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: next(iter(c), "as it is"))
def test_dp_sgd_does_what_its_event_says(change):
    """80,000 draws of a Bernoulli and 12,000 of a Gaussian at least: five standard deviations are 3 %."""
    plan = DpSgdPlan(**FIELDS | change)
    step, count = plan.event().event, plan.event().count
    rate, ratio, steps, movement = measure(plan)
    assert rate == pytest.approx(step.sampling_probability, rel=0.035)
    assert ratio == pytest.approx(step.event.noise_multiplier * SENSITIVITY_SLACK, rel=0.035)
    assert steps == count
    assert movement == pytest.approx(plan.max_grad_norm, rel=1e-3)


@pytest.mark.parametrize("change", CHANGES[1:], ids=lambda c: next(iter(c)))
def test_a_changed_field_changes_what_is_done_and_what_is_charged(change):
    """And nothing else of it. The event knows noise in units of C, so C alone moves the mechanism and not the bill."""
    before, after = DpSgdPlan(**FIELDS), DpSgdPlan(**FIELDS | change)
    field = next(iter(change))
    names = ("sample_rate", "noise_multiplier", "num_steps", "max_grad_norm")
    moved = {
        name
        for name, a, b in zip(names, measure(before), measure(after), strict=True)
        if not math.isclose(a, b, rel_tol=0.05)
    }
    assert moved == {field}
    assert (before.event() != after.event()) == (field != "max_grad_norm")
    assert before.model_dump() != after.model_dump()


@pytest.mark.parametrize(
    ("change", "other"), [({}, {"noise_multiplier": 3.0}), ({"noise_multiplier": 3.0}, {"max_norm": 5.0})]
)
def test_released_records_do_what_their_event_says(change, other):
    fields = {"stage": "s", "max_norm": 2.0, "noise_multiplier": 1.5} | change
    for plan in (GaussianRecordPlan(**fields), GaussianRecordPlan(**fields | other)):
        noise = float(noisy_records(plan, KEY, torch.zeros(2000, 20), 1).double().std())
        far = torch.full((1, 20), 1e9)
        movement = float((noisy_records(plan, KEY, far, 1) - noisy_records(plan, KEY, -far, 1)).norm()) / 2
        assert noise / movement == pytest.approx(plan.event().noise_multiplier * SENSITIVITY_SLACK, rel=0.02)
        assert movement == pytest.approx(plan.max_norm, rel=1e-3)


@pytest.mark.parametrize("change", [{}, {"noise_parameter": 0.8}, {"num_classes": 3}])
def test_released_labels_do_what_their_event_says(change):
    plan = LabelPlan(**{"stage": "s", "num_classes": 6, "labels_per_unit": 2, "noise_parameter": 0.4} | change)
    event = plan.event().event
    kept = float((plan.randomize(KEY, np.zeros(100_000, np.int64)) == 0).mean())
    assert kept == pytest.approx(1 - event.noise_parameter * (1 - 1 / event.num_buckets), abs=0.01)
    assert plan.event().count == plan.labels_per_unit
