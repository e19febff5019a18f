"""Batches of one size: kernels are chosen by it, and another one could round a record otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_equal_batches(function: Callable[[Tensor], Tensor], values: Tensor, batch_size: int) -> Tensor:
    """What a function makes of each record alone, whatever the number of the others.

    Args:
        function: [batch_size, ...] to [batch_size, ...], record by record.
        values: [n, ...]; the last batch is filled up with zeros.
        batch_size: Records at a time.

    Returns:
        [n, ...].
    """
    results = []
    for chunk in values.split(batch_size):
        padded = torch.cat([chunk, chunk.new_zeros(batch_size - len(chunk), *chunk.shape[1:])])
        results.append(function(padded)[: len(chunk)])
    return torch.cat(results)
