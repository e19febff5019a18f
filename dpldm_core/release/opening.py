"""Everything that is decided about a release before its private data is read by any mechanism."""

from __future__ import annotations

import datetime
import math
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dpldm_core.config import AuditNote, ReleaseConfig
from dpldm_core.data.schema import ImageSchema
from dpldm_core.data.sources import BUILTIN_DATASETS, load_dataset
from dpldm_core.errors import ConfigError
from dpldm_core.overrides import load_overrides
from dpldm_core.presets import check_delta, resolve_config
from dpldm_core.privacy.calibration import COVARIANCES, MEANS, plan_release, relation_of
from dpldm_core.privacy.noise import MAX_COORDINATES
from dpldm_core.privacy.plan import DpSgdPlan, LabelPlan, ReleasePlan, check_expected_batch
from dpldm_core.release.bundle import check_target
from dpldm_core.storage import is_remote, local_path, scheme_of

MIN_EXPECTED_BATCH = 16


@dataclass(frozen=True)
class Request:
    """What is asked for, checked as far as that goes without reading any private data.

    Args:
        release_id: Name of the release.
        account: Ledger account.
        cohort: Declared set of units, disjoint from the account's other cohorts; empty: all units.
        public_data: Whether the data set is a built-in public one, which protects nobody.
        budget_epsilon: Cap of the account when it is first opened.
        out: Folder or URI of releases.
        config: The resolved configuration.
    """

    release_id: str
    account: str
    cohort: str
    public_data: bool
    budget_epsilon: float
    out: str
    config: ReleaseConfig

    @property
    def relation(self) -> str:
        """dp-accounting's name of the neighbouring relation of the statement."""
        return relation_of(self.config.latent_mechanism)


@dataclass(frozen=True)
class Decision:
    """A release that may begin: its data is valid, its noise calibrated; nothing is spent yet."""

    request: Request
    schema: ImageSchema
    plan: ReleasePlan

    def public_parameters(self) -> dict[str, Any]:
        """What the MLflow run shows of it."""
        config = self.request.config
        return {
            **{name: getattr(config, name) for name in ("dataset", "epsilon", "delta", "preset", "latent_mechanism")},
            "num_samples": config.num_samples,
            "publish_metrics": config.publish_metrics,
            "neighboring_relation": self.plan.relation,
            "unit_of_privacy": self.plan.unit_of_privacy,
            **{f"noise.{m.stage}": _noise_of(m) for m in self.plan.mechanisms},
        }

    def summary(self) -> str:
        """What the steward sees before anything is spent."""
        request, config, schema = self.request, self.request.config, self.schema
        lines = [
            f"release      {request.release_id}  ->  {request.out}/{request.release_id}",
            f"data         {config.dataset}  ({schema.height}x{schema.width}x{schema.channels}, {schema.num_classes} "
            "classes: treated as public)",
            f"promise      epsilon {config.epsilon:g}, delta {config.delta:g}, {self.plan.relation}, one unit = "
            f"{self.plan.unit_of_privacy}",
            f"account      {request.account}",
        ]
        lines += [f"mechanism    {m.stage}: {m.kind}, noise {_noise_of(m):.4g}" for m in self.plan.mechanisms]
        return "\n".join(lines)


def check_request(
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
    publish_metrics: bool = False,
    inception_weights: str | None = None,
) -> Request:
    """Resolve and check the inputs of a release. Reads no data.

    Args:
        dataset: Built-in name, path or URI.
        epsilon: Asked for the whole release.
        delta: Asked for the whole release.
        preset: Name of a preset.
        num_samples: 0 for the preset's own.
        latent_mechanism: ``dp_sgd`` or ``noised_latents``.
        budget_epsilon: Cap of the account when it is first opened; 0 for the default: none for built-in sets, the asked
            epsilon (one release) for own data.
        out: Folder or URI of releases.
        config: File of overrides, or empty. ``release_id``, ``account`` and ``cohort`` may stand in it too. ``audit``
            names the result file of an audit, for the card.
        publish_metrics: Whether the accuracy on held-out private records is released too, as part of epsilon.
        inception_weights: File with the Inception weights that the evaluation will ask for, if any.

    Returns:
        The request, with its resolved configuration.

    Raises:
        ConfigError: A parameter is unknown or out of range.
        BundleError: ``out`` holds that release already or cannot be written.
    """
    overrides = load_overrides(config)
    names = {key: str(overrides.pop(key, "") or "") for key in ("release_id", "account", "cohort")}
    if isinstance(overrides.get("audit"), str):
        overrides["audit"] = read_audit_note(overrides["audit"], preset)
    elif overrides.get("audit") is not None:
        raise ConfigError(f"audit={overrides['audit']!r} must be the path of an audit's result file")
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
        publish_metrics=publish_metrics,
        overrides=overrides,
    )
    if resolved.publish_metrics and resolved.num_samples < 2:
        raise ConfigError(
            "publish_metrics=True trains a classifier on the synthetic images: num_samples must be 2 or more"
        )
    if inception_weights:
        from dpldm_core.evaluation.features import inception_metric  # imports torch

        inception_metric(inception_weights)
    release_id = names["release_id"] or _new_release_id(dataset, epsilon)
    check_target(out, release_id)
    return Request(
        release_id=release_id,
        account=names["account"] or account_name(dataset),
        cohort=names["cohort"],
        public_data=built_in is not None,
        budget_epsilon=budget_epsilon or (math.inf if built_in else epsilon),
        out=out,
        config=resolved,
    )


def decide(request: Request, *, data_root: str | None, cache_dir: str | None) -> Decision:
    """Validate the data, learn its public schema, and calibrate the noise. The budget must be reserved by now.

    Nothing computed from own data leaves this function but its schema, which is treated as public, and faults that the
    steward must mend.

    Args:
        request: What is asked for.
        data_root: Folder with MNIST and Fashion-MNIST.
        cache_dir: Where torchvision downloads to.

    Returns:
        The public schema and the calibrated plan, with the request.

    Raises:
        ConfigError: delta is too large for the data.
        DataError: The data cannot be used.
        AccountingError: No noise meets the target.
    """
    config = request.config
    loaded = load_dataset(config.dataset, data_root=data_root, cache_dir=cache_dir, num_classes=config.num_classes)
    schema = loaded.train.schema
    check_delta(config.delta, loaded.train.num_units)
    frequencies = config.autoencoder.frequencies
    latent_dim = schema.channels * min(frequencies, schema.height) * min(frequencies, schema.width)
    plan = plan_release(config, num_classes=schema.num_classes, latent_dim=latent_dim, grouped=schema.grouped)
    check_measurable(config, plan, schema, latent_dim)
    for mechanism in plan.mechanisms:
        if isinstance(mechanism, DpSgdPlan):
            check_expected_batch(mechanism, loaded.train.num_units, MIN_EXPECTED_BATCH)
            mechanism.batch_cap(loaded.train.num_units)  # refuses data larger than declared
    if config.preset != "smoke":  # two steps of everything, for tests: nobody hopes for an image
        check_useful(config, plan, num_units=loaded.train.num_units, num_classes=schema.num_classes, dim=latent_dim)
    return Decision(request, schema, plan)


def check_measurable(config: ReleaseConfig, plan: ReleasePlan, schema: ImageSchema, dim: int) -> None:
    """Refuse class covariances of more numbers than rounding is charged for.

    Args:
        config: The resolved configuration.
        plan: The calibrated plan.
        schema: Public.
        dim: Dimension of a latent.

    Raises:
        ConfigError: There are, with the frequencies that would do.
    """
    numbers = schema.num_classes * dim * (dim + 1) // 2
    if COVARIANCES not in plan.stages() or numbers <= MAX_COORDINATES:
        return
    kept = min(config.autoencoder.frequencies, max(schema.height, schema.width))
    fewer = math.floor(kept * (MAX_COORDINATES / numbers) ** 0.25)
    raise ConfigError(
        f"autoencoder.frequencies={config.autoencoder.frequencies} with {schema.num_classes} classes: covariances of "
        f"{numbers} numbers, where noise is charged for at most {MAX_COORDINATES}. Set {fewer} or less (config)"
    )


def check_useful(config: ReleaseConfig, plan: ReleasePlan, *, num_units: int, num_classes: int, dim: int) -> None:
    """Refuse a release whose noise would drown what it measures: the budget would buy nothing. For the steward alone.

    Judged by the one-shot prior that everything else starts from: the noise on the mean latent of a class, per
    coordinate, beside the size that latents are clipped to.

    Args:
        config: The resolved configuration.
        plan: The calibrated plan.
        num_units: Units in the data.
        num_classes: Public number of classes.
        dim: Dimension of a latent.

    Raises:
        ConfigError: It would, with the number of units or the epsilon that would do.
    """
    from dpldm_core.privacy.class_statistics import CLASS_MEANS  # imports torch

    if MEANS not in plan.stages():
        return
    sigma = plan.mechanism(MEANS).noise_multiplier  # type: ignore[union-attr]
    noise = sigma * math.sqrt(dim) / CLASS_MEANS.mean * num_classes / num_units
    if noise <= 1:
        return
    enough = math.ceil(num_units * noise)
    raise ConfigError(
        f"epsilon={config.epsilon:g} with {num_units} records of {num_classes} classes: the noise on the mean of a "
        f"class would be {noise:.1f} times the images themselves, and the budget would buy nothing. Use about {enough} "
        f"records, or epsilon of about {config.epsilon * noise:.2g}, or fewer autoencoder.frequencies (config; now "
        f"{config.autoencoder.frequencies}); every preset begins with these means, and no other one would help much"
    )


def read_audit_note(path: str, preset: str) -> dict[str, Any]:
    """What the card shows of an audit's result file.

    Args:
        path: File or URI that the audit wrote.
        preset: Of the release: an audit of other stages says nothing about it.

    Raises:
        ConfigError: It is no such file, its data is not public, its preset is another, or it refutes its claim.
    """
    values = load_overrides(path)
    if missing := sorted(set(AuditNote.model_fields) - set(values)):
        raise ConfigError(f"audit={path!r} is not the result of an audit: it holds no {missing}")
    note = {name: values[name] for name in AuditNote.model_fields}
    if note["dataset"] not in BUILTIN_DATASETS:
        raise ConfigError(f"audit={path!r} was made on {note['dataset']!r}, not on public data: nobody may see it")
    if note["preset"] != preset:
        raise ConfigError(f"audit={path!r} is of preset={note['preset']!r}, the release of {preset!r}. Audit that one")
    if note["epsilon_lower_bound"] > note["claim"]:
        raise ConfigError(
            f"audit={path!r} shows epsilon >= {note['epsilon_lower_bound']:.3g} where {note['claim']:.3g} is claimed: "
            "the code is at fault. Release nothing with it"
        )
    return note


def account_name(dataset: str) -> str:
    """Ledger account of a data set: a built-in's name, else its full path or URI, the same however it is spelled.

    Raises:
        ConfigError: One URI inside another, or a web address with a query or a name: of these there are many spellings.

    >>> account_name("s3a://scans//2024/"), account_name("file:///scans/2024") == account_name("/scans/./2024")
    ('s3://scans/2024', True)
    >>> account_name("https://Host:443/x.npz")
    'http://host/x.npz'
    """
    if dataset in BUILTIN_DATASETS:
        return dataset
    if "::" in dataset and "://" in dataset:
        raise ConfigError(
            f"dataset={dataset!r} is one URI inside another: name the place itself, or the ledger's account of the "
            "data as account in the file that --config names"
        )
    if not is_remote(dataset):
        return str(local_path(dataset).resolve())
    scheme, rest = scheme_of(dataset), dataset.partition("://")[2]
    if scheme == "http":
        parsed = urlsplit(dataset)
        if parsed.query or parsed.fragment or parsed.username:
            raise ConfigError(
                f"dataset={dataset!r} is one of many addresses of its data: name the ledger's account of the data as "
                "account in the file that --config names"
            )
        port = f":{parsed.port}" if parsed.port not in (None, 80, 443) else ""
        rest = f"{parsed.hostname}{port}{parsed.path}"
    return f"{scheme}://{'/'.join(part for part in rest.split('/') if part)}"


def public_name(dataset: str) -> str:
    """What a bundle calls the data: never the folder it lies in."""
    return dataset if dataset in BUILTIN_DATASETS else Path(dataset.rstrip("/")).name


def _new_release_id(dataset: str, epsilon: float) -> str:
    stem = "".join(c if c.isalnum() else "-" for c in Path(public_name(dataset)).stem)[:40].strip("-") or "data"
    now = datetime.datetime.now(datetime.UTC)
    return f"{stem}-eps{epsilon:g}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _noise_of(mechanism: Any) -> float:
    return mechanism.noise_parameter if isinstance(mechanism, LabelPlan) else mechanism.noise_multiplier
