"""The books: accounts and entries, replayed from the links of the chain. Pure: reads no store and writes none."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpldm_core.errors import BudgetError, LedgerError
from dpldm_core.privacy import accounting
from dpldm_core.privacy.accounting import NeighboringRelation
from dpldm_core.privacy.budget import EVERY_COHORT, Claim, counting_on, joint_epsilon, placeholder
from dpldm_core.privacy.chain import Link
from dpldm_core.privacy.plan import ReleasePlan

TOLERANCE = 1e-9  # of a cap: room for floating point


@dataclass(frozen=True)
class Account:
    """One data set's bill.

    Args:
        name: Built-in name, path or URI of the data set.
        budget_epsilon: Cap on the joint epsilon of all releases; infinite for public data sets.
        delta: Delta at which the cap holds.
        relation: dp-accounting's name of the neighbouring relation of the cap.
        public: Whether the data protects nobody.
        schedule: Plans that were sealed in advance and are not taken yet, each with the link that sealed it.
    """

    name: str
    budget_epsilon: float
    delta: float
    relation: str
    public: bool
    schedule: tuple[tuple[int, ReleasePlan], ...] = ()


@dataclass(frozen=True)
class Entry:
    """One release on an account.

    Args:
        entry_id: Its name in the ledger.
        account: Name of the account.
        release_id: Name of the release.
        execution_id: Who runs it; a retry of the same execution finds its entry again.
        epsilon: Asked for.
        delta: Asked for.
        relation: dp-accounting's name of the relation of its statement.
        config_digest: Of its resolved configuration; empty in entries from before it was noted.
        cohort: Declared disjoint set of units; empty: all.
        opened_at: Link that reserved it, or sealed its slot.
        fixed_at: Link at which its events were fixed.
        sealed: Whether it took the slot of a sealed schedule, which counts for every cohort.
        plan: Its mechanisms; None until bound.
        stages: Binding of each mechanism that began, by stage.
        first_read_at: Link of the first mechanism's begin.
        cancelled_at: Link that cancelled it.
        state: reserved, committed, failed, published or cancelled.
    """

    entry_id: str
    account: str
    release_id: str
    execution_id: str
    epsilon: float
    delta: float
    relation: str
    cohort: str
    opened_at: int
    fixed_at: int
    config_digest: str = ""
    sealed: bool = False
    plan: ReleasePlan | None = None
    stages: Mapping[str, str] = field(default_factory=dict)
    first_read_at: int | None = None
    cancelled_at: int | None = None
    state: str = "reserved"

    def claim(self) -> Claim:
        """What it may cost; a hold that was cancelled keeps nothing but its place in the order."""
        if self.plan is not None:
            events, truncation = tuple(self.plan.events()), self.plan.truncation()
        elif self.cancelled_at is None:
            hold = placeholder(self.epsilon, self.delta, accounting.relation_from_name(self.relation))
            events, truncation = (hold,), 0.0
        else:
            events, truncation = (), 0.0
        return Claim(
            events,
            truncation,
            opened_at=self.opened_at,
            fixed_at=self.fixed_at,
            first_read_at=self.first_read_at,
            cohort=EVERY_COHORT if self.sealed else self.cohort,
            withdrawn_at=self.cancelled_at,
            held=self.plan is None,
        )


@dataclass
class Books:
    """All accounts and entries, folded from the chain."""

    accounts: dict[str, Account] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)

    def account(self, name: str) -> Account:
        """An open account.

        Raises:
            LedgerError: There is none of that name.
        """
        if name not in self.accounts:
            raise LedgerError(f"account={name!r} is not open. Open: {', '.join(self.accounts) or 'none'}")
        return self.accounts[name]

    def entry(self, entry_id: str) -> Entry:
        """An entry.

        Raises:
            LedgerError: There is none of that name.
        """
        if entry_id not in self.entries:
            raise LedgerError(f"entry={entry_id!r} is not in the ledger")
        return self.entries[entry_id]

    def live(self, account: str) -> list[Entry]:
        """Entries of an account that were not cancelled."""
        return [e for e in self.entries.values() if e.account == account and e.state != "cancelled"]

    def counting_on(self, account: str, *relations: NeighboringRelation) -> list[Entry]:
        """Cancelled entries that stay in the way of further releases under a relation (docs/decisions/0007)."""
        entries = [e for e in self.entries.values() if e.account == account]
        claims = [e.claim() for e in entries]
        kept = [c for relation in relations for c in counting_on(claims, relation)]
        return [e for e, claim in zip(entries, claims, strict=True) if claim in kept]

    def spent(self, account: str) -> float:
        """Joint epsilon of everything reserved on an account, at its delta; :meth:`check` is what holds to the cap."""
        claims, delta, relation = self.claims(account)
        return joint_epsilon(claims, delta, relation)

    def left(self, account: str) -> float:
        """Epsilon of the largest further Gaussian release that the cap allows, rounded down to 0.001."""
        opened = self.account(account)
        if math.isinf(opened.budget_epsilon):
            return math.inf
        claims, delta, relation = self.claims(account)
        opened_at = [*(e.opened_at for e in self.entries.values()), *(at for at, _ in opened.schedule)]
        after = max([*opened_at, *(e.first_read_at or 0 for e in self.live(account))], default=0) + 1
        low, high = 0.0, opened.budget_epsilon
        while high - low > 1e-3 * opened.budget_epsilon:
            middle = (low + high) / 2
            more = Claim((placeholder(middle, delta, relation),), 0.0, after, after, None)
            low, high = (middle, high) if self._fits(opened, [*claims, more], relation) else (low, middle)
        return math.floor(low * 1000) / 1000

    def check_place(self, name: str) -> None:
        """Refuse a new account for a place within that of another one, or around it: the same people twice.

        Raises:
            LedgerError: Names that account and the way out.
        """
        for other in self.accounts:
            inner, outer = sorted((name, other), key=len, reverse=True)
            if "/" in outer and inner.startswith(outer.rstrip("/") + "/"):
                raise LedgerError(
                    f"account {name!r} would be new, but that place and the one of account {other!r} lie in one "
                    f"another. In the file that --config names, set account: {other} if anybody is in both, else a "
                    "name that is no path"
                )

    def check_name(self, release_id: str) -> None:
        """Refuse the name of a release that is under way: both would pay, and one could not be written.

        Raises:
            LedgerError: Names its account and the way out.
        """
        for entry in self.entries.values():
            if entry.release_id == release_id and entry.state in ("reserved", "committed"):
                raise LedgerError(
                    f"release_id={release_id!r} is under way on account {entry.account!r}. Take another name, or close "
                    f"that one if it died: {sys.executable} -m dpldm_core.privacy.ledger close --account "
                    f"{shlex.quote(entry.account)} --release {shlex.quote(release_id)}"
                )

    def check(self, account: str, asked: str) -> None:
        """Refuse when the account is past its cap.

        Raises:
            BudgetError: Says what was asked, what is spent and by whom, and the way out.
        """
        opened = self.account(account)
        claims, _, relation = self.claims(account)
        if math.isinf(opened.budget_epsilon) or self._fits(opened, claims, relation):
            return
        others = Books(self.accounts, {k: e for k, e in self.entries.items() if e.release_id != asked})
        by = ", ".join(e.release_id for e in others.live(account)) or "no release"
        after = joint_epsilon(claims, opened.delta, relation, cap=opened.budget_epsilon)
        spent, left = others.spent(account), others.left(account)
        late = ", ".join(e.release_id for e in self.counting_on(account, relation))
        counts = f" (with {late}, cancelled after another release had read, which counts on)" if late else ""
        raise BudgetError(
            f"the budget of account {account!r} does not cover release {asked!r}: of epsilon {opened.budget_epsilon:g} "
            f"(delta {opened.delta:g}, {relation.name}), {spent:.4g} is spent by {by}; with this release it would be "
            f"{after:.4g}{counts}; about {left:.3f} is left for one more. Ask for less, or raise the cap: "
            f"{raise_command(account)}"
        )

    def claims(self, account: str) -> tuple[list[Claim], float, NeighboringRelation]:
        """All claims of an account. One release that holds under REPLACE_ONE only moves the whole bill there."""
        opened, entries = self.account(account), [e for e in self.entries.values() if e.account == account]
        on = [*self.live(account), *self.counting_on(account, *NeighboringRelation)]
        relations = {opened.relation, *((e.plan or e).relation for e in on), *(p.relation for _, p in opened.schedule)}
        name = "REPLACE_ONE" if "REPLACE_ONE" in relations else opened.relation
        slots = [Claim(tuple(p.events()), p.truncation(), at, at, None) for at, p in opened.schedule]
        return [*(e.claim() for e in entries), *slots], opened.delta, accounting.relation_from_name(name)

    def check_unit(self, account: str, plan: ReleasePlan) -> None:
        """Refuse a plan that protects another kind of unit than the account's other plans: their costs do not add up.

        Raises:
            LedgerError: Says which units.
        """
        bound = [e.plan for e in self.live(account) if e.plan is not None]
        for other in (*bound, *(p for _, p in self.account(account).schedule)):
            if other.grouped != plan.grouped:
                raise LedgerError(
                    f"the plan protects {plan.unit_of_privacy}, but account {account!r} was billed for "
                    f"{other.unit_of_privacy}: no sum of both says anything. Name another account in the config file"
                )

    def _fits(self, account: Account, claims: Sequence[Claim], relation: NeighboringRelation) -> bool:
        cap = account.budget_epsilon
        return joint_epsilon(claims, account.delta, relation, cap=cap) <= cap * (1 + TOLERANCE)


def fold(links: Sequence[Link]) -> Books:
    """Replay the chain.

    Raises:
        LedgerError: A link of an unknown kind: written by a newer version.
    """
    books = Books()
    for link in links:
        body = dict(link.body)
        if link.kind == "open":
            cap = body.pop("budget_epsilon")
            books.accounts[body["name"]] = Account(budget_epsilon=math.inf if cap is None else cap, **body)
        elif link.kind == "raise":
            account = books.account(body["name"])
            books.accounts[account.name] = replace(account, budget_epsilon=body["budget_epsilon"])
        elif link.kind == "seal":
            account = books.account(body["account"])
            slots = tuple((link.seq, ReleasePlan.model_validate(plan)) for plan in body["plans"])
            books.accounts[account.name] = replace(account, schedule=account.schedule + slots)
        elif link.kind == "reserve":
            account = books.account(body["account"])
            entry = Entry(opened_at=link.seq, fixed_at=link.seq, **body)
            if account.schedule:  # the next sealed slot becomes this entry: fixed when it was sealed
                (sealed_at, plan), *rest = account.schedule
                entry = replace(entry, opened_at=sealed_at, fixed_at=sealed_at, sealed=True, plan=plan)
                books.accounts[account.name] = replace(account, schedule=tuple(rest))
            books.entries[entry.entry_id] = entry
        else:
            _fold_entry(books, link, body)
    return books


def _fold_entry(books: Books, link: Link, body: dict[str, Any]) -> None:
    entry = books.entry(body["entry_id"])
    if link.kind == "plan":
        entry = replace(entry, plan=ReleasePlan.model_validate(body["plan"]), fixed_at=link.seq)
    elif link.kind == "commit":
        stages = {**entry.stages, body["stage"]: body["binding"]}
        entry = replace(entry, stages=stages, state="committed", first_read_at=entry.first_read_at or link.seq)
    elif link.kind == "cancel":
        entry = replace(entry, state="cancelled", cancelled_at=link.seq)
    elif link.kind in ("fail", "publish"):
        entry = replace(entry, state={"fail": "failed", "publish": "published"}[link.kind])
    else:
        raise LedgerError(f"ledger link {link.seq} is of kind {link.kind!r}, which this version of dpldm does not know")
    books.entries[entry.entry_id] = entry


def raise_command(account: str, budget_epsilon: float | None = None) -> str:
    """The command that raises a cap, for messages."""
    cap = "E" if budget_epsilon is None else f"{budget_epsilon:g}"
    return f"{sys.executable} -m dpldm_core.privacy.ledger open --account {account!r} --budget-epsilon {cap} --raise"
