"""Run on two ranks: only rank 1 is sick, in every way; then a run in which only rank 1 fails."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain import cli, distributed
from sdtrain.errors import DataError, PeerLostError
from sdtrain.records import Batch, DrawSpec, LossOutput
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask
from sdtrain.training.engine import Engine, EngineSettings
from sdtrain.training.forensics import SickStep
from sdtrain.training.trainer import Trainer, TrainerSettings

MICRO, ACCUMULATION, STEPS = 4, 2, 8
Fault = Callable[[Tensor], Tensor]
"""What becomes of a micro-step's losses."""


class Starving(torch.autograd.Function):
    """The identity, whose backward finds no memory."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> Tensor:  # type: ignore[override]
        raise torch.OutOfMemoryError("out of memory in a backward")


def starve(losses: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("out of memory in a forward")


def fail(losses: Tensor) -> Tensor:
    raise DataError("field 'tokens' is missing")


class OneRankSick:
    """Squared errors of a small network; `faults` by (step, micro-step) befall rank 1 alone."""

    def __init__(self, network: nn.Module, faults: dict[tuple[int, int], Fault]) -> None:
        self.network = network
        self.faults = faults if distributed.ranks().rank == 1 else {}
        self.trainables: dict[str, Any] = {}
        self.frozen: dict[str, nn.Module] = {}
        self.draws = DrawSpec()
        self.calls: dict[int, int] = {}

    def is_active(self, name: str, step: int) -> bool:
        return True

    def loss(self, name: str, batch: Batch, step: int) -> LossOutput:
        micro_step = self.calls.get(step, 0)
        self.calls[step] = micro_step + 1
        inputs = batch.fields["inputs"].to(next(self.network.parameters()).dtype)
        losses = self.network(inputs).float().square().mean(1)
        losses = self.faults.get((step, micro_step), lambda losses: losses)(losses)
        return LossOutput(losses=losses, weights=batch.weights)

    def validate(self, batch: Batch) -> Any: ...

    def sample(self, conditioning: Any, seeds: Any) -> Any: ...


def batches(steps: list[int]) -> Iterator[tuple[int, int, Batch]]:
    """Micro-batches whose content is that of `steps`, in turn."""
    rank = distributed.ranks().rank
    for step, content in enumerate(steps):
        for micro_step in range(ACCUMULATION):
            first = ((content * 2 + rank) * ACCUMULATION + micro_step) * MICRO
            generator = torch.Generator().manual_seed(first)
            yield (
                step,
                micro_step,
                Batch(
                    keys=tuple(str(first + item) for item in range(MICRO)),
                    positions=torch.arange(first, first + MICRO),
                    fields={"inputs": torch.randn(MICRO, 5, generator=generator)},
                    normals={},
                    uniforms={},
                    weights=torch.ones(MICRO),
                ),
            )


def train(faults: dict[tuple[int, int], Fault], steps: list[int], **settings: Any) -> dict[str, Any]:
    """Train on the content of `steps`; returns a digest of this rank's state and what was thrown away."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 33), nn.GELU(), nn.Linear(33, 3))
    engine = Engine(network, EngineSettings(micro_batch_size=MICRO, grad_accum_steps=ACCUMULATION, **settings))
    seen: list[SickStep] = []
    trainer = Trainer(
        task=OneRankSick(network, faults),
        engines={"denoiser": engine},
        settings=TrainerSettings(
            max_steps=len(steps), batch_size=MICRO * ACCUMULATION * 2, grad_accum_steps=ACCUMULATION, seed=1
        ),
        batches=batches(steps),
        learning_rate=lambda name, applied: 1e-2 / (1 + applied),
        on_sick=lambda sick: seen.append(sick),
    )
    trainer.fit()
    state = hashlib.sha256()
    for tensor in [*engine.tensors().values(), *network.parameters()]:
        state.update(tensor.detach().float().numpy().tobytes())
    causes = [(sick.step, str(sick.evidence.cause), sick.evidence.lost) for sick in seen]
    return {"state": state.hexdigest(), "applied": engine.applied_steps, "sick": causes}


def scenarios() -> dict[str, Any]:
    def nan(losses: Tensor) -> Tensor:
        return losses * float("nan")

    sick = {(1, 0): nan, (2, 1): starve, (4, 0): starve, (5, 1): nan}
    rows: dict[str, Any] = {}
    starving = sick | {(1, 0): Starving.apply, (5, 1): Starving.apply}
    for precision in ("fp32", "bf16"):
        for oom_skip in (False, True):
            settings = {"precision": precision, "oom_skip": oom_skip}
            healthy = train({}, [0, 3, 6, 7], **settings)
            rows[f"{precision} {oom_skip}"] = (
                healthy,
                train(starving if oom_skip else sick, list(range(STEPS)), **settings),
            )
    try:
        train({(1, 1): fail}, list(range(STEPS)))
    except (DataError, PeerLostError) as error:
        rows["failed"] = f"{type(error).__name__}: {error}"
    return rows


def fail_on_rank_one() -> None:
    """From its third step on, a run's task fails on rank 1 alone."""
    real = LatentDiffusionTask.loss

    def loss(self: LatentDiffusionTask, name: str, batch: Batch, step: int) -> LossOutput:
        if step == 2 and distributed.ranks().rank == 1:
            raise DataError("field 'tokens' is missing")
        return real(self, name, batch, step)

    LatentDiffusionTask.loss = loss  # type: ignore[method-assign]


def main(folder: Path) -> None:
    distributed.initialize(timeout_seconds=60)
    rows = scenarios()
    (folder / f"rank{distributed.ranks().rank}.json").write_text(json.dumps(rows))
    fail_on_rank_one()
    distributed.initialize = lambda timeout_seconds: distributed.ranks()
    cli.main(["train", str(folder / "train.yaml")])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
