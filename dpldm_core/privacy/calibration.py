"""Calibration: from a configuration and a target to the noise of every mechanism, all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy.optimize import brentq

from dpldm_core.config import DpSgdConfig, ReleaseConfig
from dpldm_core.errors import AccountingError, ConfigError
from dpldm_core.privacy import accounting
from dpldm_core.privacy.accounting import DpEvent, NeighboringRelation
from dpldm_core.privacy.plan import (
    ONE_RECORD,
    DpSgdPlan,
    GaussianRecordPlan,
    GaussianSumPlan,
    HistogramPlan,
    LabelPlan,
    MechanismPlan,
    ReleasePlan,
    chernoff_cap,
)

AUTOENCODER, DIFFUSION = "train_autoencoder", "train_diffusion"
MEANS, COVARIANCES = "latent_means", "latent_covariances"
FIRST_TEACHER, TEACHER = "train_first_teacher", "train_teacher"
LATENTS, LABELS = "extract_latents", "extract_labels"
METRICS = "released_accuracy"
_UNSET = 1.0  # noise of a mechanism before calibration


def relation_of(latent_mechanism: str) -> str:
    """The neighbouring relation under which a release can be stated: noised latents show how many records there are."""
    return "REPLACE_ONE" if latent_mechanism == "noised_latents" else "ADD_OR_REMOVE_ONE"


def plan_release(config: ReleaseConfig, *, num_classes: int, latent_dim: int, grouped: bool) -> ReleasePlan:
    """Every private mechanism of a release, calibrated together to the asked epsilon.

    Args:
        config: The resolved configuration.
        num_classes: Public number of classes, 1 when there are no labels.
        latent_dim: Public dimension of a latent.
        grouped: Whether the data names persons, so that one unit is all records of a person.

    Returns:
        The plan of the release.

    Raises:
        ConfigError: Budget shares that do not add up, a first teacher without a second, or an accuracy to release of
            images without labels.
        AccountingError: The target cannot be met, or the accountants disagree.
    """
    return calibrate(
        private_mechanisms(config, num_classes=num_classes, latent_dim=latent_dim, grouped=grouped),
        target_epsilon=config.epsilon,
        delta=config.delta,
        relation=relation_of(config.latent_mechanism),
        unit_of_privacy=unit_of_privacy(config, grouped=grouped),
        num_records=config.num_records,
    )


def unit_of_privacy(config: ReleaseConfig, *, grouped: bool) -> str:
    """What one unit is, in words."""
    return f"one person (at most {config.max_records_per_group} records)" if grouped else ONE_RECORD


def private_mechanisms(
    config: ReleaseConfig, *, num_classes: int, latent_dim: int, grouped: bool
) -> list[tuple[MechanismPlan, float]]:
    """(plan, share of the budget) of every private mechanism of a release, in order, their noise not yet calibrated.

    Args:
        config: The resolved configuration.
        num_classes: Public number of classes, 1 when there are no labels.
        latent_dim: Public dimension of a latent.
        grouped: Whether the data names persons.

    Raises:
        ConfigError: A first teacher without a second, or an accuracy to release of images without labels.
    """
    records = config.max_records_per_group if grouped else 1
    if config.latent_mechanism == "dp_sgd":
        if config.teacher.first_share > 0 and config.teacher.dp_sgd.budget_share == 0:
            raise ConfigError(
                f"teacher.first_share={config.teacher.first_share} pays for a teacher of the teacher, and "
                "teacher.dp_sgd.budget_share=0 leaves that one out; set both to 0, or both above"
            )
        mechanisms: list[tuple[MechanismPlan, float]] = [
            (_dp_sgd(AUTOENCODER, config.autoencoder.dp_sgd), config.autoencoder.dp_sgd.budget_share),
            (_gaussian_sum(MEANS), config.prior.budget_share * config.prior.mean_share),
            (_gaussian_sum(COVARIANCES), config.prior.budget_share * (1.0 - config.prior.mean_share)),
            (_dp_sgd(DIFFUSION, config.diffusion.dp_sgd), config.diffusion.dp_sgd.budget_share),
            (_dp_sgd(FIRST_TEACHER, config.teacher.dp_sgd), config.teacher.first_share),
            (_dp_sgd(TEACHER, config.teacher.dp_sgd), config.teacher.dp_sgd.budget_share),
        ]
        if num_classes == 1:  # nothing to teach: these shares go to the others
            *mechanisms, (_, first), (_, second) = mechanisms
            mechanisms = [(mechanism, share / (1.0 - first - second)) for mechanism, share in mechanisms]
        mechanisms = [(mechanism, share) for mechanism, share in mechanisms if share > 0]
    else:
        shares = config.noised_latents
        label_share = shares.label_share if num_classes > 1 else 0.0
        radius = config.prior.clip_norm * math.sqrt(latent_dim * records)
        mechanisms = [
            (_dp_sgd(AUTOENCODER, config.autoencoder.dp_sgd), shares.autoencoder_share),
            (
                GaussianRecordPlan(stage=LATENTS, max_norm=radius, noise_multiplier=_UNSET),
                1.0 - shares.autoencoder_share - label_share,
            ),
        ]
        if num_classes > 1:
            labels = LabelPlan(stage=LABELS, num_classes=num_classes, labels_per_unit=records, noise_parameter=0.5)
            mechanisms.append((labels, label_share))
    if config.publish_metrics:
        mechanisms = _with_metrics(mechanisms, config.evaluation.metrics_share, num_classes, records)
    return mechanisms


def _with_metrics(
    mechanisms: Sequence[tuple[MechanismPlan, float]], share: float, num_classes: int, records: int
) -> list[tuple[MechanismPlan, float]]:
    """The mechanisms and the counts of right and wrong predictions on held-out records, which take ``share``.

    Held-out records are not training records, but a unit's cost is bounded as if it were in both.
    """
    if num_classes < 2:
        raise ConfigError(
            "publish_metrics=True releases an accuracy, which needs labels, and the images have none or one class. "
            "Leave publish_metrics out, or give labels"
        )
    counts = HistogramPlan(stage=METRICS, num_bins=2, max_records_per_unit=records, noise_multiplier=_UNSET)
    return [*((mechanism, own * (1.0 - share)) for mechanism, own in mechanisms), (counts, share)]


def _gaussian_sum(stage: str) -> GaussianSumPlan:
    return GaussianSumPlan(stage=stage, max_norm=1.0, noise_multiplier=_UNSET)


def _dp_sgd(stage: str, config: DpSgdConfig) -> DpSgdPlan:
    return DpSgdPlan(
        stage=stage,
        sample_rate=config.sample_rate,
        num_steps=config.num_steps,
        max_grad_norm=config.max_grad_norm,
        noise_multiplier=_UNSET,
        truncation_probability=1e-12,
    )


def calibrate(
    mechanisms: Sequence[tuple[MechanismPlan, float]],
    *,
    target_epsilon: float,
    delta: float,
    relation: str,
    unit_of_privacy: str,
    num_records: int | None = None,
) -> ReleasePlan:
    """Find the noise multipliers of all mechanisms together so that the release costs the target.

    Args:
        mechanisms: (plan, share): each plan's noise multiplier is replaced; shares of mu^2 (Gaussian DP) sum to 1.
        target_epsilon: Epsilon asked for the whole release.
        delta: Delta asked for.
        relation: dp-accounting's name of the neighbouring relation.
        unit_of_privacy: What one unit is.
        num_records: Public number of records; the caps of batches are computed from it where it is known.

    Returns:
        The plan, with epsilon within 0.2 % below the target, cross-checked by a second accountant.

    Raises:
        ConfigError: The shares do not sum to 1.
        AccountingError: No noise meets the target, or the accountants disagree.
    """
    total = sum(share for _, share in mechanisms)
    if not math.isclose(total, 1.0, abs_tol=1e-9):
        raise ConfigError(
            f"the budget shares of the mechanisms sum to {total:.10g}, not 1: {[m.stage for m, _ in mechanisms]}"
        )

    def scaled(mu: float) -> list[MechanismPlan]:
        return [_with_mu(plan, mu * math.sqrt(share), target_epsilon, delta) for plan, share in mechanisms]

    neighboring = accounting.relation_from_name(relation)
    mu = solve_scale(lambda x: [m.event() for m in scaled(x)], target_epsilon, delta, neighboring)
    calibrated = tuple(_with_public_cap(m, num_records) for m in scaled(mu))
    plan = ReleasePlan(mechanisms=calibrated, delta=delta, relation=relation, unit_of_privacy=unit_of_privacy)
    accounting.cross_check(plan.events(), delta, neighboring)
    _check_truncation(plan)
    return plan


def solve_scale(
    events_of: Callable[[float], Sequence[DpEvent]],
    target_epsilon: float,
    delta: float,
    relation: NeighboringRelation,
    *,
    rel_tol: float = 2e-3,
) -> float:
    """The scale at which a family of event lists costs the target epsilon, never more.

    Args:
        events_of: Events for a scale mu > 0; cost must grow with mu (mu is a total Gaussian-DP parameter).
        target_epsilon: Epsilon asked for.
        delta: Delta asked for.
        relation: Neighbouring relation of the statement.
        rel_tol: The epsilon found lies in [(1 - rel_tol) target, target].

    Returns:
        The scale: bracketed around that of one Gaussian release, then found by Brent's method in log space.

    Raises:
        AccountingError: No scale meets the target.
    """
    aim = math.log(target_epsilon * (1 - rel_tol / 2))
    coarse = accounting.VALUE_DISCRETIZATION_INTERVAL * min(4.0, max(1.0, target_epsilon / 2))
    tried: dict[float, float] = {}

    def excess(log_scale: float) -> float:
        if log_scale not in tried:
            tried[log_scale] = accounting.epsilon(events_of(math.exp(log_scale)), delta, relation, interval=coarse)
        missed = math.log(max(tried[log_scale], 1e-12)) - aim
        return 0.0 if abs(missed) < rel_tol / 4 else missed  # near enough: the search ends there

    def stride(missed: float) -> float:
        return min(1.3 * missed, 1.0)  # epsilon grows about as the scale does: mostly one stride is enough

    low = high = math.log(
        accounting.gaussian_mu(target_epsilon, delta) / (2.0 if relation is NeighboringRelation.REPLACE_ONE else 1.0)
    )
    while excess(low) > 0:
        low -= stride(excess(low))
        if low < math.log(1e-6):
            raise AccountingError(f"epsilon={target_epsilon} is too small for this plan at delta={delta}")
    while excess(high) < 0:
        high += stride(-excess(high))
        if high > math.log(1e3):
            raise AccountingError(f"epsilon={target_epsilon} cannot be spent by this plan at delta={delta}")
    if low < high:
        brentq(excess, low, high, xtol=rel_tol / 10)
    found = max(x for x, spent in tried.items() if spent <= target_epsilon)
    # A coarse bound is looser, so this scale is safe; epsilon grows about as it does, which gives the rest back.
    spent = accounting.epsilon(events_of(math.exp(found)), delta, relation)
    if spent < (1 - rel_tol) * target_epsilon:
        raised = found + aim - math.log(max(spent, 1e-12))
        if accounting.epsilon(events_of(math.exp(raised)), delta, relation) <= target_epsilon:
            found = raised
    return math.exp(found)


def _check_truncation(plan: ReleasePlan) -> None:
    """Refuse a plan whose cut batches could cost more than the share of delta that is kept for them."""
    replaced = plan.epsilon(NeighboringRelation.REPLACE_ONE)
    worst = (1.0 + math.exp(min(replaced, 600.0))) * plan.truncation()
    if worst > accounting.TRUNCATION_DELTA_SHARE * plan.delta:
        raise AccountingError(f"cut batches may cost {worst:.3g} of delta, more than is kept for them")


def _with_public_cap(plan: MechanismPlan, num_records: int | None) -> MechanismPlan:
    if num_records is None or not isinstance(plan, DpSgdPlan):
        return plan
    cap = chernoff_cap(num_records, plan.sample_rate, plan.truncation_probability)
    return plan.model_copy(update={"max_batch_size": min(cap, num_records)})


def _with_mu(plan: MechanismPlan, mu: float, target_epsilon: float, delta: float) -> MechanismPlan:
    if isinstance(plan, DpSgdPlan):
        multiplier = dp_sgd_multiplier(mu, sample_rate=plan.sample_rate, num_steps=plan.num_steps)
        # four times the target: room for the same release under REPLACE_ONE, whose epsilon is printed beside it
        tail = truncation_probability(delta=delta, epsilon=4 * target_epsilon, num_steps=plan.num_steps)
        return plan.model_copy(update={"noise_multiplier": multiplier, "truncation_probability": tail})
    if isinstance(plan, LabelPlan):  # epsilon 4 mu per unit: any growing map splits a budget
        keep = math.expm1(4 * mu / plan.labels_per_unit) / plan.num_classes
        return plan.model_copy(update={"noise_parameter": 1.0 / (1.0 + keep)})
    return plan.model_copy(update={"noise_multiplier": gaussian_multiplier(mu)})


def gaussian_multiplier(mu: float) -> float:
    """Noise multiplier of one Gaussian release that is mu-GDP (Dong et al. 2022, Theorem 1)."""
    return 1.0 / mu


def dp_sgd_multiplier(mu: float, *, sample_rate: float, num_steps: int) -> float:
    """Noise multiplier at which DP-SGD is about mu-GDP (Bu et al. 2020, Eq. 5). Splits a budget; never charged.

    >>> round(dp_sgd_multiplier(1.0, sample_rate=0.01, num_steps=1000), 3)
    0.646
    """
    return 1.0 / math.sqrt(math.log1p((mu / (sample_rate * math.sqrt(num_steps))) ** 2))


def truncation_probability(*, delta: float, epsilon: float, num_steps: int) -> float:
    """Chance of a cut batch per step so that the cuts of up to four stages fit the share of delta kept for them.

    A step that differs from exact Poisson sampling with probability tau costs at most (1 + e^epsilon) tau of delta.
    """
    return min(
        1e-9, accounting.TRUNCATION_DELTA_SHARE * delta / (4 * num_steps * (1.0 + math.exp(min(epsilon, 600.0))))
    )
