"""The sweep workflow. Run: pyflyte run workflows/sweep.py sweep_pipeline --help."""

from __future__ import annotations

from typing import NamedTuple

from flytekit import dynamic, workflow

from tasks._resources import SMALL
from tasks.closing import close_failed_sweep
from tasks.sweep import check_sweep, write_curve
from workflows.release import release_pipeline


class Curve(NamedTuple):
    """Where the curve is, and the bundles of its points."""

    curve: str
    bundles: list[str]


@dynamic(**SMALL)
def release_each(
    dataset: str,
    epsilons: list[float],
    delta: float,
    preset: str,
    num_samples: int,
    budget_epsilon: float,
    out: str,
    config: str,
) -> list[str]:
    """One release for each epsilon; on a cluster they run side by side, and the ledger lets no two overspend."""
    return [
        release_pipeline(
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
        ).bundle
        for epsilon in epsilons
    ]


@workflow(on_failure=close_failed_sweep)
def sweep_pipeline(
    epsilons: list[float],
    dataset: str = "mnist5k",
    delta: float = 1e-5,
    preset: str = "quick",
    num_samples: int = 0,
    budget_epsilon: float = 0.0,
    out: str = "releases",
    config: str = "",
) -> Curve:
    """Release one data set at several epsilons and draw released accuracy against epsilon.

    Every point is a whole release, charged as such: on own data the account pays for all of them together, and
    ``budget_epsilon`` must hold that. Built-in sets are public.

    Args:
        epsilons: One release each, for example '[0.2, 1, 3, 10]'.
        dataset: mnist5k, mnist, fashion_mnist, or a path or s3:// URI of your own images, with labels.
        delta: Probability that each promise may fail.
        preset: quick, cpu, long or gpu.
        num_samples: Synthetic images of each release; 0 takes the preset's number.
        budget_epsilon: Cap of a new account.
        out: Folder or s3:// URI that bundles and curve are written to.
        config: JSON or YAML file that overrides single fields of the preset; it may not name a release_id.

    Returns:
        The file of the curve, and the bundles.
    """
    points = check_sweep(
        dataset=dataset,
        epsilons=epsilons,
        delta=delta,
        preset=preset,
        num_samples=num_samples,
        budget_epsilon=budget_epsilon,
        out=out,
        config=config,
    )
    bundles = release_each(
        dataset=dataset,
        epsilons=points,
        delta=delta,
        preset=preset,
        num_samples=num_samples,
        budget_epsilon=budget_epsilon,
        out=out,
        config=config,
    )
    return Curve(write_curve(bundles=bundles, out=out), bundles)
