"""What a failure closes in the ledger and in MLflow: the release that failed, or all releases of its execution."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from tasks._resources import execution_id, open_ledger

if TYPE_CHECKING:
    from dpldm_core.privacy.books import Entry


def promise_of(*asked: str | float) -> str:
    """Digest of what a release was asked for: tells those of one execution apart, and attempts at one together."""
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


def close_release(promise: str, epsilon: float, delta: float) -> None:
    """Close one release, not other points of a sweep, which run beside it."""
    _close(lambda entry: (entry.epsilon, entry.delta) == (epsilon, delta), promise)


def close_execution() -> None:
    """Close all releases of this execution."""
    _close(lambda entry: True)


def _close(failed: Callable[[Entry], bool], promise: str = "") -> None:
    from tasks import _tracking

    ledger = open_ledger()
    for entry in filter(failed, ledger.find(execution_id=execution_id())):
        ledger.close_failed(entry.entry_id, reason="the pipeline failed")
    for run_id in _tracking.find_open_runs(execution_id(), promise=promise):
        _tracking.close_run(run_id, failed=True)
