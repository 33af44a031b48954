"""One attempt at a time in a run's folder: a lock that the kernel takes back however its holder ends.

Two starts of one run would commit into the same checkpoints. A job that was submitted twice, or requeued while the
old one still dies, must therefore wait, and leave in the end. The lock is a POSIX record lock: it belongs to rank 0's
process, no data worker inherits it, and network file systems carry it between nodes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdtrain.training.peers import host_name

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0
"""How long a start waits for the attempt before it to be gone: as long as a node takes to be missed."""
_POLL_SECONDS = 0.5
_HELD = (errno.EACCES, errno.EAGAIN)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has the lease.

    Attributes:
        words: For the user.
        is_of_this_job: Whether it is an earlier start of the Slurm job that asks.
    """

    words: str
    is_of_this_job: bool = False


class Lease:
    """The right of one attempt to write into a run's folder.

    Args:
        path: The file to lock. Nothing else may ever open it in this process: closing it anywhere gives the lock up.
        attempt: Who asks; written into the file for whoever waits.
        patience_seconds: How long another holder is waited for.
        on_wait: Called while waiting.
    """

    def __init__(
        self,
        path: Path,
        attempt: str,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._attempt = attempt
        self._patience_seconds = patience_seconds
        self._on_wait = on_wait
        self._handle: int | None = None

    def take(self, *, begins: bool) -> Holder | None:
        """Lock the file, waiting for another holder to end.

        Args:
            begins: Make the file where there is none, and sign it. Without it nothing is touched, and what else keeps
                the file from being opened is for others to say.

        Returns:
            None once the lock is held or nothing is there to lock; else who holds it.

        Raises:
            OSError: The file cannot be made.
        """
        if self._handle is None:
            try:
                handle = os.open(self._path, os.O_RDWR | (os.O_CREAT if begins else 0), 0o644)
            except OSError:
                if begins:
                    raise
                return None
            problem = self._keep(handle, must_be_new=begins)
            if problem is not None:
                return problem
        if begins:
            self._sign()
        return None

    def _keep(self, handle: int, *, must_be_new: bool) -> Holder | None:
        """Hold the file from now on, or say why not; a file that appeared since the first look belongs to another."""
        problem = None if self._got(handle) else _holder(handle)
        if problem is None and must_be_new and os.fstat(handle).st_size > 0:
            problem = Holder("another start took this folder while this one looked at it")
        if problem is None:
            self._handle = handle
        else:
            os.close(handle)
        return problem

    def _got(self, handle: int) -> bool:
        """Lock within the patience; says once who is waited for."""
        if self._locked(handle):
            return True
        log.warning("run_dir: %s; waiting up to %g s for its end", _holder(handle).words, self._patience_seconds)
        end = time.monotonic() + self._patience_seconds
        while time.monotonic() < end:
            self._on_wait()
            time.sleep(_POLL_SECONDS)
            if self._locked(handle):
                return True
        return False

    def _locked(self, handle: int) -> bool:
        """Whether the lock is this process's now; a file system without locks counts as unlocked, with a warning."""
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            log.warning(
                "%s: this file system has no locks (%s): nothing keeps a second start of this run away",
                self._path,
                error.strerror,
            )
        return True

    def _sign(self) -> None:
        """Leave the holder's name; a full disk does not matter here."""
        assert self._handle is not None
        row = {"attempt": self._attempt, "host": host_name(), "pid": os.getpid(), "since": time.time(), "job": _job()}
        with suppress(OSError):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(row).encode() + b"\n", 0)

    def release(self) -> None:
        """Give the lock up; the file stays."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _job() -> str | None:
    """The Slurm job that this process belongs to; a requeued job keeps its number."""
    return os.environ.get("SLURM_JOB_ID") or None


def _holder(handle: int) -> Holder:
    """Who signed the file."""
    try:
        row = json.loads(os.pread(handle, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["since"]))
        words = f"attempt {row['attempt']} is alive here, as process {row['pid']} of {row['host']} since {since}"
        return Holder(words, is_of_this_job=_job() is not None and row.get("job") == _job())
    except (OSError, ValueError, KeyError, TypeError):
        return Holder("another attempt is alive here")
