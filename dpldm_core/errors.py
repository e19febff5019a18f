"""Every error a user can cause. A message names the field, the value and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DpldmError(Exception):
    """Base class: anything else that reaches the user is a bug."""


class ConfigError(DpldmError):
    """A parameter, preset or config key is unknown or out of range."""


class DataError(DpldmError):
    """The private data cannot be used as given. Shown to the steward alone."""


class BudgetError(DpldmError):
    """The privacy budget of an account does not cover what was asked."""


class LedgerError(DpldmError):
    """The ledger is unreachable, inconsistent, or used out of order."""


class UnsupportedLayerError(DpldmError):
    """A model holds a part whose per-example gradient cannot be bounded."""


class AccountingError(DpldmError):
    """Two accountants disagree, or an event is unknown to them."""


class AuditError(DpldmError):
    """A mechanism does on neighbouring data sets what it should not: its claim is wrong."""


class BundleError(DpldmError):
    """A release bundle cannot be written, or does not verify."""


class TrackingError(DpldmError):
    """The MLflow store cannot be reached."""


class CheckpointError(DpldmError):
    """A saved training state belongs to another plan, or is damaged."""


def unknown_name(field: str, value: object, known: Iterable[str]) -> ConfigError:
    """A ConfigError for a name that is not among the known ones, with the nearest valid one.

    Args:
        field: Name of the parameter, as the user typed it.
        value: What was given.
        known: The valid names.

    Returns:
        The error, not raised.

    >>> str(unknown_name("preset", "quik", ["quick", "cpu"]))
    "preset='quik' is unknown; did you mean 'quick'? Known: cpu, quick"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    listed = f" Known: {', '.join(names)}" if len(names) <= 12 or not near else ""
    return ConfigError(f"{field}={str(value)!r} is unknown{hint}{listed}")
