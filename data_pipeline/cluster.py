"""Where units are worked on: Ray's workers, or this process for tests. Nothing here commits anything."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from data_pipeline.outcome import Outcome, execute
from data_pipeline.ray_head import HeadWatch
from data_pipeline.ray_pool import ActorPool, Room, TaskPool
from data_pipeline.ray_start import join_cluster, start_private
from sdtrain.errors import SdtrainError

if TYPE_CHECKING:
    from data_pipeline.stage import Stage, Unit, Work


class Pool(Protocol):
    """The workers of one stage."""

    @property
    def capacity(self) -> int:
        """How many attempts may be in flight now; 0 while no worker is ready."""
        ...

    def submit(self, unit: Unit, folder: Path) -> None:
        """Start an attempt; at most `capacity` are in flight."""
        ...

    def wait(self, timeout_seconds: float) -> list[tuple[Unit, Outcome]]:
        """Attempts that ended; empty after `timeout_seconds` without one.

        Raises:
            PeerLostError: The workers' side is gone for good.
        """
        ...


class Executor(Protocol):
    """What gives each stage its workers."""

    def pool(self, stage: Stage, num_units: int) -> contextlib.AbstractContextManager[Pool]:
        """Workers for `num_units` units of `stage`, released on leaving."""
        ...


@dataclass
class InlineExecutor:
    """Works in this process, one unit after another: for tests and debugging, without Ray."""

    @contextmanager
    def pool(self, stage: Stage, num_units: int) -> Iterator[Pool]:
        """One worker."""
        yield _InlinePool(stage)


class _InlinePool:
    capacity = 1

    def __init__(self, stage: Stage):
        self._stage = stage
        self._work: Work | None = None
        self._ended: deque[tuple[Unit, Outcome]] = deque()

    def submit(self, unit: Unit, folder: Path) -> None:
        if self._work is None or not self._stage.needs.keeps_worker:
            self._work = self._stage.worker()
        self._ended.append((unit, execute(self._work, unit, folder)))

    def wait(self, timeout_seconds: float) -> list[tuple[Unit, Outcome]]:
        if not self._ended:
            time.sleep(timeout_seconds)
        ended = list(self._ended)
        self._ended.clear()
        return ended


@dataclass
class RayExecutor:
    """Ray's workers.

    Attributes:
        workers: CPU slots; None takes every core. On a running cluster it only bounds what is in flight.
        address: None starts a private Ray on loopback; `auto` or an address joins a running cluster, whose nodes must
            see the same file system.
        memory_per_worker_bytes: What one worker reserves, so that Ray never places more than fit; None reserves none.
    """

    workers: int | None = None
    address: str | None = None
    memory_per_worker_bytes: int | None = None
    _joined: bool = field(default=False, init=False)
    _head: HeadWatch | None = field(default=None, init=False)

    @contextmanager
    def pool(self, stage: Stage, num_units: int) -> Iterator[Pool]:
        """Tasks, or actors where the stage keeps its worker; starts Ray on first use."""
        self._join()
        import ray

        room = Room(stage.name, self._head)
        room.check_services()
        slots = self.workers or int(ray.cluster_resources().get("CPU", 1))
        room.options = options = self._options(stage, slots, has_gpus=room.has_gpus())
        parallel = max(1, min(int(slots // max(options["num_cpus"], 1)), room.count()))
        parallel = min(parallel, stage.needs.max_workers or parallel, num_units)
        pool_class = ActorPool if stage.needs.keeps_worker else TaskPool
        pool = pool_class(stage, options, parallel, room)
        try:
            yield pool
        finally:
            if self._head is None or self._head.answers():
                pool.close()

    def _options(self, stage: Stage, slots: int, *, has_gpus: bool) -> dict[str, Any]:
        needs = stage.needs
        num_gpus = needs.num_gpus or (1 if needs.prefers_gpu and has_gpus else 0)
        options: dict[str, Any] = {"num_cpus": min(needs.num_cpus, slots), "num_gpus": num_gpus}
        if self.memory_per_worker_bytes is not None:
            options["memory"] = self.memory_per_worker_bytes
        if needs.environment:
            options["runtime_env"] = {"env_vars": dict(needs.environment)}
        return options

    def _join(self) -> None:
        if self._joined:
            return
        if self.address is None:
            start_private(self.workers or os.cpu_count() or 1, self.memory_per_worker_bytes)
        else:
            join_cluster(self.address)
            self._head = HeadWatch(self.address)
        self._joined = True

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop a private Ray, or leave the cluster; where its head is lost, end the process."""
        if self._head is not None and self._head.is_lost:
            self._head.end_process(error if isinstance(error, SdtrainError) else None)
        if self._joined:
            import ray

            ray.shutdown()
            self._joined = False
        if self._head is not None:  # it watches over the leaving too
            self._head.stop()
            self._head = None
