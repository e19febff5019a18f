"""The bill never counts too little: protocol, budgets, retries, kill points, races, damage."""

import math
import multiprocessing
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import sqlalchemy as sa

from dpldm_core.errors import AccountingError, BudgetError, LedgerError
from dpldm_core.privacy import accounting
from dpldm_core.privacy import chain as chain_module
from dpldm_core.privacy.ledger import Ledger, default_url
from dpldm_core.privacy.ledger_cli import _statement, main
from dpldm_core.privacy.plan import GaussianRecordPlan, GaussianSumPlan, LabelPlan, ReleasePlan

FORK = multiprocessing.get_context("fork")
DELTA = 1e-5
DIGESTS = {"data_digest": "d", "config_digest": "s", "code_digest": "c"}


def plan_of(*noise_multipliers, relation="ADD_OR_REMOVE_ONE", delta=DELTA):
    mechanisms = tuple(
        GaussianSumPlan(stage=f"s{i}", max_norm=1.0, noise_multiplier=z) for i, z in enumerate(noise_multipliers)
    )
    return ReleasePlan(mechanisms=mechanisms, delta=delta, relation=relation, unit_of_privacy="one record")


PLAN = plan_of(8.0, 6.0)
COST = PLAN.epsilon()


def reserve(ledger, account="a", *, epsilon=COST * 1.01, release_id="r1", execution_id=None, plan=PLAN, **more):
    return ledger.reserve(
        account,
        release_id=release_id,
        execution_id=execution_id or release_id,
        epsilon=epsilon,
        delta=plan.delta,
        relation=plan.relation,
        **{"config_digest": DIGESTS["config_digest"]} | more,
    )


def begin(ledger, entry, stage, plan=PLAN, **changes):
    return ledger.begin_stage(entry.entry_id, stage, **DIGESTS | {"plan_digest": plan.digest()} | changes)


def run_release(ledger, account="a", *, release_id="r1", plan=PLAN, epsilon=None, publish=True):
    entry = reserve(ledger, account, release_id=release_id, plan=plan, epsilon=epsilon or plan.epsilon() * 1.01)
    ledger.bind_plan(entry.entry_id, plan)
    for mechanism in plan.mechanisms:
        begin(ledger, entry, mechanism.stage, plan)
    return ledger.publish(entry.entry_id, bundle_digest="b") if publish else entry


@pytest.fixture
def ledger(ledger_url):
    opened = Ledger(ledger_url)
    opened.open_account("a", budget_epsilon=3.0, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    return opened


def test_a_whole_release_is_billed_by_its_events(ledger):
    entry = run_release(ledger)
    books = ledger.books()
    assert entry.state == "published"
    assert books.spent("a") == pytest.approx(COST, abs=1e-12)
    assert 0 < books.left("a") < 3.0
    body = next(link.body for link in ledger.links() if link.kind == "plan")
    assert "epsilon" not in str(body), "the ledger stores events, never epsilons"
    assert [link.kind for link in ledger.links()] == ["open", "reserve", "plan", "commit", "commit", "publish"]


def test_a_reservation_holds_what_was_asked_before_there_is_a_plan(ledger):
    reserve(ledger, epsilon=2.5)
    assert 2.49 < ledger.books().spent("a") <= 2.5
    with pytest.raises(BudgetError, match=r"'a' does not cover release 'r2': of epsilon 3 .* is spent by r1"):
        reserve(ledger, epsilon=2.5, release_id="r2")


def test_the_whole_budget_can_be_asked_for(ledger):
    reserve(ledger, epsilon=3.0)
    with pytest.raises(BudgetError, match=r"about 0\.\d* is left"):
        reserve(ledger, epsilon=0.5, release_id="r2")


def test_refused_past_the_cap_and_nothing_is_written(ledger):
    run_release(ledger)
    before = ledger.links()
    with pytest.raises(BudgetError, match="--budget-epsilon E --raise"):
        run_release(ledger, release_id="r2", plan=plan_of(0.5, 0.5))
    assert ledger.links() == before


def test_a_plan_that_costs_more_than_was_reserved_and_left_is_refused(ledger):
    entry = reserve(ledger, epsilon=1.0)
    with pytest.raises(BudgetError):
        ledger.bind_plan(entry.entry_id, plan_of(0.5))


def test_what_is_left_can_be_spent_and_not_more(ledger):
    run_release(ledger)
    left = ledger.books().left("a")
    with pytest.raises(BudgetError):
        reserve(ledger, epsilon=left * 1.02, release_id="r2")
    reserve(ledger, epsilon=left, release_id="r2")


def test_only_the_explicit_command_raises_a_cap(ledger):
    with pytest.raises(BudgetError, match="open with a cap of 3"):
        ledger.open_account("a", budget_epsilon=4.0, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    assert ledger.open_account("a", budget_epsilon=1.0, delta=DELTA, relation="ADD_OR_REMOVE_ONE").budget_epsilon == 3.0
    with pytest.raises(BudgetError, match="not above the cap of 3"):
        ledger.raise_cap("a", 2.0)
    assert ledger.raise_cap("a", 4.0).budget_epsilon == 4.0
    assert ledger.links()[-1].kind == "raise"


def test_an_unlimited_account_is_for_public_data_only(ledger):
    with pytest.raises(BudgetError, match="finite"):
        ledger.open_account("own", budget_epsilon=math.inf, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    ledger.open_account("mnist", budget_epsilon=math.inf, delta=DELTA, relation="ADD_OR_REMOVE_ONE", public=True)
    for i in range(3):
        run_release(ledger, "mnist", release_id=f"r{i}", plan=plan_of(0.3))
    assert ledger.books().left("mnist") == math.inf


# Composition


def test_a_sealed_schedule_composes_as_one_pld(ledger):
    """Joint composition is far cheaper than adding epsilons (docs/decisions/0007)."""
    plan = plan_of(12.0)
    ledger.seal("a", [plan] * 5)
    joint = plan_of(*[12.0] * 5).epsilon()
    assert ledger.books().spent("a") == pytest.approx(joint, abs=1e-9)
    for i in range(5):
        run_release(ledger, release_id=f"r{i}", plan=plan)
        assert ledger.books().spent("a") == pytest.approx(joint, abs=1e-9)
    assert joint < 0.6 * 5 * plan.epsilon()


def test_a_sealed_schedule_takes_its_own_plans_only(ledger):
    ledger.seal("a", [plan_of(12.0)] * 2)
    entry = reserve(ledger)
    with pytest.raises(LedgerError, match="another plan"):
        ledger.bind_plan(entry.entry_id, plan_of(12.0, 12.0))
    with pytest.raises(LedgerError, match="sealed schedule with 1 releases to go"):
        ledger.seal("a", [plan_of(12.0)])


def test_a_schedule_past_the_cap_is_not_sealed(ledger):
    with pytest.raises(BudgetError):
        ledger.seal("a", [plan_of(1.5)] * 12)
    assert ledger.books().spent("a") == 0.0


def test_a_plan_chosen_after_an_output_needs_the_renyi_filter(ledger):
    """PLD holds for plans that do not depend on earlier outputs; after one was seen, only the filter does."""
    plan = plan_of(8.0)
    run_release(ledger, release_id="r1", plan=plan)
    pld_of_one = ledger.books().spent("a")
    run_release(ledger, release_id="r2", plan=plan)
    adaptive = ledger.books().spent("a")
    sealed = plan_of(8.0, 8.0).epsilon()
    assert pld_of_one < sealed < adaptive < 1.25 * sealed


def test_the_cap_is_held_by_a_filter_whose_order_outputs_cannot_choose(ledger_url):
    """Between the bound of the order that is best afterwards and the filter's, which shares delta, there is no room."""
    plan = plan_of(2.0)
    events = plan.events() * 2
    best_afterwards = accounting.rdp_epsilon(events, DELTA)
    for cap, fits in ((1.001 * best_afterwards, False), (1.02 * best_afterwards, True)):
        assert (accounting.filter_epsilon(events, DELTA, (cap, DELTA)) <= cap) is fits
        ledger = Ledger(ledger_url)
        name = f"cap {cap}"
        ledger.open_account(name, budget_epsilon=cap, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
        asked = {"account": name, "plan": plan, "epsilon": 0.9 * plan.epsilon()}  # the plan decides, not the hold
        run_release(ledger, release_id=f"{name} 1", **asked)
        with nullcontext() if fits else pytest.raises(BudgetError):
            run_release(ledger, release_id=f"{name} 2", **asked)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("cancelled", ["before an output", "after an output"])
def test_a_plan_cancelled_after_an_output_counts_on(ledger_url, filtered, cancelled):
    """PLD covers two plans of an account that the filter does not: calling one off later must not let a third follow.

    Else delta would hold twice: once by PLD where it runs, once by the filter where it does not.
    """
    plan, small = plan_of(2.0), plan_of(30.0)
    together = accounting.filter_epsilon(plan.events() * 2, DELTA, (plan_of(2.0, 2.0).epsilon(), DELTA))
    cap = 1.02 * together if filtered else 1.001 * plan_of(2.0, 2.0).epsilon()
    ledger = Ledger(ledger_url)
    ledger.open_account("two", budget_epsilon=cap, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    first, second = (
        reserve(ledger, "two", release_id=name, plan=plan, epsilon=0.9 * plan.epsilon()) for name in ("r1", "r2")
    )
    for entry in (first, second):
        ledger.bind_plan(entry.entry_id, plan)
    if cancelled == "before an output":
        ledger.close_failed(second.entry_id, reason="called off")
    begin(ledger, first, "s0", plan)
    ledger.close_failed(second.entry_id, reason="called off")
    assert ledger.books().spent("two") == pytest.approx(plan.epsilon(), abs=1e-9)
    refused = not filtered and cancelled == "after an output"
    assert (ledger.books().left("two") == 0) is refused
    shown = "in the way still" in statement(ledger, "two")
    assert shown is (cancelled == "after an output")
    with pytest.raises(BudgetError, match="with r2, cancelled after another release") if refused else nullcontext():
        run_release(ledger, "two", release_id="r3", plan=small)


def statement(ledger, account):
    return "\n".join(_statement(ledger.books(), account))


def test_a_plan_under_replace_one_that_is_cancelled_after_an_output_counts_on_under_it(ledger_url):
    """Its events may be unknown under the account's relation; and there the bill would be about half of it."""
    ledger = Ledger(ledger_url)
    plan = plan_of(2.0)
    local = ReleasePlan(
        mechanisms=(
            GaussianRecordPlan(stage="s0", max_norm=1.0, noise_multiplier=4.0),
            LabelPlan(stage="s1", num_classes=10, labels_per_unit=1, noise_parameter=0.8),
        ),
        delta=DELTA,
        relation="REPLACE_ONE",
        unit_of_privacy="one record",
    )
    cap = 1.001 * accounting.epsilon(
        [*plan.events(), *local.events()], DELTA, accounting.relation_from_name("REPLACE_ONE")
    )
    ledger.open_account("a", budget_epsilon=cap, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    first = reserve(ledger, release_id="r1", plan=plan, epsilon=1.0)
    ledger.bind_plan(first.entry_id, plan)
    second = reserve(ledger, release_id="r2", plan=local, epsilon=1.0)
    ledger.bind_plan(second.entry_id, local)
    begin(ledger, first, "s0", plan)
    ledger.close_failed(second.entry_id, reason="called off")
    assert ledger.books().left("a") == 0.0
    with pytest.raises(BudgetError, match="with r2, cancelled after another release"):
        reserve(ledger, release_id="r3", plan=plan, epsilon=1.0)


def test_what_failed_before_any_output_costs_no_share_of_delta(ledger_url):
    spent = {}
    for failures in (0, 3):
        ledger = Ledger(ledger_url)
        name = f"{failures} failures"
        ledger.open_account(name, budget_epsilon=6.0, delta=DELTA, relation="REPLACE_ONE")
        plan = plan_of(6.0, relation="REPLACE_ONE")
        for i in range(failures):
            entry = reserve(ledger, name, release_id=f"mistyped {i}", plan=plan, epsilon=1.0)
            ledger.close_failed(entry.entry_id, reason="no such file")
        for i in range(2):
            run_release(ledger, name, release_id=f"r{i}", plan=plan)
        spent[failures] = ledger.books().spent(name)
        with pytest.raises(BudgetError) as refused:
            reserve(ledger, name, release_id="r9", plan=plan, epsilon=6.0)
        assert "cancelled" not in str(refused.value)
    assert spent[0] == spent[3]


def test_what_is_left_beside_open_slots_can_be_spent_under_replace_one(ledger_url):
    ledger = Ledger(ledger_url)
    ledger.open_account("a", budget_epsilon=6.0, delta=DELTA, relation="REPLACE_ONE")
    plan = plan_of(12.0, relation="REPLACE_ONE")
    run_release(ledger, plan=plan)
    ledger.seal("a", [plan] * 2)
    left = ledger.books().left("a")
    for i in range(2):
        run_release(ledger, release_id=f"slot {i}", plan=plan)
    reserve(ledger, release_id="r9", plan=plan, epsilon=left)


def test_plans_of_records_and_of_persons_are_not_added_up(ledger):
    """Of a person with four records a release by records says no more than four times as much."""
    records, person = plan_of(12.0), "one person (at most 4 records)"
    persons = records.model_copy(update={"unit_of_privacy": person})
    others = records.model_copy(update={"unit_of_privacy": "one person (at most 8 records)"})
    run_release(ledger, plan=persons)
    run_release(ledger, release_id="r2", plan=others)
    entry = reserve(ledger, release_id="r3")
    with pytest.raises(
        LedgerError, match=r"protects one record, but account 'a' was billed for one person .* Name ano"
    ):
        ledger.bind_plan(entry.entry_id, records)
    with pytest.raises(LedgerError, match="protects one record"):
        ledger.seal("a", [records])
    with pytest.raises(LedgerError, match="plans of records and of persons"):
        ledger.seal("a", [records, persons])
    ledger.open_account("b", budget_epsilon=3.0, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    ledger.seal("b", [records])
    with pytest.raises(LedgerError, match="has a sealed schedule"):
        ledger.seal("b", [persons])
    slot = reserve(ledger, "b", release_id="r4")
    ledger.bind_plan(slot.entry_id, records)


def test_a_plan_without_a_statement_under_its_relation_is_not_bound(ledger):
    plan = plan_of(8.0)
    local = plan.model_copy(
        update={"mechanisms": (GaussianRecordPlan(stage="s0", max_norm=1.0, noise_multiplier=8.0),)}
    )
    entry = reserve(ledger)
    with pytest.raises(AccountingError, match="state it under REPLACE_ONE"):
        ledger.bind_plan(entry.entry_id, local)
    with pytest.raises(AccountingError, match="state it under REPLACE_ONE"):
        ledger.seal("a", [local])


def test_a_sealed_slot_is_taken_under_its_own_relation_only(ledger):
    ledger.raise_cap("a", 9.0)
    sealed = plan_of(4.0, relation="REPLACE_ONE")
    ledger.seal("a", [sealed])
    with pytest.raises(LedgerError, match="is sealed: REPLACE_ONE, delta 1e-05; asked was ADD_OR_REMOVE_ONE"):
        reserve(ledger, epsilon=1.0)
    assert len(ledger.books().account("a").schedule) == 1
    entry = reserve(ledger, plan=sealed, epsilon=1.0)
    ledger.bind_plan(entry.entry_id, sealed)
    assert ledger.books().spent("a") == pytest.approx(sealed.epsilon(), abs=1e-9)


def test_a_plan_that_is_only_held_yet_does_not_bind_what_follows(ledger_url):
    """Nothing of it can have run by PLD: bound, it would be held to the filter like everything that follows."""
    plan, small = plan_of(3.0), plan_of(25.0)
    cap = 1.03 * plan_of(3.0, 3.0, 4.0).epsilon()
    ledger = Ledger(ledger_url)
    ledger.open_account("a", budget_epsilon=cap, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    first, second = (reserve(ledger, release_id=n, plan=plan, epsilon=0.9 * plan.epsilon()) for n in ("r1", "r2"))
    for entry in (first, second):
        ledger.bind_plan(entry.entry_id, plan)
    reserve(ledger, release_id="held", plan=plan, epsilon=0.99 * plan_of(4.0).epsilon())
    begin(ledger, first, "s0", plan)
    ledger.close_failed(second.entry_id, reason="called off")
    assert ledger.books().left("a") > small.epsilon()
    run_release(ledger, release_id="r4", plan=small)


def test_a_cancelled_plan_of_another_cohort_is_in_nobodys_way(ledger):
    plan = plan_of(4.0)
    entries = {c: reserve(ledger, release_id=c, plan=plan, epsilon=1.0, cohort=c) for c in ("x", "y")}
    for entry in entries.values():
        ledger.bind_plan(entry.entry_id, plan)
    begin(ledger, entries["x"], "s0", plan)
    ledger.close_failed(entries["y"].entry_id, reason="called off")
    assert "in the way still" not in statement(ledger, "a")


def test_a_hold_that_is_cancelled_after_an_output_frees_its_budget(ledger):
    """No plan was fixed in it that PLD could have covered."""
    entries = [reserve(ledger, release_id=f"r{i}", epsilon=1.5, plan=plan_of(3.0)) for i in range(2)]
    ledger.bind_plan(entries[0].entry_id, plan_of(3.0))
    begin(ledger, entries[0], "s0", plan_of(3.0))
    before = ledger.books().left("a")
    ledger.close_failed(entries[1].entry_id, reason="called off")
    assert ledger.books().left("a") > before + 0.1


def test_a_sealed_slot_counts_for_every_cohort_whatever_its_release_names(ledger):
    """Who it reads was not fixed when the schedule was: naming a cohort later would take it off the others' bill."""
    plan = plan_of(2.0)
    ledger.seal("a", [plan])
    entry = reserve(ledger, plan=plan, cohort="a month", epsilon=plan.epsilon())
    assert reserve(ledger, plan=plan, cohort="a month", epsilon=plan.epsilon()) == entry, "a retry finds it"
    reserve(ledger, release_id="r2", cohort="another", epsilon=0.5)
    assert ledger.books().spent("a") > 1.02 * plan.epsilon()


def test_two_releases_reserved_before_either_ran_compose_as_one_pld(ledger):
    entries = [reserve(ledger, release_id=f"r{i}", epsilon=1.0) for i in range(2)]
    for entry in entries:
        ledger.bind_plan(entry.entry_id, PLAN)
    for entry in entries:
        begin(ledger, entry, "s0")
    assert ledger.books().spent("a") == pytest.approx(plan_of(8.0, 6.0, 8.0, 6.0).epsilon(), abs=1e-9)


def test_disjoint_cohorts_compose_in_parallel(ledger):
    for i in range(4):
        entry = reserve(ledger, release_id=f"r{i}", epsilon=2.5, cohort=f"month{i}")
        ledger.bind_plan(entry.entry_id, plan_of(2.0))
    assert ledger.books().spent("a") == pytest.approx(plan_of(2.0).epsilon(), abs=1e-9)
    with pytest.raises(BudgetError):  # a release of everybody meets the largest cohort
        reserve(ledger, release_id="all", epsilon=2.5)


def test_cohorts_do_not_help_under_replace_one(ledger_url):
    """A replacement may move a record from one cohort to another."""
    ledger = Ledger(ledger_url)
    ledger.open_account("a", budget_epsilon=9.0, delta=DELTA, relation="REPLACE_ONE")
    plan = plan_of(4.0, relation="REPLACE_ONE")
    for i in range(2):
        entry = reserve(ledger, release_id=f"r{i}", epsilon=3.0, plan=plan, cohort=f"month{i}")
        ledger.bind_plan(entry.entry_id, plan)
    assert ledger.books().spent("a") == pytest.approx(plan_of(4.0, 4.0, relation="REPLACE_ONE").epsilon(), abs=1e-9)


def test_one_replace_one_release_moves_the_whole_bill(ledger):
    ledger.raise_cap("a", 50.0)
    run_release(ledger, plan=plan_of(2.0))
    local = ReleasePlan(
        mechanisms=(GaussianRecordPlan(stage="s0", max_norm=1.0, noise_multiplier=4.0),),
        delta=DELTA,
        relation="REPLACE_ONE",
        unit_of_privacy="one record",
    )
    before = ledger.books().spent("a")
    run_release(ledger, release_id="r2", plan=local)
    assert ledger.books().spent("a") > plan_of(2.0, relation="REPLACE_ONE").epsilon() > 1.8 * before


def test_a_larger_delta_than_the_accounts_is_refused(ledger):
    with pytest.raises(BudgetError, match=r"delta=0\.0001 is above the 1e-05"):
        reserve(ledger, plan=plan_of(8.0, delta=1e-4))


# Retries


def test_a_retry_finds_its_reservation_and_the_same_keys(ledger):
    entry = reserve(ledger)
    assert reserve(ledger).entry_id == entry.entry_id
    ledger.bind_plan(entry.entry_id, PLAN)
    ledger.bind_plan(entry.entry_id, PLAN)
    first = begin(ledger, entry, "s0")
    links = ledger.links()
    assert begin(ledger, entry, "s0").secret == first.secret
    assert ledger.links() == links, "one mechanism, one debit"
    assert begin(ledger, entry, "s1").secret != first.secret


def test_a_new_execution_gets_new_noise(ledger):
    keys = set()
    for name in ("r1", "r2"):
        entry = reserve(ledger, release_id=name)
        ledger.bind_plan(entry.entry_id, PLAN)
        keys.add(begin(ledger, entry, "s0").secret)
    assert len(keys) == 2


@pytest.mark.parametrize("changed", ["data_digest", "code_digest"])
def test_the_same_key_with_changed_data_or_code_is_refused(ledger, changed):
    entry = reserve(ledger)
    ledger.bind_plan(entry.entry_id, PLAN)
    begin(ledger, entry, "s0")
    with pytest.raises(LedgerError, match="other data, settings or code: the same noise on another sum would cancel"):
        begin(ledger, entry, "s0", **{changed: "x"})


def test_two_releases_of_one_execution_with_other_settings_are_billed_and_keyed_apart(ledger):
    """Equal plans whose clip norms differ: one key would put the same noise on two sums."""
    first, second = (reserve(ledger, release_id=r, execution_id="e", config_digest=r) for r in ("r1", "r2"))
    assert first.entry_id != second.entry_id and len(ledger.find(execution_id="e")) == 2
    keys = []
    for entry, settings in ((first, "r1"), (second, "r2")):
        ledger.bind_plan(entry.entry_id, PLAN)
        keys.append(begin(ledger, entry, "s0", config_digest=settings).secret)
    assert keys[0] != keys[1]
    for stage in ("s0", "s1"):  # one that began, and one that did not
        with pytest.raises(LedgerError, match=r"other settings than release 'r1' was reserved for"):
            begin(ledger, first, stage, config_digest="r2")


def test_a_release_that_was_reserved_before_settings_were_noted_goes_on_with_those_of_its_first_stage(ledger):
    entry = reserve(ledger, config_digest="")
    ledger.bind_plan(entry.entry_id, PLAN)
    begin(ledger, entry, "s0", config_digest="a")
    with pytest.raises(LedgerError, match="other data, settings or code: the same noise on another sum would cancel"):
        begin(ledger, entry, "s0", config_digest="b")


def test_own_data_is_not_billed_to_a_public_account(ledger):
    """A public account has no cap: a config that still names it would spend without end."""
    promise = {"budget_epsilon": 3.0, "delta": DELTA, "relation": "ADD_OR_REMOVE_ONE"}
    ledger.open_account("b", **promise, public=True)
    with pytest.raises(BudgetError, match=r"account='b' is that of a public data set .* Name another account"):
        ledger.open_account("b", **promise)
    ledger.open_account("c", **promise)
    assert not ledger.open_account("c", **promise, public=True).public


@pytest.mark.parametrize(
    ("first", "second"), [("/scans", "/scans/a.npz"), ("/scans/a.npz", "/scans"), ("s3://b", "s3://b/x/y")]
)
def test_a_place_within_that_of_another_account_opens_none(ledger, first, second):
    """A folder and the file in it are the same people: two accounts would count them twice, each by half."""
    options = {"budget_epsilon": 1.0, "delta": DELTA, "relation": "ADD_OR_REMOVE_ONE"}
    ledger.open_account(first, **options)
    with pytest.raises(LedgerError, match=f"account '{second}' would be new.*set account: {first} if"):
        ledger.open_account(second, **options)
    assert second not in ledger.books().accounts
    for beside in ("/scans2", "/other/a.npz", "s3://b2/x", "a name", first):
        ledger.open_account(beside, **options)


def test_a_name_that_is_under_way_is_not_reserved_again(ledger):
    """Both would pay, and one could not write its bundle."""
    entry = reserve(ledger, epsilon=0.5)
    with pytest.raises(LedgerError, match=r"release_id='r1' is under way on account 'a'.*ledger close --account a"):
        reserve(ledger, epsilon=0.5, execution_id="another")
    assert reserve(ledger, epsilon=0.5).entry_id == entry.entry_id, "a retry is no other release"
    ledger.close_failed(entry.entry_id, reason="died")
    assert reserve(ledger, epsilon=0.5, execution_id="another").entry_id != entry.entry_id


def test_another_plan_or_stage_gets_no_key(ledger):
    entry = reserve(ledger)
    with pytest.raises(LedgerError, match="another plan"):
        begin(ledger, entry, "s0")
    ledger.bind_plan(entry.entry_id, PLAN)
    with pytest.raises(LedgerError, match="another plan"):
        begin(ledger, entry, "s0", plan=plan_of(0.1))
    with pytest.raises(LedgerError, match="not in the plan"):
        begin(ledger, entry, "s7")
    with pytest.raises(LedgerError, match="bound to another plan"):
        ledger.bind_plan(entry.entry_id, plan_of(7.0))


def test_debit_comes_before_the_key(ledger):
    """Trap: a stage that reads first and books later. The key exists only in the commit's return value."""
    entry = reserve(ledger)
    ledger.bind_plan(entry.entry_id, PLAN)
    begin(ledger, entry, "s0")
    assert ledger.links()[-1].kind == "commit"


# The end of a release


def test_keys_are_destroyed_after_publish(ledger, ledger_url):
    entry = run_release(ledger)
    with pytest.raises(LedgerError, match="its key is destroyed"):
        begin(ledger, entry, "s0")
    engine = sa.create_engine(ledger_url)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM dpldm_ledger_keys")).scalar() == 0
    engine.dispose()


def test_a_destroyed_key_is_gone_from_the_sqlite_file(tmp_path):
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    ledger.open_account("a", budget_epsilon=3.0, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    entry = run_release(ledger, publish=False)
    secret = ledger._chain.secret(entry.entry_id)
    assert secret in path.read_bytes()
    ledger.publish(entry.entry_id, bundle_digest="b")
    assert secret not in path.read_bytes()


def test_a_release_with_a_missing_mechanism_is_not_published(ledger):
    entry = reserve(ledger)
    ledger.bind_plan(entry.entry_id, PLAN)
    begin(ledger, entry, "s0")
    for close in (ledger.check_ready, partial(ledger.publish, bundle_digest="b")):
        with pytest.raises(LedgerError, match=r"\['s1'\] never began"):
            close(entry.entry_id)
    begin(ledger, entry, "s1")
    ledger.check_ready(entry.entry_id)
    ledger.publish(entry.entry_id, bundle_digest="b")
    ledger.check_ready(entry.entry_id)  # a retry


def test_publishing_twice_is_the_same_or_refused(ledger):
    entry = run_release(ledger)
    ledger.publish(entry.entry_id, bundle_digest="b")
    with pytest.raises(LedgerError, match="another bundle"):
        ledger.publish(entry.entry_id, bundle_digest="c")


def test_no_refund_after_a_read(ledger):
    """Trap: refund on failure."""
    entry = reserve(ledger)
    ledger.bind_plan(entry.entry_id, PLAN)
    begin(ledger, entry, "s0")
    assert ledger.close_failed(entry.entry_id, reason="x").state == "failed"
    assert ledger.books().spent("a") == pytest.approx(COST, abs=1e-12), "all of the plan stays booked"
    assert begin(ledger, entry, "s0"), "the same run can still be resumed"


def test_closed_for_good_a_failed_release_leaves_no_key(ledger):
    """Its bundle may be in place already: who holds the key could take the noise off what it publishes."""
    entry = reserve(ledger)
    ledger.bind_plan(entry.entry_id, PLAN)
    begin(ledger, entry, "s0")
    ledger.close_failed(entry.entry_id, reason="x")
    assert ledger.close_failed(entry.entry_id, reason="by hand", for_good=True).state == "failed"
    assert ledger.books().spent("a") == pytest.approx(COST, abs=1e-12)
    with pytest.raises(LedgerError, match="its key is destroyed"):
        begin(ledger, entry, "s0")


def test_a_hold_on_unread_data_is_lifted(ledger):
    entry = reserve(ledger)
    assert ledger.close_failed(entry.entry_id, reason="bad input").state == "cancelled"
    assert ledger.books().spent("a") == 0.0
    assert ledger.close_failed(entry.entry_id, reason="again").state == "cancelled"
    with pytest.raises(LedgerError, match="cancelled"):
        ledger.bind_plan(entry.entry_id, PLAN)


# Kill points


def _die_at(event_number):
    """Kill this process at the n-th thing that happens between it and the database."""
    seen = 0

    def step(*_arguments):
        nonlocal seen
        if seen == event_number:
            os._exit(9)
        seen += 1

    for name in ("before_cursor_execute", "after_cursor_execute", "commit", "begin"):
        sa.event.listen(sa.Engine, name, step)
    sa.event.listen(sa.pool.Pool, "checkin", step)  # after the commit
    return step


def _protocol_with_witness(url, event_number, witness):
    """A release that notes on a pipe what it revealed, and dies somewhere."""
    step = _die_at(event_number)
    ledger = Ledger(url)
    ledger.open_account("a", budget_epsilon=3.0, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    opened = [e for e in ledger.find(execution_id="r1") if e.plan is not None]
    entry = opened[0] if opened else reserve(ledger)  # as Flyte does: what open_release returned is not asked for again
    ledger.bind_plan(entry.entry_id, PLAN)
    for stage in ("s0", "s1"):
        key = begin(ledger, entry, stage)
        step()
        witness.send((stage, key.secret))
        step()
    ledger.publish(entry.entry_id, bundle_digest="b")
    witness.send(("published", b""))
    os._exit(0)


def test_killed_at_every_step_the_bill_never_under_counts(ledger_url):
    Ledger(ledger_url).open_account("a", budget_epsilon=3.0, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    kills, done, number = 0, False, 0
    while not done:
        receiver, sender = FORK.Pipe(duplex=False)
        child = FORK.Process(target=_protocol_with_witness, args=(ledger_url, number, sender))
        child.start()
        sender.close()
        revealed = []
        try:
            while True:
                revealed.append(receiver.recv())
        except EOFError:
            pass
        child.join()
        assert child.exitcode in (0, 9)
        kills, done, number = kills + (child.exitcode == 9), child.exitcode == 0, number + 1
        books = Ledger(ledger_url).books()
        stages = [name for name, _ in revealed if name != "published"]
        entries = [e for e in books.entries.values() if set(stages) <= set(e.stages)]
        if stages:
            assert entries and books.spent("a") >= COST - 1e-12, f"revealed {stages}, not on the bill"
            assert books.spent("a") <= COST + 1e-12, "one release, killed and retried, is booked once"
        if done:
            assert [name for name, _ in revealed] == ["s0", "s1", "published"]
        elif any(e.state == "published" for e in books.entries.values()):
            break  # killed after the last step
    assert kills > 30, "the protocol has more steps than that"


# Races


RACE_PLAN = plan_of(4.5)


def _racer(url, number, barrier, results):
    ledger = Ledger(url)
    barrier.wait()
    try:
        entry = reserve(ledger, release_id=f"r{number}", epsilon=1.01 * RACE_PLAN.epsilon())
        ledger.bind_plan(entry.entry_id, RACE_PLAN)
        results.put("won")
    except BudgetError:
        results.put("refused")
    except LedgerError as error:
        results.put(repr(error))


def test_sixteen_processes_racing_for_one_account_overspend_nothing(ledger, ledger_url):
    barrier, results = FORK.Barrier(16), FORK.Queue()
    racers = [FORK.Process(target=_racer, args=(ledger_url, i, barrier, results)) for i in range(16)]
    for racer in racers:
        racer.start()
    outcomes = [results.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    books = ledger.books()
    assert set(outcomes) == {"won", "refused"}
    assert books.spent("a") <= 3.0 and len(books.live("a")) == outcomes.count("won") > 2
    assert books.left("a") < 1.1 * RACE_PLAN.epsilon(), "nobody was refused while there was room"


def _creator(url, barrier, results):
    barrier.wait()
    try:
        Ledger(url).open_account("a", budget_epsilon=3.0, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
        results.put("ok")
    except LedgerError as error:
        results.put(repr(error))


def test_processes_may_create_the_same_ledger_at_once(ledger_url):
    barrier, results = FORK.Barrier(8), FORK.Queue()
    creators = [FORK.Process(target=_creator, args=(ledger_url, barrier, results)) for _ in range(8)]
    for creator in creators:
        creator.start()
    assert [results.get(timeout=60) for _ in creators] == ["ok"] * 8
    for creator in creators:
        creator.join()
    assert len(Ledger(ledger_url).links()) == 1


# Damage


EDITS = {
    "body": "UPDATE dpldm_ledger SET body = replace(body, '3.0', '9.0') WHERE seq = 1",
    "kind": "UPDATE dpldm_ledger SET kind = 'cancel' WHERE seq = 3",
    "time": "UPDATE dpldm_ledger SET time = '2001-01-01T00:00:00+00:00' WHERE seq = 2",
    "hash": "UPDATE dpldm_ledger SET hash = substr(hash, 2) || substr(hash, 1, 1) WHERE seq = 6",
    "row removed": "DELETE FROM dpldm_ledger WHERE seq = 3",
    "tail removed": "DELETE FROM dpldm_ledger WHERE seq > 4",
    "head moved": "UPDATE dpldm_ledger_head SET seq = 4",
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_ledger_is_refused(ledger, ledger_url, edit):
    run_release(ledger)
    engine = sa.create_engine(ledger_url)
    with engine.begin() as connection:
        assert connection.execute(sa.text(EDITS[edit])).rowcount >= 1
    engine.dispose()
    with pytest.raises(LedgerError, match=r"broken|missing"):
        ledger.books()
    with pytest.raises(LedgerError, match=r"broken|missing"):
        reserve(ledger, release_id="r2")


def test_a_clock_that_runs_backwards_is_survived_with_one_message(ledger, monkeypatch, caplog):
    class Yesterday(chain_module.datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return chain_module.datetime.datetime(2020, 1, 1, tzinfo=tz)

    first = ledger.links()[-1].time
    monkeypatch.setattr(chain_module.datetime, "datetime", Yesterday)
    reserve(ledger)
    assert ledger.links()[-1].time == first
    assert len([r for r in caplog.records if "the clock runs behind" in r.message]) == 1


def test_a_full_disk_loses_nothing(tmp_path):
    """SQLite reports SQLITE_FULL when the file may not grow: the same code path as a full disk."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.open_account("a", budget_epsilon=3.0, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    entry = reserve(ledger)
    before = ledger.links()

    def no_growth(connection, _record):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")

    sa.event.listen(ledger._chain._engine, "connect", no_growth)
    with pytest.raises(LedgerError, match="full"):
        for i in range(100):
            ledger.open_account(f"filler {i}" * 50, budget_epsilon=3.0, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    sa.event.remove(ledger._chain._engine, "connect", no_growth)
    assert ledger.links()[: len(before)] == before
    ledger.bind_plan(entry.entry_id, PLAN)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "no URL"),
        ("mysql://h/d", "only sqlite and postgresql"),
        ("sqlite://", "lost with the process"),
        ("sqlite:///ledger.db", "another, empty one in another folder; name the whole path: sqlite:////"),
        ("sqlite:////proc/nowhere/x.db", "fails"),
        ("postgresql://user:hunter2@127.0.0.1:1/x", "fails"),
    ],
)
def test_an_unreachable_ledger_is_one_clear_error(url, message):
    with pytest.raises(LedgerError, match=message) as caught:
        Ledger(url)
    assert "hunter2" not in str(caught.value)


def test_the_file_is_its_owners_alone(tmp_path):
    Ledger(f"sqlite:///{tmp_path / 'new' / 'ledger.db'}")
    assert (tmp_path / "new" / "ledger.db").stat().st_mode & 0o077 == 0
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_default_url():
    assert default_url({"DPLDM_LEDGER_URL": "postgresql://h/d"}) == "postgresql://h/d"
    assert default_url({}).startswith("sqlite:////") and default_url({}).endswith("/.dpldm/ledger.db")


def test_command_line(tmp_path, capsys):
    url = f"sqlite:///{tmp_path / 'ledger.db'}"

    def run(*arguments):
        status = main(["--url", url, *arguments])
        output = capsys.readouterr()
        return status, output.out + output.err

    assert run("open", "--account", "scans", "--budget-epsilon", "8")[1].startswith(
        "account scans: epsilon 0.0000 of 8 spent at delta 1e-05, ADD_OR_REMOVE_ONE"
    )
    status, message = run("open", "--account", "scans", "--budget-epsilon", "9")
    assert status == 1 and "--raise" in message
    plan = tmp_path / "plan.json"
    plan.write_text(plan_of(9.0).model_dump_json())
    schedule = ("plan", "--account", "scans", "--releases", "3")
    assert "sealed in advance (PLD)" in run(*schedule, "--plan", str(plan))[1]
    run_release(Ledger(url), "scans")
    shown = run("show")[1]
    assert f"epsilon {COST:.4f} of 8 spent" in shown and "r1" in shown and "published" in shown
    cost = run(*schedule, "--plan", str(plan))[1]
    assert "sealed in advance (Renyi filter)" in cost and "fits the cap of 8" in cost
    reserve(Ledger(url), "scans", release_id="stopped")
    assert "stopped" in run("show")[1]
    assert "stopped" not in run("close", "--account", "scans", "--release", "stopped")[1]
    assert run("close", "--account", "scans", "--release", "stopped")[0] == 1
    assert "published" in run("close", "--account", "scans", "--release", "r1")[1]
    replaced = tmp_path / "replaced.json"
    replaced.write_text(plan_of(9.0, relation="REPLACE_ONE").model_dump_json())
    assert "chosen one by one (basic composition)" in run(*schedule, "--plan", str(replaced))[1]
    persons = plan_of(9.0).model_copy(update={"unit_of_privacy": "one person (at most 4 records)"})
    replaced.write_text(persons.model_dump_json())
    assert "protects one person" in run(*schedule, "--plan", str(replaced))[1]
    assert "3 more releases of epsilon" in run(*schedule)[1]
    full = Ledger(url)
    full.open_account("full", budget_epsilon=PLAN.epsilon(), delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    run_release(full, "full", release_id="all", epsilon=PLAN.epsilon())
    nothing = run("plan", "--account", "full", "--releases", "1")[1]
    assert float(re.search(r"1 more releases of epsilon ([0-9.e-]+) each", nothing)[1]) < 1e-3
    assert "exceeds the cap" in run(*schedule, "--epsilon", "7")[1]
    assert "sealed: 3 releases" in run(*schedule, "--plan", str(plan), "--seal")[1]
    assert "3 sealed releases to go" in run("show", "--account", "scans")[1]
    assert run("show", "--account", "nobody")[0] == 1
    assert "the chain holds" in run("verify")[1]


def test_command_line_says_in_one_line_that_the_chain_is_broken(tmp_path):
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    Ledger(url).open_account("a", budget_epsilon=3.0, delta=DELTA, relation="ADD_OR_REMOVE_ONE")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE dpldm_ledger SET time = 'x' WHERE seq = 1"))
    engine.dispose()
    command = [sys.executable, "-m", "dpldm_core.privacy.ledger", "--url", url, "verify"]
    broken = subprocess.run(command, capture_output=True, text=True)
    assert broken.returncode == 1 and "broken at link 1" in broken.stderr and "Traceback" not in broken.stderr
