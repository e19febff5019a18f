"""Which code runs."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

_CORE = Path(__file__).resolve().parent


@cache
def code_digest() -> str:
    """SHA-256 over the library's sources, which every cache key, every ledger binding and every report carry."""
    digest = hashlib.sha256()
    for path in sorted(_CORE.rglob("*.py")):
        digest.update(path.relative_to(_CORE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def software() -> dict[str, str]:
    """What makes a release, for its report: digest of the library's sources, version of torch."""
    return {"code_digest": code_digest(), "torch": version("torch")}
