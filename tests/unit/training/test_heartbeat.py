"""What a rank says and what its watchdog reads are the same, at every place of a step."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdtrain.training.heartbeat import Heartbeat, Patience, Pulse, PulseReader

PATIENCE = Patience(step_seconds=10.0, long_seconds=30.0)


@pytest.fixture
def heartbeat() -> Iterator[Heartbeat]:
    made = Heartbeat(PATIENCE, attempt="a1")
    yield made
    made.close()


@pytest.fixture
def reader(heartbeat: Heartbeat) -> PulseReader:
    return PulseReader(heartbeat.fd)


def test_the_first_beat_is_the_start(reader: PulseReader) -> None:
    assert reader.read() == Pulse(1, 0, 0, 1, 30.0, "start", "a1")


def test_a_beat_is_read_as_it_was_said(heartbeat: Heartbeat, reader: PulseReader) -> None:
    heartbeat.beat("data", 7, 3)
    assert reader.read() == Pulse(2, 7, 3, 1, 30.0, "data", "a1")
    heartbeat.beat("validation")
    assert reader.read() == Pulse(3, 7, 0, 2, 30.0, "validation", "a1"), "the step stays"
    heartbeat.name_attempt("20261121T053717-0ec36b")
    assert reader.read().attempt == "20261121T053717-0ec36b"


def test_ticks_count_within_a_step(heartbeat: Heartbeat, reader: PulseReader) -> None:
    told = []
    for step, phase in ((0, "data"), (0, "forward"), (1, "agree"), (1, "data"), (2, "agree")):
        heartbeat.beat(phase, step)
        told.append((reader.read().step, reader.read().ticks))
    assert told == [(0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]


def test_steps_are_short_once_the_first_one_is_over(heartbeat: Heartbeat, reader: PulseReader) -> None:
    """The first step compiles; validation, saving and phases that nobody thought of are long at any time."""
    heartbeat.beat("build", 5)  # resumed
    allowed = []
    for step in (5, 6, 7):
        for phase in ("data", "forward", "backward", "step", "report", "agree", "validation", "never heard of"):
            heartbeat.beat(phase, step)
            allowed.append(reader.read().allowance_seconds)
    assert allowed == [30.0] * 8 + 2 * ([10.0] * 6 + [30.0] * 2)


def test_long_names_are_cut_and_not_mixed_up(heartbeat: Heartbeat, reader: PulseReader) -> None:
    heartbeat.beat("p" * 50, 1)
    assert (reader.read().phase, reader.read().attempt, reader.read().count) == ("p" * 32, "a1", 2)


def test_another_process_reads_while_the_rank_writes(heartbeat: Heartbeat) -> None:
    """A record that is half of one beat and half of another would blame a rank for a place where it never was."""
    code = (
        "import sys, time; from sdtrain.training.heartbeat import PulseReader\n"
        "reader, seen, end = PulseReader(int(sys.argv[1])), set(), time.monotonic() + 0.5\n"
        "while time.monotonic() < end:\n"
        "    pulse = reader.read(); seen.add(pulse.count)\n"
        "    assert pulse.count == 1 or (pulse.step == pulse.micro_step == pulse.count), pulse\n"
        "print(len(seen) > 10)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(heartbeat.fd)], pass_fds=[heartbeat.fd], stdout=subprocess.PIPE, text=True
    )
    count = 1
    while child.poll() is None:
        count += 1
        heartbeat.beat("data", count, count)
    out, _ = child.communicate()
    assert (child.returncode, out) == (0, "True\n")


def test_a_beat_costs_microseconds_and_no_file(heartbeat: Heartbeat) -> None:
    assert "/memfd:sdtrain-heartbeat" in str(Path(f"/proc/self/fd/{heartbeat.fd}").readlink())
    started = time.perf_counter()
    for step in range(2000):
        heartbeat.beat("forward", step)
    assert (time.perf_counter() - started) / 2000 < 100e-6
