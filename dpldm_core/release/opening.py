"""Everything that is decided about a release before its private data is read by any mechanism."""

from __future__ import annotations

import datetime
import math
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpldm_core.config import ReleaseConfig
from dpldm_core.data.schema import ImageSchema
from dpldm_core.data.sources import BUILTIN_DATASETS, load_dataset
from dpldm_core.errors import ConfigError
from dpldm_core.presets import check_delta, load_overrides, resolve_config
from dpldm_core.privacy.calibration import plan_release
from dpldm_core.privacy.plan import DpSgdPlan, LabelPlan, ReleasePlan, check_expected_batch
from dpldm_core.release.bundle import check_target

MIN_EXPECTED_BATCH = 16


@dataclass(frozen=True)
class Decided:
    """A release that may be opened: resolved, checked, calibrated; nothing is spent yet."""

    release_id: str
    account: str
    built_in: bool
    budget_epsilon: float
    out: str
    config: ReleaseConfig
    public_schema: ImageSchema
    plan: ReleasePlan

    def public_parameters(self) -> dict[str, Any]:
        """What the MLflow run shows of it."""
        config = self.config
        spent = {f"noise.{m.stage}": _noise_of(m) for m in self.plan.mechanisms}
        return {
            "dataset": config.dataset,
            "epsilon": config.epsilon,
            "delta": config.delta,
            "preset": config.preset,
            "latent_mechanism": config.latent_mechanism,
            "num_samples": config.num_samples,
            "neighboring_relation": self.plan.relation,
            "unit_of_privacy": self.plan.unit_of_privacy,
            **spent,
        }

    def summary(self) -> str:
        """What the steward sees before anything is spent."""
        config = self.config
        lines = [
            f"release      {self.release_id}  ->  {self.out}/{self.release_id}",
            f"data         {config.dataset}  ({self.public_schema.height}x{self.public_schema.width}x"
            f"{self.public_schema.channels}, {self.public_schema.num_classes} classes: treated as public)",
            f"promise      epsilon {config.epsilon:g}, delta {config.delta:g}, {self.plan.relation}, one unit = "
            f"{self.plan.unit_of_privacy}",
            f"account      {self.account}  (cap {self.budget_epsilon:g} when first opened)",
        ]
        lines += [f"mechanism    {m.stage}: {m.kind}, noise {_noise_of(m):.4g}" for m in self.plan.mechanisms]
        return "\n".join(lines)


def decide(
    *,
    dataset: str,
    epsilon: float,
    delta: float,
    preset: str,
    num_samples: int,
    latent_mechanism: str,
    budget_epsilon: float,
    out: str,
    config: str,
    data_root: str | None,
    cache_dir: str | None,
) -> Decided:
    """Resolve and check all inputs of a release and calibrate its noise.

    Own data is opened here to learn its schema, which is treated as public, and to find faults that the steward must mend.
    Nothing computed from it leaves this function but that schema.

    Args:
        dataset: Built-in name, path or URI.
        epsilon: Asked for the whole release.
        delta: Asked for the whole release.
        preset: Name of a preset.
        num_samples: 0 for the preset's own.
        latent_mechanism: ``dp_sgd`` or ``noised_latents``.
        budget_epsilon: Cap of the account when it is first opened; 0 for the default.
        out: Folder or URI of releases.
        config: File of overrides, or empty.
        data_root: Folder with MNIST and Fashion-MNIST.
        cache_dir: Where torchvision downloads to.

    Raises:
        ConfigError: A parameter is unknown or out of range.
        DataError: The data cannot be used.
        BundleError: ``out`` holds that release already or cannot be written.
    """
    overrides = load_overrides(config)
    release_id = str(overrides.pop("release_id", "") or _new_release_id(dataset, epsilon))
    if not (math.isfinite(budget_epsilon) and budget_epsilon >= 0):
        raise ConfigError(f"budget_epsilon={budget_epsilon} must be 0 (the default cap) or a finite number above 0")
    built_in = BUILTIN_DATASETS.get(dataset)
    resolved = resolve_config(
        dataset=dataset,
        epsilon=epsilon,
        delta=delta,
        preset=preset,
        num_samples=num_samples,
        latent_mechanism=latent_mechanism,
        public_num_records=built_in.num_records if built_in else None,
        overrides=overrides,
    )
    check_target(out, release_id)
    loaded = load_dataset(dataset, data_root=data_root, cache_dir=cache_dir, num_classes=resolved.num_classes)
    schema = loaded.train.schema
    check_delta(delta, loaded.train.num_units)
    latent_dim = schema.channels * min(resolved.autoencoder.frequencies, schema.height) * min(
        resolved.autoencoder.frequencies, schema.width
    )
    plan = plan_release(resolved, num_classes=schema.num_classes, latent_dim=latent_dim, grouped=schema.grouped)
    for mechanism in plan.mechanisms:
        if isinstance(mechanism, DpSgdPlan):
            check_expected_batch(mechanism, loaded.train.num_units, MIN_EXPECTED_BATCH)
    default_cap = math.inf if built_in else epsilon
    return Decided(
        release_id=release_id,
        account=account_name(dataset),
        built_in=built_in is not None,
        budget_epsilon=budget_epsilon or default_cap,
        out=out,
        config=resolved,
        public_schema=schema,
        plan=plan,
    )


def account_name(dataset: str) -> str:
    """Ledger account of a data set: a built-in's name, else its full path or URI."""
    if dataset in BUILTIN_DATASETS or "://" in dataset:
        return dataset
    return str(Path(dataset).resolve())


def public_name(dataset: str) -> str:
    """What a bundle calls the data: never the folder it lies in."""
    return dataset if dataset in BUILTIN_DATASETS else Path(dataset.rstrip("/")).name


def _new_release_id(dataset: str, epsilon: float) -> str:
    stem = "".join(c if c.isalnum() else "-" for c in Path(public_name(dataset)).stem)[:40].strip("-") or "data"
    now = datetime.datetime.now(datetime.UTC)
    return f"{stem}-eps{epsilon:g}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _noise_of(mechanism: Any) -> float:
    return mechanism.noise_parameter if isinstance(mechanism, LabelPlan) else mechanism.noise_multiplier
