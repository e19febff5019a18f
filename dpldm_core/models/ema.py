"""Exponential moving average of weights, updated once per logical step."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """Averaged copy of a model's trainable weights.

    The decay is warmed up as min(decay, (1 + t) / (10 + t)), so that few steps already average well.

    Args:
        model: The model to follow.
        decay: Weight of the past, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the model after logical step ``step`` (from 0)."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for average, current in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(current, weight)
