"""Audit the stages of one release, as they are and with faults built in: one result file per run.

python benchmarks/audit.py --dataset mnist5k --epsilon 10 --preset quick

The true code runs all stages with canaries. Each mutant is the engine with one fault while the claim stays the same;
it runs the diffusion stage on the latents of the true run. ``seen_by`` names the bounds that exceed the claim: none may
for the true code. Public data sets protect nobody, so the numbers may be shown.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _machine import describe_machine

from dpldm_core.data.ingest import ingest_dataset
from dpldm_core.privacy.audit import RunBounds
from dpldm_core.privacy.calibration import DIFFUSION
from dpldm_core.privacy.engine import DpSgdEngine
from dpldm_core.release.opening import check_request, decide
from dpldm_core.rng import SecretKey
from dpldm_core.training import private, stages
from dpldm_core.training.audited import CanaryAudit, audit_report, audit_stages, step_bounds

RESULTS = Path(__file__).parent / "results" / "audit"
CONFIDENCE = 0.95


class HalfNoise(DpSgdEngine):
    """Noise of half the standard deviation that is charged."""

    factor = 0.5

    def __init__(self, model, plan, key, **options):
        super().__init__(model, plan, key, **options)
        smaller = plan.model_copy(update={"noise_multiplier": self.factor * plan.noise_multiplier})
        self._noise = smaller.noise(key.derive("noise"))


class NoiseAveragedOverTwoWorkers(HalfNoise):
    """Every worker adds its own noise, then sums are averaged: sigma over sqrt(2)."""

    factor = math.sqrt(0.5)


class NoNoiseOnOneLayer(DpSgdEngine):
    """One layer, the canaries', is left without noise."""

    def _take_noise(self, step):
        future = super()._take_noise(step)
        future.result()[-self._model.canaries.num_embeddings :] = 0
        return future


class SameNoiseEveryStep(DpSgdEngine):
    """The noise of step 0 again and again."""

    def _take_noise(self, step):
        self._ahead = None
        return super()._take_noise(0)


class ClipTooWide(DpSgdEngine):
    """Units are clipped to five times the norm that is charged."""

    def __init__(self, model, plan, key, **options):
        super().__init__(model, plan, key, **options)
        self._clip.max_norm = 5 * plan.max_grad_norm


class RateDoubled(DpSgdEngine):
    """Units are sampled at twice the rate that is charged."""

    def batch_indices(self, step, num_units):
        """Poisson at 2q."""
        rate = min(1.0, 2 * self.plan.sample_rate)
        twice = self.plan.model_copy(update={"sample_rate": rate, "max_batch_size": None})
        return twice.sample_batch(self._sampling_key, step, num_units)


class ShuffledBatches(DpSgdEngine):
    """Every unit once in each round of 1/q steps, charged as Poisson sampling."""

    def batch_indices(self, step, num_units):
        """The next part of the shuffled units."""
        rounds = round(1 / self.plan.sample_rate)
        order = self._sampling_key.generator(step // rounds).permutation(num_units)
        return np.sort(np.array_split(order, rounds)[step % rounds])


MUTANTS = (
    HalfNoise,
    NoiseAveragedOverTwoWorkers,
    NoNoiseOnOneLayer,
    SameNoiseEveryStep,
    ClipTooWide,
    RateDoubled,
    ShuffledBatches,
)


def seen_by(found: RunBounds) -> list[str]:
    """The bounds that exceed the claim."""
    return [name for name in ("steinke", "f_dp", "gdp_lower") if getattr(found, name) > found.claim]


def run_mutant(mutant, arguments, decision, latents, folder: Path) -> dict:
    """The diffusion stage with one fault in its engine."""
    started = time.perf_counter()
    audit, key = CanaryAudit(arguments.mutant_canaries, SecretKey.generate()), SecretKey.generate()
    with mock.patch.object(private, "DpSgdEngine", mutant):
        run = stages.Run(folder, train=audit.train)
        stages.train_diffusion(latents, 0.0, decision.request.config, decision.schema, decision.plan, key.derive, run)
    found = audit.bounds(decision.plan, [DIFFUSION], CONFIDENCE)
    result = {
        "fault": mutant.__doc__,
        "num_canaries": arguments.mutant_canaries,
        **found.model_dump(mode="json"),
        "seen_by": seen_by(found),
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(f"{mutant.__name__:28s} {result}", flush=True)
    return result


def audit_release(arguments: argparse.Namespace, folder: Path) -> dict:
    """The true code, then every mutant."""
    request = check_request(
        dataset=arguments.dataset,
        epsilon=arguments.epsilon,
        delta=arguments.delta,
        preset=arguments.preset,
        num_samples=0,
        latent_mechanism="dp_sgd",
        budget_epsilon=0.0,
        out=str(folder / "releases"),
        config="",
    )
    decision = decide(request, data_root=arguments.data_root, cache_dir=str(folder))
    config, plan = request.config, decision.plan
    train, _ = ingest_dataset(
        config.dataset,
        folder,
        split_key=b"benchmark",
        data_root=arguments.data_root,
        cache_dir=str(folder),
        num_classes=config.num_classes,
        split_by="content",
    )
    seconds, started = {}, time.perf_counter()
    audit = CanaryAudit(arguments.canaries, SecretKey.generate())
    audit_stages(train, config, decision.schema, plan, audit, SecretKey.generate(), folder)
    seconds["full_run"], started = round(time.perf_counter() - started, 1), time.perf_counter()
    steps = step_bounds(plan, SecretKey.generate(), CONFIDENCE, trials=arguments.trials)
    seconds["single_step"] = round(time.perf_counter() - started, 1)
    report = audit_report(audit, config, plan, CONFIDENCE, steps)
    print(report.model_dump_json(indent=1), flush=True)
    latents = folder / "latents.safetensors"
    names = arguments.mutants.split(",") if arguments.mutants else [mutant.__name__ for mutant in MUTANTS]
    mutants = {m.__name__: run_mutant(m, arguments, decision, latents, folder) for m in MUTANTS if m.__name__ in names}
    return {
        **report.model_dump(mode="json"),
        "seen_by": sorted({name for found in report.runs for name in seen_by(found)}),
        "seconds": seconds,
        "mutants": mutants,
        "machine": describe_machine(),
    }


def main() -> None:
    """Audit one release and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist5k", help="built-in name")
    parser.add_argument("--epsilon", type=float, default=10.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--canaries", type=int, default=5_000)
    parser.add_argument("--mutant-canaries", type=int, default=2_000)
    parser.add_argument("--trials", type=int, default=20_000, help="single steps in each of the two worlds")
    parser.add_argument("--mutants", default="", help="names, comma-separated; all when empty")
    parser.add_argument("--data-root", help="folder with MNIST and Fashion-MNIST")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = audit_release(arguments, Path(folder))
    path = RESULTS / f"{arguments.dataset}-eps{arguments.epsilon:g}-{arguments.preset}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
