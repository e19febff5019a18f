"""Privacy accounting: events in, (epsilon, delta) out. The only file that imports dp_accounting.

The published number is the PLD accountant's (Doroshenko et al. 2022, "connect the dots"), an upper bound for any
discretisation interval. Opacus' PRV accountant and RDP are alarms: they must agree before a number is published.

What may never change: an event written by an old version keeps its meaning. Noise multipliers in events are the
standard deviation over the L2 norm that one record is clipped to, under both relations; PLD doubles the sensitivity
itself under REPLACE_ONE. (RdpAccountant does not, so it is never asked under REPLACE_ONE.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import DpEvent, NeighboringRelation
from dp_accounting import dp_event as dpe
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from scipy.optimize import brentq
from scipy.stats import norm

from dpldm_core.errors import AccountingError

__all__ = ["DpEvent", "NeighboringRelation"]  # what others take from dp-accounting, they take from here

VALUE_DISCRETIZATION_INTERVAL = 1e-3
_MOST_COPIES = 10_000
PLD_ROUNDING = 0.02  # what discretisation adds at most; it shows where epsilon itself is below 0.2
# Share of delta kept back for the truncation of Poisson batches (docs/decisions/0006).
TRUNCATION_DELTA_SHARE = 1e-6
_FILTER_ORDERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 256, 512)
_MAIN_SHARE = 0.9  # of a filter's delta, for the order that its cap asks for


def gaussian_event(noise_multiplier: float) -> DpEvent:
    """One Gaussian release whose noise has ``noise_multiplier`` times the L2 clip norm as standard deviation."""
    return dpe.GaussianDpEvent(noise_multiplier)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Largest sensitivity over standard deviation at which one Gaussian release is (epsilon, delta)-DP.

    Balle and Wang (2018), Theorem 8: delta = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu).

    >>> round(1 / gaussian_mu(4.3777, 1e-5), 3)
    1.0
    """

    def excess(log_mu: float) -> float:
        mu = math.exp(log_mu)
        tail = math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
        return float(norm.cdf(mu / 2 - epsilon / mu)) - tail - delta

    return math.exp(float(brentq(excess, math.log(1e-8), math.log(1e4), xtol=1e-10)))


def poisson_gaussian_event(sample_rate: float, noise_multiplier: float, num_steps: int) -> DpEvent:
    """``num_steps`` Gaussian releases, each on a fresh Poisson sample (Abadi et al. 2016, DP-SGD)."""
    step = dpe.PoissonSampledDpEvent(sample_rate, dpe.GaussianDpEvent(noise_multiplier))
    return dpe.SelfComposedDpEvent(step, num_steps)


def randomized_response_event(noise_parameter: float, num_buckets: int, count: int) -> DpEvent:
    """``count`` labels, each replaced by a uniform one of ``num_buckets`` with probability ``noise_parameter``."""
    return dpe.SelfComposedDpEvent(dpe.RandomizedResponseDpEvent(noise_parameter, num_buckets), count)


def compose(events: Sequence[DpEvent]) -> DpEvent:
    """All events together."""
    return dpe.ComposedDpEvent(tuple(events))


def relation_from_name(name: str) -> NeighboringRelation:
    """The relation of dp-accounting's name, for example ``ADD_OR_REMOVE_ONE``."""
    try:
        return NeighboringRelation[name]
    except KeyError:
        known = ", ".join(r.name for r in NeighboringRelation)
        raise AccountingError(f"neighboring_relation={name!r} is unknown. Known: {known}") from None


def epsilon(
    events: Sequence[DpEvent],
    delta: float,
    relation: NeighboringRelation,
    *,
    interval: float = VALUE_DISCRETIZATION_INTERVAL,
) -> float:
    """Epsilon of all events together at ``delta``, by the PLD accountant.

    A process remembers what equal events cost: of a release's dozen questions half are asked twice.

    Args:
        events: Everything released.
        delta: Target delta; a 1e-6th of it is kept back for batch truncation.
        relation: Neighbouring relation.
        interval: Discretisation interval of the privacy loss; smaller is tighter and slower.

    Returns:
        An upper bound on epsilon.

    Raises:
        AccountingError: An event is unknown to the accountant under this relation.

    >>> round(epsilon([gaussian_event(1.0)], 1e-5, NeighboringRelation.ADD_OR_REMOVE_ONE), 2)
    4.38
    """
    if not events:
        return 0.0
    event = _written_out(compose(events))
    try:
        return _pld_epsilon(event, delta, relation, interval)
    except dp_accounting.UnsupportedEventError as error:
        raise AccountingError(f"the PLD accountant does not know an event under {relation.name}: {error}") from error


@lru_cache(maxsize=256)
def _pld_epsilon(event: DpEvent, delta: float, relation: NeighboringRelation, interval: float) -> float:
    accountant = PLDAccountant(relation, interval)
    accountant.compose(event)
    return float(accountant.get_epsilon(delta * (1.0 - TRUNCATION_DELTA_SHARE)))


def _written_out(event: DpEvent) -> DpEvent:
    """dp-accounting 0.6.0's PLD charges a self-composed randomized response once: give it every copy."""
    if isinstance(event, dpe.ComposedDpEvent):
        return dpe.ComposedDpEvent(tuple(_written_out(e) for e in event.events))
    if isinstance(event, dpe.SelfComposedDpEvent) and not isinstance(
        event.event, dpe.GaussianDpEvent | dpe.PoissonSampledDpEvent
    ):
        if event.count > _MOST_COPIES:
            raise AccountingError(f"{event.count} copies of {type(event.event).__name__} are more than {_MOST_COPIES}")
        return dpe.ComposedDpEvent((_written_out(event.event),) * event.count)
    return event


def rdp_epsilon(events: Sequence[DpEvent], delta: float) -> float:
    """Epsilon under ADD_OR_REMOVE_ONE by Renyi DP (Mironov et al. 2019): looser than PLD, an upper alarm."""
    # Integer orders: exact for sampled Gaussians, while fractional ones fail to converge at low noise.
    found = math.inf
    for orders in ((*range(2, 65), *range(72, 257, 8), 512), (1024, 4096, 16384)):
        bound, best = compute_epsilon(orders, _total_divergences(events, orders), delta)
        found = min(found, float(bound))
        if best != orders[-1]:
            break  # large orders take long, and are the best for tiny epsilons alone
    return found


def filter_epsilon(events: Sequence[DpEvent], delta: float, cap: tuple[float, float]) -> float:
    """Epsilon under ADD_OR_REMOVE_ONE of events that may have been chosen by earlier outputs: a Renyi filter.

    For one order, and a budget of it that is fixed in advance, divergences add up even then (Feldman and Zrnic 2021,
    Theorem 3.1). The order that is best in the end depends on the outputs, so every order gets its own share of delta,
    and the shares add up to delta: most of it is of the order that a Gaussian release at the cap would take.

    Args:
        events: Everything released.
        delta: Target delta.
        cap: (epsilon, delta) that may not be exceeded, fixed before anything was released.

    Returns:
        At most the cap's epsilon only where that holds with ``delta`` for all events together; where these cost less,
        more than they cost.
    """
    weights = {order: 1.0 / (order - 1) for order in _FILTER_ORDERS}  # what a share costs falls so with the order
    rest = (1.0 - _MAIN_SHARE) / sum(weights.values())
    shares = {order: rest * weight for order, weight in weights.items()}
    shares[_best_order(*cap)] += _MAIN_SHARE
    spent = dict(zip(_FILTER_ORDERS, _total_divergences(events, _FILTER_ORDERS), strict=True))
    return min(_converted(order, spent[order], delta * share) for order, share in shares.items())


def _converted(order: int, divergence: float, delta: float) -> float:
    return float(compute_epsilon([order], [divergence], delta)[0])


def _total_divergences(events: Sequence[DpEvent], orders: tuple[int, ...]) -> np.ndarray:
    """Renyi divergence of all events together, of each order."""
    return sum((_divergences(event, orders) for event in events), start=np.zeros(len(orders)))


@lru_cache(maxsize=4096)
def _divergences(event: DpEvent, orders: tuple[int, ...]) -> np.ndarray:
    """Remembered, so that a large account is not computed anew at every question."""
    accountant = RdpAccountant(orders, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    return accountant.compose(event).rdp


def _best_order(epsilon: float, delta: float) -> int:
    """The filter's order that says least of one Gaussian release at (epsilon, delta)."""
    mu = gaussian_mu(epsilon, delta)  # its divergence at order a is a mu^2 / 2

    def bound(order: int) -> float:  # Canonne, Kamath and Steinke (2020), Proposition 12
        return order * mu * mu / 2 + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)

    return min(_FILTER_ORDERS, key=bound)


def cross_check(events: Sequence[DpEvent], delta: float, relation: NeighboringRelation) -> dict[str, float]:
    """Ask independent accountants and refuse when they disagree.

    Under ADD_OR_REMOVE_ONE: PLD lies within PRV's error bounds and below RDP. Under REPLACE_ONE (a removal and an
    addition): PLD lies between the add-or-remove epsilon and the group-privacy bound for two changes.

    Args:
        events: Everything released.
        delta: Target delta.
        relation: Neighbouring relation of the statement.

    Returns:
        Epsilon by each accountant that was asked.

    Raises:
        AccountingError: They disagree; nothing may be published.
    """
    from dpldm_core.privacy.opacus_backend import prv_epsilon

    ours = epsilon(events, delta, relation)
    if relation is NeighboringRelation.ADD_OR_REMOVE_ONE:
        upper = rdp_epsilon(events, delta)
        prv_lower, prv_upper = prv_epsilon(gaussian_steps(events), delta)
        checks = {"pld": ours, "prv_lower": prv_lower, "prv_upper": prv_upper, "rdp": upper}
        agree = prv_lower <= ours <= prv_upper + 1e-3 * ours and ours <= upper + PLD_ROUNDING
    else:
        gaussian, pure = _split_pure(events)
        lower = epsilon(gaussian, delta, NeighboringRelation.ADD_OR_REMOVE_ONE)
        upper = _group_privacy_epsilon(gaussian, delta) + pure
        checks = {"pld": ours, "lower": lower, "group_privacy": upper}
        agree = lower * (1 + 1e-3) <= ours <= upper + 1e-6  # equal to lower: somebody forgot to double the sensitivity
    if not agree or not math.isfinite(ours):
        raise AccountingError(f"the accountants disagree, nothing is published: {checks}")
    return checks


def _split_pure(events: Sequence[DpEvent]) -> tuple[list[DpEvent], float]:
    """The events without randomized responses, and the epsilon that basic composition gives those."""
    rest, pure = [], 0.0
    for event in events:
        inner, count = (event.event, event.count) if isinstance(event, dpe.SelfComposedDpEvent) else (event, 1)
        if isinstance(inner, dpe.RandomizedResponseDpEvent):
            pure += count * math.log1p(inner.num_buckets * (1 - inner.noise_parameter) / inner.noise_parameter)
        else:
            rest.append(event)
    return rest, pure


def _group_privacy_epsilon(events: Sequence[DpEvent], delta: float) -> float:
    """An upper bound for two changed records: (eps, d) gives (2 eps, (1 + e^eps) d); Vadhan 2017, Lemma 2.2."""
    eps = rdp_epsilon(events, delta)
    for _ in range(100):  # the fixed point eps = rdp_epsilon(delta / (1 + e^eps)), from below
        inner = rdp_epsilon(events, delta / (1.0 + math.exp(min(eps, 500.0))))
        if inner <= eps:
            break
        eps = inner * 1.02
    return 2 * eps


def gaussian_steps(events: Sequence[DpEvent]) -> list[tuple[float, float, int]]:
    """The events as Opacus' history: (noise_multiplier, sample_rate, num_steps) each."""
    steps: list[tuple[float, float, int]] = []

    def walk(event: DpEvent, count: int) -> None:
        if isinstance(event, dpe.SelfComposedDpEvent):
            walk(event.event, count * event.count)
        elif isinstance(event, dpe.ComposedDpEvent):
            for child in event.events:
                walk(child, count)
        elif isinstance(event, dpe.GaussianDpEvent):
            steps.append((event.noise_multiplier, 1.0, count))
        elif isinstance(event, dpe.PoissonSampledDpEvent) and isinstance(event.event, dpe.GaussianDpEvent):
            steps.append((event.event.noise_multiplier, event.sampling_probability, count))
        elif not isinstance(event, dpe.NoOpDpEvent):
            raise AccountingError(f"no second accountant knows {type(event).__name__}; nothing is published")

    for event in events:
        walk(event, 1)
    return steps


def event_to_json(event: DpEvent) -> dict[str, Any]:
    """A DpEvent as nested plain JSON: ``class_name`` and dp-accounting's own field names.

    >>> event_to_json(poisson_gaussian_event(0.1, 2.0, 30))["event"]["event"]
    {'class_name': 'GaussianDpEvent', 'noise_multiplier': 2.0}
    """

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {k: plain(v) for k, v in value._asdict().items() if k != "module_name"}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    return plain(event.to_named_tuple())


def event_from_json(data: dict[str, Any]) -> DpEvent:
    """The inverse of :func:`event_to_json`.

    Raises:
        AccountingError: An unknown class, or a missing, extra or non-finite field.
    """
    if not isinstance(data, dict) or "class_name" not in data:
        raise AccountingError(f"not an event: {data!r}")
    name = str(data["class_name"])
    cls = getattr(dpe, name, None)
    if not (isinstance(cls, type) and issubclass(cls, dpe.DpEvent)):
        raise AccountingError(f"event class_name={name!r} is unknown to dp-accounting {version('dp-accounting')}")
    count = data.get("count", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise AccountingError(f"event {name} holds count={count!r}, which is not a whole number of releases")

    def build(value: Any) -> Any:
        if isinstance(value, dict):
            return event_from_json(value)
        if isinstance(value, list):
            return tuple(build(v) for v in value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise AccountingError(f"event {name} holds {value!r}, which is not a non-negative finite number")
        return value

    try:
        return cls(**{k: build(v) for k, v in data.items() if k != "class_name"})
    except TypeError as error:
        raise AccountingError(f"event {name} has wrong fields: {error}") from None


def accountant_versions() -> dict[str, str]:
    """Names and versions of the accountants behind a report."""
    return {
        "published": f"dp-accounting {version('dp-accounting')} PLDAccountant",
        "value_discretization_interval": str(VALUE_DISCRETIZATION_INTERVAL),
        "cross_check": f"opacus {version('opacus')} PRVAccountant; dp-accounting RdpAccountant",
    }
