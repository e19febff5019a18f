"""Audit the stages of one release, as they are and with faults built in: one result file per run.

python benchmarks/audit.py --dataset mnist5k --epsilon 10 --preset quick

The true code runs all stages with canaries. Each mutant is the engine with one fault while the claim stays the same; it
runs the diffusion stage on the latents of the true run, with one noise draw per record: faster, and the canaries'
coordinates are as before. ``seen_by`` names the bounds that exceed the claim: none may for the true code. Public data
sets protect nobody, so the numbers may be shown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _machine import describe_machine

from dpldm_core.privacy.audit import RunBounds
from dpldm_core.privacy.calibration import DIFFUSION
from dpldm_core.release.auditing import CONFIDENCE
from dpldm_core.release.auditing import audit_release as release_audit
from dpldm_core.release.opening import check_request, decide
from dpldm_core.rng import SecretKey
from dpldm_core.training import private, stages
from dpldm_core.training.audited import CanaryAudit
from tests.faulty_engines import MUTANTS

RESULTS = Path(__file__).parent / "results" / "audit"


def seen_by(found: RunBounds) -> list[str]:
    """The bounds that exceed the claim."""
    return [name for name in ("steinke", "f_dp", "gdp_lower") if getattr(found, name) > found.claim]


def run_mutant(mutant, arguments, decision, latents, folder: Path) -> dict:
    """The diffusion stage with one fault in its engine."""
    started, config = time.perf_counter(), decision.request.config
    config = config.model_copy(update={"diffusion": config.diffusion.model_copy(update={"noise_multiplicity": 1})})
    audit, key = CanaryAudit(arguments.mutant_canaries, SecretKey.generate()), SecretKey.generate()
    with mock.patch.object(private, "DpSgdEngine", mutant):
        run = stages.Run(folder, train=audit.train)
        stages.train_diffusion(latents, 0.0, config, decision.schema, decision.plan, key.derive, run)
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
    asked = {name: getattr(arguments, name) for name in ("dataset", "epsilon", "delta", "preset")}
    where = {"data_root": arguments.data_root, "cache_dir": str(folder)}
    started, measured = time.perf_counter(), {"num_canaries": arguments.canaries, "trials": arguments.trials}
    report = release_audit(**asked, **where, **measured, out=str(folder / "audit"), work=folder).report
    seconds = round(time.perf_counter() - started, 1)
    print(report.model_dump_json(indent=1), flush=True)
    options = {"num_samples": 0, "latent_mechanism": "dp_sgd", "budget_epsilon": 0.0, "config": ""}
    decision = decide(check_request(**asked, **options, out=str(folder)), **where)  # the same again
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
