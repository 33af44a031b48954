"""One attempt at a time: what keeps a second one away, and what lets the next one in."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdtrain.training.lease import Holder, Lease

HOLD = """
import sys, time
from pathlib import Path
from sdtrain.training.lease import Lease
lease = Lease(Path(sys.argv[1]), "first")
assert lease.take(begins=True) is None
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "attempt.lock"


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease; killed with -9 at the end, as holders are."""
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def second(path: Path, patience_seconds: float = 0.0) -> Lease:
    return Lease(path, "second", patience_seconds=patience_seconds)


def test_who_is_alive_is_named_and_nothing_changes(path: Path) -> None:
    with held(path) as process:
        signed = path.read_bytes()
        for begins in (False, True):
            said = second(path).take(begins=begins)
            assert said is not None
            assert not said.is_of_this_job
            assert said.words.startswith(
                f"attempt first is alive here, as process {process.pid} of {socket.gethostname()} since 2"
            )
        assert path.read_bytes() == signed


def test_a_holder_that_is_killed_while_another_waits_lets_it_in(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with held(path) as process:
        lease = Lease(path, "second", patience_seconds=30, on_wait=process.kill)
        assert lease.take(begins=False) is None
    assert lease.take(begins=True) is None
    assert json.loads(path.read_text())["attempt"] == "second"
    assert caplog.text.count("attempt first is alive here") == 1
    assert "waiting up to 30 s for its end" in caplog.text
    lease.release()


def test_a_child_process_neither_inherits_nor_frees_the_lease(path: Path) -> None:
    with held(path) as process:
        child = os.fork()
        if child == 0:
            os._exit(0 if second(path).take(begins=False) else 1)
        assert os.waitpid(child, 0)[1] == 0
        process.send_signal(signal.SIGKILL)
        process.wait()
    mine = second(path)
    assert mine.take(begins=False) is None
    if (child := os.fork()) == 0:  # as data workers are made and end
        os._exit(0)
    os.waitpid(child, 0)
    assert _is_locked_for_others(path)
    mine.release()
    assert not _is_locked_for_others(path)


def _is_locked_for_others(path: Path) -> bool:
    child = os.fork()
    if child == 0:
        os._exit(1 if second(path).take(begins=False) else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_look_makes_and_signs_nothing(path: Path) -> None:
    lease = second(path)
    assert lease.take(begins=False) is None
    assert not path.exists()
    path.write_text("signed by an attempt that ended\n")
    assert lease.take(begins=False) is None
    assert path.read_text() == "signed by an attempt that ended\n"
    assert lease.take(begins=True) is None  # the same start goes on with what it holds
    assert json.loads(path.read_text())["attempt"] == "second"
    lease.release()


def test_a_folder_that_another_start_took_meanwhile_is_left_to_it(path: Path) -> None:
    lease = second(path)
    assert lease.take(begins=False) is None
    path.write_text("{}\n")
    assert lease.take(begins=True) == Holder("another start took this folder while this one looked at it")
    assert path.read_text() == "{}\n"


def test_a_file_system_without_locks_is_told_and_does_not_stop_a_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lease = second(path)
    assert lease.take(begins=True) is None
    assert "this file system has no locks (No locks available): nothing keeps a second start of this run away" in (
        caplog.text
    )
    lease.release()


def test_a_holder_that_cannot_be_read_is_still_told(path: Path) -> None:
    with held(path):
        path.write_bytes(b"\xff torn")
        assert second(path).take(begins=True) == Holder("another attempt is alive here")


def test_an_earlier_start_of_the_same_job_is_known_as_such(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with held(path):
        for job, same in (("12", True), ("13", False), ("", False)):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            holder = second(path).take(begins=False)
            assert holder is not None and holder.is_of_this_job is same
        monkeypatch.delenv("SLURM_JOB_ID")
        holder = second(path).take(begins=False)
        assert holder is not None and not holder.is_of_this_job
