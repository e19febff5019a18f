"""The release bundle: one folder that holds everything public and nothing else.

It appears under its name complete or not at all. manifest.json lists the SHA-256 of every other file and of itself.
What may never change within a format version: file names, the canonical form of JSON, the meaning of the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fsspec

from dpldm_core import storage
from dpldm_core.errors import BundleError
from dpldm_core.privacy.report import PrivacyReport
from dpldm_core.storage import is_remote, local_path

FORMAT_VERSION = 1
MANIFEST, CONFIG, REPORT = "manifest.json", "config.json", "privacy_report.json"
CARD, SAMPLES, METRICS = "README.md", "samples.png", "metrics.json"
_WAY_OUT = "Choose another out, or move that one away; a release is never overwritten"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_target(out: str | Path, release_id: str) -> None:
    """Refuse a place where the bundle could not be written. Called before anything is spent.

    Args:
        out: Folder of releases, or a URI that fsspec knows (``s3://...``).
        release_id: Name of the release.

    Raises:
        BundleError: The release is there already, or the place cannot be written.
    """
    if not _NAME.fullmatch(release_id):
        raise BundleError(f"release_id={release_id!r} is not a plain name of letters, digits, '.', '_' and '-'")
    if is_remote(out):
        try:
            filesystem, root = fsspec.core.url_to_fs(f"{out}/{release_id}")
            taken = filesystem.exists(f"{root}/{MANIFEST}")
        except Exception as error:  # every store fails in its own way
            raise BundleError(f"out={str(out)!r} cannot be reached: {error}") from error
        if taken:
            raise BundleError(f"{out}/{release_id} already holds a release. {_WAY_OUT}")
        return
    target = local_path(out) / release_id
    if os.path.lexists(target):
        raise BundleError(f"{target} already exists. {_WAY_OUT}")
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BundleError(f"out={str(out)!r} cannot be written: {parent} is not a folder you may write to")


def write_bundle(
    out: str | Path,
    release_id: str,
    *,
    synthetic: Sequence[Path],
    model_files: Mapping[str, Path],
    config: Mapping[str, Any],
    report: PrivacyReport,
    card: str,
    samples_png: bytes,
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """Write the bundle in one step that cannot be seen half done.

    A local bundle is filled in a hidden folder beside its place, synced, and renamed. A remote one is uploaded with
    manifest.json last: without a manifest it is no bundle.

    Args:
        out: Folder of releases, or a URI that fsspec knows.
        release_id: Name of the release.
        synthetic: Parquet files of :func:`write_synthetic_parquet`, in order.
        model_files: Name to safetensors file of each public model.
        config: The resolved configuration, as plain JSON.
        report: The privacy report.
        card: README.md.
        samples_png: samples.png.
        metrics: metrics.json, of a release that paid for one.

    Returns:
        Path or URI of the bundle.

    Raises:
        BundleError: It exists already, cannot be written, or the parts belong to different releases.
    """
    if report.release_id != release_id:
        raise BundleError(f"the report is of release {report.release_id!r}, not of {release_id!r}")
    if bad := [name for name in model_files if not _NAME.fullmatch(name)]:
        raise BundleError(f"model names {bad} are not plain names of letters, digits, '.', '_' and '-'")
    files: dict[str, bytes | Path] = {part_name(i, len(synthetic)): path for i, path in enumerate(synthetic)}
    files |= {f"model/{name}.safetensors": path for name, path in model_files.items()}
    files |= {CONFIG: canonical_json(dict(config)), REPORT: canonical_json(report.model_dump(mode="json"))}
    files |= {CARD: card.encode(), SAMPLES: samples_png}
    files |= {METRICS: canonical_json(dict(metrics))} if metrics is not None else {}
    try:
        if is_remote(out):
            return _upload(f"{out}/{release_id}", release_id, files)
        return _rename_into_place(local_path(out), release_id, files)
    except OSError as error:
        raise BundleError(f"the bundle {release_id} cannot be written under {out}: {error}") from error


def canonical_json(value: Any) -> bytes:
    """The one byte string that stands for a JSON value: sorted keys, two spaces, UTF-8, a final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def seal(manifest: Mapping[str, Any]) -> bytes:
    """manifest.json: canonical, with ``manifest_sha256`` over the canonical form of everything else in it."""
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return canonical_json(body | {"manifest_sha256": hashlib.sha256(canonical_json(body)).hexdigest()})


def part_name(index: int, count: int) -> str:
    """Name of one parquet file of several.

    >>> part_name(0, 2)
    'synthetic/part-00000-of-00002.parquet'
    """
    return f"synthetic/part-{index:05d}-of-{count:05d}.parquet"


def digest(path: Path) -> dict[str, Any]:
    """SHA-256 and size in bytes of a file, as the manifest lists them."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


@contextmanager
def local_copy(bundle: str | Path) -> Iterator[Path]:
    """The bundle as a local folder; a remote one is fetched into a temporary folder.

    Raises:
        BundleError: It cannot be fetched.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(storage.local_copy(bundle))
        except OSError as error:
            raise BundleError(f"{bundle} cannot be fetched: {error}") from error
        yield folder


def _check_same(manifest: bytes, present: bytes, out: str | Path) -> None:
    """A retry that finds its own bundle is content; anything else is never overwritten."""
    if manifest != present:
        raise BundleError(f"another release of that name already exists under {out}. {_WAY_OUT}")


def _fill(folder: Path, release_id: str, files: Mapping[str, bytes | Path]) -> bytes:
    """Write all files, the manifest last, each synced to disk; return the manifest."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)
        _sync(target)
    listed = {name: digest(folder / name) for name in files}
    manifest = seal({"format_version": FORMAT_VERSION, "release_id": release_id, "files": listed})
    (folder / MANIFEST).write_bytes(manifest)
    for path in (folder / MANIFEST, *{(folder / name).parent for name in files}):
        _sync(path)
    return manifest


def _rename_into_place(out: Path, release_id: str, files: Mapping[str, bytes | Path]) -> str:
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob(f".{release_id}.tmp-*"):
        shutil.rmtree(stale)
    staging = out / f".{release_id}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir()
        manifest = _fill(staging, release_id, files)
        if os.path.lexists(out / release_id):
            _check_same(
                manifest, (out / release_id / MANIFEST).read_bytes() if (out / release_id).is_dir() else b"", out
            )
        else:
            os.rename(staging, out / release_id)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _sync(out)
    return str(out / release_id)


def _upload(uri: str, release_id: str, files: Mapping[str, bytes | Path]) -> str:
    filesystem, root = fsspec.core.url_to_fs(uri)
    with tempfile.TemporaryDirectory() as folder:
        manifest = _fill(Path(folder), release_id, files)
        if filesystem.exists(f"{root}/{MANIFEST}"):
            _check_same(manifest, filesystem.cat_file(f"{root}/{MANIFEST}"), uri)
            return uri
        for name in (*files, MANIFEST):
            filesystem.put_file(str(Path(folder, name)), f"{root}/{name}")
    return uri


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
