"""One rank needs no process group; two ranks agree. The two are forked from one process that has imported torch."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from sdtrain import distributed
from tests.support import free_port

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_rank(no_launcher: None) -> None:
    assert distributed.ranks() == distributed.Ranks(rank=0, world_size=1, local_rank=0)
    assert distributed.ranks().is_main


def test_the_launcher_says_where_a_rank_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(PLACE, ("5", "8", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert distributed.ranks() == distributed.Ranks(rank=5, world_size=8, local_rank=1)
    assert not distributed.ranks().is_main


def test_the_device_is_the_rank_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.device() == torch.device("cuda", 3)


def test_alone_every_agreement_is_one_s_own_opinion() -> None:
    assert [f(2.5) for f in (distributed.max_over_ranks, distributed.min_over_ranks, distributed.sum_over_ranks)] == [
        2.5
    ] * 3
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert distributed.all_ranks(True) and not distributed.all_ranks(False)
    assert distributed.gather_values(2.5) == [2.5]
    assert distributed.gather_objects("mine") == ["mine"]
    assert distributed.broadcast_object("mine") == "mine"
    distributed.barrier()


WORKER = """
import json, os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from sdtrain import distributed as d

def rank(number, port, path):
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = port
    place = d.initialize(timeout_seconds=30)
    other = dist.new_group([0, 1])
    d.set_timeout(12.0)
    from torch.distributed import distributed_c10d as c10d
    backends = [group._get_backend(torch.device("cpu")) for group in (c10d.GroupMember.WORLD, other)]
    told = {
        "place": [place.rank, place.world_size],
        "max": d.max_over_ranks(number), "min": d.min_over_ranks(number), "sum": d.sum_over_ranks(number + 0.5),
        "any": [d.any_rank(number == 1), d.any_rank(False)], "all": [d.all_ranks(True), d.all_ranks(number == 1)],
        "values": d.gather_values(number + 0.25),
        "gathered": d.gather_objects({"rank": number}), "broadcast": d.broadcast_object(["from", number]),
        "big": d.sum_over_ranks(2.0**40 + number),
        "timeouts": [backend.options._timeout.total_seconds() for backend in backends],
    }
    d.barrier()
    d.shutdown()
    told["active"] = d.is_active()
    open(f"{path}/{number}.json", "w").write(json.dumps(told))

children = []
for number in (0, 1):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            rank(number, *sys.argv[1:])
            code = 0
        finally:
            os._exit(code)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_two_ranks_agree(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(free_port()), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [one.pop("place") for one in told] == [[0, 2], [1, 2]]
    assert (
        told[0]
        == told[1]
        == {
            "max": 1.0,
            "min": 0.0,
            "sum": 2.0,
            "any": [True, False],
            "all": [True, False],
            "values": [0.25, 1.25],
            "gathered": [{"rank": 0}, {"rank": 1}],
            "broadcast": ["from", 0],
            "big": 2.0**41 + 1,  # float64: bytes of large checkpoints are counted exactly
            "timeouts": [timedelta(seconds=12).total_seconds()] * 2,  # ZeRO's own groups as well
            "active": False,
        }
    )
