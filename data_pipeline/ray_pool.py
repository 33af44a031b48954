"""The workers of one stage as Ray's tasks or actors, and whether the nodes that are alive can still hold them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.outcome import Done, Failed, Outcome, execute, failure
from data_pipeline.ray_head import HeadWatch
from data_pipeline.ray_start import dead_services
from sdtrain.errors import PeerLostError

if TYPE_CHECKING:
    from data_pipeline.stage import Stage, Unit, Work

_LOOK_EVERY_SECONDS = 5.0
_PATIENCE_SECONDS = 60.0
"""How long a stage waits for a node that can take one of its workers."""


@dataclass
class Room:
    """Whether the nodes that are alive can still take a worker.

    Attributes:
        stage_name: For the message.
        head: Watches the head of a joined cluster; None where Ray's own processes are children of this one.
        options: What one worker takes, in Ray's words.
    """

    stage_name: str
    head: HeadWatch | None
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
        if now - self._looked < _LOOK_EVERY_SECONDS or (self.head is not None and self.head.is_silent):
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

    def has_gpus(self) -> bool:
        """Whether any node alive has a GPU."""
        return any(node["Resources"].get("GPU", 0) >= 1 for node in self._alive())

    def check_services(self) -> None:
        """Look whether Ray is alive; without its raylet or its head, calls to it hang or end this process.

        Raises:
            PeerLostError: It is not.
        """
        if self.head is not None:
            self.head.check()
        elif dead := dead_services():
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


class RayPool:
    """Attempts in flight by Ray reference.

    Stages and outcomes are small and travel inside Ray's messages: a driver that uses the object store is ended by Ray,
    without a word, when its raylet dies.
    """

    def __init__(self, room: Room):
        self._room = room
        self._in_flight: dict[Any, Unit] = {}

    def wait(self, timeout_seconds: float) -> list[tuple[Unit, Outcome]]:
        """Attempts that ended; empty after `timeout_seconds` without one.

        Raises:
            PeerLostError: Ray is gone, or every node that could take a worker.
        """
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


class TaskPool(RayPool):
    """A task for each unit, in whichever of Ray's workers is free."""

    def __init__(self, stage: Stage, options: dict[str, Any], parallel: int, room: Room):
        import ray

        super().__init__(room)
        self.capacity = 2 * parallel  # as many wait beside a worker, so that none is idle
        self._stage = stage
        self._remote: Any = ray.remote(max_retries=0, **options)(_task)

    def submit(self, unit: Unit, folder: Path) -> None:
        """Start an attempt."""
        self._in_flight[self._remote.remote(self._stage, unit, folder)] = unit

    def close(self) -> None:
        """Cancel what is still in flight."""
        import ray

        for reference in self._in_flight:
            ray.cancel(reference, force=True)


class ActorPool(RayPool):
    """Only actors that are up get units: one that waits for a GPU or a node would hold its unit for ever."""

    def __init__(self, stage: Stage, options: dict[str, Any], parallel: int, room: Room):
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
        """Actors that are up."""
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
        """Start an attempt in an idle actor."""
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
