"""Per-unit clipping by book-keeping (Bu et al. 2023): the clipped gradient sum without any per-unit gradient.

Forward hooks keep each layer's input a; one backward pass gives b, the gradient of the summed loss with respect to each
layer's output, and forms no weight gradient. For a linear layer and a unit with M rows (records, noise draws, tokens),
the gradient of the unit is sum_m b_m a_m^T, so its squared norm is sum_{m,m'} (a_m.a_m')(b_m.b_m'), and the clipped sum
over units is (c b)^T a with c_i = min(1, C / |g_i|).

Float32 could understate a norm when a unit's rows cancel; the norms here carry an upper bound of that error
(``ROUNDING``), so a clipped unit never exceeds C by more than the slack that noise.py charges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpldm_core.errors import UnsupportedLayerError

ROUNDING = 1e-5  # relative to (sum_m |a_m| |b_m|)^2, above float32's error for up to 10^4 terms
LossFn = Callable[[], Tensor]


@dataclass
class _Rows:
    """What one layer contributes: a unit's gradient is sum_m b_m (outer) a_m, plus sum_m b_m for the bias."""

    a: Tensor  # [units, M, in]
    b: Tensor  # [units, M, out]
    weight: nn.Parameter
    bias: nn.Parameter | None


def _linear_rows(layer: nn.Linear, a: Tensor, b: Tensor, units: int) -> tuple[Tensor, Tensor]:
    return a.reshape(units, -1, layer.in_features), b.reshape(units, -1, layer.out_features)


def _conv_rows(layer: nn.Conv2d, a: Tensor, b: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """Every output pixel is one row: its receptive field (strided view, no F.unfold) and its output gradient."""
    assert not isinstance(layer.padding, str)  # refused by _check_layer
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    padded = F.pad(a, (pw, pw, ph, ph))
    patches = padded.unfold(2, kh, sh).unfold(3, kw, sw)  # [n, c, oh, ow, kh, kw]
    rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(units, -1, layer.in_channels * kh * kw)
    return rows, b.permute(0, 2, 3, 1).reshape(units, -1, layer.out_channels)


def _embedding_rows(layer: nn.Embedding, a: Tensor, b: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """The weight is [num, dim], the transpose of a Linear's: the one-hot index plays b, the output gradient plays a."""
    one_hot = F.one_hot(a.reshape(units, -1), layer.num_embeddings).to(b.dtype)
    return b.reshape(units, -1, layer.embedding_dim), one_hot


def _check_layer(name: str, layer: nn.Module) -> None:
    """Refuse layers, and settings of known layers, whose per-unit gradient is not the one computed here."""
    reason = ""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        reason = "it mixes records; use GroupNorm or LayerNorm without parameters"
    elif isinstance(layer, nn.Conv2d):
        if (
            layer.groups != 1
            or layer.dilation != (1, 1)
            or layer.padding_mode != "zeros"
            or isinstance(layer.padding, str)
        ):
            reason = "only groups=1, dilation=1 and numeric zero padding are bounded here"
    elif isinstance(layer, nn.Embedding):
        if layer.max_norm is not None or layer.scale_grad_by_freq or layer.padding_idx is not None:
            reason = "max_norm, padding_idx and scale_grad_by_freq change gradients across records"
    elif not isinstance(layer, nn.Linear):
        reason = "use Linear, Conv2d or Embedding for trainable weights"
    if reason:
        raise UnsupportedLayerError(f"{name or 'the model'} is {type(layer).__name__}: {reason}")


class BookKeeping:
    """Clipped gradient sums of one model.

    Args:
        model: Every parameter with ``requires_grad`` must belong to a Linear, Conv2d or Embedding, each called once per
            forward pass; rows of one unit are consecutive in the first axis.
        max_norm: L2 clip norm C over all parameters of the model together.

    Raises:
        UnsupportedLayerError: A layer whose per-unit gradient cannot be bounded, or a shared parameter.
    """

    def __init__(self, model: nn.Module, *, max_norm: float) -> None:
        self.max_norm = max_norm
        self.parameters: list[nn.Parameter] = []
        self._layers: dict[str, nn.Module] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                _check_layer(name, layer)
            own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
            if not own:
                continue
            _check_layer(name, layer)
            if any(p is q for p in own for q in self.parameters):
                raise UnsupportedLayerError(f"{name} shares a parameter with another layer: the clip would miss a part")
            self._layers[name] = layer
            self.parameters += own
        if not self.parameters:
            raise UnsupportedLayerError("the model has no trainable parameter")
        self._calls: list[tuple[str, Tensor, Tensor]] = []

    @property
    def num_parameters(self) -> int:
        """Coordinates of the clipped sum."""
        return sum(p.numel() for p in self.parameters)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        self._calls.clear()

        def hook_for(name: str) -> Callable[..., None]:
            def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                if any(name == seen for seen, _, _ in self._calls):
                    raise UnsupportedLayerError(f"{name} runs twice in one forward pass: the clip would miss a part")
                self._calls.append((name, args[0].detach(), output))

            return hook

        handles = [layer.register_forward_hook(hook_for(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _rows(self, loss_fn: LossFn, units: int) -> list[_Rows]:
        with self._recording(), torch.enable_grad():
            loss = loss_fn()
        if loss.shape != (units,):
            raise UnsupportedLayerError(
                f"the loss has shape {tuple(loss.shape)}; one loss per unit, shape ({units},), is needed: another "
                "shape broadcasts and mixes records"
            )
        if missing := set(self._layers) - {name for name, _, _ in self._calls}:
            raise UnsupportedLayerError(f"{sorted(missing)} did not run in the forward pass: its noise would be missed")
        gradients = torch.autograd.grad(loss, [output for _, _, output in self._calls], torch.ones_like(loss))
        rows = []
        for (name, a, _), b in zip(self._calls, gradients, strict=True):
            layer = self._layers[name]
            if isinstance(layer, nn.Linear):
                row_a, row_b = _linear_rows(layer, a, b, units)
            elif isinstance(layer, nn.Conv2d):
                row_a, row_b = _conv_rows(layer, a, b, units)
            else:
                row_a, row_b = _embedding_rows(layer, a, b, units)  # type: ignore[arg-type]
            bias = getattr(layer, "bias", None)
            rows.append(_Rows(row_a, row_b, layer.weight, bias if bias is not None and bias.requires_grad else None))  # type: ignore[arg-type]
        self._calls.clear()
        return rows

    @torch.no_grad()
    def clipped_sum(self, loss_fn: LossFn, mask: Tensor) -> list[Tensor]:
        """Sum over units of their clipped gradients, one tensor per parameter.

        Args:
            loss_fn: Runs the model on the batch and returns one loss per unit, shape [units].
            mask: bool [units]; padding rows are False and contribute nothing. So do units whose gradient is not finite.

        Returns:
            Tensors in the order of ``parameters``, each with its parameter's shape.

        Raises:
            UnsupportedLayerError: The forward pass does something that cannot be bounded.
        """
        if torch.get_float32_matmul_precision() != "highest":
            raise UnsupportedLayerError(
                "float32 products of low precision move the sensitivity further than is charged; call "
                "torch.set_float32_matmul_precision('highest')"
            )
        units = mask.shape[0]
        rows = self._rows(loss_fn, units)
        norms = torch.stack([_squared_norms(r) for r in rows]).sum(0).sqrt()
        usable = mask & torch.isfinite(norms)
        factors = torch.where(usable, (self.max_norm / norms).clamp(max=1.0), torch.zeros_like(norms))
        if not bool(torch.isfinite(norms).all()):  # 0 * NaN is NaN: remove the rows themselves
            for r in rows:
                r.a = torch.where(usable[:, None, None], r.a, torch.zeros_like(r.a))
                r.b = torch.where(usable[:, None, None], r.b, torch.zeros_like(r.b))
        sums: dict[int, Tensor] = {}
        for r in rows:
            scaled = (r.b * factors[:, None, None]).flatten(0, 1)
            sums[id(r.weight)] = scaled.T @ r.a.flatten(0, 1)
            if r.bias is not None:
                sums[id(r.bias)] = scaled.sum(0)
        return [sums[id(p)].reshape(p.shape) for p in self.parameters]


def _squared_norms(rows: _Rows) -> Tensor:
    """Upper bound on the squared gradient norm of each unit, [units]: by Gram matrices or directly, the cheaper."""
    a, b, bias = rows.a, rows.b, float(rows.bias is not None)  # the bias is a weight whose input is always one
    a_squared, b_squared = a.square().sum(2) + bias, b.square().sum(2)
    if a.shape[1] == 1:
        return (a_squared * b_squared)[:, 0] * (1 + ROUNDING)
    margin = ROUNDING * (a_squared * b_squared).sqrt().sum(1).square()
    if a.shape[1] * (a.shape[2] + b.shape[2]) <= a.shape[2] * b.shape[2]:
        squared = ((a @ a.transpose(1, 2) + bias) * (b @ b.transpose(1, 2))).sum((1, 2))
    else:
        squared = (b.transpose(1, 2) @ a).square().sum((1, 2)) + bias * b.sum(1).square().sum(1)
    return squared.clamp(min=0) + margin
