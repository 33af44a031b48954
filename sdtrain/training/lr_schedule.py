"""The learning rate as a pure function of applied steps, so that a resume cannot shift it."""

from __future__ import annotations

import math
from typing import Literal, assert_never


def learning_rate_at(
    applied_steps: int,
    *,
    lr_schedule: Literal["constant", "linear", "cosine"],
    peak: float,
    warmup_steps: int,
    warmup_start: float,
    final_fraction: float,
    total_steps: int,
) -> float:
    """Learning rate of the update that follows `applied_steps` applied ones.

    Args:
        peak: Rate at the end of the warm-up.
        warmup_start: Rate of the very first update when `warmup_steps` > 0.
        final_fraction: Last rate / peak, for `linear` and `cosine`.
        total_steps: Step at which the last rate is reached; later steps keep it.
    """
    if applied_steps < warmup_steps:
        return warmup_start + (peak - warmup_start) * applied_steps / warmup_steps
    progress = min(1.0, (applied_steps - warmup_steps) / max(1, total_steps - warmup_steps))
    match lr_schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 + (final_fraction - 1) * progress)
        case "cosine":
            return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
        case _:
            assert_never(lr_schedule)
