"""open_release: everything is checked and reserved before the private data is read."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from tasks._closing import close_release, promise_of
from tasks._resources import SMALL, data_root, download_folder, dpldm_task, execution_id, inception_weights, open_ledger
from tasks.artifacts import PUBLIC, Release


class Opened(NamedTuple):
    """An opened release and the numbers of its sampling shards."""

    release: Release
    shards: list[int]


@dpldm_task(**SMALL)
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
    publish_metrics: bool,
) -> Opened:
    """Check every input, reserve the budget, then validate the data and calibrate the noise; opens the MLflow run."""
    from dpldm_core.release.opening import check_request, decide
    from tasks import _tracking

    request = check_request(
        dataset=dataset,
        epsilon=epsilon,
        delta=delta,
        preset=preset,
        num_samples=num_samples,
        latent_mechanism=latent_mechanism,
        budget_epsilon=budget_epsilon,
        out=out,
        config=config,
        publish_metrics=publish_metrics,
        inception_weights=inception_weights(),
    )
    promise = promise_of(dataset, epsilon, delta, preset, latent_mechanism, config)
    ledger = open_ledger()
    run_id = _tracking.open_run(request.release_id, execution_id(), promise=promise)
    try:
        ledger.open_account(
            request.account,
            budget_epsilon=request.budget_epsilon,
            delta=delta,
            relation=request.relation,
            public=request.public_data,
        )
        entry = ledger.reserve(
            request.account,
            release_id=request.release_id,
            execution_id=execution_id(),
            epsilon=epsilon,
            delta=delta,
            relation=request.relation,
            config_digest=request.config.digest(),
            cohort=request.cohort,
        )
        request = replace(request, release_id=entry.release_id)  # the name that an attempt before this one reserved
        decision = decide(request, data_root=data_root(), cache_dir=download_folder())
        ledger.bind_plan(entry.entry_id, decision.plan)
    except Exception:
        close_release(promise, epsilon, delta)
        raise
    run = _tracking.Run(run_id)
    run.params(**decision.public_parameters())
    run.config(decision.request.config)
    print(f"{decision.summary()}\nconfig {decision.request.config.model_dump_json()}")
    release = Release(
        release_id=request.release_id,
        run_id=run_id,
        account=request.account,
        entry_id=entry.entry_id,
        config=request.config.model_dump_json(),
        plan=decision.plan.model_dump_json(),
        image_schema=decision.schema.model_dump_json(),
        out=request.out,
        visibility=PUBLIC,
    )
    return Opened(release, list(range(request.config.num_shards)))
