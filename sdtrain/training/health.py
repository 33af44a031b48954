"""Sick steps: what ranks agree on before a backward, which losses are no longer noise, how many skips are too many."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from sdtrain import distributed
from sdtrain.errors import PeerLostError
from sdtrain.records import LossOutput

OUT_OF_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, for normal noise."""


class Cause(StrEnum):
    """Why a step was thrown away."""

    OUT_OF_MEMORY = "out of memory"
    LOSS = "loss not finite"
    SPIKE = "loss spike"
    GRADIENTS = "gradients not finite"


class StepLost(Exception):
    """Raised on all ranks together: one of them lacks memory for this step. The text is this rank's own error."""


class _Fault(IntEnum):
    """What stopped a rank in its own work, weakest first: the ranks' maximum is what all of them act on."""

    NONE = 0
    OUT_OF_MEMORY = 1
    ERROR = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the host's memory was too small; a smaller or another batch may well fit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in OUT_OF_MEMORY_SIGNS)


def for_keeps(error: Exception) -> Exception:
    """An error as it may be kept: out of memory without its frames, which would keep the tensors of the failed work."""
    if is_out_of_memory(error):
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    return error


def agree(error: Exception | None) -> None:
    """Go on if no rank was stopped; collective, over host memory, so that it costs no CPU-GPU sync point.

    Args:
        error: What stopped this rank in its own work; None if nothing did.

    Raises:
        StepLost: Some rank lacked memory, and nothing worse happened.
        Exception: This rank's own error, once all the others know of it.
        PeerLostError: Another rank's error: without it no step can be finished.
    """
    mine = _Fault.NONE
    if error is not None:
        mine = _Fault.OUT_OF_MEMORY if is_out_of_memory(error) else _Fault.ERROR
    worst = distributed.max_over_ranks(mine)
    if worst == _Fault.NONE:
        return
    said = "" if error is None else f"{type(error).__name__}: {error}"
    if worst == _Fault.OUT_OF_MEMORY:
        raise StepLost(said)
    told = distributed.gather_objects(said if mine is _Fault.ERROR else "")
    if error is not None and mine is _Fault.ERROR:
        raise error
    rank = next(rank for rank, text in enumerate(told) if text)
    raise PeerLostError(f"rank {rank} failed and ends the run: {told[rank]}")


class StepLoss:
    """The loss of one step while its micro-steps come in: summed on the device, read when the step is over."""

    def __init__(self) -> None:
        self._total: Tensor | None = None  # (2,): weighted losses, weights
        self._mean: Tensor | None = None  # in host memory, once `_copied`
        self._copied: torch.cuda.Event | None = None

    def add(self, loss: LossOutput) -> None:
        """Add a micro-step of this rank."""
        weighted = torch.where(loss.weights > 0, loss.losses.detach() * loss.weights, 0.0)
        here = torch.stack([weighted.double().sum(), loss.weights.double().sum()])
        self._total = here if self._total is None else self._total + here

    def verdict(self, limit: float) -> Float[Tensor, ""]:
        """1 if all ranks' mean may be stepped on, NaN if it is not finite or above `limit`; collective.

        As the last backward's verdict, a NaN spoils the gradients of all ranks, and DeepSpeed, which looks for that at
        every step, skips the update. So nothing waits for the device here.
        """
        assert self._total is not None, "a step has a micro-step"
        if distributed.is_active():
            dist.all_reduce(self._total)
        mean = self._total[0] / self._total[1].clamp(min=1e-12)
        self._mean = torch.empty_like(mean, device="cpu", pin_memory=mean.is_cuda)
        self._mean.copy_(mean, non_blocking=True)
        if mean.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return torch.where(torch.isfinite(mean) & (mean <= limit), 1.0, math.nan).float()

    def read(self) -> float | None:
        """The mean of all ranks, None where no verdict was asked for; after an update there is nothing to wait for."""
        if self._copied is not None:
            self._copied.synchronize()
        return None if self._mean is None else float(self._mean)


class LossHistory:
    """The losses of one trainable's last applied steps, and where ordinary noise ends.

    The noise of a loss grows and shrinks with the loss, so it is measured in logarithms, by median and median absolute
    deviation, which a few outliers do not move. Losses that are not positive (some adversarial ones) have no limit.
    """

    def __init__(self, *, ratio: float | None, deviations: float, window_steps: int) -> None:
        """Remember `window_steps` losses; there is no limit before half of them came, or without `ratio`."""
        self.losses: deque[float] = deque(maxlen=window_steps)
        self._ratio = ratio
        self._deviations = deviations
        self._least = max(2, window_steps // 2)

    def add(self, loss: float) -> None:
        """Remember the loss of an applied step."""
        self.losses.append(loss)

    @property
    def limit(self) -> float:
        """A finite loss above it is a spike: over `ratio` medians and over `deviations` standard deviations."""
        if self._ratio is None or len(self.losses) < self._least or min(self.losses) <= 0:
            return math.inf
        logs = np.log(np.fromiter(self.losses, dtype=np.float64))
        median = float(np.median(logs))
        spread = TO_SIGMA * float(np.median(np.abs(logs - median)))
        return math.exp(min(median + max(math.log(self._ratio), self._deviations * spread), 700.0))


@dataclass(frozen=True, kw_only=True)
class HealthSettings:
    """When a loss is a spike and when a run is sick; plain values, explained by section `health` of the page."""

    max_skipped_in_a_row: int = 25
    max_skipped_in_window: int = 50
    window_steps: int = 1000
    max_rollbacks: int = 2
    spike_ratio: float | None = 4.0
    spike_deviations: float = 12.0
    spike_window_steps: int = 128


class Health:
    """What one trainable's steps were like lately; the same on all ranks, and a part of every checkpoint.

    A resumed run so decides of every step as the run would have that was not interrupted. A rollback takes the losses
    back to those before the checkpoint, and forgets the steps that were thrown away: it left out their samples.
    """

    def __init__(self, settings: HealthSettings, state: Mapping[str, Any] | None = None) -> None:
        """Begin with nothing, or with the `state` of an earlier one."""
        self.history = LossHistory(
            ratio=settings.spike_ratio,
            deviations=settings.spike_deviations,
            window_steps=settings.spike_window_steps,
        )
        self._settings = settings
        self._skipped: deque[tuple[int, Cause]] = deque()  # (steps finished before, cause), within the window
        self._row: list[tuple[int, Cause]] = []  # the same since the last applied step
        if state is not None:
            self.history.losses.extend(state["losses"])
            self._skipped.extend((step, Cause(cause)) for step, cause in state["skipped"])
            self._row.extend((step, Cause(cause)) for step, cause in state["row"])

    def state(self) -> dict[str, Any]:
        """Everything, as plain values of JSON."""
        return {"losses": list(self.history.losses), "skipped": list(self._skipped), "row": list(self._row)}

    def applied(self, loss: float | None) -> None:
        """A step was applied; its loss is None where it is not known."""
        self._row = []
        if loss is not None:
            self.history.add(loss)

    def skipped(self, step: int, cause: Cause) -> None:
        """A step was thrown away after `step` finished ones."""
        self._row.append((step, cause))
        self._skipped.append((step, cause))
        while self._skipped[0][0] <= step - self._settings.window_steps:
            self._skipped.popleft()

    @property
    def is_sick(self) -> bool:
        """Whether the last step was thrown away, and more of them than a healthy run has to."""
        return bool(self._row) and (self._is_row or len(self._skipped) >= self._settings.max_skipped_in_window)

    @property
    def first_sick_step(self) -> int:
        """Steps that were finished before the sickness began."""
        return (self._row if self._is_row else self._skipped)[0][0]

    @property
    def story(self) -> str:
        """What happened, in words: `25 updates in a row were thrown away (24 x loss not finite, 1 x loss spike)`."""
        thrown = self._row if self._is_row else self._skipped
        counted = ", ".join(
            f"{times} x {cause}" for cause, times in Counter(cause for _, cause in thrown).most_common()
        )
        span = "in a row" if self._is_row else f"within {self._settings.window_steps} steps"
        return f"{len(thrown)} updates {span} were thrown away ({counted})"

    @property
    def _is_row(self) -> bool:
        return len(self._row) >= self._settings.max_skipped_in_a_row


def without_skips(states: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is known of every trainable's steps after a rollback: the losses before the checkpoint."""
    return {name: {**state, "skipped": [], "row": []} for name, state in states.items()}
