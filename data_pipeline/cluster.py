"""Where units are worked on: Ray's workers, or this process for tests. Nothing here commits anything."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_pipeline.ledger import sha256_file
from data_pipeline.ray_start import dead_services, join_cluster, start_private
from sdtrain.errors import PeerLostError, SdtrainError
from sdtrain.run_dir import sync_folder

if TYPE_CHECKING:
    from data_pipeline.stage import Stage, Unit, Work

_LOOK_EVERY_SECONDS = 5.0
_PATIENCE_SECONDS = 60.0
"""How long a stage waits for a node that can take one of its workers."""
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True, slots=True)
class Done:
    """A unit whose files lie in its temporary folder, digested and on disk."""

    files: Mapping[str, str]
    stats: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that went wrong.

    Attributes:
        message: One line for the user.
        details: The traceback.
        is_final: Trying again would give the same error.
        is_storage: The disk is full or refuses writes.
    """

    message: str
    details: str
    is_final: bool
    is_storage: bool = False


Outcome = Done | Failed


def execute(work: Work, unit: Unit, folder: Path) -> Outcome:
    """Work on one unit inside its empty temporary folder; runs in the worker process and never raises."""
    started = time.monotonic()
    try:
        folder.mkdir(parents=True)
        stats = json.loads(json.dumps(work(unit, folder)))
        (folder / f"{unit.name}.stats.json").write_text(json.dumps(stats, sort_keys=True) + "\n", encoding="utf-8")
        return Done(_seal(unit, folder), stats, time.monotonic() - started)
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> Failed:
    """What the driver needs to know of an exception: ours are final, others may heal."""
    is_storage = isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS
    is_ours = isinstance(error, SdtrainError)
    message = str(error) if is_ours else f"{type(error).__name__}: {error}"
    return Failed(message, "".join(traceback.format_exception(error)), is_ours or is_storage, is_storage)


def _seal(unit: Unit, folder: Path) -> dict[str, str]:
    """Digest and sync everything that the worker wrote."""
    digests = {}
    for path in sorted(folder.iterdir()):
        assert path.is_file() and path.name.startswith(f"{unit.name}."), f"{path.name} is not named {unit.name}.*"
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        digests[path.name] = sha256_file(path)
    sync_folder(folder)
    return digests


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

    @contextmanager
    def pool(self, stage: Stage, num_units: int) -> Iterator[Pool]:
        """Tasks, or actors where the stage keeps its worker; starts Ray on first use."""
        self._join()
        import ray

        room = _Room(stage.name, is_private=self.address is None)
        room.check_services()
        slots = self.workers or int(ray.cluster_resources().get("CPU", 1))
        room.options = options = self._options(stage, slots)
        parallel = max(1, min(int(slots // max(options["num_cpus"], 1)), room.count()))
        parallel = min(parallel, stage.needs.max_workers or parallel, num_units)
        pool_class = _ActorPool if stage.needs.keeps_worker else _TaskPool
        pool = pool_class(stage, options, parallel, room)
        try:
            yield pool
        finally:
            pool.close()

    def _options(self, stage: Stage, slots: int) -> dict[str, Any]:
        needs = stage.needs
        options: dict[str, Any] = {"num_cpus": min(needs.num_cpus, slots), "num_gpus": needs.num_gpus}
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
        self._joined = True

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop a private Ray, or leave the cluster."""
        if self._joined:
            import ray

            ray.shutdown()
            self._joined = False


def _task(stage: Stage, unit: Unit, folder: Path) -> Outcome:
    try:
        work = stage.worker()
    except Exception as error:
        return failure(error)
    return execute(work, unit, folder)


class _Keeper:
    """The actor: makes the stage's working function once and keeps it."""

    def __init__(self, stage: Stage):
        self._stage = stage
        self._work: Work | None = None

    def ready(self) -> None:
        """Answers as soon as the actor is up."""

    def run(self, unit: Unit, folder: Path) -> Outcome:
        try:
            self._work = self._work or self._stage.worker()
        except Exception as error:
            return failure(error)
        return execute(self._work, unit, folder)


@dataclass
class _Room:
    """Whether the nodes that are alive can still take a worker.

    Attributes:
        stage_name: For the message.
        is_private: Ray's own processes are children of this one.
        options: What one worker takes, in Ray's words.
    """

    stage_name: str
    is_private: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    _looked: float = field(default=0.0, init=False)
    _last_seen: float = field(default_factory=time.monotonic, init=False)

    def check(self) -> None:
        """Look at most every few seconds; cheap enough for every turn of a loop.

        Raises:
            PeerLostError: Ray itself died, or no node could take a worker for a minute.
        """
        self.check_services()
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_SECONDS:
            return
        self._looked = now
        if self.count():
            self._last_seen = now
        elif now - self._last_seen > _PATIENCE_SECONDS:
            raise PeerLostError(self._message())

    def count(self) -> int:
        """How many workers all nodes alive can hold at a time: one per GPU where a worker takes one."""
        wanted = self._wanted().items()
        nodes = (node["Resources"] for node in self._alive())
        return sum(min((int(one.get(name, 0) // amount) for name, amount in wanted), default=1) for one in nodes)

    def check_services(self) -> None:
        """Look whether Ray is alive; without its raylet, calls to it hang or end this process.

        Raises:
            PeerLostError: It is not.
        """
        if self.is_private and (dead := dead_services()):
            raise PeerLostError(
                f"stage {self.stage_name}: Ray's {' and '.join(dead)} died (killed, or out of memory); "
                "what is committed stands, run again to go on"
            )

    def _alive(self) -> list[dict[str, Any]]:
        import ray

        return [node for node in ray.nodes() if node["Alive"]]

    def _wanted(self) -> dict[str, float]:
        names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        return {ray_name: self.options[name] for name, ray_name in names.items() if self.options.get(name)}

    def _message(self) -> str:
        wanted = ", ".join(f"{name} {amount:g}" for name, amount in self._wanted().items())
        nodes = [
            ", ".join(f"{name} {node['Resources'].get(name, 0):g}" for name in self._wanted()) for node in self._alive()
        ]
        there = "; ".join(nodes) or "none"
        return (
            f"stage {self.stage_name}: for {_PATIENCE_SECONDS:.0f} s no node could take a worker ({wanted}); nodes "
            f"alive: {there}. What is committed stands: bring nodes back or lower runner.memory_per_worker_bytes, "
            "and run again"
        )


class _RayPool:
    """Attempts in flight by Ray reference.

    Stages and outcomes are small and travel inside Ray's messages: a driver that uses the object store is ended by Ray,
    without a word, when its raylet dies.
    """

    def __init__(self, room: _Room):
        self._room = room
        self._in_flight: dict[Any, Unit] = {}

    def wait(self, timeout_seconds: float) -> list[tuple[Unit, Outcome]]:
        self._room.check()
        references = [*self._in_flight, *self._others()]
        if not references:
            time.sleep(timeout_seconds)
            return []
        import ray

        ready, _ = ray.wait(references, num_returns=1, timeout=timeout_seconds)
        for reference in ready:
            if reference not in self._in_flight:
                self._take_other(reference)
        return [(self._in_flight.pop(one), self._fetch(one)) for one in ready if one in self._in_flight]

    def _others(self) -> list[Any]:
        """References beside those of units."""
        return []

    def _take_other(self, reference: Any) -> None:
        """One of them is ready."""

    def _fetch(self, reference: Any) -> Outcome:
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(reference)
        except RayError as error:  # the worker died: killed, out of memory, its node is gone
            lost = failure(error)
            first_line = lost.message.splitlines()[0]
            return Failed(f"the worker process was lost ({first_line})", lost.details, is_final=False)


class _TaskPool(_RayPool):
    def __init__(self, stage: Stage, options: dict[str, Any], parallel: int, room: _Room):
        import ray

        super().__init__(room)
        self.capacity = 2 * parallel  # as many wait beside a worker, so that none is idle
        self._stage = stage
        self._remote: Any = ray.remote(max_retries=0, **options)(_task)

    def submit(self, unit: Unit, folder: Path) -> None:
        self._in_flight[self._remote.remote(self._stage, unit, folder)] = unit

    def close(self) -> None:
        """Cancel what is still in flight."""
        import ray

        for reference in self._in_flight:
            ray.cancel(reference, force=True)


class _ActorPool(_RayPool):
    """Only actors that are up get units: one that waits for a GPU or a node would hold its unit for ever."""

    def __init__(self, stage: Stage, options: dict[str, Any], parallel: int, room: _Room):
        import ray

        super().__init__(room)
        self._stage = stage
        self._actor_class: Any = ray.remote(max_restarts=0, **options)(_Keeper)
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._busy: dict[Any, Any] = {}
        for _ in range(parallel):
            self._hire()

    @property
    def capacity(self) -> int:
        return len(self._idle) + len(self._busy)

    def _hire(self) -> None:
        actor = self._actor_class.remote(self._stage)
        self._starting[actor.ready.remote()] = actor

    def _others(self) -> list[Any]:
        return list(self._starting)

    def _take_other(self, reference: Any) -> None:
        import ray
        from ray.exceptions import RayError

        actor = self._starting.pop(reference)
        try:
            ray.get(reference)
            self._idle.append(actor)
        except RayError:
            self._hire()

    def submit(self, unit: Unit, folder: Path) -> None:
        actor = self._idle.pop()
        reference = actor.run.remote(unit, folder)
        self._in_flight[reference] = unit
        self._busy[reference] = actor

    def _fetch(self, reference: Any) -> Outcome:
        outcome = super()._fetch(reference)
        actor = self._busy.pop(reference)
        if isinstance(outcome, Done) or outcome.is_final:
            self._idle.append(actor)
        else:  # a worker that stumbled is not trusted with the next unit: its process may be half broken
            _kill(actor)
            self._hire()
        return outcome

    def close(self) -> None:
        """End every actor."""
        for actor in [*self._starting.values(), *self._idle, *self._busy.values()]:
            _kill(actor)


def _kill(actor: Any) -> None:
    import ray

    ray.kill(actor)
