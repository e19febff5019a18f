"""An audit of the very stages of a release: canaries ride along with the private records.

A canary is a unit whose gradient is one coordinate of an extra parameter, far beyond the clip. Nothing else moves that
coordinate, so its noisy gradient is all that anybody can learn about the canary (white box; Steinke, Nasr and Jagielski
2023). The private records do not touch that parameter, and the canaries do not touch the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpldm_core.config import ReleaseConfig
from dpldm_core.data.schema import ImageSchema
from dpldm_core.privacy import accounting
from dpldm_core.privacy.accounting import NeighboringRelation
from dpldm_core.privacy.audit import TRIALS, AuditReport, CanaryScores, RunBounds, StepBound, single_step_audit
from dpldm_core.privacy.audit_bounds import one_run_bounds
from dpldm_core.privacy.calibration import TEACHER
from dpldm_core.privacy.engine import Batch, BatchLoss
from dpldm_core.privacy.plan import DpSgdPlan, ReleasePlan, chernoff_cap
from dpldm_core.rng import SecretKey
from dpldm_core.training import private, stages
from dpldm_core.training.units import Units

METHOD = "one training run with canaries, white box; f-DP bound of Mahloujifar, Melis and Chaudhuri (2024)"
_STRENGTH = 10.0  # a canary's gradient over the clip norm


@dataclass(frozen=True)
class CanaryUnits(Units):
    """Private units, followed by the canaries that were included.

    Args:
        canaries: Numbers of the included canaries, int64 [included].
    """

    canaries: Tensor

    @property
    def num_units(self) -> int:
        """Private units and included canaries."""
        return len(self.table) + len(self.canaries)

    def fetch(self, indices: Tensor) -> Batch:
        """As :meth:`Units.fetch`, with ``canary`` [B]: the canary's number, -1 for a private unit.

        A canary's records are zeros of weight 0.
        """
        rank = indices.to(self.canaries.device) - len(self.table)
        batch = super().fetch(indices.clamp(max=len(self.table) - 1))
        batch["values"][rank >= 0] = 0.0
        batch["weights"][rank >= 0] = 0.0
        numbers = self.canaries[rank.clamp(min=0)] if len(self.canaries) else torch.full_like(rank, -1)
        return batch | {"canary": torch.where(rank >= 0, numbers, -1)}

    def probe(self, num_classes: int, *, generator: torch.Generator) -> Batch:
        """As :meth:`Units.probe`; the last two made-up units are canaries."""
        batch = super().probe(num_classes, generator=generator)
        batch["weights"][2:] = 0.0
        return batch | {"canary": torch.tensor([-1, -1, 0, 1], device=self.canaries.device)}


class CanaryModel(nn.Module):
    """A network, and one more weight for each canary."""

    def __init__(self, network: nn.Module, num_canaries: int) -> None:
        super().__init__()
        self.network, self.canaries = network, nn.Embedding(num_canaries, 1)
        nn.init.zeros_(self.canaries.weight)


class CanaryAudit:
    """Trains in the place of :func:`train_private`, with canaries, and keeps what their coordinates released.

    Args:
        num_canaries: Each is in the data with probability 1/2, the same ones in every stage.
        key: Secret key of the choice.
    """

    def __init__(self, num_canaries: int, key: SecretKey) -> None:
        self.included = key.uint64(0, num_canaries) >= 2**63
        self.scores: dict[str, CanaryScores] = {}

    def train(
        self,
        model: nn.Module,
        units: Units,
        plan: DpSgdPlan,
        key: SecretKey,
        *,
        loss: BatchLoss,
        **loop: Any,
    ) -> nn.Module:
        """Train with canaries among the units, by the same loop, engine, q, T, C and sigma.

        Only the cap of a batch is raised, to leave room for the canaries; the chance to exceed it is the plan's.

        Args:
            model: Trained in place.
            units: The private data.
            plan: Of the stage.
            key: Secret key of the stage.
            loss: One loss per unit.
            loop: Further arguments of :func:`train_private`.

        Returns:
            The averaged model, without the canaries' weights.
        """
        m, device = len(self.included), units.values.device
        audited = CanaryModel(model, m).to(device)
        numbers = torch.from_numpy(self.included).nonzero()[:, 0].to(device)
        riding = CanaryUnits(units.values, units.class_labels, units.table, numbers)
        cap = chernoff_cap(units.num_units + m, plan.sample_rate, plan.truncation_probability)
        scores = self.scores[plan.stage] = CanaryScores(m)

        def watch(done: int, num_steps: int) -> None:
            gradient = audited.canaries.weight.grad
            assert gradient is not None
            scores.observe(gradient[:, 0].double().cpu().numpy(), plan)

        trained = private.train_private(
            audited,
            riding,
            plan.model_copy(update={"max_batch_size": cap}),
            key,
            loss=_with_canaries(loss, _STRENGTH * plan.max_grad_norm),
            on_step=watch,
            **loop,
        )
        assert isinstance(trained, CanaryModel)
        return trained.network

    def bounds(self, plan: ReleasePlan, names: Iterable[str], confidence: float) -> RunBounds:
        """Bounds on the epsilon of some of the audited stages together.

        Args:
            plan: Of the release.
            names: The stages.
            confidence: Of each bound.
        """
        names = tuple(names)
        events = [plan.mechanism(name).event() for name in names]
        parts = [self.scores[name].attacks() for name in names]
        attacks = {attack: sum(part[attack] for part in parts) for attack in parts[0]}
        found = one_run_bounds(attacks, self.included, delta=plan.delta, confidence=confidence)  # type: ignore[arg-type]
        claim = accounting.epsilon(events, plan.delta, NeighboringRelation.ADD_OR_REMOVE_ONE)
        return RunBounds(stages=names, claim=claim, **found.model_dump())


def _with_canaries(loss: BatchLoss, strength: float) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss of a stage; a canary adds its own weight, times ``strength``."""

    def audited_loss(model: nn.Module, batch: Batch) -> Tensor:
        numbers = batch["canary"]
        own = model.canaries(numbers.clamp(min=0))[:, 0]  # type: ignore[operator]
        return loss(model.network, batch) + torch.where(numbers >= 0, strength * own, 0.0)  # type: ignore[arg-type]

    return audited_loss


def audit_stages(
    train: Path,
    config: ReleaseConfig,
    schema: ImageSchema,
    plan: ReleasePlan,
    audit: CanaryAudit,
    key: SecretKey,
    folder: Path,
) -> None:
    """Run all stages of a release with canaries in each DP-SGD. The models are of no use: throw the folder away.

    Args:
        train: Ingested training records of a public data set.
        config: The resolved configuration.
        schema: Public schema.
        plan: Of the release.
        audit: Collects the scores.
        key: Secret key of this run.
        folder: Scratch.
    """
    run = stages.Run(folder, train=audit.train)
    keys = {m.stage: key.derive(m.stage) for m in plan.mechanisms}
    autoencoder, decoder, _ = stages.train_codec(train, config, plan, keys.__getitem__, run)
    latents, noise_std = stages.extract_latents(train, autoencoder, config, plan, keys.__getitem__, run)
    denoiser, _ = stages.train_diffusion(latents, noise_std, config, schema, plan, keys.__getitem__, run)
    if TEACHER in plan.stages():
        stages.train_teacher(train, autoencoder, decoder, denoiser, config, plan, keys.__getitem__, run)


def audit_report(
    audit: CanaryAudit, config: ReleaseConfig, plan: ReleasePlan, confidence: float, steps: Iterable[StepBound]
) -> AuditReport:
    """What the canaries tell, for each audited stage and for all together.

    Args:
        audit: After :func:`audit_stages`.
        config: The resolved configuration.
        plan: Of the release.
        confidence: Of each bound.
        steps: Of single-step audits.
    """
    names = list(audit.scores)
    alone = [audit.bounds(plan, [name], confidence) for name in names]
    together = audit.bounds(plan, names, confidence)
    return AuditReport(
        dataset=config.dataset,
        preset=config.preset,
        epsilon=config.epsilon,
        delta=config.delta,
        num_canaries=len(audit.included),
        confidence=confidence,
        claim=together.claim,
        epsilon_lower_bound=together.f_dp,
        method=METHOD,
        runs=(*alone, together) if len(names) > 1 else (together,),
        steps=tuple(steps),
    )


def step_bounds(plan: ReleasePlan, key: SecretKey, confidence: float, *, trials: int = TRIALS) -> tuple[StepBound, ...]:
    """The single-step audit of every DP-SGD stage.

    Args:
        plan: Of the release.
        key: Secret key.
        confidence: Of each bound.
        trials: Steps in each of the two worlds.
    """
    found = []
    for mechanism in plan.mechanisms:
        if isinstance(mechanism, DpSgdPlan):
            stage_key = key.derive(mechanism.stage)
            found.append(
                single_step_audit(mechanism, stage_key, delta=plan.delta, confidence=confidence, trials=trials)
            )
    return tuple(found)
