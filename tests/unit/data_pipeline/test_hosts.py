"""Slots, gaps and closing times of hosts, by a clock of the test's own."""

from __future__ import annotations

import threading

import pytest

from data_pipeline import hosts as module
from data_pipeline.hosts import Hosts
from data_pipeline.transport_policy import RefusedError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def hosts(limit: int = 4, gap_seconds: float = 0.0) -> tuple[Hosts, Clock]:
    clock = Clock()
    return Hosts(limit, gap_seconds, clock.sleep, lambda: clock.now), clock


def visit(known: Hosts, name: str = "a.example", patience_seconds: float = 30.0) -> None:
    with known.visit(name, patience_seconds):
        pass


def test_without_wishes_nobody_waits_and_nothing_is_remembered() -> None:
    known, clock = hosts()
    for _ in range(3):
        visit(known)
    assert clock.slept == [] and known._hosts == {}


def test_requests_to_one_host_start_a_gap_apart() -> None:
    known, clock = hosts(gap_seconds=2.0)
    visit(known)
    visit(known)
    clock.now += 0.5
    visit(known)
    visit(known, "b.example")
    assert clock.slept == pytest.approx([2.0, 1.5])


def test_gaps_are_waited_for_beyond_all_patience() -> None:
    known, clock = hosts(gap_seconds=100.0)
    visit(known, patience_seconds=1.0)
    visit(known, patience_seconds=1.0)
    assert clock.slept == [100.0]


def test_a_closed_host_is_waited_for_or_left_alone() -> None:
    known, clock = hosts()
    known.close("a.example", 20.0)
    visit(known, "b.example")
    visit(known)
    assert clock.slept == [20.0]
    known.close("a.example", 60.0)
    with pytest.raises(RefusedError) as caught:
        visit(known, patience_seconds=30.0)
    assert str(caught.value) == "retry_after a.example asked for no request in the next 60 s"
    clock.now += 61
    visit(known, patience_seconds=0.0)
    assert clock.slept == [20.0]


def test_a_shorter_wish_does_not_open_a_host() -> None:
    known, clock = hosts()
    known.close("a.example", 20.0)
    known.close("a.example", 1.0)
    visit(known)
    assert clock.slept == [20.0]


def test_an_hour_is_remembered_at_most() -> None:
    known, clock = hosts()
    known.close("a.example", 10**9)
    visit(known, patience_seconds=3600.0)
    assert clock.slept == [3600.0]


def test_of_very_many_wishes_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_HOSTS", 10)
    known, _ = hosts()
    for number in range(20):
        known.close(f"{number}.example", 3600.0)
    visit(known)
    assert list(known._hosts) == [f"{number}.example" for number in range(10, 20)]


def test_a_host_is_forgotten_when_its_wish_is_over() -> None:
    known, clock = hosts()
    known.close("a.example", 5.0)
    clock.now += 6
    visit(known)
    assert known._hosts == {}


def test_a_host_gets_no_more_visits_at_once_than_allowed() -> None:
    known, inside, most = Hosts(2), 0, 0
    lock, together = threading.Lock(), threading.Event()

    def work() -> None:
        nonlocal inside, most
        with known.visit("a.example", 1.0):
            with lock:
                inside += 1
                most = max(most, inside)
            together.wait(0.05)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2 and known._hosts == {}
