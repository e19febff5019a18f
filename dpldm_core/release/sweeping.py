"""A curve of released utility against epsilon: several releases of one data set, each with a released accuracy."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import fsspec

from dpldm_core.errors import ConfigError
from dpldm_core.overrides import load_overrides
from dpldm_core.privacy.accounting import relation_from_name
from dpldm_core.privacy.budget import epsilon_one_by_one
from dpldm_core.release.bundle import METRICS, REPORT, local_copy
from dpldm_core.release.metrics import ReleasedMetrics
from dpldm_core.release.opening import check_request

_ROOM = 1.08  # for what a plan may cost more than the one Gaussian release of its epsilon, once others came before


def check_sweep(
    *,
    dataset: str,
    epsilons: Sequence[float],
    delta: float,
    preset: str,
    num_samples: int,
    budget_epsilon: float,
    out: str,
    config: str,
) -> list[float]:
    """Check every release of a sweep before the first one spends anything. Reads no data.

    Args:
        dataset: Built-in name, path or URI.
        epsilons: One release each.
        delta: Of each release.
        preset: Name of a preset.
        num_samples: 0 for the preset's own.
        budget_epsilon: Cap of the account when it is first opened; own data is charged for all releases together.
        out: Folder or URI of releases.
        config: File of overrides, or empty.

    Returns:
        The epsilons in ascending order.

    Raises:
        ConfigError: No or equal epsilons, a budget that a new account's releases would exceed, or what one release
            would refuse.
        BundleError: ``out`` cannot be written.
    """
    if not epsilons or len(set(epsilons)) < len(epsilons):
        raise ConfigError(f"epsilons={list(epsilons)} must be one or more different numbers above 0, one release each")
    if "release_id" in load_overrides(config):
        raise ConfigError(
            f"config={config!r} names a release_id, but a sweep makes {len(epsilons)} releases: leave it out"
        )
    for epsilon in epsilons:
        request = check_request(
            dataset=dataset,
            epsilon=epsilon,
            delta=delta,
            preset=preset,
            num_samples=num_samples,
            latent_mechanism="dp_sgd",
            budget_epsilon=budget_epsilon,
            out=out,
            config=config,
            publish_metrics=True,
        )
    if request.public_data:
        return sorted(epsilons)
    if budget_epsilon < (needed := _smallest_cap(sorted(epsilons), delta, request.relation)):
        raise ConfigError(
            f"budget_epsilon={budget_epsilon:g}: {len(epsilons)} releases of one data set are charged together, about "
            f"{needed:g}. Set budget_epsilon to that, or sweep over public data, which protects nobody"
        )
    return sorted(epsilons)


def _smallest_cap(epsilons: Sequence[float], delta: float, relation: str) -> float:
    """About the smallest cap of a new account that lets all releases through, one after another."""
    if len(epsilons) == 1:
        return epsilons[0]
    cost = partial(epsilon_one_by_one, epsilons, delta, relation_from_name(relation))
    cap = max(epsilons)
    while cost(cap=cap) * _ROOM > cap and cap < 2 * sum(epsilons):
        cap *= 1.005
    return math.ceil(100 * cap) / 100


def write_curve(bundles: Sequence[str], out: str) -> tuple[str, str]:
    """One file with the promise and the released accuracy of each bundle. Everything in it is public already.

    Args:
        bundles: Folders or URIs of published bundles with released metrics.
        out: Folder or URI.

    Returns:
        The file's path and a table of it for the eye.
    """
    points = []
    for bundle in bundles:
        with local_copy(bundle) as folder:
            report = json.loads((folder / REPORT).read_text())
            metrics = ReleasedMetrics.model_validate_json((folder / METRICS).read_text())
        points.append(
            {
                "release_id": Path(bundle.rstrip("/")).name,
                "epsilon": report["epsilon"],
                "delta": report["delta"],
                "accuracy": metrics.accuracy,
                "accuracy_noise_std": metrics.accuracy_noise_std,
            }
        )
    text = json.dumps({"points": points}, indent=2) + "\n"
    path = f"{out.rstrip('/')}/sweep-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    with fsspec.open(path, "wt", auto_mkdir=True) as file:
        file.write(text)
    lines = ["epsilon   released accuracy (standard error of its noise)   release"]
    lines += [
        f"{p['epsilon']:<9.4g} {100 * p['accuracy']:5.1f} % ({100 * p['accuracy_noise_std']:.1f} %)   {p['release_id']}"
        for p in points
    ]
    return path, "\n".join(lines)
