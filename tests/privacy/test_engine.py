import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from dpldm_core.config import PerformanceConfig
from dpldm_core.errors import UnsupportedLayerError
from dpldm_core.privacy.clipping import BookKeeping
from dpldm_core.privacy.engine import DpSgdEngine, check_bounded
from dpldm_core.privacy.layers import PRODUCT_ERROR, Outer
from dpldm_core.privacy.noise import GRID, SENSITIVITY_SLACK
from dpldm_core.privacy.opacus_backend import OpacusClipping
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey

KEY = SecretKey(bytes(range(32)))
SIGMA, C, DIM = 1.5, 0.25, 5


def make_plan(**changes):
    fields = {
        "stage": "s",
        "sample_rate": 0.3,
        "num_steps": 40,
        "max_grad_norm": C,
        "noise_multiplier": SIGMA,
        "truncation_probability": 1e-12,
        "max_batch_size": 30,
    }
    return DpSgdPlan(**fields | changes)


def make_model(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(DIM, 6), nn.Tanh(), nn.Linear(6, 3))


def loss(model, batch):
    return 50 * (model(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean(1)


def no_gradient(model, batch):
    return 0.0 * model(batch["x"]).sum(1)


def make_engine(model=None, plan=None, key=KEY, *, loss=loss, physical_batch_size=7, **options):
    return DpSgdEngine(
        model or make_model(),
        plan or make_plan(),
        key,
        loss=loss,
        physical_batch_size=physical_batch_size,
        **{"probe": {"x": torch.randn(4, DIM)}} | options,
    )


def private_data(n=30):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(5))


def noisy_sum(model):
    """What was released: the gradient, scaled back to the clipped sum with its noise, float64."""
    return SIGMA * C * torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def step(x, t=0, *, seen=None, **engine):
    model = engine.pop("model", None) or make_model()

    def fetch(indices):
        if seen is not None:
            seen.append(tuple(indices.shape))
        return {"x": x[indices]}

    make_engine(model, **engine).noisy_step(t, len(x), fetch)
    return noisy_sum(model)


def clipped_sum(x, indices, max_norm=C):
    """Slow reference: plain autograd, one record at a time."""
    model, total = make_model(), 0.0
    for i in indices:
        g = torch.autograd.grad(loss(model, {"x": x[i : i + 1]}).sum(), list(model.parameters()))
        g = torch.cat([p.flatten() for p in g]).double()
        total = total + g * min(1.0, max_norm / float(g.norm()))
    return total


@pytest.mark.parametrize("t", [0, 1, 39])
@pytest.mark.parametrize("max_grad_norm", [C, 1e4])
def test_a_step_is_sampling_then_clipping_then_noise(t, max_grad_norm):
    """Clip after sum, clip by batch mean, division by the real batch size: all would miss the slow reference."""
    plan, x, model = make_plan(max_grad_norm=max_grad_norm), private_data(), make_model()
    engine = make_engine(model, plan)
    engine.noisy_step(t, 30, lambda i: {"x": x[i]})
    chosen = engine.batch_indices(t, 30)
    noise = plan.noise(KEY.derive("noise")).draw(t, 57) * max_grad_norm * GRID
    got = SIGMA * max_grad_norm * torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    expected = clipped_sum(x, chosen[chosen >= 0], max_grad_norm) + torch.from_numpy(noise)
    assert 0 < (chosen >= 0).sum() < 30
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * max_grad_norm)


def test_record_and_replay_on_neighbours():
    """Key replayed: the same calls with the same shapes, and sums that differ by at most C, and by C when clipped."""
    x, moved = private_data(), []
    for t in range(12):
        calls = [], []
        a, b = (step(data, t, seen=seen) for data, seen in zip((x, x[:29]), calls, strict=True))
        assert calls[0] == calls[1] == [(6,)] * 5
        moved.append(float((a - b).norm()) / C)
    sampled = [29 in make_engine().batch_indices(t, 30) for t in range(12)]
    assert 0 < sum(sampled) < 12
    assert all(m == 0.0 if not s else 0.999 < m <= SENSITIVITY_SLACK for m, s in zip(moved, sampled, strict=True))


@pytest.mark.parametrize("value", [0.0, 1e4, -1e15, 3e38, math.inf, math.nan])
def test_whatever_a_unit_holds_it_moves_the_sum_by_at_most_c(value):
    x = private_data(6)
    x[5] = value
    a, b = (step(x[:n], plan=make_plan(sample_rate=1.0)) for n in (6, 5))
    assert float((a - b).norm()) <= C * SENSITIVITY_SLACK


def test_padding_may_hold_anything():
    """Padding rows are copies of unit 0: a unit 0 that is not finite must be dropped there as well."""
    x = private_data(10)
    x[0] = math.nan
    plan = make_plan(sample_rate=0.5)
    chosen = make_engine(plan=plan).batch_indices(0, 10)
    expected = step(x.nan_to_num(), plan=plan) - (clipped_sum(x.nan_to_num(), [0]) if 0 in chosen else 0)
    torch.testing.assert_close(step(x, plan=plan), expected, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_a_step_like_any_other():
    """Skipping empty batches, or filling one with a random record, breaks the sensitivity: this one is noise alone."""
    seen, plan = [], make_plan(sample_rate=1e-12)
    got = step(private_data(), seen=seen, plan=plan)
    noise = plan.noise(KEY.derive("noise")).draw(0, 57) * C * GRID
    torch.testing.assert_close(got, torch.from_numpy(noise), rtol=1e-6, atol=0)
    assert len(seen) == 5


def test_float32_sums_of_the_largest_chunk_round_by_less_than_is_charged_for():
    """A unit less moves the rows of all others up: the sum of what is left of them is rounded otherwise."""
    most = next(m.le for m in PerformanceConfig.model_fields["physical_batch_size"].metadata if hasattr(m, "le"))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, generator=generator) + 0.01 * torch.rand(4 * most, 400, generator=generator)  # nearly parallel
    torch.manual_seed(0)
    model = nn.Linear(400, 10)
    engine = make_engine(model, probe={"x": x[:4]}, loss=lambda model, batch: model(batch["x"]).square().sum(1))

    def clipped(rows, mask):
        sums = engine._clip.clipped_sum(lambda: engine._loss(model, {"x": x[rows]}), mask)
        return torch.cat([part.flatten().double() for part in sums])

    def rounding(n):
        rows = torch.arange(n)
        with_first, without = clipped(rows, rows < n), clipped(rows.roll(-1), rows < n - 1)
        return float((with_first - without - clipped(rows[:1], rows[:1] < 1)).norm()) / C

    slack = SENSITIVITY_SLACK - 1 - 0.25e-3  # a quarter of it is the grid's
    assert rounding(most) <= slack < rounding(4 * most)


@pytest.mark.parametrize("physical", [1, 4, 30, 1000])
def test_the_physical_batch_size_changes_nothing(physical):
    """Noise reused across, or added once per, micro-batch would show: one draw a step, whatever the pieces."""
    x = private_data()
    torch.testing.assert_close(step(x, physical_batch_size=physical), step(x), rtol=1e-5, atol=1e-6)
    alone = [step(x, loss=no_gradient, physical_batch_size=p) for p in (physical, 7)]
    assert torch.equal(*alone)


@pytest.fixture(scope="module")
def noise_alone():
    """100 steps of a model with every kind of layer, the data's gradients being zero; [steps, coordinates] each."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(20, 8), nn.Conv2d(1, 120, (2, 1))
            self.wide, self.out = nn.Linear(120, 120), nn.Linear(120, 8, bias=False)

        def forward(self, x):
            h = self.wide(self.conv(x[:, None, :, None]).mean((2, 3)))
            return (self.out(torch.tanh(h)) * self.embed((x[:, 0] > 0).long())).sum(1)

    model, plan = Net(), make_plan(num_steps=100, max_batch_size=2)
    engine = make_engine(model, plan, loss=lambda m, b: 0.0 * m(b["x"]))
    draws = {name: [] for name, _ in model.named_parameters()}
    for t in range(100):
        engine.noisy_step(t, 2, lambda i: {"x": torch.ones(len(i), DIM)})
        for name, p in model.named_parameters():
            draws[name].append(p.grad.flatten().double().numpy())
    return {name: np.stack(d) for name, d in draws.items()}


@pytest.mark.parametrize(("factor", "accept"), [(1.0, True), (0.95, False), (1.05, False)])
@pytest.mark.parametrize("name", ["embed.weight", "conv.weight", "conv.bias", "wide.weight", "wide.bias", "out.weight"])
def test_every_parameter_gets_its_own_noise_of_unit_variance(noise_alone, name, factor, accept):
    """sigma C, never sigma: the gradient is (sum + noise) / (sigma C), so its noise has variance 1 (and the slack).

    Chi-square at 1e-4 with 12,000 draws or more: standard deviations are known to 0.7 %. False alarm 6e-4, seeded.
    """
    x = noise_alone[name] / SENSITIVITY_SLACK
    cdf = stats.chi2.cdf(np.square(x / factor).sum(), x.size)
    assert (2 * min(cdf, 1 - cdf) > 1e-4) == accept


def test_no_two_coordinates_or_steps_share_noise(noise_alone):
    """Equal draws but for chance (float32), up to the sign, and correlations of all pairs of steps."""
    x = np.concatenate(list(noise_alone.values()), axis=1)
    assert all(len(np.unique(np.abs(row))) > 0.99 * row.size for row in x)
    assert np.abs(np.corrcoef(x) - np.eye(len(x))).max() < 6 / math.sqrt(x.shape[1])


def test_noise_and_batches_depend_on_the_key_alone():
    """Constant seed on the noise: global seeds decide nothing, and are not touched."""
    x = private_data()
    torch.manual_seed(0)
    np.random.seed(0)
    first = step(x)
    torch.manual_seed(123)
    assert torch.equal(first, step(x))
    other = SecretKey(bytes(32))
    assert not np.array_equal(make_engine().batch_indices(0, 30), make_engine(key=other).batch_indices(0, 30))
    a, b = step(x, loss=no_gradient), step(x, loss=no_gradient, key=other)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.6 and not torch.isclose(a, b).any()
    engine, state = make_engine(), torch.get_rng_state()
    engine.noisy_step(0, 30, lambda i: {"x": x[i]})
    assert torch.equal(state, torch.get_rng_state())


def test_a_step_is_a_function_of_key_and_step():
    """Noise drawn one step ahead is the noise of that step: in order, after a gap, or alone."""
    x = private_data()
    alone = [step(x, t) for t in range(6)]
    model = make_model()
    engine = make_engine(model)
    for t in (0, 1, 2, 4, 5):
        engine.noisy_step(t, 30, lambda i: {"x": x[i]})
        assert torch.equal(noisy_sum(model), alone[t])
    assert len({tuple(s.tolist()) for s in alone}) == 6


def test_a_step_taken_before_is_refused():
    """Equal noise on the gradients of two models would cancel in their difference."""
    x, engine = private_data(), make_engine()
    engine.noisy_step(3, 30, lambda i: {"x": x[i]})
    for t in (3, 2):
        with pytest.raises(ValueError, match="was taken before"):
            engine.noisy_step(t, 30, lambda i: {"x": x[i]})


@pytest.mark.parametrize("t", [-1, 40])
def test_a_step_that_is_not_charged_is_refused(t):
    def never(indices):
        raise AssertionError("private data was read")

    with pytest.raises(ValueError, match="would not be charged"):
        make_engine().noisy_step(t, 30, never)


@pytest.mark.parametrize("where", ["fetch", "loss"])
def test_an_interrupted_step_leaves_nothing_stale(where):
    """Leaving a memory manager early leaves stale skip flags: here a step that failed half way is simply repeated."""
    x, model, calls = private_data(), make_model(), []

    def fails_once(place):
        calls.append(place)
        if calls.count(place) == 3 and place == where:
            raise OSError("disk")

    def fetch(indices):
        fails_once("fetch")
        return {"x": x[indices]}

    def fragile(model, batch):
        out = loss(model, batch)
        if "fetch" in calls:  # the check before training is over
            fails_once("loss")
        return out

    engine = make_engine(model, loss=fragile)
    with pytest.raises(OSError, match="disk"):
        engine.noisy_step(0, 30, fetch)
    assert all(p.grad is None for p in model.parameters())
    engine.noisy_step(0, 30, fetch)
    assert torch.equal(noisy_sum(model), step(x))


def repeated(model, batch):
    """Four noise draws per record by x.repeat(K): a unit's rows are not consecutive, though the loss has shape [B]."""
    x = batch["x"]
    return (
        model(x.repeat(4, 1) * torch.arange(1.0, 5).repeat_interleave(len(x))[:, None])
        .square()
        .mean(1)
        .reshape(4, len(x))
        .mean(0)
    )


def interleaved(model, batch):
    """The same by shape [B, K, d]."""
    return model(batch["x"][:, None] * torch.arange(1.0, 5)[:, None]).square().mean((1, 2))


def test_noise_multiplicity_by_repeat_is_refused():
    with pytest.raises(UnsupportedLayerError, match="mixes units"):
        make_engine(loss=repeated)
    x = private_data(8)
    plan = make_plan(sample_rate=1.0)
    a, b = (step(x[:n], plan=plan, loss=interleaved) for n in (8, 7))
    assert float((a - b).norm()) <= C * SENSITIVITY_SLACK


@pytest.mark.parametrize(
    "mixing",
    [
        lambda m, b: (h := m(b["x"])).square().mean(1) - h.mean(0).square().sum(),
        lambda m, b: (m(b["x"]) - m(b["x"]).mean(0)).square().mean(1),
        lambda m, b: m(b["x"]).square().mean(1, keepdim=True),
        lambda m, b: m(b["x"] - b["x"].mean(0)).square().mean(1),
        lambda m, b: torch.nn.functional.linear(m(b["x"]), m[2].weight.T).square().mean(1),
    ],
    ids=["batch_mean_in_loss", "two_forward_passes", "shape_b_1", "batch_mean_of_input", "functional_weight"],
)
def test_what_is_not_bounded_is_refused_before_private_data_is_read(mixing):
    with pytest.raises(UnsupportedLayerError):
        make_engine(loss=mixing)


def test_the_check_leaves_the_model_alone():
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    check_bounded(model, loss, {"x": torch.randn(4, DIM)})
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("outside", ["high", "medium"])
def test_what_the_process_uses_outside_does_not_reach_the_clip(outside):
    """TF32 or bfloat16 products break the 0.1 % that is charged for rounding in float32."""
    seen, convolutions = [], (torch.backends.mkldnn.conv, torch.backends.cudnn.conv)

    def spying_loss(model, batch):
        seen.append((torch.get_float32_matmul_precision(), *(found.fp32_precision for found in convolutions)))
        return loss(model, batch)

    before = [found.fp32_precision for found in convolutions]
    torch.set_float32_matmul_precision(outside)
    try:
        make_engine(loss=spying_loss).noisy_step(0, 30, lambda i: {"x": private_data()[i]})
        assert set(seen[len(seen) // 2 :]) == {("highest", "ieee", "ieee")}
        assert torch.get_float32_matmul_precision() == outside
        assert [found.fp32_precision for found in convolutions] == before  # cuDNN's default is TF32
    finally:
        torch.set_float32_matmul_precision("highest")


def in_bfloat16(part, factors):
    """The clipped sum as a bfloat16 product makes it: both factors are rounded, sums are kept in float32."""
    scaled = (part.b * factors[:, None, None]).bfloat16().float().flatten(0, 1)
    return scaled.T @ part.a.bfloat16().float().flatten(0, 1)


@given(st.integers(0, 2**32), st.integers(1, 12), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_no_unit_in_bfloat16_exceeds_the_clip(seed, rows, left):
    """Also where the rows of a unit cancel nearly or wholly, and rounding is all that is left of them."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(1, rows, 7, generator=g), torch.randn(1, rows, 5, generator=g)
    a, b = torch.cat([a, a], 1), torch.cat([b, -b * (1 + left * 1e-3 * torch.randn(b.shape, generator=g))], 1)
    part = Outer(a * 1e3, b, nn.Parameter(torch.zeros(5, 7)), None)
    factors = (1.0 / part.squared_norms(PRODUCT_ERROR["bfloat16"]).sqrt()).clamp(max=1.0)
    assert float(in_bfloat16(part, factors).norm()) <= 1.0


def test_bfloat16_products_pass_the_bound_of_float32():
    """The negative control: rows that cancel, rounded away from each other."""
    half = 2.0**-8  # between the bfloat16 neighbours 1 and 1 + 2^-7
    a = torch.tensor([1 + half - 1e-4, 1 + half + 1e-4])[None, :, None]
    part = Outer(a, a * torch.tensor([1.0, -1.0])[:, None], nn.Parameter(torch.zeros(1, 1)), None)
    rounded = float(in_bfloat16(part, torch.ones(1)).norm())
    bounds = {precision: float(part.squared_norms(error).sqrt()) for precision, error in PRODUCT_ERROR.items()}
    assert bounds["float32"] < rounded <= bounds["bfloat16"]


def test_bfloat16_clips_a_single_row_by_its_rounding_alone():
    part = Outer(torch.full((1, 1, 3), 3.0), torch.full((1, 1, 2), 5.0), nn.Parameter(torch.zeros(2, 3)), None)
    ratio = float((part.squared_norms(PRODUCT_ERROR["bfloat16"]) / part.squared_norms(0.0)).sqrt())
    assert ratio == pytest.approx((1 + 2.0**-8) ** 2, abs=1e-6)


def test_a_step_in_bfloat16_is_that_of_float32_up_to_its_rounding():
    sums = []
    for precision in ("float32", "bfloat16"):
        model = make_model()
        make_engine(model, matmul_precision=precision).noisy_step(0, 30, lambda i: {"x": private_data()[i]})
        sums.append(noisy_sum(model))
    assert float((sums[0] - sums[1]).norm()) < 0.02 * 30 * C


class Denoise(nn.Module):
    """Linear with draws on a middle axis, LayerNorm and Embedding."""

    def __init__(self):
        super().__init__()
        self.label, self.inner = nn.Embedding(3, 4), nn.Linear(DIM, 4)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, DIM)

    def forward(self, x, labels):
        return self.out(self.norm(self.inner(x) + self.label(labels)[:, None]))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.ConvTranspose2d(4, 1, 2, stride=2)
    )


def several_kinds():
    """(model, loss, private data) with every supported layer between them."""
    g = torch.Generator().manual_seed(2)
    draws, labels = torch.randn(30, 3, DIM, generator=g), torch.randint(0, 3, (30,), generator=g)
    images = torch.randn(30, 2, 8, 8, generator=g)
    torch.manual_seed(1)
    return {
        "denoiser": (
            Denoise(),
            lambda m, b: 50 * (m(b["x"], b["y"]) - 1).square().mean((1, 2)),
            {"x": draws, "y": labels},
        ),
        "convolutional": (convolutional(), lambda m, b: 50 * m(b["x"]).square().mean((1, 2, 3)), {"x": images}),
    }


@pytest.mark.filterwarnings("ignore")  # opacus and torch warn of hooks
@pytest.mark.parametrize("kind", ["denoiser", "convolutional"])
def test_opacus_as_backend_gives_the_same_noisy_step(kind):
    steps = []
    for backend in ("book_keeping", "opacus"):
        model, its_loss, data = several_kinds()[kind]
        engine = DpSgdEngine(
            model,
            make_plan(),
            KEY,
            loss=its_loss,
            probe={k: v[:4] for k, v in data.items()},
            physical_batch_size=7,
            clip_backend=backend,
        )
        engine.noisy_step(0, 30, lambda i, data=data: {k: v[i] for k, v in data.items()})
        steps.append(noisy_sum(model))
    assert float((steps[0] - steps[1]).abs().max()) < 1e-3 * C
    assert float(steps[0].norm()) > C


def test_opacus_as_backend_refuses_a_loss_that_broadcasts_and_low_precision():
    with pytest.raises(UnsupportedLayerError, match="shape"):
        OpacusClipping(make_model(), max_norm=C).clipped_sum(lambda: torch.zeros(4, 1), torch.ones(4, dtype=torch.bool))
    with pytest.raises(UnsupportedLayerError, match="book_keeping"):
        OpacusClipping(make_model(), max_norm=C, matmul_precision="bfloat16")


def test_opacus_as_backend_goes_on_after_a_refused_forward_pass():
    model, data = make_model(), {"x": private_data(4)}
    clip, everybody = OpacusClipping(model, max_norm=C), torch.ones(4, dtype=torch.bool)
    with pytest.raises(UnsupportedLayerError, match="shape"):
        clip.clipped_sum(lambda: loss(model, data)[:, None], everybody)
    again = clip.clipped_sum(lambda: loss(model, data), everybody)
    other = make_model()
    book = BookKeeping(other, max_norm=C).clipped_sum(lambda: loss(other, data), everybody)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(again, book, strict=True))


ONE_PROCESS = """
import sys
import torch
import torch.distributed as dist
sys.path[:0] = [{root!r}, {root!r} + "/tests/privacy"]
from test_engine import make_engine, make_model, noisy_sum, no_gradient, private_data, loss
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=2)
for name, chosen in (("sum", loss), ("noise", no_gradient)):
    model = make_model()
    make_engine(model, loss=chosen).noisy_step(0, 30, lambda i: {{"x": private_data()[i]}})
    torch.save(noisy_sum(model), f"{{folder}}/{{name}}{{rank}}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_make_the_step_of_one_with_the_noise_added_once(tmp_path):
    """Averaging noise over workers would leave sigma / sqrt(2), adding it sqrt(2) sigma; here all hold the same."""
    script = tmp_path / "worker.py"
    script.write_text(ONE_PROCESS.format(root=str(Path(__file__).parents[2])))
    command = [sys.executable, str(script)]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [w.wait(120) for w in workers] == [0, 0]
    for name, chosen in (("sum", loss), ("noise", no_gradient)):
        alone = make_model()
        make_engine(alone, loss=chosen).noisy_step(0, 30, lambda i: {"x": private_data()[i]})
        both = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert torch.equal(both[0], both[1]), "processes must stay in step"
        assert torch.allclose(both[0], noisy_sum(alone), atol=1e-5 * C)


def test_a_process_without_rows_adds_nothing(monkeypatch):
    """More processes than rows of a batch: what is left of the step of such a one is the noise."""
    silent, idle = make_model(), make_model()
    make_engine(silent, loss=no_gradient).noisy_step(0, 30, lambda i: {"x": private_data()[i]})
    monkeypatch.setattr("dpldm_core.privacy.engine._share_of_this_process", lambda indices: indices[:0])
    make_engine(idle).noisy_step(0, 30, lambda i: {"x": private_data()[i]})
    assert torch.equal(noisy_sum(silent), noisy_sum(idle))
