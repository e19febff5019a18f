"""Plans: one frozen object per private mechanism.

Each plan states q, sigma, T and C once. The sampler, the clip, the noise and the DpEvent are made from the same fields,
so the loop and the accountant cannot drift apart (after jax_privacy's DPExecutionPlan). All fields are public; the
number of records and the keys are arguments of the mechanism, never fields.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from scipy.special import rel_entr

from dpldm_core.config import Frozen
from dpldm_core.errors import AccountingError, ConfigError, DataError
from dpldm_core.privacy import accounting
from dpldm_core.privacy.accounting import DpEvent, NeighboringRelation
from dpldm_core.privacy.discrete import MAX_BINS, DiscreteGaussianNoise, drawn_variance
from dpldm_core.privacy.noise import GaussianNoise
from dpldm_core.rng import SecretKey


class DpSgdPlan(Frozen):
    """DP-SGD with truncated Poisson batches (Abadi et al. 2016; truncation: Chua et al. 2024)."""

    kind: Literal["dp_sgd"] = "dp_sgd"
    stage: str
    sample_rate: float = Field(gt=0, le=1, description="Poisson inclusion probability q of a unit per step")
    num_steps: int = Field(ge=1, description="logical optimizer steps T")
    max_grad_norm: float = Field(gt=0, description="per-unit L2 clip norm C")
    noise_multiplier: float = Field(gt=0, description="noise standard deviation over C, as charged")
    truncation_probability: float = Field(
        gt=0, le=1e-9, description="largest chance per step that a batch exceeds the cap"
    )
    max_batch_size: int | None = Field(
        default=None, ge=1, description="cap in units; None: the smallest that truncation_probability allows"
    )

    def event(self) -> DpEvent:
        """What the whole run releases."""
        return accounting.poisson_gaussian_event(self.sample_rate, self.noise_multiplier, self.num_steps)

    def batch_cap(self, num_units: int) -> int:
        """Rows of every padded batch.

        Args:
            num_units: Private number of units in the data.

        Raises:
            ConfigError: ``max_batch_size`` is too small for the rate.
        """
        needed = chernoff_cap(num_units, self.sample_rate, self.truncation_probability)
        if self.max_batch_size is None:
            return min(needed, num_units)
        if self.max_batch_size < min(needed, num_units):
            raise ConfigError(
                f"max_batch_size={self.max_batch_size} of stage {self.stage!r} is too small for "
                f"sample_rate={self.sample_rate}: Poisson batches would be cut too often. Raise it to {needed}, or "
                "declare a larger num_records (a rounded public number will do)"
            )
        return self.max_batch_size

    def sample_batch(self, key: SecretKey, step: int, num_units: int) -> np.ndarray:
        """Indices of the units in the batch of one step, int64 [batch_cap], padded with -1.

        A unit is in the batch when its own 64 secret bits fall below q 2^64. Empty batches stay empty.
        """
        cap = self.batch_cap(num_units)
        draws = key.uint64(step, num_units)
        chosen = np.flatnonzero(draws <= np.uint64(max(int(self.sample_rate * 2.0**64), 1) - 1))
        if len(chosen) > cap:  # keep a uniformly random subset: the smallest draws among the chosen
            chosen = np.sort(chosen[np.argsort(draws[chosen], kind="stable")[:cap]])
        return np.concatenate([chosen, np.full(cap - len(chosen), -1, dtype=np.int64)])

    def noise(self, key: SecretKey) -> GaussianNoise:
        """The noise that the event charges for."""
        return GaussianNoise(key, noise_multiplier=self.noise_multiplier, max_norm=self.max_grad_norm)


class GaussianSumPlan(Frozen):
    """One noisy sum of clipped vectors: sums, means, second moments and principal axes come from it."""

    kind: Literal["gaussian_sum"] = "gaussian_sum"
    stage: str
    max_norm: float = Field(gt=0, description="L2 norm that the contribution of one unit is clipped to")
    noise_multiplier: float = Field(gt=0, description="noise standard deviation over max_norm, as charged")

    def event(self) -> DpEvent:
        """What the sum releases."""
        return accounting.gaussian_event(self.noise_multiplier)

    def noise(self, key: SecretKey) -> GaussianNoise:
        """The noise that the event charges for."""
        return GaussianNoise(key, noise_multiplier=self.noise_multiplier, max_norm=self.max_norm)


class HistogramPlan(Frozen):
    """Counts of records in bins with exact discrete Gaussian noise (Canonne, Kamath and Steinke 2020).

    A unit adds at most ``max_records_per_unit`` to all counts together, so it moves them by no more than that in L2.
    """

    kind: Literal["discrete_histogram"] = "discrete_histogram"
    stage: str
    num_bins: int = Field(ge=1, le=MAX_BINS, description="public number of bins")
    max_records_per_unit: int = Field(ge=1, description="most records of one unit that are counted: the L2 sensitivity")
    noise_multiplier: float = Field(
        gt=0, description="noise standard deviation over max_records_per_unit, as charged; the noise drawn is larger"
    )

    @property
    def variance(self) -> Fraction:
        """Variance of the discrete Gaussian that is drawn: the charged one and what smoothing takes, exactly."""
        return drawn_variance(self.noise_multiplier, self.max_records_per_unit)

    def event(self) -> DpEvent:
        """What the counts release: no more than one Gaussian (docs/decisions/0009)."""
        return accounting.gaussian_event(self.noise_multiplier)

    def noise(self, key: SecretKey) -> DiscreteGaussianNoise:
        """The noise that the event charges for."""
        return DiscreteGaussianNoise(key, variance=self.variance)


class GaussianRecordPlan(Frozen):
    """Every record's own clipped vector with noise, a local mechanism: stated under REPLACE_ONE only.

    The list of outputs shows how many records there are, so no add-or-remove statement exists.
    """

    kind: Literal["gaussian_record"] = "gaussian_record"
    stage: str
    max_norm: float = Field(gt=0, description="L2 norm that the vectors of one unit are clipped to, jointly")
    noise_multiplier: float = Field(gt=0, description="noise standard deviation over max_norm, as charged")

    def event(self) -> DpEvent:
        """What the outputs release about one unit (REPLACE_ONE doubles the sensitivity in the accountant)."""
        return accounting.gaussian_event(self.noise_multiplier)

    def noise(self, key: SecretKey) -> GaussianNoise:
        """The noise that the event charges for."""
        return GaussianNoise(key, noise_multiplier=self.noise_multiplier, max_norm=self.max_norm)


class LabelPlan(Frozen):
    """Every record's label by randomized response (Warner 1965): stated under REPLACE_ONE only."""

    kind: Literal["randomized_response"] = "randomized_response"
    stage: str
    num_classes: int = Field(ge=2, description="public number of classes")
    labels_per_unit: int = Field(ge=1, description="most labels that one unit holds")
    noise_parameter: float = Field(gt=0, le=1, description="probability that a label is replaced by a uniform one")

    def event(self) -> DpEvent:
        """What the labels release about one unit."""
        return accounting.randomized_response_event(self.noise_parameter, self.num_classes, self.labels_per_unit)

    def randomize(self, key: SecretKey, labels: np.ndarray) -> np.ndarray:
        """Released labels, int64 [n].

        Args:
            key: Secret key of this mechanism.
            labels: Private labels, int64 [n].
        """
        replace = key.uint64(0, len(labels)) < np.uint64(min(math.ceil(self.noise_parameter * 2.0**64), 2**64 - 1))
        uniform = (key.uint64(1, len(labels)) % np.uint64(self.num_classes)).astype(np.int64)
        return np.where(replace, uniform, np.clip(labels, 0, self.num_classes - 1))


MechanismPlan = Annotated[
    DpSgdPlan | GaussianSumPlan | HistogramPlan | GaussianRecordPlan | LabelPlan, Field(discriminator="kind")
]


ONE_RECORD = "one record"


class ReleasePlan(Frozen):
    """Every private mechanism of one release, and the statement they add up to."""

    mechanisms: tuple[MechanismPlan, ...]
    delta: float = Field(gt=0, lt=1)
    relation: str = Field(description="dp-accounting's name of the neighbouring relation of the statement")
    unit_of_privacy: str = Field(description="what one unit is: one record, or all records of one group")

    def events(self) -> list[DpEvent]:
        """One event per mechanism, in order."""
        return [m.event() for m in self.mechanisms]

    def stage_events(self) -> list[tuple[str, DpEvent]]:
        """(stage, event) of each mechanism."""
        return [(m.stage, m.event()) for m in self.mechanisms]

    def epsilon(self, relation: NeighboringRelation | None = None) -> float:
        """Epsilon of the whole release at ``delta``.

        Args:
            relation: Another relation than the statement's.
        """
        relation = relation or accounting.relation_from_name(self.relation)
        self.check_relation(relation)
        return accounting.epsilon(self.events(), self.delta, relation)

    def check_relation(self, relation: NeighboringRelation) -> None:
        """Refuse a relation that outputs of this plan have no statement under.

        Raises:
            AccountingError: Their number is that of the records.
        """
        if relation is not NeighboringRelation.REPLACE_ONE:
            for m in self.mechanisms:
                if isinstance(m, GaussianRecordPlan | LabelPlan):
                    raise AccountingError(f"{m.stage} shows how many records there are: state it under REPLACE_ONE")

    def truncation(self) -> float:
        """Sum over the steps of all DP-SGD stages of the probability that a batch is cut."""
        return sum(m.num_steps * m.truncation_probability for m in self.mechanisms if isinstance(m, DpSgdPlan))

    @property
    def grouped(self) -> bool:
        """Whether one unit is a person, with all records, and not one record."""
        return self.unit_of_privacy != ONE_RECORD

    def stages(self) -> list[str]:
        """Names of all private mechanisms, in order."""
        return [m.stage for m in self.mechanisms]

    def mechanism(self, stage: str) -> MechanismPlan:
        """The plan of one stage.

        Raises:
            KeyError: No private mechanism of that name.
        """
        return {m.stage: m for m in self.mechanisms}[stage]


def chernoff_cap(num_units: int, sample_rate: float, probability: float) -> int:
    """Smallest k whose Chernoff bound P[Binomial(n, q) > k] <= exp(-n KL(k/n || q)) is below ``probability``.

    >>> chernoff_cap(60_000, 4096 / 60_000, 1e-12)
    4564
    """
    if sample_rate >= 1.0:
        return num_units
    budget = -math.log(probability)
    low, high = math.ceil(num_units * sample_rate), num_units
    while low < high:
        k = (low + high) // 2
        x = k / num_units
        divergence = float(rel_entr(x, sample_rate) + rel_entr(1 - x, 1 - sample_rate))
        low, high = (low, k) if num_units * divergence >= budget else (k + 1, high)
    return max(1, low)


def check_expected_batch(plan: DpSgdPlan, num_units: int, minimum: int) -> None:
    """Refuse data too small for the plan's rate. For the steward alone.

    Raises:
        DataError: Fewer units are expected per batch than ``minimum``.
    """
    if plan.sample_rate * num_units < minimum:
        raise DataError(
            f"too few records: {num_units} units at sample_rate={plan.sample_rate} give an expected batch of "
            f"{plan.sample_rate * num_units:.1f}, below {minimum}. Use more records, or a higher sample_rate (config)"
        )
