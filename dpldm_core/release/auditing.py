"""An audit of the stages of a release that is not made: public data alone (docs/decisions/0008)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import fsspec

from dpldm_core.data.ingest import ingest_dataset
from dpldm_core.data.sources import BUILTIN_DATASETS
from dpldm_core.errors import ConfigError
from dpldm_core.privacy.audit import TRIALS, AuditReport
from dpldm_core.release.opening import check_request, decide
from dpldm_core.rng import SecretKey
from dpldm_core.storage import is_remote, local_path
from dpldm_core.training.audited import CanaryAudit, audit_report, audit_stages, step_bounds

CONFIDENCE = 0.95
MIN_CANARIES = 100


@dataclass(frozen=True)
class Audited:
    """A finished audit.

    Args:
        path: Path or URI of its result.
        report: What it found.
    """

    path: str
    report: AuditReport

    def summary(self) -> str:
        """What the steward sees at the end."""
        lines = [f"{'audited':36s} {'claim':>8s} {'steinke':>8s} {'f_dp':>8s} {'gdp_lower':>9s} {'gdp_fit':>8s}"]
        for run in self.report.runs:
            values = f"{run.claim:8.3f} {run.steinke:8.3f} {run.f_dp:8.3f} {run.gdp_lower:9.3f} {run.gdp_fit:8.3f}"
            lines.append(f"{' + '.join(run.stages):36s} {values}")
        lines += [f"one step of {s.stage:24s} {s.claim:8.3f} {s.epsilon_lower_bound:8.3f}" for s in self.report.steps]
        return "\n".join([*lines, f"result: {self.path}"])


def audit_release(
    *,
    dataset: str,
    epsilon: float,
    delta: float,
    preset: str,
    num_canaries: int,
    out: str,
    work: Path,
    data_root: str | None,
    cache_dir: str | None,
    trials: int = TRIALS,
) -> Audited:
    """Run the stages of the release that these inputs ask for, with canaries, and keep nothing but the bounds.

    Args:
        dataset: Built-in public data set.
        epsilon: Asked for the whole release.
        delta: Asked for the whole release.
        preset: Name of a preset.
        num_canaries: At least 100; a few thousand show most.
        out: Folder or URI that the result is written to.
        work: Scratch folder.
        data_root: Folder with MNIST and Fashion-MNIST.
        cache_dir: Where torchvision downloads to.
        trials: Of the single-step audit, in each of the two worlds.

    Returns:
        Where its result is, and what it found.

    Raises:
        ConfigError: A parameter is unknown or out of range, or the data is not public.
    """
    if dataset not in BUILTIN_DATASETS:
        raise ConfigError(
            f"dataset={dataset!r}: an audit reads its data without a charge, so it runs on public data only "
            f"({', '.join(BUILTIN_DATASETS)}). Audit one of these with the preset of your release: the code is the same"
        )
    if num_canaries < MIN_CANARIES:
        raise ConfigError(
            f"num_canaries={num_canaries} must be {MIN_CANARIES} or more; 5000 shows most of what there is"
        )
    request = check_request(
        dataset=dataset,
        epsilon=epsilon,
        delta=delta,
        preset=preset,
        num_samples=0,
        latent_mechanism="dp_sgd",
        budget_epsilon=0.0,
        out=out,
        config="",
    )
    decision = decide(request, data_root=data_root, cache_dir=cache_dir)
    config, plan = request.config, decision.plan
    train, _ = ingest_dataset(
        dataset,
        work,
        split_key=b"audit",
        data_root=data_root,
        cache_dir=cache_dir,
        num_classes=config.num_classes,
        relation=plan.relation,
    )
    audit = CanaryAudit(num_canaries, SecretKey.generate())
    audit_stages(train, config, decision.schema, plan, audit, SecretKey.generate(), work)
    steps = step_bounds(plan, SecretKey.generate(), CONFIDENCE, trials=trials)
    report = audit_report(audit, config, plan, CONFIDENCE, steps)
    path = write_report(out, f"{dataset}-eps{epsilon:g}-{preset}.json", report)
    return Audited(path, report)


def write_report(out: str, name: str, report: AuditReport) -> str:
    """Write the result of an audit; an earlier one of that name is replaced.

    Args:
        out: Folder or URI.
        name: Of the file.
        report: What the audit found.

    Returns:
        Path or URI of the file.
    """
    text, place = report.model_dump_json(indent=1) + "\n", f"{out.rstrip('/')}/{name}"
    if is_remote(out):
        filesystem, path = fsspec.core.url_to_fs(place)
        filesystem.pipe_file(path, text.encode())
        return place
    local_path(out).mkdir(parents=True, exist_ok=True)
    local_path(place).write_text(text)
    return str(local_path(place))
