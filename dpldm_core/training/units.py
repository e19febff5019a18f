"""Private records arranged by unit of privacy, on their way into a mechanism."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpldm_core.privacy.engine import Batch


@dataclass(frozen=True)
class Units:
    """Records and the table that says which of them belong to which unit.

    Args:
        values: Private, float32 [n, ...]: images or latents.
        class_labels: Private, int64 [n].
        table: Private, int64 [units, M]: record indices of each unit, -1 where it has fewer.
    """

    values: Tensor
    class_labels: Tensor
    table: Tensor

    @property
    def num_units(self) -> int:
        """Private number of units."""
        return len(self.table)

    def fetch(self, indices: Tensor) -> Batch:
        """The units with the given indices.

        Returns:
            ``values`` [B, M, ...], ``class_labels`` [B, M], ``weights`` [B, M]: 1 / (unit's records), 0 on padding.
        """
        records = self.table[indices.to(self.table.device)]
        present = (records >= 0).float()
        safe = records.clamp(min=0)
        values = self.values[safe]
        values[records < 0] = 0.0  # else record 0, not finite, would take every unit with padding down with it
        return {
            "values": values,
            "class_labels": self.class_labels[safe],
            "weights": present / present.sum(1, keepdim=True).clamp(min=1.0),
        }

    def with_copies(self, copies: Tensor) -> Units:
        """The same units with copies of each record beside it: a unit's records weigh less, and it no more.

        Args:
            copies: Private, float32 [n * num_copies, ...]: one copy of every record, then the next.
        """
        rounds = range(1 + len(copies) // len(self.values))
        shifted = [torch.where(self.table >= 0, self.table + turn * len(self.values), -1) for turn in rounds]
        labels = self.class_labels.repeat(len(rounds))
        return Units(torch.cat([self.values, copies]), labels, torch.cat(shifted, dim=1))

    def record_weights(self) -> Tensor:
        """1 / (records of its unit) for each record in the table, 0 for records left out of it, [n]."""
        present = self.table >= 0
        per_record = (1.0 / present.sum(1, keepdim=True).clamp(min=1)).expand_as(self.table)
        weights = torch.zeros(len(self.values))
        weights[self.table[present]] = per_record[present].float()
        return weights

    def probe(self, num_classes: int, *, generator: torch.Generator) -> Batch:
        """Four made-up units with the shapes of the real ones, holding no private value."""
        shape = (4, self.table.shape[1])
        weights = torch.ones(shape)
        weights[0, 1:] = 0.0
        return {
            "values": torch.randn(*shape, *self.values.shape[1:], generator=generator)
            .clamp(-1, 1)
            .to(self.values.device),
            "class_labels": torch.randint(num_classes, shape, generator=generator).to(self.values.device),
            "weights": (weights / weights.sum(1, keepdim=True)).to(self.values.device),
        }

    def to(self, device: str) -> Units:
        """The same units on a device."""
        return Units(self.values.to(device), self.class_labels.to(device), self.table.to(device))
