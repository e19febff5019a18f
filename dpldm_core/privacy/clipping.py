"""Per-unit clipping by book-keeping (Bu et al. 2023): the clipped gradient sum without any per-unit gradient.

Forward hooks keep each layer's input a; one backward pass gives b, the gradient of the summed loss with respect to each
layer's output, and forms no weight gradient. From a and b, layers.py finds every unit's gradient norm |g_i| and the sum
of c_i g_i with c_i = min(1, C / |g_i|). The norms are upper bounds, so a clipped unit never exceeds C by more than the
slack that noise.py charges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpldm_core.errors import UnsupportedLayerError
from dpldm_core.privacy.layers import PRODUCT_ERROR, Contribution, check_layer, contributions

LossFn = Callable[[], Tensor]
_PRECISION = {"float32": ("highest", "ieee", "ieee"), "bfloat16": ("medium", "bf16", "tf32")}  # torch's names


@contextmanager
def _product_precision(name: str) -> Iterator[None]:
    """Products of the given precision inside, whatever the process uses outside; cuDNN's own choice would be TF32."""
    convolutions = torch.backends.mkldnn.conv, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    matmul, *wanted = _PRECISION[name]
    matmul_before, before = torch.get_float32_matmul_precision(), [found.fp32_precision for found in convolutions]
    torch.set_float32_matmul_precision(matmul)
    for found, precision in zip(convolutions, wanted, strict=True):
        found.fp32_precision = precision
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul_before)
        for found, precision in zip(convolutions, before, strict=True):
            found.fp32_precision = precision


class BookKeeping:
    """Clipped gradient sums of one model.

    Args:
        model: Every parameter with ``requires_grad`` must belong to a layer of layers.py, each called once per forward
            pass; rows of one unit are consecutive in the first axis.
        max_norm: L2 clip norm C over all parameters of the model together.
        matmul_precision: Of the products in forward pass, gradient and sum. Norms are taken in float32 and widened by
            the rounding of the sum's products, so the clip holds for what is summed.

    Raises:
        UnsupportedLayerError: A layer whose per-unit gradient cannot be bounded, or a shared parameter.
    """

    def __init__(self, model: nn.Module, *, max_norm: float, matmul_precision: str = "float32") -> None:
        self.max_norm = max_norm
        self._precision, self._product_error = matmul_precision, PRODUCT_ERROR[matmul_precision]
        self.parameters: list[nn.Parameter] = []
        self._layers: dict[str, nn.Module] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                check_layer(name, layer)
            own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
            if not own:
                continue
            check_layer(name, layer)
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

    def _contributions(self, loss_fn: LossFn, units: int) -> list[Contribution]:
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
        found = []
        for (name, a, _), b in zip(self._calls, gradients, strict=True):
            found += contributions(self._layers[name], a, b, units)
        self._calls.clear()
        return found

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
        units = mask.shape[0]
        with _product_precision(self._precision):
            parts = self._contributions(loss_fn, units)
        with _product_precision("float32"):
            norms = torch.stack([part.squared_norms(self._product_error) for part in parts]).sum(0).sqrt()
        usable = mask & torch.isfinite(norms)
        factors = torch.where(usable, (self.max_norm / norms).clamp(max=1.0), 0.0)
        if not bool(torch.isfinite(norms).all()):
            for part in parts:
                part.drop(usable)
        with _product_precision(self._precision):
            sums = {id(parameter): total for part in parts for parameter, total in part.weighted_sums(factors)}
        return [sums[id(p)] for p in self.parameters]
