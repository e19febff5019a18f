"""Time and memory of one DP-SGD step beside the same step without privacy: python benchmarks/dp_step.py [--json].

The release's own denoiser and autoencoder, on random data of MNIST's shape. Every arm runs forward pass, gradient, its
noise and Adam on batches of the same number of rows; all arms take turns within each round, and a ratio is the median
over rounds of (arm / no privacy) in that round, so that other work on the machine hits both. Peak memory is that of a
process which runs one arm alone, less what it held before its first step.

Arms: ``no_privacy`` (float32), ``ours``, ``ours_bfloat16`` (products in bfloat16), ``opacus_hooks``, ``opacus_ghost``
(each noise draw clipped by itself, so not the same mechanism above one draw), ``vmap`` (torch.func).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from _machine import describe_machine
from torch import Tensor, nn

from dpldm_core.config import ReleaseConfig
from dpldm_core.models.precond import edm_scalings, edm_weight
from dpldm_core.presets import resolve_config
from dpldm_core.privacy.engine import Batch, BatchLoss, DpSgdEngine
from dpldm_core.privacy.plan import DpSgdPlan, chernoff_cap
from dpldm_core.rng import SecretKey
from dpldm_core.threads import settle_on_cpu
from dpldm_core.training.autoencoder import build_autoencoder, reconstruction_loss
from dpldm_core.training.diffusion import build_denoiser, diffusion_loss, draw_diffusion

RESULTS = Path(__file__).parent / "results" / "dp_step.json"
RECORDS, CLIP, SIGMA, TRUNCATION = 60_000, 0.5, 1.0, 1e-12
Step = Callable[[], None]


@dataclass
class Workload:
    """A model of the release, its loss with one value per unit, and what a batch of it looks like."""

    model: nn.Module
    loss: BatchLoss
    batch: Callable[[int], Batch]

    def trainable(self) -> list[nn.Parameter]:
        """What the optimizer steps."""
        return [p for p in self.model.parameters() if p.requires_grad]


def denoiser(draws: int) -> Workload:
    """Stage 2 with ``draws`` noise draws per record."""
    config = resolved()
    side = config.autoencoder.frequencies
    model = build_denoiser(config.diffusion, latent_shape=(1, side, side), num_classes=10)
    settings = config.diffusion.model_copy(update={"noise_multiplicity": draws})
    labels = torch.arange(RECORDS) % 10

    def batch(rows: int) -> Batch:
        latents = torch.randn(rows, 1, model.dim)
        plain = {"values": latents, "class_labels": labels[:rows, None], "weights": torch.ones(rows, 1)}
        return draw_diffusion(plain, np.random.default_rng(0), settings, model.sigma_data)

    return Workload(model, diffusion_loss, batch)


def autoencoder() -> Workload:
    """Stage 1."""
    model = build_autoencoder(resolved().autoencoder, channels=1, height=28, width=28)

    def batch(rows: int) -> Batch:
        noise = 0.1 * torch.randn(rows, 1, model.latent_dim)
        return {"values": torch.rand(rows, 1, 1, 28, 28) * 2 - 1, "weights": torch.ones(rows, 1), "noise": noise}

    return Workload(model, reconstruction_loss, batch)


def resolved() -> ReleaseConfig:
    """The preset whose models are timed."""
    return resolve_config(
        dataset="mnist",
        epsilon=1.0,
        delta=1e-5,
        preset="cpu",
        num_samples=0,
        latent_mechanism="dp_sgd",
        public_num_records=RECORDS,
    )


def no_privacy(work: Workload, rows: int, physical: int) -> Step:
    """Mean loss, autograd, Adam, on rows that are drawn at each step as a training loop does."""
    optimizer, data = torch.optim.Adam(work.trainable(), lr=1e-3), work.batch(rows)

    def step() -> None:
        optimizer.zero_grad()
        for chosen in torch.randperm(rows).split(physical):
            part = {name: value[chosen] for name, value in data.items()}
            (work.loss(work.model, part).sum() / rows).backward()
        optimizer.step()

    return step


def ours(work: Workload, rows: int, physical: int, **options: str) -> Step:
    """The engine of a release: Poisson batches padded to exactly ``rows``, book-keeping clip, keyed noise, Adam."""
    plan = DpSgdPlan(
        stage="benchmark",
        sample_rate=rate_of_cap(rows),
        num_steps=10**6,
        max_grad_norm=CLIP,
        noise_multiplier=SIGMA,
        truncation_probability=TRUNCATION,
        max_batch_size=rows,
    )
    optimizer, data = torch.optim.Adam(work.trainable(), lr=1e-3), work.batch(rows)
    engine = DpSgdEngine(
        work.model,
        plan,
        SecretKey.generate(),
        loss=work.loss,
        probe={name: value[:4] for name, value in data.items()},
        physical_batch_size=physical,
        **options,  # type: ignore[arg-type]
    )
    steps = iter(range(10**6))

    def step() -> None:
        engine.noisy_step(next(steps), RECORDS, lambda chosen: {n: v[chosen % rows] for n, v in data.items()})
        optimizer.step()

    return step


def rate_of_cap(rows: int) -> float:
    """The sample rate at which batches of RECORDS units are padded to ``rows``."""
    low, high = 0.0, rows / RECORDS
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chernoff_cap(RECORDS, middle, TRUNCATION) <= rows else (low, middle)
    return low


def opacus(work: Workload, rows: int, physical: int, ghost: bool) -> Step:
    """Opacus' wrapped module, optimizer and noise; hooks keep per-sample gradients, ghost clipping their norms."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    adam, data = torch.optim.Adam(work.trainable(), lr=1e-3), work.batch(rows)
    settings = {"noise_multiplier": SIGMA, "max_grad_norm": CLIP, "expected_batch_size": rows}
    wrapped, optimizer, criterion = GradSampleModule(work.model), DPOptimizer(adam, **settings), None
    if ghost:
        wrapped.to_standard_module()
        wrapped = GradSampleModuleFastGradientClipping(work.model, max_grad_norm=CLIP, use_ghost_clipping=True)
        optimizer = DPOptimizerFastGradientClipping(adam, **settings)
        per_unit = lambda found, target, reduction="none": found  # noqa: E731
        criterion = DPLossFastGradientClipping(wrapped, optimizer, per_unit, loss_reduction="mean")

    def step() -> None:
        optimizer.zero_grad()
        for start in range(0, rows, physical):
            part = {name: value[start : start + physical] for name, value in data.items()}
            losses = work.loss(work.model, part)
            optimizer.signal_skip_step(start + physical < rows)
            if criterion is None:
                losses.mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                criterion(losses, losses.detach()).backward()
                optimizer.step()

    return step


def vmap(work: Workload, rows: int, physical: int) -> Step:
    """torch.func: grad of one unit, vmapped; every unit's gradient is formed."""
    optimizer, data = torch.optim.Adam(work.trainable(), lr=1e-3), work.batch(rows)
    names = [name for name, p in work.model.named_parameters() if p.requires_grad]
    model = work.model

    def loss_of_one(parameters: dict[str, Tensor], unit: Batch) -> Tensor:
        if not hasattr(model, "prior"):
            restored = torch.func.functional_call(model, parameters, (unit["values"],))
            return (restored - unit["values"]).square().mean()
        found = torch.func.functional_call(
            model.network, parameters, (unit["inputs"], unit["estimate"], unit["c_noise"], unit["class_labels"])
        )
        return (unit["gain"][:, None] * found - unit["target"]).square().mean()

    def step() -> None:
        optimizer.zero_grad()
        units = network_batch(model, data) if hasattr(model, "prior") else {"values": data["values"]}
        prefix = "network." if hasattr(model, "prior") else ""
        parameters = {n.removeprefix(prefix): p.detach() for n, p in model.named_parameters() if n in names}
        sums: dict[str, Tensor] = {}
        for start in range(0, rows, physical):
            part = {name: value[start : start + physical] for name, value in units.items()}
            found = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0))(parameters, part)
            norms = torch.stack([g.flatten(1).square().sum(1) for g in found.values()]).sum(0).sqrt()
            factors = (CLIP / norms).clamp(max=1.0)
            for name, g in found.items():
                sums[name] = sums.get(name, 0.0) + torch.einsum("n,n...->...", factors, g)
        for name, parameter in model.named_parameters():
            if name in names:
                total = sums[name.removeprefix(prefix)]
                parameter.grad = (total + SIGMA * CLIP * torch.randn_like(total)) / rows
        optimizer.step()

    return step


def network_batch(model: nn.Module, data: Batch) -> Batch:
    """What the network itself sees of a batch, [rows, draws, ...]: the prior's estimate has no trainable weight."""
    sigma = data["sigma"].flatten(1)
    rows, draws = sigma.shape
    noisy = data["values"] + sigma[..., None] * data["noise"].flatten(1, 2)
    labels = data["class_labels"].expand(rows, draws)
    estimate = model.prior.denoise(noisy.flatten(0, 1), sigma.flatten(), labels.flatten()).view_as(noisy)
    scalings = edm_scalings(sigma, model.sigma_data)
    weight = edm_weight(sigma, model.sigma_data).sqrt()
    return {
        "inputs": scalings.c_in[..., None] * noisy,
        "estimate": estimate / model.sigma_data,
        "c_noise": scalings.c_noise,
        "class_labels": labels,
        "gain": weight * scalings.c_out,
        "target": weight[..., None] * (data["values"] - estimate),
    }


ARMS: dict[str, Callable[[Workload, int, int], Step]] = {
    "no_privacy": no_privacy,
    "ours": ours,
    "ours_bfloat16": lambda work, rows, physical: ours(work, rows, physical, matmul_precision="bfloat16"),
    "opacus_hooks": lambda work, rows, physical: opacus(work, rows, physical, ghost=False),
    "opacus_ghost": lambda work, rows, physical: opacus(work, rows, physical, ghost=True),
    "vmap": vmap,
}


def measure(build: Callable[[], Workload], rows: int, arms: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each arm, and its median ratio to no privacy within a round."""
    steps = {}
    for arm in arms:
        torch.manual_seed(0)
        steps[arm] = ARMS[arm](build(), rows, min(rows, physical_of(arm)))
        steps[arm]()  # warm-up
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in arms:
            start = time.perf_counter()
            steps[arm]()
            seconds[arm].append(time.perf_counter() - start)
    return {
        arm: {
            "seconds": round(statistics.median(found), 4),
            "ratio": round(statistics.median(a / b for a, b in zip(found, seconds["no_privacy"], strict=True)), 3),
        }
        for arm, found in seconds.items()
    }


def physical_of(arm: str) -> int:
    """Rows per forward pass: 512 (presets take 256) for every arm but those that keep every unit's gradient."""
    return 128 if arm in ("opacus_hooks", "vmap") else 512


def peak_memory_gb(name: str, rows: int, arm: str) -> float:
    """Memory that a step needs above what building it needs, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        arm,
        "--model",
        name,
        "--batch",
        str(rows),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def resident_kb(field: str) -> int:
    """Resident memory of this process now (VmRSS) or at most (VmHWM); getrusage would start with the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_memory() -> dict[str, dict[str, float]]:
    """Of the judged models at batch 4096, with and without privacy."""
    return {
        f"{name}, batch 4096": {arm: round(peak_memory_gb(name, 4096, arm), 3) for arm in ("no_privacy", "ours")}
        for name in ("denoiser", "autoencoder")
    }


def builder(name: str, draws: int) -> Callable[[], Workload]:
    """The workload of that name."""
    return autoencoder if name == "autoencoder" else lambda: denoiser(draws)


def main() -> None:
    """Measure everything, write the result file, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--quick", action="store_true", help="batch 2048 and our arms alone; writes no file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure peak memory alone, into the result file")
    parser.add_argument("--memory-of", choices=sorted(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--model", default="denoiser", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=2048, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # opacus and torch on hooks
    if arm := arguments.memory_of:
        rows = arguments.batch
        step = ARMS[arm](builder(arguments.model, 1)(), rows, min(rows, physical_of(arm)))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident_kb("VmRSS")
        step()
        print((resident_kb("VmHWM") - before) / 1e6)
        return
    if arguments.memory:
        result = json.loads(RESULTS.read_text()) | {"peak_memory_gb": peak_memory()}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        return
    result = run(arguments.rounds, quick=arguments.quick)
    if not arguments.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result))


def run(rounds: int, *, quick: bool) -> dict[str, object]:
    """All measurements as one object."""
    own = ["no_privacy", "ours", "ours_bfloat16"]
    threads = settle_on_cpu()
    grid = [("denoiser", 1, 2048, own), ("autoencoder", 1, 2048, own)]
    if not quick:
        every = list(ARMS)
        grid = [("denoiser", 1, 512, every), ("autoencoder", 1, 512, every)]
        grid += [("denoiser", draws, rows, own) for draws, rows in ((1, 2048), (4, 2048), (16, 512))]
        grid += [("denoiser", 1, rows, own) for rows in (4096, 8192)]
        grid += [("autoencoder", 1, rows, own) for rows in (2048, 4096, 8192)]
    rows = []
    for name, draws, batch, arms in grid:
        found = measure(builder(name, draws), batch, arms, rounds)
        rows.append({"model": name, "batch": batch, "noise_multiplicity": draws, "arms": found})
        print(name, batch, draws, found, file=sys.stderr, flush=True)
    at = {row["model"]: row["arms"] for row in rows if row["batch"] == 2048 and row["noise_multiplicity"] == 1}
    ratios = {name: at[name]["ours"]["ratio"] for name in ("denoiser", "autoencoder")}  # type: ignore[index]
    ratios |= {f"{name}_bfloat16": at[name]["ours_bfloat16"]["ratio"] for name in ("denoiser", "autoencoder")}  # type: ignore[index]
    result: dict[str, object] = {"ratios": ratios, "rounds": rounds, "threads": threads, "rows": rows}
    if not quick:
        result["peak_memory_gb"] = peak_memory()
    return result | {"machine": describe_machine()}


if __name__ == "__main__":
    main()
