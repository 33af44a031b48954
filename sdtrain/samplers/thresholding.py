"""Thresholding of the clean prediction: made for pixels, off by default.

Latents are not pixels. Clamping unit-variance latents to [-1, 1] shrinks them (the standard deviation of
clamp(N(0, 1), -1, 1) is 0.718) and breaks guidance, so this is an option that has to be asked for by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sdtrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class FixedRange:
    """Clamp to [-limit, limit].

    Raises:
        ConfigError: a limit that is not above 0.
    """

    limit: float = 1.0

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise ConfigError(f"thresholding.limit: found {self.limit}, allowed are numbers above 0")


@dataclass(frozen=True, slots=True)
class DynamicPercentile:
    """Clamp each item to [-s, s] and divide by s, s = the percentile of its absolute values within [1, max_value].

    Attributes:
        ratio: The percentile as a fraction, in (0, 1].
        max_value: Upper bound of s; at 1 this is `FixedRange(1)`.

    Raises:
        ConfigError: a ratio or a bound outside its range.

    Source: Saharia et al. 2022 (Imagen), arXiv:2205.11487, section 2.3.
    """

    ratio: float = 0.995
    max_value: float = float("inf")

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"thresholding.ratio: found {self.ratio}, allowed are numbers above 0 and up to 1")
        if self.max_value < 1:
            raise ConfigError(f"thresholding.max_value: found {self.max_value}, allowed are numbers from 1 on")


Thresholding = FixedRange | DynamicPercentile


def threshold(clean: Float[Tensor, " batch *item"], thresholding: Thresholding) -> Float[Tensor, " batch *item"]:
    """Apply the option to the clean prediction of each item."""
    match thresholding:
        case FixedRange(limit=limit):
            return clean.clamp(-limit, limit)
        case DynamicPercentile(ratio=ratio, max_value=max_value):
            s = torch.quantile(clean.flatten(1).abs(), ratio, dim=1).clamp(1.0, max_value)
            s = s.view(-1, *([1] * (clean.dim() - 1)))
            return clean.clamp(-s, s) / s
