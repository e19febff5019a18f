"""The DP-SGD training loop that all stages share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dpldm_core.config import PerformanceConfig
from dpldm_core.models.ema import Ema
from dpldm_core.privacy.engine import Batch, BatchLoss, DpSgdEngine, process_rank
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey
from dpldm_core.training.state import TrainState
from dpldm_core.training.units import Units

Draw = Callable[[Batch, np.random.Generator], Batch]
OnStep = Callable[[int, int], None]
TrainLoop = Callable[..., nn.Module]  # train_private, or the audited one (audited.py)


def train_private(
    model: nn.Module,
    units: Units,
    plan: DpSgdPlan,
    key: SecretKey,
    *,
    loss: BatchLoss,
    draw: Draw,
    num_classes: int,
    learning_rate: float,
    momentum: float | None = None,
    ema_decay: float,
    performance: PerformanceConfig,
    binding: str,
    checkpoint: Path | None = None,
    on_checkpoint: Callable[[], None] | None = None,
    on_step: OnStep | None = None,
) -> nn.Module:
    """Train with DP-SGD for exactly the plan's steps and return the averaged model.

    Nothing computed from private data is logged or reported: no loss, no gradient norm, no batch size.

    Args:
        model: Trained in place.
        units: The private data.
        plan: q, sigma, T and C; also what is charged.
        key: Secret key of this stage, from the ledger.
        loss: One loss per unit.
        draw: Adds a step's random draws (diffusion times and noise) to a batch. They are secret, see rng.py.
        num_classes: Public number of classes.
        learning_rate: Gradients arrive with noise of unit variance.
        momentum: Of SGD; None takes Adam. Adam evens out the steps of all weights, which few weights on good features
            do not need (docs/research.md).
        ema_decay: Of the average over steps.
        performance: What cannot change the guarantee.
        binding: Digest of plan and data; a checkpoint with another one is refused.
        checkpoint: Folder to resume from and save to.
        on_checkpoint: Called after each save.
        on_step: Called with (steps done, num_steps): public.

    Returns:
        The averaged model, in eval mode.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(trainable, lr=learning_rate, betas=(0.9, 0.99))
        if momentum is None
        else torch.optim.SGD(trainable, lr=learning_rate, momentum=momentum)
    )
    state = TrainState(0, model, Ema(model, ema_decay), optimizer, binding)
    if checkpoint is not None:
        state.restore(checkpoint)
    # Draws of different rows must be independent: two processes with the same ones would tie the rows of one to those
    # of the other, and removing a unit, which shifts all rows, would change more than that unit's part.
    draws_key = key.derive("draws", *([str(rank)] if (rank := process_rank()) else []))
    made_up = units.probe(num_classes, generator=torch.Generator().manual_seed(0))  # nothing private
    probe = draw(made_up, np.random.default_rng(0))
    engine = DpSgdEngine(
        model,
        plan,
        key,
        loss=loss,
        probe=probe,
        physical_batch_size=performance.physical_batch_size,
        clip_backend=performance.clip_backend,
        matmul_precision=performance.matmul_precision,
    )
    model.train()
    while state.step < plan.num_steps:
        generator = draws_key.generator(state.step)
        engine.noisy_step(state.step, units.num_units, lambda indices, g=generator: draw(units.fetch(indices), g))  # type: ignore[misc]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _warmup_and_decay(state.step, plan.num_steps)
        optimizer.step()
        state.ema.update(model, state.step)
        state.step += 1
        if checkpoint is not None and state.step % performance.checkpoint_every == 0 and state.step < plan.num_steps:
            state.save(checkpoint)
            if on_checkpoint:
                on_checkpoint()
        if on_step:
            on_step(state.step, plan.num_steps)
    return state.ema.model


def _warmup_and_decay(step: int, num_steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then linear decay to a tenth."""
    progress = (step + 1) / num_steps
    return min(1.0, progress / 0.05) * (1.0 - 0.9 * progress)
