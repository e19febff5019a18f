"""DP-SGD: one step = Poisson batch, clipped sum, noise. Loop and accountant read the same plan.

The gradient handed to the optimizer is (clipped sum + noise) / (sigma C): its noise has unit variance. Nothing divides
by a batch size: the real one is private, and the expected one would need the private number of records.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpldm_core.errors import UnsupportedLayerError
from dpldm_core.privacy.clipping import BookKeeping
from dpldm_core.privacy.opacus_backend import OpacusClipping
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey

Batch = dict[str, Tensor]
BatchLoss = Callable[[nn.Module, Batch], Tensor]


class DpSgdEngine:
    """Turns units into noisy gradients, step by step.

    Args:
        model: The network to train; see :class:`BookKeeping` for what it may hold.
        plan: q, sigma, T and C.
        key: Secret key of this run. Batches and noise of step t are functions of (key, t): a resumed run repeats them.
        loss: ``loss(model, batch) -> [units]``, one loss per unit, without any mixing of units.
        probe: A batch of made-up units of the right shapes, on which the clip is checked before private data is read.
        physical_batch_size: Units per forward pass; cannot change the result beyond float rounding.
        clip_backend: ``book_keeping``, or ``opacus`` (slower; same sums).
        matmul_precision: Of matrix products; ``bfloat16`` clips as much tighter as its rounding needs.

    Several processes (torch.distributed) share the units of each batch; every one of them holds the key, so all add the
    same noise, once, to the sum over all processes, and stay in step.

    Raises:
        UnsupportedLayerError: The model or the loss does something whose sensitivity is not C.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: DpSgdPlan,
        key: SecretKey,
        *,
        loss: BatchLoss,
        probe: Batch,
        physical_batch_size: int,
        clip_backend: str = "book_keeping",
        matmul_precision: str = "float32",
    ) -> None:
        self.plan = plan
        self._model = model
        self._loss = loss
        self._physical = physical_batch_size
        self._sampling_key, self._noise = key.derive("poisson"), plan.noise(key.derive("noise"))
        check_bounded(model, loss, probe)
        self._clip: BookKeeping | OpacusClipping
        if clip_backend == "opacus":
            self._clip = OpacusClipping(model, max_norm=plan.max_grad_norm, matmul_precision=matmul_precision)
        else:
            self._clip = BookKeeping(model, max_norm=plan.max_grad_norm, matmul_precision=matmul_precision)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dp-noise")
        self._last_step = -1
        self._ahead: tuple[int, Future[np.ndarray]] | None = None

    def batch_indices(self, step: int, num_units: int) -> np.ndarray:
        """Unit indices of one step, int64 [cap], -1 where padded. Private."""
        return self.plan.sample_batch(self._sampling_key, step, num_units)

    def noisy_step(self, step: int, num_units: int, fetch: Callable[[Tensor], Batch]) -> None:
        """Put the noisy gradient of one step into ``.grad`` of every trainable parameter.

        Args:
            step: Logical step, 0 to num_steps - 1.
            num_units: Units in the private data.
            fetch: Batch of the units with the given indices; padded rows are masked here and may hold anything.

        Raises:
            ValueError: A step beyond the plan, or not after the last one.
        """
        if not 0 <= step < self.plan.num_steps:
            raise ValueError(f"step={step} is outside the plan's {self.plan.num_steps} steps: it would not be charged")
        if step <= self._last_step:
            raise ValueError(f"step={step} was taken before: equal noise on two gradients would cancel")
        noise = self._take_noise(step)
        indices = self.batch_indices(step, num_units)
        total = np.zeros(self._clip.num_parameters)
        shared = _share_of_this_process(indices)
        for chunk in np.array_split(shared, max(1, math.ceil(len(shared) / self._physical))):
            if not len(chunk):  # more processes than rows: this one has nothing to add
                continue
            chosen = torch.from_numpy(chunk)
            batch = fetch(chosen.clamp(min=0))
            mask = (chosen >= 0).to(next(iter(batch.values())).device)
            sums = self._clip.clipped_sum(lambda batch=batch: self._loss(self._model, batch), mask)  # type: ignore[misc]
            total += torch.cat([part.flatten() for part in sums]).cpu().numpy()
        self._set_gradients(self._noise.add(_sum_over_processes(total), noise.result()))
        self._last_step = step

    def _take_noise(self, step: int) -> Future[np.ndarray]:
        """The noise of this step; that of the next is drawn meanwhile on an idle thread."""
        size = self._clip.num_parameters
        current = (
            self._ahead[1]
            if self._ahead and self._ahead[0] == step
            else self._thread.submit(self._noise.draw, step, size)
        )
        self._ahead = (step + 1, self._thread.submit(self._noise.draw, step + 1, size))
        return current

    def _set_gradients(self, noisy_sum: np.ndarray) -> None:
        scale = 1.0 / (self.plan.noise_multiplier * self.plan.max_grad_norm)
        flat = torch.from_numpy(noisy_sum * scale)
        parameters = self._clip.parameters
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.reshape(parameter.shape).to(parameter.device, parameter.dtype)


def process_rank() -> int:
    """Number of this process among those that work together, 0 when there is one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _share_of_this_process(indices: np.ndarray) -> np.ndarray:
    """Every n-th row of the batch, where n processes work together."""
    if not (dist.is_available() and dist.is_initialized()):
        return indices
    return indices[process_rank() :: dist.get_world_size()]


def _sum_over_processes(total: np.ndarray) -> np.ndarray:
    if not (dist.is_available() and dist.is_initialized()):
        return total
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.from_numpy(total).to(device)
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()


def check_bounded(model: nn.Module, loss: BatchLoss, probe: Batch, *, tolerance: float = 1e-3) -> None:
    """Check on made-up units that every unit's clipped gradient is its own.

    The clipped sum of the probe must equal the sum of clipped gradients that plain autograd finds for each unit alone.
    That fails for batch statistics, functional use of a weight, losses that mix units: everything hooks cannot see. A
    buffer that a forward pass changes is refused too: it would hold private values without noise.
    The check runs on a copy with random weights, since freshly initialised zero layers would hide a fault.

    Args:
        model: The network.
        loss: As for :class:`DpSgdEngine`.
        probe: At least two made-up units.
        tolerance: Relative to the clip norm.

    Raises:
        UnsupportedLayerError: The clipped sums differ.
    """
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)  # public: no private data is read here
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad:
                fan_in = p[0].numel() if p.ndim > 1 else p.numel()
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(fan_in))
    book, buffers = BookKeeping(twin, max_norm=1.0), {name: b.clone() for name, b in twin.named_buffers()}
    units = next(iter(probe.values())).shape[0]
    alone = []
    for i in range(units):
        one = {k: v[i : i + 1] for k, v in probe.items()}
        gradients = torch.autograd.grad(loss(twin, one).sum(), book.parameters, allow_unused=True)
        alone.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(gradients, book.parameters, strict=True)
                ]
            )
        )
    norms = [float(g.norm()) for g in alone]
    book.max_norm = max(0.5 * sorted(norms)[len(norms) // 2], 1e-12)  # some units are clipped, some are not
    expected = torch.stack(
        [g * min(1.0, book.max_norm / max(n, 1e-30)) for g, n in zip(alone, norms, strict=True)]
    ).sum(0)
    sums = book.clipped_sum(lambda: loss(twin, probe), torch.ones(units, dtype=torch.bool, device=expected.device))
    got = torch.cat([s.flatten() for s in sums])
    if changed := [name for name, b in twin.named_buffers() if not torch.equal(b, buffers[name])]:
        raise UnsupportedLayerError(f"a forward pass changes the buffers {changed}: they would hold private values")
    if not bool(torch.isfinite(got).all()) or float((got - expected).norm()) > tolerance * units * book.max_norm:
        raise UnsupportedLayerError(
            "the clipped gradient of a batch is not the sum of its units' own clipped gradients: a layer or the loss "
            "mixes units (batch statistics, h - h.mean(0)) or uses a weight outside its layer"
        )
