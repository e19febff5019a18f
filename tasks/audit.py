"""audit: what an attacker can show about the stages of a release, on public data; releases nothing."""

from __future__ import annotations

from typing import NamedTuple

from tasks._resources import CPU_TASK, data_root, download_folder, dpldm_task, work_folder


class Audit(NamedTuple):
    """Where the result is, and its headline."""

    result: str
    claim: float
    epsilon_lower_bound: float


@dpldm_task(**CPU_TASK | {"cache": False})
def audit_stages(dataset: str, epsilon: float, delta: float, preset: str, num_canaries: int, out: str) -> Audit:
    """Train the stages with canaries among the records and bound epsilon from below; the models are thrown away."""
    from dpldm_core.release.auditing import audit_release

    done = audit_release(
        dataset=dataset,
        epsilon=epsilon,
        delta=delta,
        preset=preset,
        num_canaries=num_canaries,
        out=out,
        work=work_folder("audit"),
        data_root=data_root(),
        cache_dir=download_folder(),
    )
    print(done.summary())
    return Audit(done.path, done.report.claim, done.report.epsilon_lower_bound)
