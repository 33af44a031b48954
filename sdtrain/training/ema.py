"""Exponential moving average of the weights: fp32, over this rank's own master partition, without communication."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def decay_at(applied_steps: int, max_decay: float) -> float:
    """Decay of the update that follows the n-th applied step: min(max_decay, (1 + n) / (10 + n)).

    The ramp keeps the average from remembering the random initialisation.
    """
    return min(max_decay, (1 + applied_steps) / (10 + applied_steps))


class ShardedEma:
    """Moving average of one trainable's master partition.

    Averaging the fp32 master rather than the bf16 working weights matters: at decay 0.9999 a bf16 weight's step is lost
    in rounding. Each rank averages its own slice; only a checkpoint or an evaluation ever brings slices together.

    Attributes:
        decay: The ceiling of the decay.
        shards: This rank's average, one flat fp32 vector per parameter group.
    """

    def __init__(self, masters: Sequence[Tensor], *, decay: float) -> None:
        self.decay = decay
        self.shards = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], *, applied_steps: int) -> float:
        """Move towards the master after its `applied_steps`-th update; returns the decay that was used."""
        decay = decay_at(applied_steps, self.decay)
        torch._foreach_lerp_(self.shards, list(masters), 1.0 - decay)
        return decay

    def restore(self, shards: Sequence[Tensor]) -> None:
        """Take over saved averages of the same spans."""
        for mine, saved in zip(self.shards, shards, strict=True):
            mine.copy_(saved)
