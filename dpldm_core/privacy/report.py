"""The privacy report of one release: its promise, in numbers that anyone recomputes from its events.

What may never change: the wording of :func:`promise` (reports carry it, and a report whose sentence disagrees with its
fields is refused), and the names of the fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from dpldm_core.config import Frozen
from dpldm_core.errors import AccountingError
from dpldm_core.privacy import accounting
from dpldm_core.privacy.accounting import NeighboringRelation
from dpldm_core.privacy.plan import ReleasePlan
from dpldm_core.provenance import software

NOT_COVERED = (
    "Facts listed under public_facts, and the choices in config.json: they are treated as public, so they must have "
    "been made without looking at the private data.",
    "Other releases of the same data: the costs of separate releases add up. The ledger keeps that bill.",
    "Somebody who stands behind k units of privacy: for them epsilon is up to k times as large, and delta grows more.",
    "What is true of everybody: a conclusion that would hold without any single unit is learned, not leaked.",
    "That there is a release: it is refused where the data holds too few units for its settings or more than declared, "
    "which a single unit decides at the very edge.",
    "The machine that ran it: private files, logs, run times and internal measurements stay inside and are outside the "
    "promise if they leave.",
)
_CHANGES = {
    "ADD_OR_REMOVE_ONE": "adding or removing {unit}",
    "REPLACE_ONE": "replacing {unit} by any other",
}


class StageEvent(Frozen):
    """What one stage released about the private data."""

    stage: str
    event: dict[str, Any] = Field(description="class_name and dp-accounting's own field names, nested")


class LedgerEntry(Frozen):
    """Where the bill was booked."""

    account: str
    entry: str


class PublicFact(Frozen):
    """Something treated as known to everybody."""

    value: JsonValue
    origin: str = Field(description="where the fact comes from, which is not the private data")


class PrivacyReport(Frozen):
    """What a bundle promises. Written as privacy_report.json."""

    release_id: str
    parent_release_id: str | None = Field(description="release that this one post-processes, at no further cost")
    epsilon: float = Field(ge=0, description="spent by the whole release under neighboring_relation")
    delta: float = Field(gt=0, lt=1)
    neighboring_relation: Literal["ADD_OR_REMOVE_ONE", "REPLACE_ONE"] = Field(description="dp-accounting's name")
    epsilon_replace_one: float = Field(ge=0, description="the same release, stated under REPLACE_ONE")
    unit_of_privacy: str
    accountant: dict[str, str]
    ledger: LedgerEntry
    events: tuple[StageEvent, ...] = Field(min_length=1)
    statement: str = Field(description="the promise in one sentence")
    latent_mechanism: str
    public_facts: dict[str, PublicFact]
    not_covered: tuple[str, ...]
    software: dict[str, str] = Field(default={}, description="what made it; empty in reports from before it was said")

    @model_validator(mode="after")
    def _speaks_with_one_voice(self) -> Self:
        expected = promise(
            self.epsilon, self.delta, self.neighboring_relation, self.unit_of_privacy, [e.stage for e in self.events]
        )
        if self.statement != expected:
            raise ValueError(f"statement does not say what the fields say, which is: {expected!r}")
        if self.latent_mechanism == "noised_latents" and self.neighboring_relation != "REPLACE_ONE":
            raise ValueError("noised_latents shows how many records there are: it can only be stated under REPLACE_ONE")
        return self


def promise(epsilon: float, delta: float, relation: str, unit: str, stages: Sequence[str]) -> str:
    """One plain sentence: what holds, under which change, for whom, over which stages. Epsilon is rounded up.

    >>> promise(9.98, 1e-5, "ADD_OR_REMOVE_ONE", "one record", ["autoencoder", "diffusion"])
    'This release is (epsilon = 9.980, delta = 1e-05)-differentially private under ADD_OR_REMOVE_ONE (adding or removing one record), end to end, over every stage that read the private data: autoencoder, diffusion.'
    """  # noqa: E501 - the sentence is one line
    change = _CHANGES[relation].format(unit=unit)
    names = ", ".join(dict.fromkeys(stages))
    return (
        f"This release is (epsilon = {round_up(epsilon):.3f}, delta = {delta!r})-differentially private under "
        f"{relation} ({change}), end to end, over every stage that read the private data: {names}."
    )


def round_up(epsilon: float) -> float:
    """To three decimals, never down: a rounded promise is still true.

    >>> round_up(9.98), round_up(17.01157)
    (9.98, 17.012)
    """
    nearest = round(epsilon, 3)
    return nearest if nearest >= epsilon else math.ceil(epsilon * 1000) / 1000


def build_report(
    plan: ReleasePlan,
    *,
    release_id: str,
    account: str,
    entry: str,
    latent_mechanism: str,
    public_facts: Mapping[str, Any],
) -> PrivacyReport:
    """The report of a release, with every number computed from the plan's events.

    Args:
        plan: All private mechanisms of the release.
        release_id: Name of the release.
        account: Ledger account of the data set.
        entry: Ledger entry that was debited.
        latent_mechanism: ``dp_sgd`` or ``noised_latents``.
        public_facts: Name to ``{"value": ..., "origin": ...}`` of what is treated as public.

    Raises:
        AccountingError: An event is unknown under a relation.
    """
    epsilon = plan.epsilon()
    replace_one = plan.epsilon(NeighboringRelation.REPLACE_ONE) if plan.relation != "REPLACE_ONE" else epsilon
    stages = plan.stage_events()
    return PrivacyReport.model_validate(
        {
            "release_id": release_id,
            "parent_release_id": None,
            "epsilon": epsilon,
            "delta": plan.delta,
            "neighboring_relation": plan.relation,
            "epsilon_replace_one": replace_one,
            "unit_of_privacy": plan.unit_of_privacy,
            "accountant": accounting.accountant_versions(),
            "ledger": {"account": account, "entry": entry},
            "events": [{"stage": stage, "event": accounting.event_to_json(event)} for stage, event in stages],
            "statement": promise(
                epsilon, plan.delta, plan.relation, plan.unit_of_privacy, [stage for stage, _ in stages]
            ),
            "latent_mechanism": latent_mechanism,
            "public_facts": dict(public_facts),
            "not_covered": NOT_COVERED,
            "software": software(),
        }
    )


def recompute(report: Mapping[str, Any]) -> tuple[float, float]:
    """(epsilon, epsilon_replace_one) of a report from its events, delta and relation alone.

    Args:
        report: privacy_report.json as a dict. Its own epsilons are not looked at.

    Raises:
        AccountingError: The events cannot be rebuilt or are unknown to the accountant.
    """
    try:
        events = [accounting.event_from_json(item["event"]) for item in report["events"]]
        delta, relation = report["delta"], accounting.relation_from_name(report["neighboring_relation"])
        epsilon = accounting.epsilon(events, delta, relation)
        if relation is NeighboringRelation.REPLACE_ONE:
            return epsilon, epsilon
        return epsilon, accounting.epsilon(events, delta, NeighboringRelation.REPLACE_ONE)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise AccountingError(f"no epsilon can be computed from the report: {type(error).__name__}: {error}") from error
