"""Start-up, I/O and bookkeeping of a release: its wall time when every stage takes one step, without the stages.

Run: python benchmarks/overhead.py --rounds 6, and with --dataset mnist --num-samples 60000 --data-root FOLDER. Writes
benchmarks/results/overhead/DATASET-IMAGES.json. The first round makes the ledger and the MLflow store. What is not in
the MLflow run of a stage that computes counts as overhead: imports, flytekit, reading and writing of records and
images, calibration and its cross-check, ledger, MLflow, report, bundle and its verification.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "overhead"
STAGES = ("train_autoencoder", "extract_latents", "train_diffusion", "train_teacher", "sample", "evaluate")
ONE_STEP = {
    "autoencoder": {"procedural_steps": 1, "dp_sgd": {"num_steps": 1}},
    "diffusion": {"procedural_steps": 1, "dp_sgd": {"num_steps": 1}},
    "teacher": {"num_synthetic": 600, "num_epochs": 1, "dp_sgd": {"num_steps": 1}},
    "evaluation": {"num_epochs": 1, "max_frechet_images": 100},
}


def one_release(folder: Path, arguments: argparse.Namespace) -> float:
    """Seconds of ``make release`` with one step of everything."""
    root = Path(__file__).parent.parent
    (folder / "one-step.json").write_text(json.dumps(ONE_STEP))
    places = {"TMPDIR": str(folder), "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    places |= {"DPLDM_LEDGER_URL": f"sqlite:///{folder / 'ledger.db'}", "PYTHONPATH": str(root)}
    places |= {"DPLDM_DATA_ROOT": arguments.data_root} if arguments.data_root else {}
    pyflyte = Path(sys.executable).parent / "pyflyte"
    command = [pyflyte, "run", root / "workflows" / "release.py", "release_pipeline", "--dataset", arguments.dataset]
    command += ["--num_samples", str(arguments.num_samples)]
    start = time.perf_counter()
    subprocess.run(
        [*command, "--config", folder / "one-step.json", "--out", folder / "releases"],
        check=True,
        cwd=folder,
        env=os.environ | places,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def stage_seconds(folder: Path, release: int) -> dict[str, float]:
    """Seconds that each stage of the release with this number, from 0, took, by its MLflow run."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dpldm").experiment_id
    runs = client.search_runs([experiment], order_by=["attributes.start_time ASC"])
    parents = [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]
    found: dict[str, float] = {}
    for run in runs:
        if run.data.tags.get("mlflow.parentRunId") == parents[release]:
            name = run.info.run_name.split("-")[0]
            found[name] = found.get(name, 0.0) + (run.info.end_time - run.info.start_time) / 1000
    return {name: round(seconds, 2) for name, seconds in found.items()}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dataset", default="mnist5k", help="built-in name")
    parser.add_argument("--num-samples", type=int, default=500, help="synthetic images")
    parser.add_argument("--data-root", help="folder with MNIST and Fashion-MNIST")
    arguments = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(arguments.rounds):
            wall = one_release(Path(name), arguments)
            stages = stage_seconds(Path(name), number)
            overhead = wall - sum(seconds for stage, seconds in stages.items() if stage in STAGES)
            rounds.append({"wall": round(wall, 2), "overhead": round(overhead, 2), "runs": stages})
            print(rounds[-1], flush=True)
    later = [found["overhead"] for found in rounds[1:]] or [rounds[0]["overhead"]]
    result = {
        "dataset": arguments.dataset,
        "num_samples": arguments.num_samples,
        "first": rounds[0]["overhead"],
        "median_of_later": round(statistics.median(later), 2),
        "rounds": rounds,
        "machine": describe_machine(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{arguments.dataset}-{arguments.num_samples}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
