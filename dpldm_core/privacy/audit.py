"""Audits: attempts to show from outside that a mechanism promises too much. They prove faults, never their absence.

Three kinds: record and replay on neighbouring data sets, many trials of one step, and one whole run with canaries. What
they find is computed from private data and is not covered by any promise (docs/decisions/0008).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from dpldm_core.config import Frozen
from dpldm_core.errors import AuditError
from dpldm_core.privacy import accounting
from dpldm_core.privacy.accounting import NeighboringRelation
from dpldm_core.privacy.audit_bounds import Bounds, two_sample_bound
from dpldm_core.privacy.discrete import DiscreteGaussianNoise
from dpldm_core.privacy.engine import DpSgdEngine
from dpldm_core.privacy.noise import SENSITIVITY_SLACK, GaussianNoise
from dpldm_core.privacy.plan import DpSgdPlan
from dpldm_core.rng import SecretKey

TRIALS = 20_000
_ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
_RECORDING = threading.RLock()
Data = TypeVar("Data")


class StepBound(Frozen):
    """A bound on one step of a plan."""

    stage: str
    claim: float = Field(description="epsilon of one step, as charged")
    epsilon_lower_bound: float = Field(description="by Clopper and Pearson's limits for one event")
    trials: int = Field(description="steps taken in each of the two worlds")


class RunBounds(Bounds):
    """Bounds on a whole run of some stages."""

    stages: tuple[str, ...]
    claim: float = Field(description="epsilon of these stages together, as charged")


class AuditReport(Frozen):
    """What an audit of a release's stages found, and what it was made on."""

    dataset: str
    preset: str
    epsilon: float = Field(description="asked for the whole release whose plan was audited")
    delta: float
    num_canaries: int
    confidence: float
    claim: float = Field(description="epsilon of all audited stages together")
    epsilon_lower_bound: float = Field(description="f_dp of all audited stages together")
    method: str
    runs: tuple[RunBounds, ...] = Field(description="each stage alone, then all together")
    steps: tuple[StepBound, ...]


@dataclass
class Recording:
    """What a mechanism did: everything public that it handled, and its exact sums before noise.

    Args:
        calls: In order: ("batch", rows) of each padded batch, ("noise", coordinates, digest of the draw) of each sum.
        sums: [coordinates] of each sum before continuous noise. Private.
    """

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)


@contextmanager
def recording() -> Iterator[Recording]:
    """Record every padded batch and every noisy sum of this process; one recording at a time."""
    seen = Recording()
    add, draw, sample = GaussianNoise.add, DiscreteGaussianNoise.draw, DpSgdPlan.sample_batch

    def recorded_add(self: GaussianNoise, clipped_sum: np.ndarray, noise: np.ndarray) -> np.ndarray:
        seen.calls.append(("noise", noise.size, hash(noise.tobytes())))
        seen.sums.append(clipped_sum.copy())
        return add(self, clipped_sum, noise)

    def recorded_draw(self: DiscreteGaussianNoise, size: int) -> np.ndarray:
        noise = draw(self, size)
        seen.calls.append(("noise", size, hash(noise.tobytes())))
        return noise

    def recorded_sample(self: DpSgdPlan, key: SecretKey, step: int, num_units: int) -> np.ndarray:
        batch = sample(self, key, step, num_units)
        seen.calls.append(("batch", len(batch)))
        return batch

    with _RECORDING:
        GaussianNoise.add = recorded_add  # type: ignore[method-assign]
        DiscreteGaussianNoise.draw = recorded_draw  # type: ignore[method-assign]
        DpSgdPlan.sample_batch = recorded_sample  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            GaussianNoise.add = add  # type: ignore[method-assign]
            DiscreteGaussianNoise.draw = draw  # type: ignore[method-assign]
            DpSgdPlan.sample_batch = sample  # type: ignore[method-assign]


def record_and_replay(
    mechanism: Callable[[Data], np.ndarray | None], data: Data, neighbour: Data, *, sensitivity: float
) -> list[float]:
    """Run a mechanism on two neighbouring data sets with the same key and compare all that it does.

    Args:
        mechanism: Builds its engine or noise from a fixed key, and runs on the data given. Counts that it returns are
            compared too: with equal noise they differ as the exact ones do.
        data: A private data set.
        neighbour: The same but for one unit.
        sensitivity: Declared: how far, in L2, one unit may move any of the exact sums.

    Returns:
        Distance of each pair of sums over ``sensitivity``.

    Raises:
        AuditError: The calls, a public shape or a noise draw depend on the data, or a sum moves too far.
    """
    runs = []
    for records in (data, neighbour):
        with recording() as seen:
            released = mechanism(records)
        if released is not None:
            seen.sums.append(released)
        runs.append(seen)
    first, second = runs
    if first.calls != second.calls:
        pairs = zip([*first.calls, None], [*second.calls, None], strict=False)
        at = next((i, a[:2] if a else a, b[:2] if b else b) for i, (a, b) in enumerate(pairs) if a != b)
        raise AuditError(f"call {at[0]} depends on the data: {at[1]} on one data set, {at[2]} on its neighbour")
    moved = [float(np.linalg.norm(a - b)) / sensitivity for a, b in zip(first.sums, second.sums, strict=True)]
    if max(moved, default=0.0) > SENSITIVITY_SLACK:
        raise AuditError(f"one unit moves sum {int(np.argmax(moved))} by {max(moved):.6g} times its sensitivity")
    return moved


def single_step_audit(
    plan: DpSgdPlan,
    key: SecretKey,
    *,
    delta: float,
    confidence: float,
    trials: int = TRIALS,
    engine: type[DpSgdEngine] = DpSgdEngine,
) -> StepBound:
    """Tell from one noisy gradient whether a canary is in the data, many times.

    The canary alone moves one coordinate of a linear model, with a gradient far beyond the clip. The event is a
    threshold on that coordinate, chosen on the first half of the trials and counted on the second.

    Args:
        plan: q, sigma and C of the step.
        key: Secret key.
        delta: At which epsilon is stated.
        confidence: Of the bound.
        trials: Steps in each of the two worlds.
        engine: The engine, or a faulty one.

    Returns:
        The claim for one step, and a lower bound on what it really costs.
    """
    step = plan.model_copy(update={"num_steps": trials, "max_batch_size": 3})
    data = torch.tensor([[9.0, 0.0], [-7.0, 0.0], [0.0, 50.0]])
    seen = []
    for name, num_units in (("without", 2), ("with", 3)):
        model = nn.Linear(2, 1, bias=False)
        worker = engine(
            model,
            step,
            key.derive(name),
            loss=lambda network, batch: network(batch["x"])[:, 0],
            probe={"x": torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [-1.0, 3.0]])},
            physical_batch_size=3,
        )
        coordinate = np.empty(trials)
        for t in range(trials):
            worker.noisy_step(t, num_units, lambda indices: {"x": data[indices]})
            coordinate[t] = float(model.weight.grad[0, 1])  # type: ignore[index]
        seen.append(coordinate)
    without, with_canary = seen
    half, significance = trials // 2, 1.0 - confidence

    def bound(threshold: float, part: slice) -> float:
        hits, misses = (int((world[part] > threshold).sum()) for world in (with_canary, without))
        return two_sample_bound(hits, misses, half, delta, significance)

    candidates = np.quantile(np.concatenate([without[:half], with_canary[:half]]), np.linspace(0.0, 0.9995, 400))
    best = max(candidates.tolist(), key=lambda threshold: bound(threshold, slice(half)))
    claim = accounting.epsilon([plan.model_copy(update={"num_steps": 1}).event()], delta, _ADD_OR_REMOVE)
    found = bound(best, slice(half, 2 * half))
    return StepBound(stage=plan.stage, claim=claim, epsilon_lower_bound=found, trials=trials)


class CanaryScores:
    """What an attacker knows of each canary: sums, over the steps of a run, of what its coordinate released.

    Args:
        num_canaries: Coordinates watched.
    """

    def __init__(self, num_canaries: int) -> None:
        self._likelihood = np.zeros(num_canaries)
        self._lowest, self._highest = np.full(num_canaries, np.inf), np.full(num_canaries, -np.inf)

    def observe(self, gradients: np.ndarray, plan: DpSgdPlan) -> None:
        """Take in one step.

        Args:
            gradients: The canaries' coordinates of the noisy gradient, in units of its noise, [num_canaries].
            plan: Of the step.
        """
        q, shift = plan.sample_rate, 1.0 / plan.noise_multiplier
        with np.errstate(divide="ignore"):  # q = 1
            absent = np.log1p(-q)
        self._likelihood += np.logaddexp(absent, np.log(q) + shift * gradients - shift**2 / 2)
        self._lowest = np.minimum(self._lowest, gradients)
        self._highest = np.maximum(self._highest, gradients)

    def attacks(self) -> dict[str, np.ndarray]:
        """Scores [num_canaries] by attack.

        ``likelihood_ratio`` is the strongest against noise that is as charged (Neyman and Pearson 1933). ``range`` over
        the steps sees noise that the steps share.
        """
        return {"likelihood_ratio": self._likelihood, "range": self._highest - self._lowest}
