"""From uniform draws to timesteps.

Every draw is a function of the sample's own uniform number, its global position and the step, so that neither the
number of ranks nor a resume moves a timestep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import Literal, get_args

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from sdtrain.errors import ConfigError

TimestepDistribution = Literal["uniform", "logit_normal"]

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_NUM_CANDIDATES = 64


def uniform_timesteps(uniforms: Float64[Tensor, " batch"], num_train_timesteps: int) -> Int64[Tensor, " batch"]:
    """Timesteps floor(u * T), each of the T equally likely.

    Args:
        uniforms: Draws in [0, 1), float64.

    Raises:
        TypeError: draws that are not float64; float32 cannot hold the same draw on every device.
    """
    if uniforms.dtype != torch.float64:
        raise TypeError(f"timesteps need float64 uniform draws, found {uniforms.dtype}")
    return (uniforms * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def stratified(
    uniforms: Float64[Tensor, " batch"], positions: Int64[Tensor, " batch"], num_bins: int
) -> Float64[Tensor, " batch"]:
    """Uniform draws moved into bin `position mod num_bins` of [0, 1]: any run of positions covers all bins evenly.

    Feed the result to `uniform_timesteps`. Validation losses then hold every noise level in equal parts, at every
    checkpoint.

    Args:
        uniforms: Draws in [0, 1).
        positions: Positions in the validation order.
        num_bins: Number of equal bins.
    """
    return (positions % num_bins + uniforms) / num_bins


def low_discrepancy(
    uniforms: Float64[Tensor, " batch"], positions: Int64[Tensor, " batch"], batch_size: int
) -> Float64[Tensor, " batch"]:
    """Uniform draws of which every global batch holds exactly one in each of `batch_size` equal bins.

    Each draw stays uniform within its bin, so a batch's mean over noise levels has the right expectation and much less
    variance than independent draws. Bins are visited in steps near the golden ratio: a rank's or a micro-batch's share
    of the batch covers [0, 1] evenly too, however the batch is cut.

    Args:
        uniforms: Draws in [0, 1).
        positions: Global positions; a batch is `batch_size` of them in a row, beginning at a multiple.
        batch_size: Global batch size.

    Source: Kingma et al. 2021, arXiv:2107.00630, appendix I.1 (the same idea with one offset for the whole batch).
    """
    return stratified(uniforms, positions % batch_size * _lattice_step(batch_size), batch_size)


@lru_cache(maxsize=16)
def _lattice_step(num_bins: int) -> int:
    """A step that shares no factor with num_bins, so that its multiples visit all bins, and spreads them well.

    How well any run of multiples covers the bins is told by the largest partial quotient of step / num_bins; the golden
    ratio's are all 1, so the best step is looked for around it.

    Source: Niederreiter 1992, "Random number generation and quasi-Monte Carlo methods", theorem 3.4.
    """
    wanted = round(num_bins * _GOLDEN_RATIO)
    candidates = [step for step in range(1, num_bins + 1) if math.gcd(step, num_bins) == 1]
    nearest = sorted(candidates, key=lambda step: abs(step - wanted))[:_NUM_CANDIDATES]
    return min(nearest, key=lambda step: _largest_quotient(step, num_bins))


def _largest_quotient(numerator: int, denominator: int) -> int:
    """The largest partial quotient of a fraction in (0, 1]."""
    largest = 0
    while numerator:
        quotient, rest = divmod(denominator, numerator)
        largest, denominator, numerator = max(largest, quotient), numerator, rest
    return largest


@dataclass(frozen=True, slots=True, kw_only=True)
class TimestepPhase:
    """How likely each part of the timestep axis is, for a part of the training.

    Attributes:
        until_step: The first step that is no longer in this phase; None for the last phase.
        edges: Where [0, 1) is cut, ascending; 0 is the least noise, 1 the most.
        weights: Relative likelihood of each part, one more than edges; 0 leaves a part out.

    Raises:
        ConfigError: edges or weights that are not so.
    """

    until_step: int | None = None
    edges: tuple[float, ...] = ()
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        inside = all(low < high for low, high in pairwise((0.0, *self.edges, 1.0)))
        if not inside or len(self.weights) != len(self.edges) + 1 or min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ConfigError(
                f"task.timesteps.phases: found edges {list(self.edges)} and weights {list(self.weights)}; allowed are "
                "edges ascending within 0 and 1, and one more weight than edges, none below 0 and one above"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TimestepSampling:
    """How training chooses the noise level of every sample.

    Phases are **importance sampled**: timesteps are drawn in proportion to distribution x weight and the loss is left
    alone, so the expected gradient is that of the loss weighted by `weights`, up to a constant.

    Attributes:
        distribution: `uniform`, or `logit_normal`: sigmoid(N(logit_mean, logit_std)) of the timestep axis.
        logit_mean: 0 is symmetric, above 0 favours noise.
        logit_std: Spread; above 0.
        strata: The global batch size, to draw a batch's levels evenly (`low_discrepancy`); None draws independently.
        phases: In the order of the training, the last without an end; none leaves the distribution alone.

    Raises:
        ConfigError: an unknown distribution, a spread that is not above 0, or phases without an order.

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1 (logit-normal).
    """

    distribution: TimestepDistribution = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    strata: int | None = None
    phases: tuple[TimestepPhase, ...] = ()

    def __post_init__(self) -> None:
        if self.distribution not in get_args(TimestepDistribution):
            allowed = ", ".join(get_args(TimestepDistribution))
            raise ConfigError(f"task.timesteps.distribution: found {self.distribution!r}, allowed are {allowed}")
        if self.logit_std <= 0:
            raise ConfigError(f"task.timesteps.logit_std: found {self.logit_std}, allowed are numbers above 0")
        ends = [phase.until_step for phase in self.phases]
        ordered = [0, *(math.inf if end is None else end for end in ends)]
        if ends and (ends[-1] is not None or not all(low <= high for low, high in pairwise(ordered))):
            raise ConfigError(
                f"task.timesteps.phases: found phases that end before steps {ends}; allowed are ends that do not fall, "
                "and none for the last phase"
            )

    def draw(
        self,
        uniforms: Float64[Tensor, " batch"],
        positions: Int64[Tensor, " batch"],
        *,
        step: int,
        num_train_timesteps: int,
    ) -> Int64[Tensor, " batch"]:
        """The timesteps of a micro-batch.

        Args:
            uniforms: Draws in [0, 1), float64.
            positions: Global positions of the samples.
            step: Finished optimiser steps.
            num_train_timesteps: T.
        """
        if self.strata is not None:
            uniforms = low_discrepancy(uniforms, positions, self.strata)
        return uniform_timesteps(self._quantile(self._weighted(uniforms, step)), num_train_timesteps)

    def _weighted(self, uniforms: Float64[Tensor, " batch"], step: int) -> Float64[Tensor, " batch"]:
        """Uniform draws moved to where the phase of `step` wants them, on the distribution's own scale."""
        if not self.phases:
            return uniforms
        phase = next(one for one in self.phases if one.until_step is None or step < one.until_step)
        edges = [0.0, *(self._cumulative(edge) for edge in phase.edges), 1.0]
        masses = [weight * (high - low) for weight, (low, high) in zip(phase.weights, pairwise(edges), strict=True)]
        moved, start = uniforms, 0.0
        for mass, (low, high) in zip(masses, pairwise(edges), strict=True):
            share = mass / sum(masses)
            if share > 0:
                inside = low + (uniforms - start) * ((high - low) / share)
                moved = torch.where(uniforms >= start, inside.clamp(max=math.nextafter(high, 0.0)), moved)
                start += share
        return moved

    def _cumulative(self, edge: float) -> float:
        """Probability of the timestep axis below `edge`."""
        if self.distribution == "uniform":
            return edge
        return NormalDist(self.logit_mean, self.logit_std).cdf(math.log(edge / (1 - edge)))

    def _quantile(self, uniforms: Float64[Tensor, " batch"]) -> Float64[Tensor, " batch"]:
        """The place on the timestep axis below which the share `uniforms` of the distribution lies."""
        if self.distribution == "uniform":
            return uniforms
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(uniforms))
