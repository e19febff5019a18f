"""check_sweep and write_curve: the ends of a sweep over epsilon."""

from __future__ import annotations

from tasks._resources import SMALL, dpldm_task


@dpldm_task(**SMALL)
def check_sweep(
    dataset: str,
    epsilons: list[float],
    delta: float,
    preset: str,
    num_samples: int,
    budget_epsilon: float,
    out: str,
    config: str,
) -> list[float]:
    """Refuse bad input of any release of the sweep before the first one spends anything."""
    from dpldm_core.release.sweeping import check_sweep as check

    return check(
        dataset=dataset,
        epsilons=epsilons,
        delta=delta,
        preset=preset,
        num_samples=num_samples,
        budget_epsilon=budget_epsilon,
        out=out,
        config=config,
    )


@dpldm_task(**SMALL)
def write_curve(bundles: list[str], out: str) -> str:
    """Write the released accuracy against epsilon."""
    from dpldm_core.release.sweeping import write_curve as write

    path, table = write(bundles, out)
    print(table)
    return path
