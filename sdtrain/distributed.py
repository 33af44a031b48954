"""Ranks, agreement and timeouts. In one process, without a process group, everything is a no-op."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands: global rank, number of ranks, rank on its node."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes what is written once."""
        return self.rank == 0


def ranks() -> Ranks:
    """This process's place as its launcher set it (torchrun or `srun` variables); one rank if unset."""
    env = os.environ
    return Ranks(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))


def is_active() -> bool:
    """Whether a process group stands."""
    return dist.is_available() and dist.is_initialized()


def device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", ranks().local_rank)
    return torch.device("cpu")


def initialize(*, timeout_seconds: float, store: dist.Store | None = None) -> Ranks:
    """Join the process group: gloo for CPU tensors, NCCL beside it where there is an accelerator.

    Agreement goes over gloo, so that asking the other ranks costs no CPU-GPU sync point. Without a launcher the group
    has one rank.

    Args:
        timeout_seconds: How long a collective waits.
        store: Where the ranks have met already; else they meet at MASTER_ADDR:MASTER_PORT.
    """
    place = ranks()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if place.world_size == 1 else "29500")
    for name, value in (("RANK", place.rank), ("WORLD_SIZE", place.world_size), ("LOCAL_RANK", place.local_rank)):
        os.environ.setdefault(name, str(value))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_seconds)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    return place


def set_timeout(seconds: float) -> None:
    """Give every process group the same timeout; ZeRO's own groups ignore the one of `init_process_group`."""
    from torch.distributed import distributed_c10d as c10d

    for group in list(c10d._world.pg_map):
        if group is not c10d.GroupMember.NON_GROUP_MEMBER:
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _reduce(value: float, op: dist.ReduceOp.RedOpType) -> float:
    if not is_active():
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return float(tensor.item())


def max_over_ranks(value: float) -> float:
    """The largest value that any rank gave; collective."""
    return _reduce(value, dist.ReduceOp.MAX)


def min_over_ranks(value: float) -> float:
    """The smallest value that any rank gave; collective."""
    return _reduce(value, dist.ReduceOp.MIN)


def sum_over_ranks(value: float) -> float:
    """The sum of all ranks' values; collective."""
    return _reduce(value, dist.ReduceOp.SUM)


def any_rank(flag: bool) -> bool:
    """Whether any rank raised the flag; collective."""
    return max_over_ranks(float(flag)) > 0


def all_ranks(flag: bool) -> bool:
    """Whether every rank raised the flag; collective."""
    return min_over_ranks(float(flag)) > 0


def gather_objects(item: Any) -> list[Any]:
    """Every rank's small object, in rank order, on every rank; collective."""
    if not is_active():
        return [item]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, item)
    return gathered


def gather_values(value: float) -> list[float]:
    """Every rank's number, in rank order, on every rank; collective, and far cheaper than objects."""
    if not is_active():
        return [value]
    gathered = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    dist.all_gather_into_tensor(gathered, torch.tensor([value], dtype=torch.float64))
    return gathered.tolist()


def broadcast_object(item: Any) -> Any:
    """Rank 0's object on every rank; collective."""
    if not is_active():
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for all ranks."""
    if is_active():
        dist.barrier()


def shutdown() -> None:
    """Leave the process group."""
    if is_active():
        dist.destroy_process_group()
