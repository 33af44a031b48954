"""What torch compiles while a run trains: how much, how long it takes, and whether it ever starts again."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sdtrain import distributed
from sdtrain.records import Batch

if TYPE_CHECKING:  # it brings all of the compiler along
    from torch._dynamo.utils import CompilationMetrics

Batches = Generator[tuple[int, int, Batch]]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
RECORDS_KEPT = 4096
"""Of torch's own list between two readings; it keeps 64, fewer than the first step of a UNet writes."""


@dataclass(slots=True)
class Tally:
    """What one rank compiled so far.

    Attributes:
        graphs: Pieces of code, once for each variant.
        seconds: Time that took, backward passes included.
        graph_breaks: Places where a graph ends because torch cannot compile what follows.
        recompiles: Graphs compiled after warm-up.
        first_step_seconds: Wall time of this attempt's first step; 0 until it is over.
        news: What was compiled after warm-up and why, as far as nobody was told of it yet.
    """

    graphs: int = 0
    seconds: float = 0.0
    graph_breaks: int = 0
    recompiles: int = 0
    first_step_seconds: float = 0.0
    news: list[str] = field(default_factory=list)


class CompileWatch:
    """Counts what is compiled, and warns of what is compiled after warm-up.

    The first step with a batch of new shapes compiles: each bucket of samples once. A graph that is compiled in any
    later step means that something else changes from step to step, at the price of seconds each time: it is told with
    torch's reason. Batches pass through the watch, so that it knows which shapes a step trains on.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Forget what was compiled before.

        Args:
            clock: Seconds.
        """
        from torch._dynamo import utils

        self._dynamo = utils
        self._clock = clock
        self._tally = Tally()
        self._breaks_before = self._breaks()
        self._seen: set[Shapes] = set()
        self._step = -1
        self._is_warm = False
        self._first_step: tuple[int, float] | None = None
        utils.set_compilation_metrics_limit(RECORDS_KEPT)
        utils.clear_compilation_metrics()

    def over(self, batches: Batches) -> Batches:
        """The same batches; closing this closes them."""
        self._step = -1
        try:
            for step, micro_step, batch in batches:
                if step != self._step:
                    self._enter(step, _shapes(batch.fields))
                yield step, micro_step, batch
        finally:
            batches.close()

    def beat(self, phase: str, step: int | None) -> None:
        """Be told where the loop is: the first step lasts from its first forward to whatever follows it."""
        if self._first_step is None and phase == "forward" and step is not None:
            self._first_step = (step, self._clock())
        elif self._first_step is not None and not self._tally.first_step_seconds and step != self._first_step[0]:
            self._tally.first_step_seconds = self._clock() - self._first_step[1]

    def figures(self) -> tuple[dict[str, float], list[str]]:
        """Figures so far, and what was compiled after warm-up since the last call; collective, the same on all ranks.

        Ranks train on the same shapes, so a figure is that of the rank with most of it.
        """
        self._read()
        tallies: list[Tally] = distributed.gather_objects(self._tally)
        figures = {
            "compile/graphs": float(max(tally.graphs for tally in tallies)),
            "compile/seconds": max(tally.seconds for tally in tallies),
            "compile/graph_breaks": float(max(tally.graph_breaks for tally in tallies)),
            "compile/recompiles": float(max(tally.recompiles for tally in tallies)),
            "compile/first_step_seconds": max(tally.first_step_seconds for tally in tallies),
        }
        news = list(dict.fromkeys(one for tally in tallies for one in tally.news))  # ranks say the same
        self._tally.news = []
        return figures, news

    def _enter(self, step: int, shapes: Shapes) -> None:
        """Begin a step on batches of these shapes."""
        self._read()
        self._step, self._is_warm = step, shapes in self._seen
        self._seen.add(shapes)

    def _read(self) -> None:
        """Count what was compiled since the last reading, all of it in the step that was entered last."""
        records = self._dynamo.get_compilation_metrics()
        self._dynamo.clear_compilation_metrics()
        tally = self._tally
        tally.graph_breaks = self._breaks() - self._breaks_before
        for record in records:
            tally.seconds += (record.duration_us or 0) / 1e6
            if not record.is_forward or not record.has_guarded_code:
                continue
            tally.graphs += 1
            if self._is_warm:
                tally.recompiles += 1
                tally.news.append(f"{_named(record)} in step {self._step}: {_reason(record)}")

    def _breaks(self) -> int:
        """Graph breaks of this process."""
        return sum(self._dynamo.counters["graph_break"].values())


def _shapes(fields: Mapping[str, Tensor]) -> Shapes:
    return tuple(sorted((name, tuple(field.shape)) for name, field in fields.items()))


def _named(record: CompilationMetrics) -> str:
    """What was compiled, and where it stands."""
    return f"{record.co_name} ({Path(record.co_filename or '?').name}:{record.co_firstlineno})"


def _reason(record: CompilationMetrics) -> str:
    """The guard that failed, in torch's words and on one line."""
    return " ".join((record.recompile_reason or "it ran for the first time").split())
