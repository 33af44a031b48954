"""What follows from how long a cluster's head has been silent; tests/data/test_cluster_head.py kills a real one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from data_pipeline.ray_head import HeadWatch
from sdtrain.errors import ExitCode, PeerLostError

MESSAGE = (
    r"^runner\.address: 'head:6379': the head of the Ray cluster has not answered for 30 s: it died, stands still or "
    r"cannot be reached\. What is committed stands: bring the cluster back and run again$"
)


@pytest.fixture
def watch() -> HeadWatch:
    """One that asks nobody."""
    watch = HeadWatch("head:6379")
    watch.stop()
    return watch


def test_a_silence_is_waited_out_and_then_ends(watch: HeadWatch) -> None:
    assert not watch.is_silent and watch.answers()
    watch.check()
    answered = watch._answered
    watch._answered = time.monotonic() - 8
    assert watch.is_silent and not watch.is_lost
    watch.check()
    back = threading.Timer(0.2, setattr, (watch, "_answered", answered))
    back.start()
    assert watch.answers() and not watch.is_silent
    watch._answered = time.monotonic() - 31
    assert watch.is_lost and not watch.answers()
    with pytest.raises(PeerLostError, match=MESSAGE) as caught:
        watch.check()
    assert caught.value.exit_code == ExitCode.HANG


def test_a_thread_ends_a_process_whose_main_thread_stands_still() -> None:
    script = """
import data_pipeline.ray_head as head
from ray.exceptions import RpcError
def silent():
    raise RpcError("nobody there")
head._ask, head._PROBE_EVERY_SECONDS, head._PATIENCE_SECONDS, head._GRACE_SECONDS = silent, 0.05, 0.2, 0.2
watch = head.HeadWatch("head:6379")
print("joined", end="")
watch._thread.join()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (ExitCode.HANG, "joined")
    assert ended.stderr.startswith("sdtrain-data: runner.address: 'head:6379': the head of the Ray cluster has not")
    assert ended.stderr.count("\n") == 1
