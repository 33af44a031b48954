"""The short form of `python -m tests.data.kills`: a Ray worker and a driver inside a commit, during the downloads."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

import data_pipeline.build
from data_pipeline.cluster import InlineExecutor
from data_pipeline.ledger import Ledger
from tests.data import kills
from tests.data.ground import DOWNLOAD, Grounds, Run, in_fresh_process, workers_of


def without_ray() -> None:
    """Let the driver do the work itself: many times quicker to start."""
    data_pipeline.build.executor_for = lambda config: nullcontext(InlineExecutor())


def finish_inline(run: Run, until: str) -> None:
    assert run.start("--until", until, prepare=without_ray).wait(120) == 0, run.tail()


@pytest.mark.heavy
def test_kills_during_the_downloads_lose_nothing_and_fetch_nothing_twice(tmp_path: Path) -> None:
    in_fresh_process("tests.data.test_kills", tmp_path)


def main(grounds: Grounds) -> None:
    first = grounds.run()
    finish_inline(first, "download")
    yardstick, run = first.end(), grounds.run()
    finish_inline(run, "dedup")
    watched = kills.Watched(run)
    watched.look()
    start = run.start("download", prepare=kills.plant_a_torn_row(run, "ledger.jsonl", 4))
    kills.follow(run, start, lambda: bool(workers_of(start.pid)))
    os.kill(workers_of(start.pid)[0], signal.SIGKILL)  # one that Ray does not know of yet
    kills.follow(run, start, lambda: len(Ledger(run.output / DOWNLOAD).commits()) > 0)
    os.kill(workers_of(start.pid)[0], signal.SIGKILL)
    assert start.wait(120) == -signal.SIGKILL, run.tail()
    assert kills.note(run).read_text() == f"in a row of {DOWNLOAD}/ledger.jsonl"
    assert len(Ledger(run.output / DOWNLOAD).commits()) == 3
    watched.look()
    finish_inline(run, "download")
    watched.look()
    deadline = time.monotonic() + 60
    while set(left := run.processes()) and set(left.values()) - kills.AGENTS:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    for pid in left:  # they would go within a minute, which the long form waits for
        os.kill(pid, signal.SIGKILL)
    assert run.end() == yardstick


if __name__ == "__main__":
    importlib.import_module("img2dataset")  # once here, so that forked drivers need not
    with Grounds(Path(sys.argv[1])).served() as served:
        main(served)
