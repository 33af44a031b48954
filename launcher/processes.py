"""One child process tree: its output streams through, the launcher's signals go to it, its end is told in words."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

# What a launcher is told from outside, and what it passes on; a closed terminal asks for the same as SIGTERM.
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}
PUMP_TIMEOUT_SECONDS = 5.0
# torchrun's own words about a worker that a signal ended, e.g. "failed (exitcode: -9) local_rank: 1 (pid: 4242)".
_RANK_KILLED = re.compile(r"failed \(exitcode: -(?P<signal>\d+)\) local_rank: (?P<rank>\d+)")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child process tree ended, as far as its parent can see.

    Attributes:
        returncode: The child's own return code; says little, torchrun returns 1 for whatever its workers returned.
        killed_by: The signal that ended a rank, or the child itself; None where none did.
        killed_rank: Local rank of the first worker that a signal ended; None where none did.
        told: The signal that the launcher itself received and passed on; None where it received none.
    """

    returncode: int
    killed_by: int | None
    killed_rank: int | None
    told: int | None


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; `signal 99` where the number has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class _Forwarding(AbstractContextManager["_Forwarding"]):
    """While active, the first signal that reaches this process goes to the children; it must run in the main thread.

    Only the first: torchrun is already waiting for its workers to save then, and a second one would cut that short.
    """

    def __init__(self, children: Sequence[subprocess.Popen[str]]) -> None:
        self._children = children
        self._previous: dict[signal.Signals, Any] = {}
        self.told: int | None = None

    def __enter__(self) -> _Forwarding:
        for received in FORWARDED:
            self._previous[received] = signal.signal(received, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for received, handler in self._previous.items():
            signal.signal(received, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        if self.told is None:
            self.told = number
            self.pass_on()

    def pass_on(self) -> None:
        """Send what came to all children that there are by now."""
        if self.told is not None:
            for child in self._children:
                child.send_signal(FORWARDED[signal.Signals(self.told)])


class _Pump(threading.Thread):
    """Copies the child's stderr to ours line by line, and remembers which rank a signal ended."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self.killed: tuple[int, int] | None = None

    def run(self) -> None:
        with self._stream:
            for line in self._stream:
                sys.stderr.write(line)
                sys.stderr.flush()
                if self.killed is None and (match := _RANK_KILLED.search(line)):
                    self.killed = (int(match["signal"]), int(match["rank"]))


def run_forwarding(command: Sequence[str], env: Mapping[str, str]) -> Ended:
    """Run `command` to its end; its stdout is ours, its stderr is copied to ours.

    The child gets a session of its own, so that Ctrl-C in a terminal reaches it once, through the launcher.

    Args:
        command: Program and arguments.
        env: The child's whole environment.

    Raises:
        FileNotFoundError: The program does not exist.
    """
    child = subprocess.Popen(
        command, env=dict(env), stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    assert child.stderr is not None
    pump = _Pump(child.stderr)
    with _Forwarding([child]) as forwarding:
        pump.start()
        returncode = child.wait()
        pump.join(PUMP_TIMEOUT_SECONDS)  # an orphan may hold the pipe open; its words are in the log folder
    killed_by, killed_rank = pump.killed or (-returncode if returncode < 0 else None, None)
    return Ended(returncode, killed_by, killed_rank, forwarding.told)


def run_together(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], *, seconds: float
) -> tuple[list[int], int | None]:
    """Run one command once per environment, all at a time and to their ends; what they say is ours.

    Args:
        command: Program and arguments.
        environments: Each one's whole environment.
        seconds: After which those that are left are killed.

    Returns:
        Return codes in order, and the signal that was passed on to all, if one came.

    Raises:
        FileNotFoundError: The program does not exist.
    """
    children: list[subprocess.Popen[str]] = []
    with _Forwarding(children) as forwarding:
        for environment in environments:
            children.append(subprocess.Popen(command, env=dict(environment), text=True, start_new_session=True))
        forwarding.pass_on()  # to those that were started after it came
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(child.poll() is None for child in children):
            time.sleep(0.05)
        for child in children:
            if child.poll() is None:
                child.kill()
        codes = [child.wait() for child in children]
    return codes, forwarding.told
