"""What all releases of one account cost together.

Plans that were fixed before the account's first mechanism ran compose as one PLD. A plan chosen later may depend on
what earlier releases showed; then PLD is no longer valid, and a Renyi filter is used (Feldman and Zrnic 2021): the
Renyi divergences of all plans add up and are converted once, for the account's cap. Under REPLACE_ONE, where our Renyi
accountant is not used, such plans add up by basic composition. Disjoint cohorts compose in parallel under
ADD_OR_REMOVE_ONE.

Outputs may choose neither which of the two bounds holds nor what share of delta a plan has: what was fixed before the
first output must fit the filter too before anything follows, whether or not some of it is cancelled later
(docs/decisions/0007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from dpldm_core.privacy import accounting
from dpldm_core.privacy.accounting import DpEvent, NeighboringRelation

EVERY_COHORT = ""


@dataclass(frozen=True)
class Claim:
    """What one release, or one slot of a sealed schedule, may cost.

    Args:
        events: Everything that it may release.
        truncation: Sum over its DP-SGD steps of the probability that a batch is cut.
        opened_at: Ledger link that reserved or sealed it.
        fixed_at: Ledger link at which its events were fixed.
        first_read_at: Ledger link of its first mechanism's commit; None before.
        cohort: Declared set of units that it reads, disjoint from every other one; empty: all of them.
        withdrawn_at: Ledger link at which it was cancelled, with no mechanism begun; None: it was not.
        held: Whether its events stand for a plan that is not made yet.
    """

    events: tuple[DpEvent, ...]
    truncation: float
    opened_at: int
    fixed_at: int
    first_read_at: int | None
    cohort: str = EVERY_COHORT
    withdrawn_at: int | None = None
    held: bool = False


def placeholder(epsilon: float, delta: float, relation: NeighboringRelation) -> DpEvent:
    """One Gaussian release that costs (epsilon, delta): stands for a plan that is not made yet."""
    changes = 2.0 if relation is NeighboringRelation.REPLACE_ONE else 1.0  # in units of the clip norm
    return accounting.gaussian_event(changes / accounting.gaussian_mu((1 - 1e-3) * epsilon, delta))


def epsilon_one_by_one(epsilons: Sequence[float], delta: float, relation: NeighboringRelation, *, cap: float) -> float:
    """About what releases of a new account cost together where each is reserved after the one before has read.

    Args:
        epsilons: Of each release at ``delta``; one Gaussian release stands for its plan.
        delta: The account's delta.
        relation: The account's relation.
        cap: What they are held against.
    """
    costs = [(placeholder(epsilon, delta, relation),) for epsilon in epsilons]
    claims = [Claim(cost, 0.0, 2 * i, 2 * i, 2 * i + 1) for i, cost in enumerate(costs)]
    return joint_epsilon(claims, delta, relation, cap=cap)


def joint_epsilon(
    claims: Sequence[Claim], delta: float, relation: NeighboringRelation, *, cap: float | None = None
) -> float:
    """Epsilon of all claims together at ``delta``.

    Args:
        claims: Every release that was reserved, cancelled ones marked, and every open slot of a sealed schedule.
        delta: The account's delta.
        relation: The account's relation.
        cap: What the claims are held against, by a Renyi filter where one was chosen by outputs; None: by the Renyi
            bound that is best for them, which says what was spent, and is no promise where outputs chose.

    Returns:
        An upper bound; infinite when no statement can be made.
    """
    return max(_sequential(group, delta, relation, cap) for group in _groups(claims, relation))


def counting_on(claims: Sequence[Claim], relation: NeighboringRelation) -> list[Claim]:
    """Withdrawn claims that stay in the way of whatever would follow: fixed before an output, cancelled after it."""
    before = [c for group in _groups(claims, relation) for c in _before_the_first_read(group)]
    return [c for c in before if c.withdrawn_at is not None and c.events]


def _groups(claims: Sequence[Claim], relation: NeighboringRelation) -> list[list[Claim]]:
    """The claims that meet the same units: those of each cohort where cohorts compose in parallel, else all."""
    names = {c.cohort for c in claims} - {EVERY_COHORT}
    if relation is not NeighboringRelation.ADD_OR_REMOVE_ONE or not names:
        return [list(claims)]
    return [[c for c in claims if c.cohort in (EVERY_COHORT, name)] for name in names]


def _first_read(claims: Sequence[Claim]) -> float:
    return min((c.first_read_at for c in claims if c.first_read_at is not None), default=math.inf)


def _before_the_first_read(claims: Sequence[Claim]) -> list[Claim]:
    """The plans that were fixed when the first mechanism began, and not cancelled yet."""
    read = _first_read(claims)
    return [c for c in claims if not c.held and c.fixed_at < read < (c.withdrawn_at or math.inf)]


def _sequential(claims: Sequence[Claim], delta: float, relation: NeighboringRelation, cap: float | None) -> float:
    first_read = _first_read(claims)
    counted = [c for c in claims if c.withdrawn_at is None]
    if all(c.fixed_at <= first_read for c in counted):
        return _in_advance(counted, delta, relation)
    ranked = [c for c in claims if (c.withdrawn_at or math.inf) > first_read]  # what was called off before stays out
    spent = _chosen_by_outputs(ranked, counted, delta, relation, cap)
    before = _before_the_first_read(claims)
    if cap is None or all(c.withdrawn_at is None for c in before):
        return spent
    return max(spent, _chosen_by_outputs(ranked, before, delta, relation, cap))


def _in_advance(counted: Sequence[Claim], delta: float, relation: NeighboringRelation) -> float:
    """PLD of everything at once."""
    if not counted:
        return 0.0
    events = [event for c in counted for event in c.events]
    truncation = sum(c.truncation for c in counted)
    return _keeping_back(lambda d: accounting.epsilon(events, d, relation), truncation, delta)


def _chosen_by_outputs(
    ranked: Sequence[Claim],
    counted: Sequence[Claim],
    delta: float,
    relation: NeighboringRelation,
    cap: float | None,
) -> float:
    """The Renyi filter, or basic composition under REPLACE_ONE, over those of the ranked claims that count."""
    truncation = sum(c.truncation for c in counted)
    if relation is NeighboringRelation.ADD_OR_REMOVE_ONE:
        events = [event for c in counted for event in c.events]
        bound = accounting.rdp_epsilon if cap is None else partial(accounting.filter_epsilon, cap=(cap, delta))
        uncut = 1 - accounting.TRUNCATION_DELTA_SHARE
        return _keeping_back(lambda d: bound(events, d * uncut), truncation, delta)

    def basic(d: float) -> float:  # shares 1/2, 1/6, 1/12, ... of delta in the order of opening; they sum to 1
        ordered = enumerate(sorted(ranked, key=lambda c: c.opened_at), start=1)
        shares = [(c, d / (i * (i + 1))) for i, c in ordered]
        return sum(accounting.epsilon(c.events, share, relation) for c, share in shares if c in counted)

    return _keeping_back(basic, truncation, delta)


def _keeping_back(epsilon_at: Callable[[float], float], truncation: float, delta: float) -> float:
    """Epsilon at delta minus what cut batches may cost: (1 + e^epsilon) times their probability.

    ``epsilon_at`` keeps back the usual share of its delta; more is kept where all releases together need more.
    """
    kept = 0.0
    while kept < delta / 2:
        spent = epsilon_at(delta - kept)
        needed = (1.0 + math.exp(min(spent, 700.0))) * truncation
        if needed <= kept + accounting.TRUNCATION_DELTA_SHARE * (delta - kept):
            return spent
        kept = 2.0 * needed
    return math.inf
