"""What releases of one account cost together: what is kept back for cut batches, holds, caps, stale writers."""

import math

import pytest

from dpldm_core.errors import BudgetError
from dpldm_core.privacy.accounting import TRUNCATION_DELTA_SHARE, NeighboringRelation, epsilon, gaussian_event
from dpldm_core.privacy.budget import Claim, joint_epsilon, placeholder
from dpldm_core.privacy.chain import Chain, Change
from dpldm_core.privacy.ledger import Ledger
from dpldm_core.privacy.plan import GaussianSumPlan, ReleasePlan

ADD_REMOVE, REPLACE = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE
DELTA = 1e-5
EVENT = gaussian_event(1.0)


def claim(truncation, *, fixed_at=1, first_read_at=None):
    return Claim((EVENT,), truncation, fixed_at, fixed_at, first_read_at)


@pytest.mark.parametrize("relation", [ADD_REMOVE, REPLACE])
def test_cut_batches_of_all_releases_are_charged(relation):
    """Batches that are cut with probability tau in all cost (1 + e^epsilon) tau of delta, whatever is kept for them."""
    free = joint_epsilon([claim(0.0), claim(0.0)], DELTA, relation)
    tau = 0.01 * DELTA / (1 + math.exp(free))
    spent = joint_epsilon([claim(tau), claim(2 * tau)], DELTA, relation)
    left = DELTA - 3 * tau * (1 + math.exp(spent))
    assert free == epsilon([EVENT, EVENT], DELTA, relation)
    assert epsilon([EVENT, EVENT], left, relation) <= spent <= 1.01 * free and spent > free
    assert joint_epsilon([claim(1.0)], DELTA, relation) == math.inf, "no statement can be made"


def test_cut_batches_within_the_usual_share_cost_nothing_more():
    tau = 0.4 * TRUNCATION_DELTA_SHARE * DELTA / (1 + math.exp(epsilon([EVENT], DELTA, ADD_REMOVE)))
    assert joint_epsilon([claim(tau)], DELTA, ADD_REMOVE) == epsilon([EVENT], DELTA, ADD_REMOVE)


def test_shares_of_delta_follow_the_order_of_opening_alone():
    """Basic composition: what happens to others after a release ran changes nothing of what it is charged."""
    ran = Claim((EVENT,), 0.0, 2, 4, first_read_at=5)
    later = Claim((EVENT,), 0.0, 3, 6, first_read_at=7)
    shares = [DELTA / 2, DELTA / 6, DELTA / 12]
    for first in (
        Claim((EVENT,), 0.0, 1, 8, first_read_at=9),  # opened before, its plan bound after: still the first share
        Claim((EVENT,), 0.0, 1, 1, None, withdrawn_at=2),  # called off before any output: it never was there
        Claim((), 0.0, 1, 1, None, withdrawn_at=10),  # after one: it keeps its share
    ):
        paid = shares[1:] if first.withdrawn_at == 10 else shares[: 3 - (first.withdrawn_at == 2)]
        expected = sum(epsilon([EVENT], share, REPLACE) for share in paid)
        assert joint_epsilon([first, ran, later], DELTA, REPLACE) == expected


@pytest.mark.parametrize("relation", [ADD_REMOVE, REPLACE])
@pytest.mark.parametrize("asked", [0.3, 3.0, 12.0])
def test_a_hold_costs_what_was_asked(relation, asked):
    """Under REPLACE_ONE a record moves the sum by twice the clip norm: the stand-in needs twice the noise."""
    assert 0.99 * asked <= epsilon([placeholder(asked, DELTA, relation)], DELTA, relation) <= asked


def test_a_cap_is_met_to_the_last_digit_and_not_passed(tmp_path):
    plan = ReleasePlan(
        mechanisms=(GaussianSumPlan(stage="s", max_norm=1.0, noise_multiplier=3.0),),
        delta=DELTA,
        relation="ADD_OR_REMOVE_ONE",
        unit_of_privacy="one record",
    )
    ledger, cost = Ledger(f"sqlite:///{tmp_path / 'l.db'}"), plan.epsilon()
    promise = {"delta": DELTA, "relation": plan.relation}
    entries = {}
    for name, cap in (("exact", cost), ("short", cost * (1 - 1e-6))):
        ledger.open_account(name, budget_epsilon=cap, **promise)
        asked = {"release_id": name, "execution_id": name, "epsilon": 0.9 * cost, "config_digest": "s"}
        entries[name] = ledger.reserve(name, **asked, **promise)
    ledger.bind_plan(entries["exact"].entry_id, plan)
    assert ledger.books().spent("exact") == cost
    with pytest.raises(BudgetError):
        ledger.bind_plan(entries["short"].entry_id, plan)


def test_a_writer_whose_head_was_moved_decides_anew(tmp_path, monkeypatch):
    """Compare-and-swap alone, on a store whose locks fail: the first read misses what another writer had appended."""
    chain = Chain(f"sqlite:///{tmp_path / 'l.db'}")
    for kind in ("first", "second"):
        chain.append(lambda links, kind=kind: Change(kind, {}))
    reads, decided_on, read = [], [], chain._read

    def stale_read(connection, *, writing=False):
        links = read(connection, writing=writing)
        reads.append(1)
        return links[:-1] if len(reads) == 1 else links

    def decide(links):
        decided_on.append([link.kind for link in links])
        return Change("third", {})

    monkeypatch.setattr(chain, "_read", stale_read)
    chain.append(decide)
    assert decided_on == [["first"], ["first", "second"]]
    assert [link.kind for link in chain.read()] == ["first", "second", "third"]
