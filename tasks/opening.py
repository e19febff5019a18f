"""open_release: everything is decided, checked and paid for before the private data is read; and the failure handler."""

from __future__ import annotations

from typing import NamedTuple

from flytekit import task
from flytekit.types.error import FlyteError

from tasks._resources import SMALL, code_digest, data_root, download_folder, execution_id, open_ledger
from tasks.artifacts import Release


class Opened(NamedTuple):
    """An opened release and the numbers of its sampling shards."""

    release: Release
    shards: list[int]


@task(**SMALL)
def open_release(
    dataset: str,
    epsilon: float,
    delta: float,
    preset: str,
    num_samples: int,
    latent_mechanism: str,
    budget_epsilon: float,
    out: str,
    config: str,
) -> Opened:
    """Resolve and check every input, calibrate the noise, reserve the budget, open the MLflow run."""
    from dpldm_core.release.opening import decide
    from tasks import _tracking

    decided = decide(
        dataset=dataset,
        epsilon=epsilon,
        delta=delta,
        preset=preset,
        num_samples=num_samples,
        latent_mechanism=latent_mechanism,
        budget_epsilon=budget_epsilon,
        out=out,
        config=config,
        data_root=data_root(),
        cache_dir=download_folder(),
    )
    print(decided.summary())
    ledger = open_ledger()
    run_id = _tracking.open_run(decided.release_id, execution_id(), decided.public_parameters())
    try:
        account = ledger.open_account(
            decided.account,
            budget_epsilon=decided.budget_epsilon,
            delta=decided.config.delta,
            relation=decided.plan.relation,
            public=decided.built_in,
        )
        entry = ledger.reserve(
            account.name,
            release_id=decided.release_id,
            execution_id=execution_id(),
            plan=decided.plan,
            code_digest=code_digest(),
        )
    except Exception:
        _tracking.close_run(run_id, failed=True)
        raise
    release = Release(
        release_id=decided.release_id,
        run_id=run_id,
        account=account.name,
        entry_id=entry.entry_id,
        config=decided.config.model_dump_json(),
        plan=decided.plan.model_dump_json(),
        schema=decided.public_schema.model_dump_json(),
        out=decided.out,
    )
    return Opened(release, list(range(decided.config.sampling.num_shards)))


@task(**SMALL)
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
    err: FlyteError | None = None,
) -> None:
    """Close the MLflow run and leave the ledger truthful: a hold on unread data is lifted, a started stage stays spent."""
    from tasks import _tracking

    ledger = open_ledger()
    for entry in ledger.find(execution_id=execution_id()):
        ledger.close_failed(entry.entry_id, reason="the pipeline failed")
    for run_id in _tracking.find_open_runs(execution_id()):
        _tracking.close_run(run_id, failed=True)
