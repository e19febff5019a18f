"""close_failed_release and close_failed_sweep: the failure handlers."""

from __future__ import annotations

from flytekit.types.error import FlyteError

from tasks._closing import close_execution, close_release, promise_of
from tasks._resources import SMALL, dpldm_task


@dpldm_task(**SMALL)
def close_failed_release(
    dataset: str,
    epsilon: float,
    delta: float,
    preset: str,
    num_samples: int,
    latent_mechanism: str,
    budget_epsilon: float,
    out: str,
    config: str,
    publish_metrics: bool,
    err: FlyteError | None = None,
) -> None:
    """Close the MLflow run and leave the ledger truthful: only a hold on data that no mechanism read is lifted."""
    close_release(promise_of(dataset, epsilon, delta, preset, latent_mechanism, config), epsilon, delta)


@dpldm_task(**SMALL)
def close_failed_sweep(
    dataset: str,
    epsilons: list[float],
    delta: float,
    preset: str,
    num_samples: int,
    budget_epsilon: float,
    out: str,
    config: str,
    err: FlyteError | None = None,
) -> None:
    """Close what all points left open: a sweep that fails stops those that run, without their own failure handlers."""
    close_execution()
