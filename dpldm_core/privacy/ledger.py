"""The ledger: what was promised on each account, before anything private is read, and what is left.

Protocol of a release: reserve -> bind_plan -> begin_stage (once a mechanism) -> publish. Each step is one link of the
chain (chain.py), written before what it stands for happens, so a process that dies anywhere leaves a bill that counts
too much rather than too little. A reservation may be cancelled until its first mechanism began; never after.

Entries hold events, never epsilons: what an account has spent is composed anew from them (books.py, budget.py). A
stage's secret key is derived from the entry's secret and the digests of data, plan, settings and code, so a retry
repeats the same noise and is one mechanism; with any of them changed it is refused, since equal noise would cancel.
Secrets are destroyed after publication. Command line: ``python -m dpldm_core.privacy.ledger --help`` (ledger_cli.py).
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dpldm_core.errors import BudgetError, LedgerError
from dpldm_core.privacy import accounting
from dpldm_core.privacy.books import Account, Books, Entry, fold, raise_command
from dpldm_core.privacy.budget import EVERY_COHORT
from dpldm_core.privacy.chain import Chain, Change, Link
from dpldm_core.privacy.plan import ReleasePlan
from dpldm_core.rng import SecretKey


class Ledger:
    """The protocol on one store.

    Args:
        url: SQLAlchemy URL of SQLite or PostgreSQL; see :func:`default_url`.
    """

    def __init__(self, url: str) -> None:
        self._chain = Chain(url)

    def books(self) -> Books:
        """Everything that stands in the ledger, checked."""
        return fold(self._chain.read())

    def links(self) -> list[Link]:
        """The raw chain, checked."""
        return self._chain.read()

    def open_account(
        self, name: str, *, budget_epsilon: float, delta: float, relation: str, public: bool = False
    ) -> Account:
        """Open an account, or find it open: its cap then stays as it is.

        Args:
            name: Of the account.
            budget_epsilon: Cap on the joint epsilon; infinite only for public data.
            delta: Delta of the cap.
            relation: dp-accounting's name of the relation of the cap.
            public: Whether the data protects nobody.

        Returns:
            The account as it stands.

        Raises:
            BudgetError: The account is open with a lower cap, which only :meth:`raise_cap` raises; or it is of public
                data, and this is not.
            LedgerError: It is new, and its place lies within that of another account, or holds it.
        """
        accounting.relation_from_name(relation)
        if not budget_epsilon > 0 or (math.isinf(budget_epsilon) and not public):
            raise BudgetError(f"budget_epsilon={budget_epsilon} must be a finite number above 0")

        def decide(links: list[Link]) -> Change | None:
            known = fold(links).accounts.get(name)
            if known is None:
                fold(links).check_place(name)
                cap = None if math.isinf(budget_epsilon) else float(budget_epsilon)
                body = {"name": name, "budget_epsilon": cap, "delta": delta, "relation": relation, "public": public}
                return Change("open", body)
            if known.public and not public:
                raise BudgetError(
                    f"account={name!r} is that of a public data set and has no cap, and this release is of own data. "
                    "Name another account in the config file, or leave account out"
                )
            if budget_epsilon > known.budget_epsilon and not public:
                raise BudgetError(
                    f"budget_epsilon={budget_epsilon:g}, but account {name!r} is open with a cap of "
                    f"{known.budget_epsilon:g}, which no release may raise. Use: {raise_command(name, budget_epsilon)}"
                )
            return None

        return fold(self._chain.append(decide)).account(name)

    def raise_cap(self, name: str, budget_epsilon: float) -> Account:
        """Raise the cap of an account, explicitly.

        Raises:
            BudgetError: It is not above the present one.
        """

        def decide(links: list[Link]) -> Change:
            account = fold(links).account(name)
            if not (math.isfinite(budget_epsilon) and budget_epsilon > account.budget_epsilon):
                raise BudgetError(f"budget_epsilon={budget_epsilon} is not above the cap of {account.budget_epsilon:g}")
            return Change("raise", {"name": name, "budget_epsilon": float(budget_epsilon)})

        return fold(self._chain.append(decide)).account(name)

    def seal(self, name: str, plans: Sequence[ReleasePlan]) -> Account:
        """Seal a schedule: the next releases of the account are these plans, in order, and compose as one PLD.

        Raises:
            BudgetError: The cap does not cover them all.
        """

        def decide(links: list[Link]) -> Change:
            books = fold(links)
            account = books.account(name)
            if account.schedule:
                raise LedgerError(f"account {name!r} has a sealed schedule with {len(account.schedule)} releases to go")
            slots = tuple((len(links) + 1, plan) for plan in plans)
            if len({plan.grouped for plan in plans}) > 1:
                raise LedgerError("the schedule holds plans of records and of persons: no sum of both says anything")
            for plan in plans:
                plan.check_relation(accounting.relation_from_name(plan.relation))
                if not account.public:
                    books.check_unit(name, plan)
            books.accounts[name] = replace(account, schedule=slots)
            _check_delta(account, max(plan.delta for plan in plans))
            books.check(name, "of the schedule")
            return Change("seal", {"account": name, "plans": [plan.model_dump(mode="json") for plan in plans]})

        return fold(self._chain.append(decide)).account(name)

    def reserve(
        self,
        account: str,
        *,
        release_id: str,
        execution_id: str,
        epsilon: float,
        delta: float,
        relation: str,
        config_digest: str,
        cohort: str = EVERY_COHORT,
    ) -> Entry:
        """Hold the asked budget, before any private data is read.

        A retry of the same execution with the same settings finds its entry; with others it is another release.

        Raises:
            BudgetError: The cap does not cover it; says what is left.
            LedgerError: A release of that name is under way.
        """
        body = {
            "entry_id": secrets.token_hex(8),
            "account": account,
            "release_id": release_id,
            "execution_id": execution_id,
            "epsilon": epsilon,
            "delta": delta,
            "relation": relation,
            "config_digest": config_digest,
            "cohort": cohort,
        }

        def same(entry: Entry) -> bool:
            return entry.state == "reserved" and all(
                getattr(entry, k) == v for k, v in body.items() if k not in ("entry_id", "release_id")
            )

        def decide(links: list[Link]) -> Change | None:
            books = fold(links)
            if any(same(entry) for entry in books.entries.values()):
                return None
            books.check_name(release_id)
            _check_delta(books.account(account), delta)
            for _, sealed in books.account(account).schedule[:1]:  # which this release would take
                if (sealed.relation, sealed.delta) != (relation, delta):
                    raise LedgerError(
                        f"the next release of account {account!r} is sealed: {sealed.relation}, delta "
                        f"{sealed.delta:g}; asked was {relation}, delta {delta:g}"
                    )
            after = fold([*links, Link(len(links) + 1, "", "reserve", body, "")])
            after.check(account, release_id)
            return Change("reserve", body, new_secret=(str(body["entry_id"]), SecretKey.generate().secret))

        entries = fold(self._chain.append(decide)).entries.values()
        return next(entry for entry in reversed(list(entries)) if same(entry))

    def bind_plan(self, entry_id: str, plan: ReleasePlan) -> Entry:
        """Put the release's mechanisms in the place of the hold. From here on the plan cannot change.

        Raises:
            LedgerError: Another plan is bound, or the sealed schedule expects another one.
            BudgetError: The cap does not cover the plan.
        """

        def decide(links: list[Link]) -> Change | None:
            books = fold(links)
            entry = books.entry(entry_id)
            if (plan.relation, plan.delta) != (entry.relation, entry.delta):
                raise LedgerError(f"the plan states {plan.relation}, delta {plan.delta}; reserved was another promise")
            if entry.plan is not None:
                if entry.plan.digest() == plan.digest():
                    return None
                raise LedgerError(f"release {entry.release_id!r} is bound to another plan (or its sealed schedule is)")
            if entry.state != "reserved":
                raise LedgerError(f"release {entry.release_id!r} is {entry.state}: no plan can be bound to it")
            plan.check_relation(accounting.relation_from_name(plan.relation))
            if not books.account(entry.account).public:
                books.check_unit(entry.account, plan)
            books.entries[entry_id] = replace(entry, plan=plan, fixed_at=len(links) + 1)
            books.check(entry.account, entry.release_id)
            return Change("plan", {"entry_id": entry_id, "plan": plan.model_dump(mode="json")})

        return fold(self._chain.append(decide)).entry(entry_id)

    def begin_stage(
        self, entry_id: str, stage: str, *, data_digest: str, plan_digest: str, config_digest: str, code_digest: str
    ) -> SecretKey:
        """Commit a mechanism before it reads its data, and hand out its key.

        Args:
            entry_id: The release's entry.
            stage: Stage of the bound plan.
            data_digest: Of the private file that it is about to read.
            plan_digest: Of the plan that it runs.
            config_digest: Of the release's resolved configuration, which says what the mechanism measures.
            code_digest: Of the code that runs it.

        Returns:
            The stage's key; the same one again for a retry on the same data, plan, settings and code.

        Raises:
            LedgerError: The release is over, the plan is not the bound one, or data, settings or code are not those of
                the first try.
        """
        secret = self._chain.secret(entry_id)
        bound_to = stage, data_digest, plan_digest, config_digest, code_digest
        binding = "" if secret is None else _binding(secret, *bound_to)

        def decide(links: list[Link]) -> Change | None:
            entry = fold(links).entry(entry_id)
            if secret is None or entry.state in ("published", "cancelled"):
                raise LedgerError(
                    f"release {entry.release_id!r} is {entry.state}: its key is destroyed, no stage can run"
                )
            if entry.plan is None or entry.plan.digest() != plan_digest:
                raise LedgerError(f"stage {stage!r} runs another plan than the one that the ledger holds: refused")
            if stage not in entry.plan.stages():
                raise LedgerError(f"stage {stage!r} is not in the plan of release {entry.release_id!r}: not paid for")
            if entry.config_digest not in ("", config_digest):  # empty: reserved before settings were noted
                raise LedgerError(
                    f"stage {stage!r} runs other settings than release {entry.release_id!r} was reserved for"
                )
            if stage in entry.stages:
                if hmac.compare_digest(entry.stages[stage], binding):
                    return None
                raise LedgerError(
                    f"stage {stage!r} of release {entry.release_id!r} began with other data, settings or code: the "
                    "same noise on another sum would cancel. Start a new release"
                )
            return Change("commit", {"entry_id": entry_id, "stage": stage, "binding": binding})

        self._chain.append(decide)
        assert secret is not None
        return SecretKey(secret).derive("stage", *bound_to)

    def check_ready(self, entry_id: str) -> None:
        """Refuse a release that :meth:`publish` would refuse, before its bundle is written.

        Raises:
            LedgerError: It was cancelled, or a mechanism of its plan never began.
        """
        _check_complete(self.books().entry(entry_id))

    def publish(self, entry_id: str, *, bundle_digest: str) -> Entry:
        """Note the published bundle and destroy the release's secret.

        Raises:
            LedgerError: A mechanism of the plan never began, or another bundle was published.
        """

        def decide(links: list[Link]) -> Change | None:
            entry = fold(links).entry(entry_id)
            body = {"entry_id": entry_id, "bundle_digest": bundle_digest}
            if entry.state == "published":
                if any(link.kind == "publish" and link.body == body for link in links):
                    return None
                raise LedgerError(f"release {entry.release_id!r} was published with another bundle")
            _check_complete(entry)
            return Change("publish", body, destroy_secret=entry_id)

        return fold(self._chain.append(decide)).entry(entry_id)

    def close_failed(self, entry_id: str, *, reason: str, for_good: bool = False) -> Entry:
        """Close a release that failed: cancelled when no mechanism began, else its cost stays for ever.

        A plan that is cancelled when another release's output is known may count on (docs/decisions/0007).
        A failed release keeps its secret, so that the same run can still be resumed, unless it is closed for good.
        """

        def decide(links: list[Link]) -> Change | None:
            entry = fold(links).entry(entry_id)
            if entry.state in ("published", "cancelled") or (entry.state == "failed" and not for_good):
                return None
            body = {"entry_id": entry_id, "reason": reason}
            if entry.stages:
                return Change("fail", body, destroy_secret=entry_id if for_good else None)
            return Change("cancel", body, destroy_secret=entry_id)

        return fold(self._chain.append(decide)).entry(entry_id)

    def find(self, *, execution_id: str) -> list[Entry]:
        """Entries of one execution."""
        return [e for e in self.books().entries.values() if e.execution_id == execution_id]


def default_url(environ: Mapping[str, str]) -> str:
    """DPLDM_LEDGER_URL of an environment, else one SQLite file in the home folder, whatever ``out`` is."""
    return environ.get("DPLDM_LEDGER_URL") or f"sqlite:///{Path.home() / '.dpldm' / 'ledger.db'}"


def _check_delta(account: Account, delta: float) -> None:
    if delta > account.delta and not account.public:
        raise BudgetError(
            f"delta={delta:g} is above the {account.delta:g} of account {account.name!r}; ask for that or less"
        )


def _check_complete(entry: Entry) -> None:
    planned = set() if entry.plan is None else set(entry.plan.stages())
    if entry.state == "cancelled" or not planned or planned != set(entry.stages):
        raise LedgerError(
            f"release {entry.release_id!r} cannot be published: it is {entry.state}, and of its mechanisms "
            f"{sorted(planned - set(entry.stages))} never began"
        )


def _binding(secret: bytes, *parts: str) -> str:
    """HMAC of the digests under the entry's secret: once that is destroyed, it tells nothing about the data."""
    return hmac.new(secret, "\0".join(parts).encode(), hashlib.sha256).hexdigest()


if __name__ == "__main__":
    from dpldm_core.privacy.ledger_cli import main

    raise SystemExit(main())
