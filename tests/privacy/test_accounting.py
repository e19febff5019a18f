import itertools
import json
import math

import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from dpldm_core.errors import AccountingError
from dpldm_core.privacy import accounting, opacus_backend
from dpldm_core.privacy.accounting import (
    NeighboringRelation,
    compose,
    cross_check,
    epsilon,
    event_from_json,
    event_to_json,
    filter_epsilon,
    gaussian_event,
    gaussian_mu,
    gaussian_steps,
    poisson_gaussian_event,
    randomized_response_event,
    rdp_epsilon,
    relation_from_name,
)
from dpldm_core.privacy.calibration import solve_scale

ADD_REMOVE, REPLACE = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE
DELTA = 1e-5
KEPT = DELTA * (1 - accounting.TRUNCATION_DELTA_SHARE)
Q = 4096 / 60000
AUTOENCODER = poisson_gaussian_event(Q, 2.0, 1000)
DIFFUSION = poisson_gaussian_event(Q, 1.5, 3000)
ONE_SHOT = gaussian_event(5.0)


def exact_epsilon(delta_of, delta=KEPT):
    """Where a closed-form delta(epsilon) equals delta."""
    return brentq(lambda eps: delta_of(eps) - delta, 0.0, 200.0, xtol=1e-12) if delta_of(0.0) > delta else 0.0


def gaussian_delta(mu):
    """Balle and Wang (2018), Theorem 8, for sensitivity over noise mu."""
    return lambda eps: norm.cdf(mu / 2 - eps / mu) - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu))


def sampled_gaussian_delta(q, sigma, relation):
    """One DP-SGD step: the worse hockey-stick divergence between mixtures whose likelihood ratio is monotone."""
    without, added, removed = [(1.0, 0.0)], [(1 - q, 0.0), (q, 1.0)], [(1 - q, 0.0), (q, -1.0)]

    def log_pdf(mixture, x):
        return logsumexp([norm.logpdf(x, m, sigma) for _, m in mixture], b=[w for w, _ in mixture])

    def divergence(p, r, eps):
        up = max(m for _, m in p) > max(m for _, m in r)

        def excess(x):
            return log_pdf(p, x) - log_pdf(r, x) - eps

        if excess(-500.0) * excess(500.0) > 0:  # on one side everywhere
            return 0.0 if excess(0.0) < 0 else 1 - math.exp(eps)
        edge = brentq(excess, -500.0, 500.0, xtol=1e-12)
        tail = norm.sf if up else norm.cdf
        mass_p, mass_r = (sum(w * tail(edge, m, sigma) for w, m in mixture) for mixture in (p, r))
        return mass_p - math.exp(eps) * mass_r

    pairs = [(added, removed)] if relation is REPLACE else [(added, without), (without, added)]
    return lambda eps: max(divergence(p, r, eps) for p, r in pairs)


def randomized_response_delta(p, k, count):
    """By enumeration of the outputs of ``count`` labels: kept, turned into the other record's label, anything else."""
    same, other = 1 - p + p / k, p / k
    rest = (k - 2) * other
    outcomes = [(same, other), (other, same), (rest, rest)]

    def of(eps):
        pairs = (map(math.prod, zip(*word, strict=True)) for word in itertools.product(outcomes, repeat=count))
        return sum(max(a - math.exp(eps) * b, 0.0) for a, b in pairs)

    return of


@pytest.mark.parametrize(
    ("events", "relation", "golden"),
    [
        ([AUTOENCODER, DIFFUSION, ONE_SHOT], ADD_REMOVE, 17.011),
        ([AUTOENCODER, DIFFUSION, ONE_SHOT], REPLACE, 37.16),
        ([AUTOENCODER], ADD_REMOVE, 5.29),
        ([DIFFUSION], ADD_REMOVE, 15.38),
        ([ONE_SHOT], ADD_REMOVE, 0.73),
        ([gaussian_event(1.0)], ADD_REMOVE, 4.38),
    ],
)
def test_anchors(events, relation, golden):
    """Measured once with dp-accounting 0.6.0 PLD, interval 1e-3, delta 1e-5."""
    digits = len(str(golden).split(".")[1])
    assert epsilon(events, DELTA, relation) == pytest.approx(golden, abs=0.6 * 10**-digits)


def test_anchors_of_the_other_accountants():
    """Measured once at delta 1e-5: dp-accounting 0.6.0 RDP 18.29 with its own orders, Opacus 1.6.0 PRV 17.02."""
    checks = cross_check([AUTOENCODER, DIFFUSION, ONE_SHOT], DELTA, ADD_REMOVE)
    assert 18.29 - 0.01 <= checks["rdp"] <= 1.1 * 18.29  # integer orders alone: a little looser
    assert checks["prv_lower"] <= 17.02 <= checks["prv_upper"] + 0.05
    assert checks["pld"] == pytest.approx(17.011, abs=1e-3)


@pytest.mark.parametrize(("relation", "sensitivity"), [(ADD_REMOVE, 1.0), (REPLACE, 2.0)])
@pytest.mark.parametrize("sigma", [0.4, 1.0, 5.0, 80.0])
def test_gaussian_equals_the_closed_form_from_above(relation, sensitivity, sigma):
    exact = exact_epsilon(gaussian_delta(sensitivity / sigma))
    assert exact <= epsilon([gaussian_event(sigma)], DELTA, relation) <= exact + 2e-3


@pytest.mark.parametrize("relation", [ADD_REMOVE, REPLACE])
@pytest.mark.parametrize(("q", "sigma"), [(0.5, 0.7), (0.05, 1.0), (1.0, 2.0)])
def test_one_poisson_step_equals_the_closed_form_from_above(q, sigma, relation):
    exact = exact_epsilon(sampled_gaussian_delta(q, sigma, relation))
    got = epsilon([poisson_gaussian_event(q, sigma, 1)], DELTA, relation)
    assert exact - 1e-6 <= got <= exact + 2e-3


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("p", "k"), [(0.5, 10), (0.9, 2)])
def test_randomized_response_equals_enumeration_from_above(p, k, count):
    exact = exact_epsilon(randomized_response_delta(p, k, count))
    got = epsilon([randomized_response_event(p, k, count)], DELTA, REPLACE)
    assert exact - 1e-6 <= got <= exact + 2e-3 * count
    assert got <= count * math.log(1 + k * (1 - p) / p) + 2e-3 * count  # pure epsilon, Warner (1965)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.floats(1.0, 6.0), st.integers(2, 40))
def test_composed_gaussians_are_one_gaussian(sigma, count):
    many = epsilon([gaussian_event(sigma * math.sqrt(count))] * count, DELTA, ADD_REMOVE)
    assert many == pytest.approx(
        epsilon([gaussian_event(sigma)], DELTA, ADD_REMOVE), abs=1e-3 + 1e-3 * math.sqrt(count)
    )
    assert many >= exact_epsilon(gaussian_delta(1 / sigma)) - 1e-9


@pytest.mark.parametrize("relation", [ADD_REMOVE, REPLACE])
def test_every_discretisation_is_an_upper_bound(relation):
    events = [poisson_gaussian_event(0.1, 1.5, 20)]
    coarse, usual, fine = (epsilon(events, DELTA, relation, interval=i) for i in (1e-1, 1e-3, 1e-4))
    assert fine - 1e-9 <= usual <= fine + 2e-3 and usual <= coarse + 1e-9


def test_the_share_of_delta_for_cut_batches_is_kept_back(monkeypatch):
    accounting._pld_epsilon.cache_clear()
    monkeypatch.setattr(accounting.PLDAccountant, "get_epsilon", lambda self, delta: delta)
    assert epsilon([ONE_SHOT], DELTA, ADD_REMOVE) == KEPT < DELTA
    accounting._pld_epsilon.cache_clear()


def test_only_a_question_equal_in_every_part_is_answered_from_memory(monkeypatch):
    accounting._pld_epsilon.cache_clear()
    true, asked = accounting.PLDAccountant.get_epsilon, []
    monkeypatch.setattr(accounting.PLDAccountant, "get_epsilon", lambda *a: asked.append(a) or true(*a))
    first = epsilon([ONE_SHOT, AUTOENCODER], DELTA, ADD_REMOVE)
    read = [event_from_json(event_to_json(event)) for event in (ONE_SHOT, AUTOENCODER)]
    assert epsilon(read, DELTA, ADD_REMOVE) == first and len(asked) == 1
    others = {
        epsilon([ONE_SHOT, poisson_gaussian_event(0.1, 1.5, 31)], DELTA, ADD_REMOVE),
        epsilon([ONE_SHOT, AUTOENCODER], 2 * DELTA, ADD_REMOVE),
        epsilon([ONE_SHOT, AUTOENCODER], DELTA, REPLACE),
        epsilon([ONE_SHOT, AUTOENCODER], DELTA, ADD_REMOVE, interval=2e-3),
    }
    assert len(asked) == 5 and first not in others and len(others) == 4
    listed = compose([compose([ONE_SHOT]), AUTOENCODER])
    assert epsilon([listed], DELTA, ADD_REMOVE) == first


@given(st.floats(1e-3, 50.0), st.floats(1e-12, 0.1))
def test_gaussian_mu_inverts_the_closed_form(eps, delta):
    assert gaussian_delta(gaussian_mu(eps, delta))(eps) == pytest.approx(delta, rel=1e-5)


def test_events_are_composed_never_their_epsilons_added():
    parts = [epsilon([e], DELTA, ADD_REMOVE) for e in (AUTOENCODER, DIFFUSION, ONE_SHOT)]
    together = epsilon([AUTOENCODER, DIFFUSION, ONE_SHOT], DELTA, ADD_REMOVE)
    assert max(parts) < together < sum(parts) - 1.0
    assert together == pytest.approx(
        epsilon([ONE_SHOT, compose([DIFFUSION, AUTOENCODER])], DELTA, ADD_REMOVE), abs=1e-6
    )
    assert epsilon([], DELTA, ADD_REMOVE) == 0.0


def test_no_step_is_forgotten_and_none_is_free():
    """Reloading an older accountant state forgets steps: here every event counts, in any grouping."""
    split = [poisson_gaussian_event(0.1, 1.5, 30), poisson_gaussian_event(0.1, 1.5, 70)]
    whole = epsilon([poisson_gaussian_event(0.1, 1.5, 100)], DELTA, ADD_REMOVE)
    assert epsilon(split, DELTA, ADD_REMOVE) == pytest.approx(whole, abs=1e-6)
    assert epsilon(split[:1], DELTA, ADD_REMOVE) < whole - 0.5


def test_replacing_costs_more_than_adding_or_removing():
    """The accountant of add-or-remove used for replace-one data understates by more than a factor of two here."""
    for events in ([AUTOENCODER], [ONE_SHOT]):
        assert epsilon(events, DELTA, REPLACE) > 2 * epsilon(events, DELTA, ADD_REMOVE)


def test_randomized_response_has_no_add_or_remove_statement():
    with pytest.raises(AccountingError, match="ADD_OR_REMOVE_ONE"):
        epsilon([randomized_response_event(0.5, 10, 1)], DELTA, ADD_REMOVE)


@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.01, 0.7, 2000), (0.2, 3.0, 500), (1.0, 10.0, 20), (0.001, 0.5, 100)]
)
def test_pld_lies_between_prv_and_rdp(q, sigma, steps):
    events = [poisson_gaussian_event(q, sigma, steps), gaussian_event(8.0)]
    checks = cross_check(events, DELTA, ADD_REMOVE)
    assert checks["prv_lower"] <= checks["pld"] <= checks["rdp"] == rdp_epsilon(events, DELTA)


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.1, 0.7, 200), (1.0, 5.0, 1), (1.0, 2_000.0, 1), (0.01, 90.0, 10)])
def test_large_orders_of_rdp_are_asked_where_they_are_the_best(q, sigma, steps):
    orders = [*range(2, 65), *range(72, 257, 8), 512, 1024, 4096, 16384]
    all_at_once = RdpAccountant(orders).compose(poisson_gaussian_event(q, sigma, steps))
    asked = rdp_epsilon([poisson_gaussian_event(q, sigma, steps)], DELTA)
    assert asked == pytest.approx(all_at_once.get_epsilon(DELTA), rel=1e-12)


def test_replace_one_lies_between_its_bounds():
    checks = cross_check([AUTOENCODER, randomized_response_event(0.5, 10, 1)], DELTA, REPLACE)
    assert checks["lower"] <= checks["pld"] <= checks["group_privacy"]


@pytest.mark.parametrize("factor", [0.8, 1.25, math.nan])
def test_disagreement_with_prv_publishes_nothing(monkeypatch, factor):
    true = opacus_backend.prv_epsilon
    monkeypatch.setattr(opacus_backend, "prv_epsilon", lambda *a: tuple(factor * bound for bound in true(*a)))
    with pytest.raises(AccountingError, match="disagree"):
        cross_check([AUTOENCODER], DELTA, ADD_REMOVE)


@pytest.mark.parametrize(("relation", "factor"), [(ADD_REMOVE, 1.3), (ADD_REMOVE, math.inf), (REPLACE, 3.0)])
def test_a_pld_beyond_its_upper_alarm_publishes_nothing(monkeypatch, relation, factor):
    true = accounting.epsilon
    monkeypatch.setattr(accounting, "epsilon", lambda *a: factor * true(*a))
    monkeypatch.setattr(opacus_backend, "prv_epsilon", lambda *a: (0.0, math.inf))  # RDP alone must notice
    with pytest.raises(AccountingError, match="disagree"):
        cross_check([AUTOENCODER], DELTA, relation)


def test_a_pld_below_its_lower_alarm_publishes_nothing(monkeypatch):
    """The lower alarm: nothing costs less under replace-one than under add-or-remove."""
    true = accounting.epsilon
    monkeypatch.setattr(accounting, "epsilon", lambda e, d, r: true(e, d, ADD_REMOVE) * (0.99 if r is REPLACE else 1.0))
    with pytest.raises(AccountingError, match="disagree"):
        cross_check([AUTOENCODER], DELTA, REPLACE)


def test_events_no_second_accountant_knows_are_refused():
    with pytest.raises(AccountingError, match="LaplaceDpEvent"):
        cross_check([event_from_json({"class_name": "LaplaceDpEvent", "noise_multiplier": 3.0})], DELTA, ADD_REMOVE)


def test_history_for_opacus_names_every_step():
    nested = compose([AUTOENCODER, compose([ONE_SHOT, ONE_SHOT])])
    assert gaussian_steps([nested]) == [(2.0, Q, 1000), (5.0, 1.0, 1), (5.0, 1.0, 1)]


@pytest.mark.parametrize(
    "event", [AUTOENCODER, ONE_SHOT, randomized_response_event(0.3, 7, 4), compose([AUTOENCODER, compose([ONE_SHOT])])]
)
def test_json_round_trip(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "5", True, None, {"class_name": "int"}])
def test_a_field_that_is_no_plain_number_is_refused(value):
    with pytest.raises(AccountingError):
        event_from_json({"class_name": "GaussianDpEvent", "noise_multiplier": value})


@pytest.mark.parametrize("count", [0.001, 2.5])
def test_a_fraction_of_a_release_is_refused(count):
    with pytest.raises(AccountingError):
        event_from_json({"class_name": "SelfComposedDpEvent", "count": count, "event": event_to_json(ONE_SHOT)})


def test_relation_names():
    assert relation_from_name("REPLACE_ONE") is REPLACE
    with pytest.raises(AccountingError, match="ADD_OR_REMOVE_ONE"):
        relation_from_name("add_or_remove")


def test_solved_scale_anchor():
    """Measured once: autoencoder (sigma 2) and one-shot (sigma 5) fixed, total epsilon 8 takes diffusion sigma 3.28."""

    def events(scale):
        return [AUTOENCODER, poisson_gaussian_event(Q, 1 / scale, 3000), ONE_SHOT]

    scale = solve_scale(events, 8.0, DELTA, ADD_REMOVE)
    assert 1 / scale == pytest.approx(3.28, rel=4e-3)  # epsilon is within 2e-3, and grows more slowly than the scale
    assert 8.0 * (1 - 2e-3) <= epsilon(events(scale), DELTA, ADD_REMOVE) <= 8.0


@pytest.mark.parametrize(
    ("target", "relation"), [(0.05, ADD_REMOVE), (1.0, REPLACE), (8.0, ADD_REMOVE), (20.0, REPLACE)]
)
def test_solved_scale_never_exceeds_the_target(target, relation):
    scale = solve_scale(lambda mu: [gaussian_event(1 / mu)], target, DELTA, relation)
    exact = exact_epsilon(gaussian_delta(scale * (2 if relation is REPLACE else 1)))
    assert target * (1 - 2e-3) - 2e-3 <= exact <= target


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(AccountingError, match="too small"):
        solve_scale(lambda mu: [gaussian_event(1 / mu), gaussian_event(1.0)], 0.5, DELTA, ADD_REMOVE)
    with pytest.raises(AccountingError, match="cannot be spent"):
        solve_scale(lambda mu: [gaussian_event(10.0)], 100.0, DELTA, ADD_REMOVE)


@pytest.mark.parametrize("cap", [0.5, 3.0, 10.0])
def test_the_orders_of_a_filter_share_one_delta(cap, monkeypatch):
    """Outputs may decide which order is the best in the end: each has its own part of delta, and no more is spent."""
    given = {}
    monkeypatch.setattr(accounting, "_best_order", lambda cap, delta: 7)
    monkeypatch.setattr(accounting, "_converted", lambda order, divergence, delta: given.setdefault(order, delta))
    filter_epsilon([gaussian_event(1.0)], DELTA, (cap, DELTA))
    assert len(given) > 20 and sum(given.values()) == pytest.approx(DELTA, rel=1e-12)
    assert given[7] > 0.9 * DELTA


def test_the_order_that_has_most_of_delta_follows_from_the_cap_alone(monkeypatch):
    """What is kept back for cut batches depends on the plans: it may not choose the order."""
    cap, left, given = (1.7, DELTA), 0.5 * DELTA, {}
    monkeypatch.setattr(accounting, "_converted", lambda order, divergence, delta: given.setdefault(order, delta))
    wanted, other = 10, 12  # of (1.7, 1e-5) and (1.7, 5e-6)
    monkeypatch.setattr(accounting, "_best_order", lambda epsilon, delta: wanted if delta == DELTA else other)
    filter_epsilon([gaussian_event(5.0)], left, cap)
    assert given[wanted] > 0.9 * left > given[other]


def test_a_filter_is_the_closed_form_at_its_order():
    """Gaussian releases of noise s: divergence n a / (2 s^2) at order a; Canonne, Kamath and Steinke 2020, Prop. 12."""
    n, s, cap = 4, 3.0, 3.8
    found = filter_epsilon([gaussian_event(s)] * n, DELTA, (cap, DELTA))
    delta = DELTA * (accounting._MAIN_SHARE + (1 - accounting._MAIN_SHARE) / 60)  # the main order's, about

    def at(order):
        return n * order / (2 * s * s) + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)

    assert found == pytest.approx(at(accounting._best_order(cap, DELTA)), rel=2e-3)


@pytest.mark.parametrize("cap", [1.0, 3.0, 10.0])
def test_a_filter_is_above_rdp_and_near_it_at_the_cap(cap):
    """Where it decides, it costs next to nothing; of an account that is far from its cap it says too much."""
    for share, most in ((1.0, 1.02), (0.2, 2.5)):
        mu = accounting.gaussian_mu(share * cap / 1.08, DELTA)
        events = [gaussian_event(math.sqrt(5) / mu)] * 5
        assert (
            rdp_epsilon(events, DELTA)
            <= filter_epsilon(events, DELTA, (cap, DELTA))
            <= most * rdp_epsilon(events, DELTA)
        )


def test_events_that_were_composed_before_cost_what_they_hold():
    """A report may hold them, and accountants remember by events: lists would not do."""
    nested = [accounting.compose([accounting.gaussian_event(2.0)] * 2), accounting.gaussian_event(2.0)]
    plain = [accounting.gaussian_event(2.0)] * 3
    for events in (nested, [accounting.event_from_json(accounting.event_to_json(event)) for event in nested]):
        assert accounting.rdp_epsilon(events, 1e-5) == pytest.approx(accounting.rdp_epsilon(plain, 1e-5), rel=1e-12)
        assert accounting.epsilon(events, 1e-5, ADD_REMOVE) == pytest.approx(
            accounting.epsilon(plain, 1e-5, ADD_REMOVE)
        )
