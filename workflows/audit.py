"""The audit workflow. Run: pyflyte run workflows/audit.py audit_pipeline --help."""

from __future__ import annotations

from typing import NamedTuple

from flytekit import workflow

from tasks.audit import audit_stages


class AuditResult(NamedTuple):
    """Where the result is; what the audited stages claim together, and what the audit shows of it."""

    result: str
    claim: float
    epsilon_lower_bound: float


@workflow
def audit_pipeline(
    dataset: str = "mnist5k",
    epsilon: float = 10.0,
    delta: float = 1e-5,
    preset: str = "quick",
    num_canaries: int = 5000,
    out: str = "audits",
) -> AuditResult:
    """Attack the stages of a release with canaries and bound its epsilon from below. Releases nothing.

    Args:
        dataset: mnist5k, mnist or fashion_mnist: an audit is not charged, so it runs on public data only.
        epsilon: Privacy budget of the release whose plan is audited.
        delta: Its delta.
        preset: quick, cpu, long or gpu.
        num_canaries: Made-up records, each in the data with probability 1/2; more give tighter bounds.
        out: Folder or s3:// URI that the result is written to.

    Returns:
        The result file, the claim and the lower bound. Name the file as ``audit`` in a release's config to show it.
    """
    done = audit_stages(
        dataset=dataset, epsilon=epsilon, delta=delta, preset=preset, num_canaries=num_canaries, out=out
    )
    return AuditResult(done.result, done.claim, done.epsilon_lower_bound)
