"""Calibrating whole releases, the anchors, and three accountants on 50 plans: python benchmarks/accounting.py [--json].

Every row of the grid is a two-stage release plus one Gaussian sum. They agree when PRV's interval reaches PLD's upper
bound from below, and RDP lies above PLD. Calibration is timed on the wall and on the processor: others may share
the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _machine import describe_machine

from dpldm_core.presets import resolve_config
from dpldm_core.privacy import accounting
from dpldm_core.privacy.accounting import DpEvent, NeighboringRelation
from dpldm_core.privacy.calibration import plan_release
from dpldm_core.privacy.opacus_backend import prv_epsilon

RESULTS = Path(__file__).parent / "results" / "accounting.json"
DELTA = 1e-5
# batch of 60,000, noise of stage 1 and of stage 2, steps of stage 2, noise of the sum
GRID = list(itertools.product((512, 4096), (1.5, 4.0, 12.0), (300, 1500, 3000), (5.0, 40.0, 200.0)))[:50]
ANCHOR = (
    (4096, 2.0, 1000, 1.5, 3000, 5.0),
    {"pld": 17.011, "replace_one": 37.16},
)


def events_of(
    batch: int, first: float, first_steps: int, second: float, second_steps: int, one_shot: float
) -> list[DpEvent]:
    """Autoencoder, diffusion and one Gaussian sum."""
    rate = batch / 60_000
    return [
        accounting.poisson_gaussian_event(rate, first, first_steps),
        accounting.poisson_gaussian_event(rate, second, second_steps),
        accounting.gaussian_event(one_shot),
    ]


def compare(batch: int, noise: float, steps: int, one_shot: float) -> dict[str, object]:
    """One plan under PLD, PRV and RDP."""
    events = events_of(batch, 1.5 * noise, steps // 3, noise, steps, one_shot)
    pld = accounting.epsilon(events, DELTA, NeighboringRelation.ADD_OR_REMOVE_ONE)
    lower, upper = prv_epsilon(accounting.gaussian_steps(events), DELTA)
    rdp = accounting.rdp_epsilon(events, DELTA)
    row = {"batch": batch, "noise_multiplier": noise, "num_steps": steps, "one_shot_noise_multiplier": one_shot}
    numbers = {"pld": pld, "prv_lower": lower, "prv_upper": upper, "rdp": rdp}
    agree = lower <= pld <= min(upper, rdp + accounting.PLD_ROUNDING)
    return row | {name: round(value, 4) for name, value in numbers.items()} | {"agree": agree}


def seconds_to_calibrate(preset: str, epsilon: float, rounds: int) -> dict[str, float]:
    """Median times in which all noise multipliers of a release are found and cross-checked."""
    config = resolve_config(
        dataset="mnist",
        epsilon=epsilon,
        delta=DELTA,
        preset=preset,
        num_samples=0,
        latent_mechanism="dp_sgd",
        public_num_records=60_000,
    )
    seconds = []
    for _ in range(rounds):
        accounting._pld_epsilon.cache_clear()
        accounting._divergences.cache_clear()
        wall, cpu = time.perf_counter(), time.process_time()
        plan_release(config, num_classes=10, latent_dim=196, grouped=False)
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: round(statistics.median(found), 3)
        for name, found in zip(("wall", "cpu"), zip(*seconds, strict=False), strict=True)
    }


def main() -> None:
    """Measure, write the result file, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    arguments = parser.parse_args()
    anchor, golden = ANCHOR
    found = {
        "pld": accounting.epsilon(events_of(*anchor), DELTA, NeighboringRelation.ADD_OR_REMOVE_ONE),
        "replace_one": accounting.epsilon(events_of(*anchor), DELTA, NeighboringRelation.REPLACE_ONE),
    }
    rows = [compare(*row) for row in GRID]
    calibration = {
        f"{preset}, epsilon {epsilon:g}": seconds_to_calibrate(preset, epsilon, 3)
        for preset in ("quick", "cpu", "gpu")
        for epsilon in (1.0, 10.0)
    }
    result = {
        "delta": DELTA,
        "anchor": {name: {"golden": golden[name], "found": round(found[name], 3)} for name in golden},
        "calibration_seconds": calibration,
        "plans": len(rows),
        "disagreements": sum(not row["agree"] for row in rows),
        "grid": rows,
        "accountants": accounting.accountant_versions(),
        "machine": describe_machine(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result if arguments.json else {k: v for k, v in result.items() if k != "grid"}))


if __name__ == "__main__":
    main()
