"""The held-out split of a source that has no test set of its own."""

from __future__ import annotations

import hashlib
import hmac
from typing import Literal

import numpy as np

from dpldm_core.data.schema import Records
from dpldm_core.errors import DataError

HELDOUT_SHARE = 1 / 6  # as in MNIST
SplitBy = Literal["content", "position"]


def split_records(records: Records, *, key: bytes, by: SplitBy) -> tuple[Records, Records]:
    """Training and held-out records by a keyed hash, so that no unit's place depends on another unit.

    Args:
        records: Private records.
        key: Secret or public bytes; equal keys give equal splits.
        by: What is hashed when records are their own units. ``content``: adding or removing a record moves no other
            (ADD_OR_REMOVE_ONE). ``position``: replacing a record keeps the sizes (REPLACE_ONE). A person's
            content is her name, her position the order of first appearance.

    Returns:
        (train, heldout).

    Raises:
        DataError: One side would be empty.
    """
    tokens = [token.encode() for token in _tokens(records, by)]
    draws = np.array(
        [int.from_bytes(hmac.new(key, token, hashlib.sha256).digest()[:8], "big") for token in tokens], np.uint64
    )
    heldout = draws < np.uint64(int(HELDOUT_SHARE * 2.0**64))
    if not heldout.any() or heldout.all():
        raise DataError(
            f"{len(records.images)} images are too few to hold some out for evaluation; give more, or a test set"
        )
    return records.take(np.flatnonzero(~heldout)), records.take(np.flatnonzero(heldout))


def _tokens(records: Records, by: SplitBy) -> list[str]:
    """What is hashed for each record; equal for all records of a person."""
    if records.groups is not None:
        names = records.groups.astype(str).tolist()
        if by == "content":
            return names
        order = {name: str(i) for i, name in enumerate(dict.fromkeys(names))}
        return [order[name] for name in names]
    if by == "position":
        return [str(i) for i in range(len(records.images))]
    pairs = zip(records.images, records.labels, strict=True)
    return [f"{hashlib.sha256(image.tobytes()).hexdigest()} {label}" for image, label in pairs]
