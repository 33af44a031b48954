"""Engines for tests: a plain one without DeepSpeed, and one rank of the real thing inside the test's own process."""

from __future__ import annotations

import gc
import importlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdtrain import cli, distributed
from sdtrain.checkpoints.recut import Layout
from sdtrain.training.engine import StepResult
from sdtrain.training.health import StepLost


class PlainEngine:
    """What trainer, keeper and state ask of an engine, on plain tensors.

    `skips` names the updates (from 0) whose gradients are not finite, beside those whose losses are not; `loses` names
    the backwards (from 0) that lack memory on some rank; `log` is told everything that happens.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        *,
        name: str = "denoiser",
        accumulation: int = 1,
        skips: Sequence[int] = (),
        loses: Sequence[int] = (),
        has_ema: bool = True,
        log: list[Any] | None = None,
    ) -> None:
        self.module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) if module is None else module
        self.applied_steps = 0
        self.log = [] if log is None else log
        self._name, self._accumulation, self._skips, self._loses = name, accumulation, set(skips), set(loses)
        self._micro, self._updates, self._backwards, self._is_finite = 0, 0, 0, True
        flat = torch.cat([parameter.detach().flatten() for parameter in self.module.parameters()])
        layout = Layout.of([{key: parameter.shape for key, parameter in self.module.named_parameters()}])
        self.partitions: Any = SimpleNamespace(layout=layout, spans=((0, len(flat)),))
        self.state = {"master": flat, "exp_avg": flat + 1, "exp_avg_sq": flat.square()}
        self.ema = SimpleNamespace(shards=[flat / 2]) if has_ema else None
        self.restored: tuple[dict[str, Tensor], int, dict[str, float]] | None = None

    # The loop -----------------------------------------------------------------------------------------------------

    @contextmanager
    def alone(self, others: Sequence[Any]) -> Iterator[None]:
        self.log.append(("alone", self._name, [other._name for other in others]))
        yield

    def begin(self) -> None:
        self.module.train()

    def backward(self, losses: Tensor, weights: Tensor, verdict: Tensor | None = None) -> None:
        self.log.append(("backward", self._name))
        self._backwards += 1
        if self._backwards - 1 in self._loses:
            raise StepLost("MemoryError: too little")
        self._micro += 1
        self._is_finite &= verdict is None or bool(torch.isfinite(verdict))

    def discard(self) -> None:
        self.log.append(("discard", self._name))
        self._micro, self._is_finite = self._accumulation, False

    def step(self, learning_rate: float) -> StepResult | None:
        if self._micro < self._accumulation:
            return None
        self.log.append(("step", self._name, learning_rate))
        skipped = self._updates in self._skips or not self._is_finite
        self._micro, self._is_finite = 0, True
        self._updates += 1
        if skipped:
            return StepResult(applied=False, gradient_norm=float("inf"), learning_rate=learning_rate, ema_decay=None)
        self.applied_steps += 1
        return StepResult(applied=True, gradient_norm=1.0, learning_rate=learning_rate, ema_decay=0.5)

    def rewind(self, *, keeps_scale: bool) -> None:
        self.log.append(("rewind", self._name, keeps_scale))

    # Checkpoints --------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        kinds = self.state | ({} if self.ema is None else {"ema": self.ema.shards[0]})
        return {f"group0/{kind}": value for kind, value in kinds.items()}

    def scaler_state(self) -> dict[str, float]:
        return {}

    def restore(self, read: dict[str, Tensor], *, applied_steps: int, scaler: dict[str, float]) -> None:
        self.restored, self.applied_steps = (read, applied_steps, scaler), applied_steps


# One real rank ----------------------------------------------------------------------------------------------------


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of one rank, for as many DeepSpeed engines and runs as a module wants.

    It is left through DeepSpeed, which keeps groups of its own that torch alone would leave stale.
    """
    from sdtrain.training.engine import import_deepspeed

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "to be removed")
            patch.delenv(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch deprecates what torch's compiler imports
            deepspeed = import_deepspeed()
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        distributed.initialize(timeout_seconds=60)
        try:
            yield
        finally:
            gc.collect()  # an engine that was left in the middle of a step reduces what it holds back when it is freed
            if deepspeed.comm.comm.cdb is None:
                distributed.shutdown()
            else:
                deepspeed.comm.destroy_process_group()


@contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """Let DeepSpeed train in fp16 on a CPU, which it refuses where the CPU has no fast instructions for it."""
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
        yield


def sdtrain(*arguments: object) -> int:
    """Run a command line of `sdtrain` inside `one_rank()` and return what its process would have exited with."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "initialize", lambda timeout_seconds: None)
        patch.setattr(os, "_exit", leave)
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)
