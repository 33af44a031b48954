"""The record and protocol that runner and stages share.

How a stage is written
----------------------
A stage is a small frozen dataclass. The driver asks it for its units (one unit = one numbered output); a worker
process asks it once for its working function and calls that for unit after unit::

    @dataclass(frozen=True)
    class Uppercase:
        source: Path                                   # folder of the previous stage
        folder: Path                                   # OUT/02-uppercase, this stage's own
        name: str = "uppercase"
        version: str = "1"                             # raise it when the code's output changes
        needs: Needs = Needs()

        def config_facts(self) -> dict[str, Any]:      # JSON; a change of it makes every unit run again
            return {"encoding": "utf-8"}

        def units(self) -> list[Unit]:                 # the previous stage is complete when this is called
            return one_to_one(self.source, ".txt")     # 00000.txt -> unit 0, 00001.txt -> unit 1, ...

        def worker(self) -> Work:                      # in the worker process, once: load models, install openers here
            def work(unit: Unit, folder: Path) -> dict[str, Any]:
                text = unit.inputs[0].read_text()
                (folder / f"{unit.name}.txt").write_text(text.upper())    # any number of files, all named 00000.*
                return {"chars": len(text)}            # JSON and deterministic: no times, no host names
            return work

        def report(self, stats: Sequence[Mapping[str, Any]]) -> RenderableType | None:
            return f"{sum(row['chars'] for row in stats)} characters"     # in the driver, stats in the units' order

Rules for workers:
- Write only into `folder` (a private temporary folder on the same file system). The runner digests, syncs and renames
  what lies there into `stage.folder` and adds `<unit>.stats.json`; only then the ledger says "done".
- The same unit gives the same bytes: no clocks, no order of arrival, no dependence on the number of workers.
- A `SdtrainError` is final (bad data does not heal) and puts the unit on the dead-letter list. Any other exception, and
  a worker process that dies, is tried again with backoff, `max_attempts` times in all.
- `needs=Needs(keeps_worker=True, ...)` makes long-lived actors: `worker()` is called once per actor, not per unit.
- With `num_gpus=1` there is one actor per GPU, else one per CPU slot, and never more than the nodes can hold.
- `prefers_gpu=True` does so where any node has a GPU, wherever the driver runs; `has_gpu()` in `worker()` says which.
- A count called `rows` in what a worker returns is what `sdtrain-data status` shows (`data_pipeline.progress.rows_of`).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import RenderableType

from sdtrain.errors import ConfigError, DataError


def unit_name(index: int) -> str:
    """A unit's number as it stands in file names: `00000`, and `100000` after `99999`.

    So names of different length sort wrongly as text; `numbered_files` and `in_number_order` sort by the number.
    """
    return f"{index:05d}"


def in_number_order(name: str) -> tuple[int, str]:
    """Sorting key for names of units."""
    return len(name), name


@dataclass(frozen=True, slots=True)
class Unit:
    """One numbered output of a stage and the files that it is made from.

    Attributes:
        index: Number of the output.
        inputs: Files that are read; their digests are part of the commit's key.
        facts: JSON facts beyond the stage's own (a bucket number, a row range); part of the commit's key.
    """

    index: int
    inputs: tuple[Path, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The number as it stands in file names."""
        return unit_name(self.index)


@dataclass(frozen=True, slots=True)
class Needs:
    """What one worker of a stage takes.

    Attributes:
        num_cpus: CPU slots of one worker; at most the run's workers are counted.
        num_gpus: GPUs of one worker, without which it does not start.
        prefers_gpu: One GPU where any node has one, and the CPU where none has.
        keeps_worker: Long-lived actors that call `worker()` once, for models and process-wide openers.
        max_workers: Upper bound for this stage, below the run's number of workers.
        environment: Variables set in the worker process before it starts.
    """

    num_cpus: float = 1
    num_gpus: float = 0
    prefers_gpu: bool = False
    keeps_worker: bool = False
    max_workers: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def has_gpu() -> bool:
    """Whether Ray gave this worker a GPU; outside of Ray, whether torch can use one.

    Raises:
        ConfigError: Ray gave one that torch cannot use: the CPU would take its place without a word.
    """
    import torch

    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return torch.cuda.is_available()
    given = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    if given and not torch.cuda.is_available():
        raise ConfigError(
            f"Ray gave a worker on {socket.gethostname()} GPU {', '.join(given)}, but torch {torch.__version__} cannot "
            "use it: mend the driver there, or start Ray's node with --num-gpus 0 to work on the CPU"
        )
    return bool(given)


Work = Callable[[Unit, Path], Mapping[str, Any]]


class Stage(Protocol):
    """What the runner knows of a stage; see the module's docstring for how one is written."""

    @property
    def name(self) -> str:
        """What the command line calls it. `dedup-split` runs wherever `dedup` is asked for."""
        ...

    @property
    def folder(self) -> Path:
        """Where its outputs lie."""
        ...

    @property
    def version(self) -> str:
        """Version of the code or model; another one makes every unit run again."""
        ...

    @property
    def needs(self) -> Needs:
        """What one worker takes."""
        ...

    def config_facts(self) -> Mapping[str, Any]:
        """The settings that the output depends on, as JSON."""
        ...

    def units(self) -> Sequence[Unit]:
        """All units, from the complete outputs of the stages before. DataError where there is nothing to do."""
        ...

    def worker(self) -> Work:
        """The working function; called in the worker process."""
        ...

    def report(self, stats: Sequence[Mapping[str, Any]]) -> RenderableType | None:
        """Called in the driver when all units stand, with their stats in order; what it returns is printed."""
        ...


def numbered_files(folder: Path, suffix: str) -> list[Path]:
    """`00000<suffix>`, `00001<suffix>`, ... of a folder in the order of their numbers; none where it is missing."""
    try:
        with os.scandir(folder) as entries:  # a Path for each of a million names would take seconds
            numbers = [entry.name.removesuffix(suffix) for entry in entries if entry.name.endswith(suffix)]
    except FileNotFoundError:
        return []
    return [folder / f"{number}{suffix}" for number in sorted(filter(str.isdecimal, numbers), key=in_number_order)]


def one_to_one(folder: Path, suffix: str) -> list[Unit]:
    """One unit for each numbered file of the previous stage, with the same number.

    Raises:
        DataError: The folder holds no numbered file.
    """
    files = numbered_files(folder, suffix)
    if not files:
        raise DataError(f"{folder} holds no numbered {suffix} file; run the stage that writes it first")
    return [Unit(int(path.name.removesuffix(suffix)), (path,)) for path in files]
