"""A stage whose workers are slow and die on demand, in a module that Ray's workers can import."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.runner import Needs, Unit, Work, one_to_one


@dataclass(frozen=True)
class Slow:
    """Reverses a text; `marks` counts what happened, across processes.

    Attributes:
        source: Folder of texts.
        folder: Where the reversed ones go.
        marks: Folder of empty files: one for each worker that was made, one for each attempt at a unit.
        seconds: How long a unit takes.
        crashes: How often the worker of unit 1 dies.
    """

    source: Path
    folder: Path
    marks: Path
    seconds: float = 0.0
    crashes: int = 0
    name: str = "slow"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> Mapping[str, Any]:
        return {}

    def units(self) -> Sequence[Unit]:
        return one_to_one(self.source, ".txt")

    def mark(self, what: str) -> int:
        count = len(list(self.marks.glob(f"{what}.*")))
        (self.marks / f"{what}.{count}.{os.getpid()}").touch()
        return count

    def worker(self) -> Work:
        self.mark("made")

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            time.sleep(self.seconds)
            if self.mark(unit.name) < self.crashes and unit.index == 1:
                os._exit(9)
            text = unit.inputs[0].read_text()
            (folder / f"{unit.name}.txt").write_text(text[::-1])
            return {"chars": len(text)}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> None:
        return None
