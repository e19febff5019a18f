"""Verify a bundle from its own files: every hash, every shape, the events from config.json, epsilon from the events.

``python -m dpldm_core.release.verify releases/<id>`` exits 0 when all holds and 1, saying what is wrong, when anything
was changed. Whoever rewrites events, numbers and hashes consistently has written another bundle: compare the
manifest_sha256 that is printed with the one the publisher announced.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from dpldm_core.data.schema import ImageSchema
from dpldm_core.errors import AccountingError, BundleError, ConfigError
from dpldm_core.presets import check_delta
from dpldm_core.privacy.accounting import accountant_versions, event_to_json
from dpldm_core.privacy.calibration import COVARIANCES, MEANS, TEACHER, private_mechanisms, unit_of_privacy
from dpldm_core.privacy.calibration import METRICS as METRICS_STAGE
from dpldm_core.privacy.report import PrivacyReport, recompute
from dpldm_core.release import bundle
from dpldm_core.release import metrics as released
from dpldm_core.release.bundle import CARD, CONFIG, MANIFEST, METRICS, REPORT, SAMPLES
from dpldm_core.release.sampling import read_public_config
from dpldm_core.release.synthetic import read_synthetic, synthetic_format

TOLERANCE = 1e-6  # of a stored epsilon: room for another machine's floating point, not for another promise
_NOISE = {"noise_multiplier", "noise_parameter"}  # fields of events that calibration decides, not config.json
_ONE_SUM = "latent_prior"  # the stage of MEANS and COVARIANCES in bundles from before decision 21
_TWO_SUMS = {"mean_share", "covariance_clip_norm"}  # settings of the prior that such bundles do not have
_MODEL = re.compile(r"model/[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


@dataclass(frozen=True)
class VerifiedBundle:
    """What a bundle was found to be."""

    release_id: str
    report: PrivacyReport
    num_samples: int
    num_files: int
    manifest_sha256: str


def verify_bundle(path: str | Path, *, strict: bool = False) -> VerifiedBundle:
    """Check everything that can be checked without the private data.

    Args:
        path: Folder or URI of the bundle.
        strict: Decode every image, not only the first of each file.

    Returns:
        What was verified.

    Raises:
        BundleError: Lists every problem found.
    """
    problems: list[str] = []
    with bundle.local_copy(path) as folder:
        if not folder.is_dir():
            raise BundleError(f"{path} is not a bundle: there is no such folder")
        manifest = _load(folder, MANIFEST, problems) or {}
        intact = _check_files(folder, manifest, problems)
        report = _check_report(folder, problems)
        config = _load(folder, CONFIG, problems) or {}
        if report is not None:
            _check_agreement(folder, manifest, config, report, problems)
            if config:
                _check_mechanisms(folder, config, report, intact, problems)
            _check_metrics(folder, manifest, config, report, problems)
        _check_images(folder, intact, config, strict, problems)
        _check_models(folder, intact, problems)
    if problems or report is None:
        raise BundleError(f"{path} does not verify:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return VerifiedBundle(
        release_id=report.release_id,
        report=report,
        num_samples=config["num_samples"],
        num_files=len(manifest["files"]) + 1,
        manifest_sha256=manifest["manifest_sha256"],
    )


def _load(folder: Path, name: str, problems: list[str]) -> dict[str, Any] | None:
    """A JSON object that is byte for byte its canonical form (the manifest: sealed), or None."""
    try:
        raw = (folder / name).read_bytes()
        value = json.loads(raw)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        expected = bundle.seal(value) if name == MANIFEST else bundle.canonical_json(value)
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{name} cannot be read as JSON: {error}")
        return None
    if raw != expected:
        reason = "it does not match its own manifest_sha256" if name == MANIFEST else "it is not in canonical form"
        problems.append(f"{name} was changed: {reason}")
    return value


def _check_files(folder: Path, manifest: dict[str, Any], problems: list[str]) -> set[str]:
    """Compare the folder with the manifest; return the names whose bytes are as listed."""
    if manifest and manifest.get("format_version") != bundle.FORMAT_VERSION:
        problems.append(
            f"format_version={manifest.get('format_version')!r}: this dpldm reads {bundle.FORMAT_VERSION}; upgrade it"
        )
    listed = manifest.get("files")
    listed = listed if isinstance(listed, dict) else {}
    present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    present.pop(MANIFEST, None)
    parts = [name for name in listed if name.startswith("synthetic/")]
    models = {f"model/{name}.safetensors" for name in ("decoder", "denoiser")}
    required = {
        CONFIG,
        REPORT,
        CARD,
        SAMPLES,
        *models,
        *(bundle.part_name(i, len(parts)) for i in range(max(1, len(parts)))),
    }
    problems += [f"{name} is missing" for name in sorted((set(listed) | required) - set(present))]
    problems += [f"{name} is not listed in {MANIFEST}" for name in sorted(set(present) - set(listed))]
    problems += [
        f"{name} is no part of a bundle"
        for name in sorted(set(listed) - required - {METRICS})
        if not _MODEL.fullmatch(name)
    ]
    intact = set()
    for name in sorted(set(listed) & set(present)):
        if present[name].is_symlink() or not present[name].is_file():
            problems.append(f"{name} is not a plain file")
            continue
        if bundle.digest(present[name]) != listed[name]:
            problems.append(f"{name} was changed: its SHA-256 or size is not the one in {MANIFEST}")
        else:
            intact.add(name)
    return intact


def _check_report(folder: Path, problems: list[str]) -> PrivacyReport | None:
    """Recompute both epsilons from the events."""
    value = _load(folder, REPORT, problems)
    if value is None:
        return None
    report = None
    try:
        report = PrivacyReport.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        problems += [f"{REPORT}: {'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors()]
    try:
        recomputed = recompute(value)
    except AccountingError as error:
        problems.append(f"{REPORT}: {error}")
        return report
    for name, again in zip(("epsilon", "epsilon_replace_one"), recomputed, strict=True):
        stored = value.get(name)
        if not isinstance(stored, int | float) or not math.isclose(stored, again, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            problems.append(
                f"{REPORT}: states {name} = {stored}, but its events cost {again} "
                f"(by {accountant_versions()['published']})"
            )
    return report


def _check_agreement(
    folder: Path, manifest: dict[str, Any], config: dict[str, Any], report: PrivacyReport, problems: list[str]
) -> None:
    """Manifest, config and card say what the report says."""
    stated = {"delta": report.delta, "latent_mechanism": report.latent_mechanism}
    problems += [
        f"{CONFIG}: {name} is {config.get(name)!r}, but {REPORT} states {value!r}"
        for name, value in stated.items()
        if config.get(name) != value
    ]
    target = config.get("epsilon")
    if not isinstance(target, int | float) or report.epsilon > target * (1 + TOLERANCE):
        problems.append(f"{REPORT}: epsilon = {report.epsilon} exceeds the {target!r} asked for in {CONFIG}")
    if manifest.get("release_id") != report.release_id:
        problems.append(f"{MANIFEST} is of release {manifest.get('release_id')!r}, {REPORT} of {report.release_id!r}")
    try:
        if report.statement not in (folder / CARD).read_text(encoding="utf-8"):
            problems.append(f"{CARD} does not carry the statement of {REPORT}")
    except (OSError, ValueError) as error:
        problems.append(f"{CARD} cannot be read: {error}")


def _check_mechanisms(
    folder: Path, stored: dict[str, Any], report: PrivacyReport, intact: set[str], problems: list[str]
) -> None:
    """The events are those of config.json: its stages, their rates, steps and labels. Noise is left to the epsilons.

    So are the unit, delta and the models.
    """
    try:
        config, schema, _ = read_public_config(folder)
        planned = private_mechanisms(config, num_classes=schema.num_classes, latent_dim=1, grouped=schema.grouped)
        if config.num_records is not None:
            check_delta(config.delta, config.num_records)
    except (BundleError, ConfigError, ArithmeticError) as error:
        problems.append(f"{CONFIG}: {error}")
        return
    expected = {plan.stage: _without_noise(event_to_json(plan.event())) for plan, _ in planned}
    stated = [(e.stage, _without_noise(e.event)) for e in report.events]
    if _ONE_SUM in dict(stated) and MEANS in expected and not _TWO_SUMS & set(stored["prior"]):
        expected[_ONE_SUM] = expected.pop(MEANS)
        del expected[COVARIANCES]
    problems += [
        f"{REPORT}: {stage} is billed as {event}, but by {CONFIG} it is {expected.get(stage, 'no private stage')}"
        for stage, event in stated
        if expected.get(stage) != event
    ]
    problems += [
        f"{REPORT}: {CONFIG} has a private stage {stage!r}, which is billed {billed} times"
        for stage in expected
        if (billed := sum(stage == other for other, _ in stated)) != 1
    ]
    unit = unit_of_privacy(config, grouped=schema.grouped)
    if report.unit_of_privacy != unit:
        problems.append(f"{REPORT}: one unit is {report.unit_of_privacy!r}, but by {CONFIG} it is {unit!r}")
    named = TEACHER in expected or config.named_by_prior(schema.num_classes)
    known = {f"model/{name}.safetensors" for name in ("decoder", "denoiser", *["teacher"] * named)}
    found = {name for name in intact if name.startswith("model/")}
    problems += [f"{name} is no model of this release: no stage of {CONFIG} makes it" for name in sorted(found - known)]


def _without_noise(event: dict[str, Any]) -> dict[str, Any]:
    """A nested event without the amounts of its noise."""
    return {
        name: _without_noise(value) if isinstance(value, dict) else value
        for name, value in event.items()
        if name not in _NOISE
    }


def _check_metrics(
    folder: Path, manifest: dict[str, Any], config: dict[str, Any], report: PrivacyReport, problems: list[str]
) -> None:
    """metrics.json is there when the release paid for it, follows from its counts and noise, and is on the card.

    A bundle that samples another release's models again carries none: the accuracy was that of the first images.
    """
    paid = [e.event for e in report.events if e.stage == METRICS_STAGE]
    if bool(config.get("publish_metrics", False)) != bool(paid):
        problems.append(f"{CONFIG}: publish_metrics is {config.get('publish_metrics')!r}, {REPORT} says otherwise")
    listed = METRICS in (manifest.get("files") or {})
    if not paid or report.parent_release_id is not None:
        problems += [f"{METRICS} is no part of this bundle: no mechanism of it paid for it"] * listed
        return
    if not listed:
        problems.append(f"{METRICS} is missing: {REPORT} lists the mechanism that released it")
        return
    if (value := _load(folder, METRICS, problems)) is None:
        return
    try:
        found = released.ReleasedMetrics.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        problems += [f"{METRICS}: {'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors()]
        return
    schema = config.get("schema")
    most = config.get("max_records_per_group") if isinstance(schema, dict) and schema.get("grouped") else 1
    if found.max_records_per_unit != most:
        problems.append(
            f"{METRICS}: its noise hides {found.max_records_per_unit} records of a unit, {CONFIG} has {most}"
        )
    if found.stage != METRICS_STAGE or [found.noise_multiplier] != [e.get("noise_multiplier") for e in paid]:
        problems.append(f"{METRICS}: its noise is not that of stage {METRICS_STAGE!r} in {REPORT}")
    try:
        if released.in_words(found) not in (folder / CARD).read_text(encoding="utf-8"):
            problems.append(f"{CARD} does not carry the accuracy of {METRICS}")
    except (OSError, ValueError) as error:
        problems.append(f"{CARD} cannot be read: {error}")


def _check_images(folder: Path, intact: set[str], config: dict[str, Any], strict: bool, problems: list[str]) -> None:
    """The parquet files open and hold as many images as config.json says, of its size, channels and classes.

    Damaged ones were reported before. Classes and labels decide which mechanisms were to be paid for.
    """
    parts = sorted(name for name in intact if name.startswith("synthetic/"))
    if not parts or parts != [bundle.part_name(i, len(parts)) for i in range(len(parts))]:
        return
    try:
        found = {name: synthetic_format(folder / name) for name in parts}
        _, labels = read_synthetic([folder / name for name in parts]) if strict else (None, None)
        schema = ImageSchema.model_validate(config.get("schema"))
    except BundleError as error:
        problems.append(str(error))
        return
    except ValidationError:
        return  # reported before
    shape = (schema.height, schema.width, schema.channels)
    names = schema.class_names if schema.labelled else None
    for name, part in found.items():
        if part.image_shape not in (shape, None):
            problems.append(f"{name} holds images of {part.image_shape}, {CONFIG} has {shape}")
        if part.class_names != names:
            problems.append(f"{name} holds the classes {part.class_names}, {CONFIG} has {names}")
    if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < schema.num_classes:
        problems.append(f"synthetic/ holds labels that are none of the {schema.num_classes} classes of {CONFIG}")
    rows = sum(part.num_images for part in found.values())
    if rows != config.get("num_samples"):
        problems.append(f"synthetic/ holds {rows} images, but {CONFIG} says num_samples={config.get('num_samples')!r}")


def _check_models(folder: Path, intact: set[str], problems: list[str]) -> None:
    """The model files open as safetensors."""
    for name in sorted(name for name in intact if name.startswith("model/")):
        try:
            with safe_open(folder / name, framework="numpy") as file:
                if not list(file.keys()):
                    problems.append(f"{name} holds no tensor")
        except (SafetensorError, OSError, ValueError) as error:
            problems.append(f"{name} is not a safetensors file: {error}")


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 when the bundle verifies, 1 when not."""
    parser = argparse.ArgumentParser(prog="python -m dpldm_core.release.verify", description="Verify a release bundle.")
    parser.add_argument("path", help="folder or URI of the bundle, for example releases/<release_id>")
    parser.add_argument("--strict", action="store_true", help="decode every image, not only the first of each file")
    arguments = parser.parse_args(argv)
    try:
        found = verify_bundle(arguments.path, strict=arguments.strict)
    except BundleError as error:
        print(error, file=sys.stderr)
        return 1
    report = found.report
    print(f"{arguments.path} verifies")
    print(
        f"  release      {found.release_id}" + (f", from {report.parent_release_id}" * bool(report.parent_release_id))
    )
    print(f"  promise      {report.statement}")
    print(f"  epsilon      {report.epsilon:.6f}, recomputed from {len(report.events)} events, delta {report.delta!r}")
    print(f"  relation     {report.neighboring_relation}; epsilon under REPLACE_ONE {report.epsilon_replace_one:.6f}")
    print(f"  unit         {report.unit_of_privacy}")
    print(f"  contents     {found.num_samples} images, {found.num_files} files, every SHA-256 as listed")
    print(f"  manifest     {found.manifest_sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
