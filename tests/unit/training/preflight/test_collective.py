"""What follows from figures of several nodes; the ranks themselves are in test_doctor.py."""

from __future__ import annotations

import pytest

from sdtrain.training.preflight.collective import (
    Reduction,
    compare_versions,
    judge_all_reduce,
    judge_clocks,
    judge_links,
    judge_speed,
    ring_rounds,
)

SAME = {"torch": "2.13.0", "source": "abc", "machine": "H100"}


def test_equal_nodes() -> None:
    (found,) = compare_versions({"n1": SAME, "n2": dict(SAME)})
    assert (found.status, found.hosts) == ("ok", ("n1", "n2"))


def test_the_node_that_differs_is_to_blame() -> None:
    (found,) = compare_versions({"n1": SAME, "n2": SAME | {"torch": "2.12.0"}, "n3": SAME})
    assert (found.status, found.of_node, found.hosts) == ("failed", True, ("n2",))
    assert found.found == "torch is 2.13.0 on 2 nodes, 2.12.0 on n2"


def test_of_two_nobody_is_to_blame() -> None:
    (found,) = compare_versions({"n1": SAME, "n2": SAME | {"source": "def"}})
    assert (found.status, found.of_node, found.hosts) == ("failed", False, ("n1", "n2"))
    assert found.found == "source is abc on n1, def on n2"


def test_a_missing_package_is_a_difference_and_another_gpu_is_only_slow() -> None:
    without = {name: version for name, version in SAME.items() if name != "torch"}
    mixed = compare_versions({"n1": SAME, "n2": without | {"machine": "A100"}, "n3": SAME})
    (found,) = compare_versions({"n1": {"device": "cuda"}, "n2": {"device": "cuda"}, "n3": {"device": "cpu"}})
    assert (found.status, found.hosts, found.found) == ("failed", ("n3",), "device is cuda on 2 nodes, cpu on n3")
    assert [(one.status, one.found) for one in mixed] == [
        ("failed", "torch is 2.13.0 on 2 nodes, none on n2"),
        ("warning", "machine is H100 on 2 nodes, A100 on n2"),
    ]


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ({"n1": 0.0, "n2": 0.4, "n3": -0.3}, [("ok", "clocks agree within 400.0 ms", ("n1", "n2", "n3"))]),
        ({"n1": 0.0, "n2": 0.1, "n3": 9.0}, [("warning", "n3 is 8.9 s ahead of the other nodes", ("n3",))]),
        ({"n1": 0.0, "n2": -500.0, "n3": 0.0}, [("failed", "n2 is 500.0 s behind the other nodes", ("n2",))]),
        ({"n1": 0.0, "n2": 200.0, "n3": 200.0}, [("failed", "n1 is 200.0 s behind the other nodes", ("n1",))]),
        ({"n1": 0.0, "n2": 200.0}, [("failed", "n2 is 200.0 s ahead of the other nodes", ("n1", "n2"))]),
    ],
)
def test_clocks(offsets: dict[str, float], expected: list[tuple[str, str, tuple[str, ...]]]) -> None:
    assert [(one.status, one.found, one.hosts) for one in judge_clocks(offsets)] == expected


def test_an_all_reduce() -> None:
    well, slow, wrong = Reduction(True, 2e-5, 9e9), Reduction(True, 4e-5, 1e9), Reduction(False, 2e-5, 9e9)
    found = judge_all_reduce({"n1": [well, well], "n2": [well]}, "cuda")
    assert (found.status, found.found) == ("ok", "the known sum; bus bandwidth 9.00 GB/s, latency 20 us")
    found = judge_all_reduce({"n1": [well], "n2": [slow]}, "cuda")
    assert (found.status, found.found) == ("warning", "bus bandwidth 1.00 GB/s, latency 40 us")
    assert "NCCL_SOCKET_IFNAME" in found.advice
    assert judge_all_reduce({"n1": [slow]}, "cpu").status == "ok"
    found = judge_all_reduce({"n1": [well], "n2": [well, wrong]}, "cuda")
    assert (found.status, found.hosts) == ("failed", ("n2",))


def test_slow_ranks_are_named_by_their_host() -> None:
    seconds = {"n1": [1.0, 1.1], "n2": [1.0, 1.9], "n3": [1.0, 1.0]}
    (found,) = judge_speed("a product", seconds, 1.5)
    assert (found.status, found.hosts, found.of_node) == ("warning", ("n2",), True)
    assert found.found == "a product takes 1.9 times the median: 1900.0 ms and 1000.0 ms"
    assert judge_speed("a product", seconds, 2.0) == []
    (found,) = judge_speed("a product", {"n1": [3.0], "n2": [1.0]}, 1.5)
    assert found.hosts == ("n1",), "of two the slower one"


def test_a_link_has_two_ends() -> None:
    assert judge_links({"n1": 9.0, "n2": 1.0}, 2.0) == [], "of two nobody can say"
    (found,) = judge_links({"n1": 1.0, "n2": 9.0, "n3": 1.0}, 2.0)
    assert found.hosts == ("n2",)


@pytest.mark.parametrize("count", [*range(1, 10), 64, 65])
def test_the_ring_has_every_link_once_and_no_node_twice_at_a_time(count: int) -> None:
    rounds = ring_rounds(count)
    links = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(links) == len(set(links)) == {1: 0, 2: 1}.get(count, count)
    for pairs in rounds:
        nodes = [node for pair in pairs for node in pair]
        assert len(nodes) == len(set(nodes))
    assert {node for pair in links for node in pair} == (set(range(count)) if count > 1 else set())
    assert len(rounds) <= 3
