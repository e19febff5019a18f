"""Publishing a release, and sampling again from a published one."""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpldm_core.config import ReleaseConfig
from dpldm_core.data.schema import ImageSchema
from dpldm_core.data.sources import BUILTIN_DATASETS
from dpldm_core.errors import ConfigError
from dpldm_core.privacy.plan import ReleasePlan
from dpldm_core.privacy.report import PrivacyReport, build_report
from dpldm_core.provenance import software
from dpldm_core.release.bundle import REPORT, check_target, local_copy, write_bundle
from dpldm_core.release.card import render_card
from dpldm_core.release.figures import samples_grid_png
from dpldm_core.release.metrics import ReleasedMetrics
from dpldm_core.release.opening import public_name
from dpldm_core.release.sampling import public_config, read_public_config, write_shard
from dpldm_core.release.synthetic import read_synthetic, synthetic_format
from dpldm_core.release.verify import verify_bundle

_OWN = -1.0  # guidance: the release's own
_SHOWN = 100  # images of a class, or of all without labels, that samples.png may show


@dataclass(frozen=True)
class Publication:
    """A bundle that was written and verified.

    Args:
        bundle: Path or URI.
        report: Its privacy report.
        dataset: Public name of the data.
        digest: The manifest_sha256 that ``verify`` prints.
        samples_png: Its picture.
        model_folder: Folder with the public model files; None for a bundle of another release's model.
        metrics: The accuracy that the release paid for; None when it did not.
    """

    bundle: str
    report: PrivacyReport
    dataset: str
    digest: str
    samples_png: bytes
    model_folder: Path | None
    metrics: ReleasedMetrics | None = None

    @property
    def release_id(self) -> str:
        """Name of the release."""
        return self.report.release_id

    @property
    def parent_release_id(self) -> str:
        """The release that this one samples again; empty for a first release."""
        return self.report.parent_release_id or ""

    def promise(self) -> dict[str, float]:
        """Public numbers of the whole release."""
        report = self.report
        numbers = {"epsilon": report.epsilon, "delta": report.delta, "epsilon_replace_one": report.epsilon_replace_one}
        return numbers | ({"released.accuracy": self.metrics.accuracy} if self.metrics else {})

    def summary(self) -> str:
        """What the steward sees at the end."""
        return (
            f"{self.report.statement}\nbundle: {self.bundle}\n"
            f"verify: {sys.executable} -m dpldm_core.release.verify {self.bundle}"
        )


def publish_release(
    out: str,
    release_id: str,
    config: ReleaseConfig,
    plan_json: str,
    schema_json: str,
    *,
    account: str,
    entry: str,
    synthetic: Sequence[str],
    model_files: Mapping[str, str],
    noise_std: float,
    work: Path,
    metrics: str = "",
) -> Publication:
    """Write the bundle of a release and verify it.

    Args:
        out: Folder or URI of releases.
        release_id: Name of the release.
        config: The resolved configuration.
        plan_json: The plan that the ledger reserved.
        schema_json: Public schema.
        account: Ledger account.
        entry: Ledger entry.
        synthetic: Parquet files of synthetic images.
        model_files: Public model files by name.
        noise_std: Noise of the latents that the denoiser was trained on.
        work: Scratch folder.
        metrics: Released metrics as JSON; empty when there are none.

    Returns:
        The verified bundle's place, its report and its picture.

    Raises:
        BundleError: It cannot be written, or does not verify.
    """
    plan, schema = ReleasePlan.model_validate_json(plan_json), ImageSchema.model_validate_json(schema_json)
    report = build_report(
        plan,
        release_id=release_id,
        account=public_name(account),
        entry=entry,
        latent_mechanism=config.latent_mechanism,
        public_facts=public_facts(config, schema),
    )
    values = public_config(config, schema, noise_std, public_name(config.dataset))
    files = {name: Path(path) for name, path in model_files.items()}
    released = ReleasedMetrics.model_validate_json(metrics) if metrics else None
    parts = [Path(p) for p in synthetic]
    return _publish(out, report, values, schema, parts, files, work, registered=True, metrics=released)


def resample_release(bundle: str, num_samples: int, seed: int, guidance: float, out: str, work: Path) -> Publication:
    """A new bundle of images from the models of a published one: post-processing, the promise is unchanged.

    Args:
        bundle: Folder or URI of the published bundle; it is verified first.
        num_samples: Synthetic images.
        seed: Seed of the sampler.
        guidance: Mean strength of class guidance, of half of the images, 0 for none; -1 for the release's own.
        out: Folder or URI of releases.
        work: Scratch folder.

    Returns:
        The new bundle's place, its report and its picture.

    Raises:
        ConfigError: ``num_samples``, ``seed`` or ``guidance`` is out of range.
        BundleError: The bundle does not verify, or the new one cannot be written.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples={num_samples} must be 1 or more")
    if not 0 <= seed < 2**62:
        raise ConfigError(f"seed={seed} must lie in [0, 2^62)")
    if not 0 <= guidance < math.inf and guidance != _OWN:
        raise ConfigError(
            f"guidance={guidance} must be a finite number of 0 or more, or -1 for the release's own; 3 to 8 makes "
            "classes clear"
        )
    with local_copy(bundle) as folder:
        verify_bundle(folder)
        parent = PrivacyReport.model_validate_json((folder / REPORT).read_text())
        config, schema, noise_std = read_public_config(folder)
        release_id = f"{parent.release_id}-resample-seed{seed}-{secrets.token_hex(2)}"
        check_target(out, release_id)
        sampling = config.sampling
        if guidance != _OWN:
            sampling = sampling.model_copy(update={"guidance": guidance})
        config = config.model_copy(update={"num_samples": num_samples, "seed": seed, "sampling": sampling})
        models = {path.stem: path for path in sorted((folder / "model").glob("*.safetensors"))}
        part = write_shard(
            work,
            0,
            config,
            schema.model_dump_json(),
            decoder=models["decoder"],
            denoiser=models["denoiser"],
            noise_std=noise_std,
            teacher=models.get("teacher"),
            num_shards=1,
        )
        own = {"release_id": release_id, "parent_release_id": parent.release_id, "software": software()}
        report = parent.model_copy(update=own)
        values = public_config(config, schema, noise_std, config.dataset)
        return _publish(out, report, values, schema, [part], models, work, registered=False)


def public_facts(config: ReleaseConfig, schema: ImageSchema) -> dict[str, dict[str, Any]]:
    """What the promise treats as known to everybody, and why it may."""
    built_in = BUILTIN_DATASETS.get(config.dataset)
    origin = "well known: a public data set" if built_in else "stated as public by the steward who chose this data set"
    facts: dict[str, Any] = {
        "image_size": f"{schema.height}x{schema.width}x{schema.channels}",
        "class_names": list(schema.class_names),
        "labelled": schema.labelled,
        "grouped": schema.grouped,
    }
    if config.num_records is not None:
        facts["num_records"] = config.num_records
    return {name: {"value": value, "origin": origin} for name, value in facts.items()}


def _publish(
    out: str,
    report: PrivacyReport,
    config: dict[str, Any],
    schema: ImageSchema,
    synthetic: list[Path],
    models: Mapping[str, Path],
    work: Path,
    *,
    registered: bool,
    metrics: ReleasedMetrics | None = None,
) -> Publication:
    images, labels = read_synthetic(synthetic, per_class=_SHOWN)
    names = schema.class_names if schema.labelled else ()
    picture = samples_grid_png(images, labels, class_names=names)
    dataset = str(config["dataset"])
    built_in = BUILTIN_DATASETS.get(dataset)
    card = render_card(
        report,
        config,
        dataset_title=built_in.title if built_in else dataset,
        num_samples=sum(synthetic_format(part).num_images for part in synthetic),
        class_names=names,
        metrics=metrics,
        audit=config["audit"],
    )
    bundle = write_bundle(
        out,
        report.release_id,
        synthetic=synthetic,
        model_files=models,
        config=config,
        report=report,
        card=card,
        samples_png=picture,
        metrics=metrics.model_dump(mode="json") if metrics else None,
    )
    digest = verify_bundle(bundle).manifest_sha256
    folder = work / "model"
    if registered:
        folder.mkdir()
        for name, path in models.items():
            (folder / f"{name}.safetensors").write_bytes(path.read_bytes())
    return Publication(bundle, report, dataset, digest, picture, folder if registered else None, metrics)
