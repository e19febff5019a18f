"""Opacus as second opinion and as another backend of the clip. The only file that imports opacus."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpldm_core.errors import UnsupportedLayerError

if TYPE_CHECKING:
    from torch import Tensor, nn


def prv_epsilon(steps: Sequence[tuple[float, float, int]], delta: float) -> tuple[float, float]:
    """Epsilon by Opacus' PRV accountant (Gopi et al. 2021), under ADD_OR_REMOVE_ONE.

    Args:
        steps: (noise_multiplier, sample_rate, num_steps) of each mechanism.
        delta: Target delta.

    Returns:
        (lower, upper): bounds on epsilon, twice the error of 0.05 apart.
    """
    from opacus.accountants import PRVAccountant, RDPAccountant

    # RDP says how far PRV's grid must reach: whole orders take it further at most, and fractional ones take a second
    RDPAccountant.DEFAULT_ALPHAS = list(range(2, 64))
    eps_error = 0.05
    accountant = PRVAccountant()
    accountant.history = list(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus takes log(0) in branches that np.where then drops
        upper = float(accountant.get_epsilon(delta=delta, eps_error=eps_error, delta_error=delta / 1000))
    return upper - 2 * eps_error, upper


class OpacusClipping:
    """Clipped gradient sums from Opacus' per-sample gradients: the interface of :class:`BookKeeping`, slower.

    Args:
        model: Gets Opacus' hooks; rows of one unit are consecutive in the first axis of every layer.
        max_norm: L2 clip norm C over all parameters of the model together.
        matmul_precision: Only ``float32``.

    Raises:
        UnsupportedLayerError: Another precision.
    """

    def __init__(self, model: nn.Module, *, max_norm: float, matmul_precision: str = "float32") -> None:
        from opacus.grad_sample import GradSampleModule

        if matmul_precision != "float32":
            raise UnsupportedLayerError(
                f"matmul_precision={matmul_precision!r} goes with clip_backend='book_keeping' only; use 'float32'"
            )
        self.max_norm = max_norm
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._hooks = GradSampleModule(model, loss_reduction="sum", strict=True)

    @property
    def num_parameters(self) -> int:
        """Coordinates of the clipped sum."""
        return sum(p.numel() for p in self.parameters)

    def clipped_sum(self, loss_fn: Callable[[], Tensor], mask: Tensor) -> list[Tensor]:
        """Sum over units of their clipped gradients; see :meth:`BookKeeping.clipped_sum`."""
        import torch

        units = len(mask)
        for module in self._hooks.modules():  # a forward pass that was refused leaves its inputs behind
            if hasattr(module, "activations"):
                module.activations.clear()
        for parameter in self.parameters:
            parameter._forward_counter = 0  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # full backward hooks on inputs that need no gradient
            losses = loss_fn()
            if losses.shape != (units,):
                raise UnsupportedLayerError(f"the loss has shape {tuple(losses.shape)}: one per unit, [{units}]")
            losses.sum().backward()
        # a layer's first axis holds units, or the rows of all units: the rows of a unit belong together
        samples = [p.grad_sample.unflatten(0, (units, -1)).sum(1).flatten(1) for p in self.parameters]  # type: ignore[attr-defined]
        for parameter in self.parameters:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        norms = torch.stack([s.square().sum(1) for s in samples]).sum(0).sqrt() * (1 + 1e-5)
        usable = mask & torch.isfinite(norms)
        factors = torch.where(usable, (self.max_norm / norms).clamp(max=1.0), 0.0)
        kept = [torch.where(usable[:, None], s, 0.0) for s in samples]
        return [(factors @ s).reshape(p.shape) for s, p in zip(kept, self.parameters, strict=True)]
