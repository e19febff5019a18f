"""Command line of the ledger: what is spent, by which release, what is left, and what a schedule would cost."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dpldm_core.errors import BudgetError, DpldmError, LedgerError
from dpldm_core.privacy import accounting
from dpldm_core.privacy.accounting import NeighboringRelation
from dpldm_core.privacy.books import Books
from dpldm_core.privacy.budget import Claim, joint_epsilon, placeholder
from dpldm_core.privacy.ledger import Ledger, default_url
from dpldm_core.privacy.plan import ReleasePlan


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 when all went well, 1 with one message when not."""
    parser = argparse.ArgumentParser(
        prog="python -m dpldm_core.privacy.ledger", description="The privacy budget ledger."
    )
    parser.add_argument("--url", default=default_url(os.environ), help="SQLAlchemy URL (default: DPLDM_LEDGER_URL)")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("open", help="open an account, or raise its cap with --raise")
    one.add_argument("--account", required=True, help="built-in name, path or URI of the data set")
    one.add_argument("--budget-epsilon", type=float, required=True, help="cap on all its releases together")
    one.add_argument("--delta", type=float, default=1e-5)
    one.add_argument("--relation", default="ADD_OR_REMOVE_ONE", choices=["ADD_OR_REMOVE_ONE", "REPLACE_ONE"])
    one.add_argument("--raise", dest="raise_cap", action="store_true", help="raise the cap of an open account")
    two = commands.add_parser("show", help="what is spent, by which release, and what is left")
    two.add_argument("--account", help="one account only")
    three = commands.add_parser("plan", help="what further releases would cost")
    three.add_argument("--account", required=True)
    three.add_argument("--releases", type=int, required=True, help="how many more releases")
    three.add_argument("--epsilon", type=float, help="of each; default: the most that the cap allows")
    three.add_argument("--plan", type=Path, help="privacy plan of each (JSON of a ReleasePlan) instead of --epsilon")
    three.add_argument("--seal", action="store_true", help="with --plan: seal them as the account's schedule")
    four = commands.add_parser(
        "close", help="close a release that was stopped; frees its budget if nothing has read, and destroys its key"
    )
    four.add_argument("--account", required=True)
    four.add_argument("--release", required=True, help="as `show` names it; it must not run any more")
    commands.add_parser("verify", help="check the whole chain")
    arguments = parser.parse_args(argv)
    try:
        print("\n".join(_run(Ledger(arguments.url), arguments)))
    except (DpldmError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run(ledger: Ledger, arguments: argparse.Namespace) -> list[str]:
    if arguments.command == "open":
        if arguments.raise_cap:
            ledger.raise_cap(arguments.account, arguments.budget_epsilon)
        else:
            ledger.open_account(
                arguments.account,
                budget_epsilon=arguments.budget_epsilon,
                delta=arguments.delta,
                relation=arguments.relation,
            )
    if arguments.command == "verify":
        links = ledger.links()
        return [f"the chain holds: {len(links)} links, head {links[-1].hash if links else 'none'}"]
    if arguments.command == "close":
        stopped = [e for e in ledger.books().live(arguments.account) if e.release_id == arguments.release]
        if not stopped:
            raise LedgerError(f"account {arguments.account!r} has no open release={arguments.release!r}")
        for entry in stopped:
            ledger.close_failed(entry.entry_id, reason="closed by hand", for_good=True)
    if arguments.command == "plan":
        return _forecast(ledger, arguments)
    books = ledger.books()
    names = [arguments.account] if arguments.account else list(books.accounts)
    return [line for name in names for line in _statement(books, name)] or ["no account is open"]


def _statement(books: Books, name: str) -> list[str]:
    """One account in words."""
    account, entries, relation = books.account(name), books.live(name), books.claims(name)[2]
    late = [] if math.isinf(account.budget_epsilon) else books.counting_on(name, relation)
    lines = [
        f"account {name}{' (public data)' * account.public}: epsilon {books.spent(name):.4f} of "
        f"{account.budget_epsilon:g} spent at delta {account.delta:g}, {relation.name}; left for one more release: "
        f"about {books.left(name):.3f}"
    ]
    lines += [
        f"  {e.release_id:40s} {e.state:10s} epsilon {e.epsilon:g}  {', '.join(e.stages) or '-'}" for e in entries
    ]
    lines += [f"  {e.release_id:40s} {e.state:10s} after another release had read: in the way still" for e in late]
    return lines + [f"  {len(account.schedule)} sealed releases to go"] * bool(account.schedule)


def _forecast(ledger: Ledger, arguments: argparse.Namespace) -> list[str]:
    """Joint epsilon of further releases, sealed in advance and chosen one by one."""
    books, count = ledger.books(), arguments.releases
    account = books.account(arguments.account)
    if count < 1:
        raise BudgetError(f"releases={count} must be 1 or more")
    if arguments.plan:
        plan = ReleasePlan.model_validate_json(arguments.plan.read_text())
        if arguments.seal:
            ledger.seal(account.name, [plan] * count)
            return [f"sealed: {count} releases of plan {plan.digest()[:12]} on account {account.name}"]
        events, truncation = tuple(plan.events()), plan.truncation()
    claims, delta, relation = books.claims(account.name)
    if arguments.plan:
        plan.check_relation(accounting.relation_from_name(plan.relation))
        if not account.public:
            books.check_unit(account.name, plan)
        relation = NeighboringRelation.REPLACE_ONE if plan.relation == "REPLACE_ONE" else relation
    following = len(ledger.links()) + 1
    cap = None if math.isinf(account.budget_epsilon) else account.budget_epsilon

    def joint(epsilon: float | None, *, sealed: bool) -> float:
        cost = events if epsilon is None else (placeholder(epsilon, delta, relation),)
        at = [following] * count if sealed else range(following, following + 2 * count, 2)
        cut = 0.0 if epsilon is not None else truncation
        more = [Claim(cost, cut, k, k, None if sealed else k + 1) for k in at]
        return joint_epsilon([*claims, *more], delta, relation, cap=cap)

    each = arguments.epsilon
    if not arguments.plan and each is None:
        each = _largest(lambda e: joint(e, sealed=True) <= account.budget_epsilon, account.budget_epsilon)
    lines = [f"{count} more releases{f' of epsilon {each:.4g} each' if each is not None else ' of this plan'}:"]
    chosen = "basic composition" if relation is NeighboringRelation.REPLACE_ONE else "Renyi filter"
    at_once = "PLD" if all(c.first_read_at is None for c in claims) else chosen
    for sealed, how in ((True, f"sealed in advance ({at_once})"), (False, f"chosen one by one ({chosen})")):
        total = joint(each, sealed=sealed)
        verdict = "fits" if total <= account.budget_epsilon else "exceeds"
        lines.append(f"  {how}: epsilon {total:.4f} in total, {verdict} the cap of {account.budget_epsilon:g}")
    return lines


def _largest(fits: Callable[[float], bool], high: float) -> float:
    """The largest epsilon below ``high`` that fits, to 0.1 % or 0.0001; 0 when none does."""
    low, high = 0.0, min(high, 100.0)
    while high - low > max(1e-3 * high, 1e-4):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
