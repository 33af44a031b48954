from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdtrain.training.preemption import Preemption, Request


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def preemption(tmp_path: Path, clock: Clock) -> Iterator[Preemption]:
    asked = Preemption(tmp_path, clock=clock)
    asked.install()
    yield asked
    asked.uninstall()


def wishes(asked: Preemption) -> tuple[bool, bool, bool]:
    return asked.wants_save, asked.wants_stop, asked.wants_requeue


def test_nothing_is_asked_at_first(preemption: Preemption) -> None:
    assert wishes(preemption) == (False, False, False)
    assert preemption.reason == ""


@pytest.mark.parametrize(
    ("number", "expected", "reason"),
    [
        (signal.SIGUSR1, (True, True, True), "SIGUSR1"),
        (signal.SIGTERM, (True, True, True), "SIGTERM"),
        (signal.SIGINT, (True, True, False), "SIGINT"),
    ],
)
def test_signals_ask_to_leave(
    preemption: Preemption,
    number: signal.Signals,
    expected: tuple[bool, bool, bool],
    reason: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    os.kill(os.getpid(), number)
    assert wishes(preemption) == expected
    assert preemption.reason == reason
    assert capfd.readouterr().err == f"{reason}: saving and leaving as soon as this step allows\n"


def test_the_strongest_request_counts(preemption: Preemption) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert (preemption.request, preemption.reason) == (Request.REQUEUE, "SIGTERM")


def test_however_often_a_signal_comes_it_is_one_request(preemption: Preemption) -> None:
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert (preemption.poll(), preemption.reason) == (Request.REQUEUE, "SIGTERM")


def test_the_time_limit_asks_to_be_started_again(tmp_path: Path, clock: Clock) -> None:
    asked = Preemption(tmp_path, watch_files=False, max_hours=0.5, clock=clock)
    clock.now += 1799
    assert (asked.poll(), asked.reason) == (Request.NONE, "")
    clock.now += 1
    assert (asked.poll(), asked.reason) == (Request.REQUEUE, "trainer.max_hours = 0.5 is over")
    asked.acknowledge()
    assert asked.poll() == Request.REQUEUE, "never taken back"


def test_a_second_interrupt_does_not_wait(preemption: Preemption) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_files_ask_to_save_and_to_stop(preemption: Preemption, tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "SAVE").touch()
    assert wishes(preemption) == (True, False, False)
    assert preemption.reason == "SAVE file"
    (tmp_path / "STOP").touch()
    clock.now += 1.0
    assert wishes(preemption) == (True, True, False)
    assert preemption.reason == "STOP file"


def test_files_are_looked_for_now_and_then(preemption: Preemption, tmp_path: Path, clock: Clock) -> None:
    assert preemption.poll() == Request.NONE
    (tmp_path / "STOP").touch()
    clock.now += 0.9
    assert preemption.poll() == Request.NONE
    clock.now += 0.2
    assert preemption.poll() == Request.STOP


def test_a_save_that_is_done_is_forgotten_and_a_stop_is_not(preemption: Preemption, tmp_path: Path) -> None:
    (tmp_path / "SAVE").touch()
    assert preemption.poll() == Request.SAVE
    (tmp_path / "STOP").touch()  # while it was saving
    preemption.acknowledge(Request.SAVE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["STOP"]
    assert preemption.poll() == Request.STOP
    preemption.acknowledge(Request.STOP)
    assert list(tmp_path.iterdir()) == []
    assert wishes(preemption) == (False, False, False)


def test_a_signal_during_a_save_is_not_lost(preemption: Preemption, tmp_path: Path) -> None:
    (tmp_path / "SAVE").touch()
    preemption.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    preemption.acknowledge(Request.SAVE)
    assert (preemption.request, preemption.reason) == (Request.REQUEUE, "SIGTERM")


def test_other_ranks_look_for_no_files(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    asked = Preemption(tmp_path, watch_files=False)
    assert asked.poll() == Request.NONE
    asked.acknowledge()
    assert (tmp_path / "STOP").exists()


def test_uninstall_gives_the_signals_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    asked = Preemption(tmp_path)
    asked.install()
    assert signal.getsignal(signal.SIGTERM) not in before
    asked.uninstall()
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == before
