"""Engines with one fault each, whose plan, and so whose claim, stays as it is: what an audit should find."""

from __future__ import annotations

import math

import numpy as np

from dpldm_core.privacy.engine import DpSgdEngine


class HalfNoise(DpSgdEngine):
    """Noise of half the standard deviation that is charged."""

    factor = 0.5

    def __init__(self, model, plan, key, **options):
        super().__init__(model, plan, key, **options)
        smaller = plan.model_copy(update={"noise_multiplier": self.factor * plan.noise_multiplier})
        self._noise = smaller.noise(key.derive("noise"))


class NoiseAveragedOverTwoWorkers(HalfNoise):
    """Every worker adds its own noise, then sums are averaged: sigma over sqrt(2)."""

    factor = math.sqrt(0.5)


class NoNoiseOnOneLayer(DpSgdEngine):
    """One layer, the canaries', is left without noise."""

    def _take_noise(self, step):
        future = super()._take_noise(step)
        future.result()[-self._model.canaries.num_embeddings :] = 0
        return future


class SameNoiseEveryStep(DpSgdEngine):
    """The noise of step 0 again and again."""

    def _take_noise(self, step):
        self._ahead = None
        return super()._take_noise(0)


class ClipTooWide(DpSgdEngine):
    """Units are clipped to five times the norm that is charged."""

    def __init__(self, model, plan, key, **options):
        super().__init__(model, plan, key, **options)
        self._clip.max_norm = 5 * plan.max_grad_norm


class RateDoubled(DpSgdEngine):
    """Units are sampled at twice the rate that is charged."""

    def batch_indices(self, step, num_units):
        """Poisson at 2q."""
        rate = min(1.0, 2 * self.plan.sample_rate)
        twice = self.plan.model_copy(update={"sample_rate": rate, "max_batch_size": None})
        return twice.sample_batch(self._sampling_key, step, num_units)


class ShuffledBatches(DpSgdEngine):
    """Every unit once in each round of 1/q steps, charged as Poisson sampling."""

    def batch_indices(self, step, num_units):
        """The next part of the shuffled units."""
        rounds = round(1 / self.plan.sample_rate)
        order = self._sampling_key.generator(step // rounds).permutation(num_units)
        return np.sort(np.array_split(order, rounds)[step % rounds])


MUTANTS = (
    HalfNoise,
    NoiseAveragedOverTwoWorkers,
    NoNoiseOnOneLayer,
    SameNoiseEveryStep,
    ClipTooWide,
    RateDoubled,
    ShuffledBatches,
)
