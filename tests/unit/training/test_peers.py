"""Who still answers over the network: real sockets on loopback, and a host that is cut off in a network namespace."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdtrain.training.peers import (
    Answer,
    Peer,
    RollCall,
    call_roll,
    from_bytes,
    host_name,
    listen_beside,
    ranks_in_words,
    to_bytes,
)

HERE, GONE, SILENT = Answer.HERE, Answer.GONE, Answer.SILENT


def cluster(*ranks_of_hosts: int) -> dict[int, Peer]:
    """Hosts with so many ranks each."""
    hosts = [host for host, ranks in enumerate(ranks_of_hosts) for _ in range(ranks)]
    return {rank: Peer(rank, f"host{host}", f"10.0.0.{host}", 4000 + rank) for rank, host in enumerate(hosts)}


def called(caller: int, roll: dict[int, Peer], **answers: Answer) -> RollCall:
    """All others are here but the hosts that are named."""
    told = {rank: answers.get(peer.host, HERE) for rank, peer in roll.items() if rank != caller}
    return RollCall(caller, roll, told)


# Calling --------------------------------------------------------------------------------------------------------------


def test_who_is_there_and_who_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    (mine, door), (other, other_door), (left, left_door) = (listen_beside(rank) for rank in range(3))
    assert door is not None and other_door is not None and left_door is not None
    assert (mine.host, mine.address) == (host_name(), "127.0.0.1")
    left_door.close()
    calls = [call_roll(0, [mine, other, left]) for _ in range(3)]  # nobody ever takes one
    call = calls[-1]
    assert [one.answers for one in calls] == [{1: HERE, 2: GONE}] * 3
    assert (call.of(HERE), call.of(GONE), call.of(SILENT), call.is_cut_off()) == ([1], [2], [], False)
    assert call.named([2]) == f"rank 2 on {host_name()}"
    door.close()
    other_door.close()


def test_a_host_that_cannot_reach_rank_0_has_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no.such.name.invalid")
    peer, door = listen_beside(3)
    assert (peer, door) == (Peer(3, host_name()), None)
    assert call_roll(0, [Peer(0, "host0", "127.0.0.1", 1), peer]).answers == {}


def test_an_address_that_leads_back_to_the_caller_is_not_called() -> None:
    """On some machines the own name leads to 127.0.1.1; from another host that would be the caller itself."""
    assert call_roll(1, [Peer(0, "host0", "127.0.1.1", 9), Peer(1, "host1", "10.0.0.2", 9)]).answers == {}


def test_nodes_have_the_names_that_slurm_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert host_name() == socket.gethostname()
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert host_name() == "n7"


def test_the_roll_goes_through_memory_unchanged() -> None:
    peers = list(cluster(2, 1).values())
    assert from_bytes(to_bytes(peers)) == peers
    assert from_bytes(b"") == []


CUT_OFF = """
set -e
ip link set lo up
ip link add here type veth peer name there
ip address add 10.77.0.1/24 dev here
ip link set here up
ip link set there up
exec "$@"
"""
CALL = """
from sdtrain.training.peers import Peer, call_roll
roll = [Peer(0, "host1", "10.77.0.1", 9), *(Peer(rank, "host2", "10.77.0.2", 9) for rank in (1, 2, 3))]
print(call_roll(0, roll).answers)
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2")
def test_a_host_that_is_cut_off_costs_one_wait_for_all_its_ranks() -> None:
    started = time.monotonic()
    command = ("unshare", "--net", "bash", "-c", CUT_OFF, "cut", sys.executable, "-c", CALL)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{dict.fromkeys((1, 2, 3), SILENT)}\n"
    assert time.monotonic() - started < 15


# Words ----------------------------------------------------------------------------------------------------------------


def test_ranks_are_named_by_their_hosts() -> None:
    call = called(0, cluster(8, 8, 8, 8, 8, 8, 8))
    assert call.named([9]) == "rank 9 on host1"
    assert call.named([8, 9, 10, 24, 26]) == "ranks 8-10 on host1 and ranks 24, 26 on host3"
    assert call.named(range(8, 56)) == (
        "ranks 8-15 on host1 and ranks 16-23 on host2 and ranks 24-31 on host3 and the ranks of 3 more hosts"
    )
    assert RollCall().named([3, 4]) == "ranks 3-4", "before they have met"
    assert ranks_in_words([5]) == "rank 5"


def test_the_side_with_more_hosts_stays_and_of_two_halves_the_caller_s() -> None:
    four = cluster(2, 2, 2, 2)
    assert not called(0, four, host3=SILENT).is_cut_off()
    assert not called(0, four, host2=SILENT, host3=SILENT).is_cut_off()
    lonely = called(0, four, host1=SILENT, host2=SILENT, host3=SILENT)
    assert lonely.is_cut_off()
    assert lonely.of_own_host() == [0, 1]
    assert not called(0, cluster(1, 1), host1=SILENT).is_cut_off()
    assert not called(0, cluster(1, 1)).is_cut_off()
