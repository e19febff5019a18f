"""The accuracy that a bundle may carry: metrics.json, from two noisy counts that the release paid for."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from dpldm_core.config import Frozen
from dpldm_core.privacy.discrete import drawn_variance

WORDS = "released through a mechanism that is part of epsilon"
_MOST = 10**12  # records, or noise in them: whatever is larger is no count


class ReleasedMetrics(Frozen):
    """Accuracy on held-out private records of a classifier trained on the synthetic images. Public.

    The two counts are what the mechanism released; every other number follows from them and from the plan.
    """

    stage: str = Field(description="the mechanism's name in privacy_report.json")
    num_right: int = Field(
        ge=-_MOST, le=_MOST, description="noisy count of held-out records that were classified right; may be negative"
    )
    num_wrong: int = Field(ge=-_MOST, le=_MOST, description="noisy count of the others; may be negative")
    noise_multiplier: float = Field(
        gt=0, le=_MOST, description="as charged: noise of a count over max_records_per_unit"
    )
    max_records_per_unit: int = Field(ge=1, le=_MOST, description="most records of one unit that were counted")
    count_noise_std: float = Field(gt=0, description="noise standard deviation of each count, in records")
    accuracy: float = Field(ge=0, le=1, description="num_right / (num_right + num_wrong), kept within 0 and 1")
    accuracy_noise_std: float = Field(gt=0, description="standard error that the noise gives to accuracy")

    @model_validator(mode="after")
    def _follows_from_the_counts(self) -> Self:
        counts = self.num_right, self.num_wrong
        derived = _derived(*counts, self.noise_multiplier, self.max_records_per_unit)
        if wrong := [name for name, value in derived.items() if getattr(self, name) != value]:
            raise ValueError(f"{wrong} do not follow from the counts and the noise, which give {derived}")
        return self


def metrics_of(
    stage: str, num_right: int, num_wrong: int, noise_multiplier: float, max_records_per_unit: int
) -> ReleasedMetrics:
    """The metrics that two released counts give.

    Args:
        stage: Name of the mechanism.
        num_right: Noisy count of right predictions.
        num_wrong: Noisy count of wrong ones.
        noise_multiplier: As charged.
        max_records_per_unit: Sensitivity of the counts.

    >>> metrics_of("s", 90, 10, 7.0, 1).accuracy, round(metrics_of("s", 90, 10, 7.0, 1).accuracy_noise_std, 4)
    (0.9, 0.0647)
    """
    values = {
        "stage": stage,
        "num_right": num_right,
        "num_wrong": num_wrong,
        "noise_multiplier": noise_multiplier,
        "max_records_per_unit": max_records_per_unit,
    }
    derived = _derived(num_right, num_wrong, noise_multiplier, max_records_per_unit)
    return ReleasedMetrics.model_validate(values | derived)


def in_words(metrics: ReleasedMetrics) -> str:
    """The sentence that a card carries.

    >>> in_words(metrics_of("s", 90, 10, 7.0, 1))
    'A classifier trained on the synthetic images alone was right on 90.0 % of held-out private records; the noise in \
this number has a standard error of 6.5 %. It was released through a mechanism that is part of epsilon (stage s).'
    """
    return (
        f"A classifier trained on the synthetic images alone was right on {100 * metrics.accuracy:.1f} % of held-out "
        f"private records; the noise in this number has a standard error of {100 * metrics.accuracy_noise_std:.1f} %. "
        f"It was {WORDS} (stage {metrics.stage})."
    )


def _derived(num_right: int, num_wrong: int, noise_multiplier: float, max_records: int) -> dict[str, float]:
    """Accuracy and its noise, to first order in the noise of the counts; the divisor is at least 1."""
    std, total = math.sqrt(drawn_variance(noise_multiplier, max_records)), max(num_right + num_wrong, 1)
    accuracy = min(max(num_right / total, 0.0), 1.0)
    return {
        "count_noise_std": std,
        "accuracy": accuracy,
        "accuracy_noise_std": std * math.sqrt(accuracy * accuracy + (1.0 - accuracy) * (1.0 - accuracy)) / total,
    }
