"""Ranks without a cold start: forked from a process that has imported everything, as in `tests.faults.campaign`.

A cold start of two ranks under torchrun spends seconds of both cores on imports alone. The process of the tests itself
cannot be forked, because it has threads; so a server is started once and forks on request. All ranks of a fork share
one hash seed, and no agent watches them: what depends on that is tested under the real torchrun.

    python -m tests.ranks  # the server: a request per line of JSON on stdin, process ids and then exit codes on stdout
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.support import free_port

ROOT = Path(__file__).parents[1]
KILL = b"kill\n"

# The tests' side ------------------------------------------------------------------------------------------------------


@dataclass
class Start:
    """Ranks that run, and how they ended: exit codes in rank order, negative for a signal."""

    pids: list[int]
    log: Path
    _requests: IO[bytes]
    _answers: IO[bytes]
    codes: list[int] = field(default_factory=list)

    def is_over(self, wait_seconds: float = 0.0) -> bool:
        """Whether all ranks have ended, or do within `wait_seconds`."""
        if not self.codes and select.select([self._answers], [], [], wait_seconds)[0]:
            self.codes = json.loads(self._answers.readline())
        return bool(self.codes)

    def wait(self, timeout: float) -> None:
        """Wait for the end; ranks that do not come to it are killed.

        Raises:
            AssertionError: They had to be killed.
        """
        if not self.is_over(timeout):
            self.kill()
            raise AssertionError(f"{len(self.pids)} ranks were not over after {timeout:.0f} s:\n{self.said()}")

    def kill(self) -> None:
        """kill -9 of every rank that is left."""
        self._requests.write(KILL)
        assert self.is_over(10.0)

    def said(self) -> str:
        """The last words of all ranks."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]


class Ranks:
    """The server, started with the first ranks; one start at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        self._last: Start | None = None
        self._starts = 0

    def start(self, world_size: int, *arguments: object) -> Start:
        """Fork ranks that run a script, or a module after `-m`, with arguments, as `python` would."""
        if self._server is None:
            command = [sys.executable, "-m", "tests.ranks"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a thread pool would be missing in the forked ranks
            self._server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT, env=environment
            )
        if self._last is not None and not self._last.is_over():
            self._last.kill()  # a failed test left it
        requests, answers = self._server.stdin, self._server.stdout
        assert requests is not None and answers is not None
        self._starts += 1
        log = self._folder / f"ranks-{self._starts}.log"
        request = {"arguments": [str(one) for one in arguments], "world_size": world_size, "log": str(log)}
        requests.write(json.dumps(request | {"folder": str(Path.cwd())}).encode() + b"\n")
        self._last = Start(json.loads(answers.readline()), log, requests, answers)
        return self._last

    def run(self, world_size: int, *arguments: object, timeout: float = 120) -> Start:
        """`start` and wait for the end."""
        start = self.start(world_size, *arguments)
        start.wait(timeout)
        return start

    def close(self) -> None:
        """End the server and what it has forked."""
        if self._server is not None:
            self._server.communicate()  # end of file


# The server -----------------------------------------------------------------------------------------------------------


def preload() -> None:
    """Import what a rank imports, and start no thread: a forked process has only the thread that forked."""
    for name in ("training.run", "training.engine", "evaluation.during_training", "export.after_training"):
        importlib.import_module(f"sdtrain.{name}")
    importlib.import_module("sdtrain.training.engine").import_deepspeed()
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: ranks cannot be forked"


def fork(request: dict[str, Any], rank: int, port: int) -> int:
    """Process id of a new rank."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = become(request, rank, port)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def become(request: dict[str, Any], rank: int, port: int) -> int:
    """Be the rank that torchrun would have started."""
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, descriptor)
    size = request["world_size"]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    os.chdir(request["folder"])
    is_module, *_ = arguments = request["arguments"]
    if is_module == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


def wait(pids: Sequence[int]) -> list[int]:
    """Exit codes of all; asked to kill them, or at the end of the tests' process, it kills them."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        if select.select([sys.stdin], [], [], 0.01)[0] and sys.stdin.readline().encode() in (KILL, b""):
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
    return [codes[pid] for pid in pids]


def serve() -> None:
    """Fork on request until the end of file."""
    preload()
    while line := sys.stdin.readline():
        if line.encode() == KILL:
            continue  # they had just ended
        request, port = json.loads(line), free_port()
        pids = [fork(request, rank, port) for rank in range(request["world_size"])]
        print(json.dumps(pids), flush=True)
        print(json.dumps(wait(pids)), flush=True)


if __name__ == "__main__":
    serve()
