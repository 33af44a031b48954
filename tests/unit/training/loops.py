"""Loops for tests of the trainer: a task that counts, its batches, and a trainer around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sdtrain.records import Batch, DrawSpec, LossOutput, Tombstone, Trainable
from sdtrain.training.trainer import Trainer, TrainerSettings
from tests.engines import PlainEngine

MICRO = 2


class CountingTask:
    """Loss of a sample: its position, or what `change` makes of it. `draws_seen` holds what torch draws inside."""

    def __init__(
        self,
        active: Callable[[str, int], bool] = lambda name, step: True,
        on_loss: Callable[[], object] = lambda: None,
        change: Callable[[int, Tensor], Tensor] = lambda step, losses: losses,
    ) -> None:
        self.trainables: dict[str, Trainable] = {}
        self.frozen: dict[str, torch.nn.Module] = {}
        self.draws = DrawSpec()
        self.is_active = active
        self.on_loss = on_loss
        self.change = change
        self.draws_seen: list[tuple[int, float]] = []

    def loss(self, name: str, batch: Batch, step: int) -> LossOutput:
        self.on_loss()
        self.draws_seen.append((step, float(torch.rand(()))))
        values = self.change(step, batch.positions.float())
        return LossOutput(losses=values, weights=batch.weights, metrics={"double": 2 * values})

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def sample(self, conditioning: Any, seeds: Sequence[int]) -> Tensor:
        raise NotImplementedError


def micro_batch(first: int, bad: Sequence[int] = ()) -> Batch:
    positions = list(range(first, first + MICRO))
    return Batch(
        keys=tuple(map(str, positions)),
        positions=torch.tensor(positions),
        fields={},
        normals={},
        uniforms={},
        weights=torch.tensor([0.0 if position in bad else 1.0 for position in positions]),
        errors=tuple(Tombstone(str(position), "0.tar", "torn") for position in positions if position in bad),
    )


def batches(start: int, accumulation: int, bad: Sequence[int] = ()) -> Iterator[tuple[int, int, Batch]]:
    for step in range(start, 10_000):
        for micro in range(accumulation):
            yield step, micro, micro_batch((step * accumulation + micro) * MICRO, bad)


def make(
    engines: dict[str, PlainEngine],
    *,
    max_steps: int = 4,
    accumulation: int = 1,
    start: int = 0,
    bad: Sequence[int] = (),
    task: CountingTask | None = None,
    learning_rate: Callable[[str, int], float] = lambda name, applied: 0.1,
    settings: dict[str, Any] | None = None,
    stream: Iterator[tuple[int, int, Batch]] | None = None,
    **hooks: Any,
) -> Trainer:
    values = {"log_every_steps": 2} | (settings or {})
    return Trainer(
        task=task or CountingTask(),
        engines=engines,
        settings=TrainerSettings(
            max_steps=max_steps, batch_size=accumulation * MICRO, grad_accum_steps=accumulation, seed=3, **values
        ),
        batches=stream or batches(start, accumulation, bad),
        learning_rate=learning_rate,
        start_step=start,
        **hooks,
    )
