"""Where units are worked on: Ray's workers, or this process for tests. Nothing here commits anything."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_pipeline.ledger import sha256_file
from sdtrain.errors import ConfigError, SdtrainError
from sdtrain.run_dir import sync_folder

if TYPE_CHECKING:
    from data_pipeline.stage import Stage, Unit, Work

_OBJECT_STORE_BYTES = 128 << 20  # units travel as paths, so the store stays almost empty
_PROBE_SECONDS = 10.0
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

    capacity: int

    def submit(self, unit: Unit, folder: Path) -> None:
        """Start an attempt; at most `capacity` are in flight."""
        ...

    def wait(self, timeout_seconds: float) -> list[tuple[Unit, Outcome]]:
        """Attempts that ended; empty after `timeout_seconds` without one."""
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

        slots = self.workers or int(ray.cluster_resources().get("CPU", 1))
        options = self._options(stage, slots)
        parallel = max(1, int(slots // max(options["num_cpus"], 1)))
        parallel = min(parallel, stage.needs.max_workers or parallel, num_units)
        pool = _ActorPool(stage, options, parallel) if stage.needs.keeps_worker else _TaskPool(stage, options, parallel)
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
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault(
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
        )  # leave CUDA_VISIBLE_DEVICES of CPU tasks alone
        import ray

        try:
            if self.address is None:
                self._start_private()
            else:
                _probe(self.address)
                ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
        except OSError as error:
            raise ConfigError(
                f"runner.address: {self.address!r}: no Ray cluster answers ({error}); "
                "start one with `ray start --head`, or leave the key out to run on this machine"
            ) from None
        self._joined = True

    def _start_private(self) -> None:
        import ray

        workers = self.workers or os.cpu_count() or 1
        memory = self.memory_per_worker_bytes
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            _memory=None if memory is None else memory * workers,
            _node_ip_address="127.0.0.1",
        )

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop a private Ray, or leave the cluster."""
        if self._joined:
            import ray

            ray.shutdown()
            self._joined = False


def _probe(address: str) -> None:
    """Fail within seconds where `host:port` does not answer; Ray itself would wait for minutes.

    Raises:
        OSError: Nothing listens there, or the address has no such form.
    """
    host, separator, port = address.rpartition(":")
    if separator and "//" not in address and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()


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

    def run(self, unit: Unit, folder: Path) -> Outcome:
        try:
            self._work = self._work or self._stage.worker()
        except Exception as error:
            return failure(error)
        return execute(self._work, unit, folder)


class _RayPool:
    """Attempts in flight by Ray reference."""

    def __init__(self, parallel: int, queued: int):
        self.capacity = parallel + queued
        self._in_flight: dict[Any, Unit] = {}

    def wait(self, timeout_seconds: float) -> list[tuple[Unit, Outcome]]:
        import ray

        if not self._in_flight:
            time.sleep(timeout_seconds)
            return []
        ready, _ = ray.wait(list(self._in_flight), num_returns=1, timeout=timeout_seconds)
        return [(self._in_flight.pop(reference), self._fetch(reference)) for reference in ready]

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
    def __init__(self, stage: Stage, options: dict[str, Any], parallel: int):
        import ray

        super().__init__(parallel, queued=parallel)
        self._stage = ray.put(stage)
        self._remote: Any = ray.remote(max_retries=0, **options)(_task)

    def submit(self, unit: Unit, folder: Path) -> None:
        self._in_flight[self._remote.remote(self._stage, unit, folder)] = unit

    def close(self) -> None:
        """Cancel what is still in flight."""
        import ray

        for reference in self._in_flight:
            ray.cancel(reference, force=True)


class _ActorPool(_RayPool):
    def __init__(self, stage: Stage, options: dict[str, Any], parallel: int):
        import ray

        super().__init__(parallel, queued=0)
        self._stage = ray.put(stage)
        self._actor_class: Any = ray.remote(max_restarts=0, **options)(_Keeper)
        self._idle: list[Any] = []
        self._busy: dict[Any, Any] = {}

    def submit(self, unit: Unit, folder: Path) -> None:
        actor = self._idle.pop() if self._idle else self._actor_class.remote(self._stage)
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
        return outcome

    def close(self) -> None:
        """End every actor."""
        for actor in [*self._idle, *self._busy.values()]:
            _kill(actor)


def _kill(actor: Any) -> None:
    import ray

    ray.kill(actor)
