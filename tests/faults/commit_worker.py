"""Runs commits and finds on forked ranks, some of which are told to die or to fail; prints what came of it as JSON.

A fork from one preloaded process, because a cold start of two ranks costs many seconds of imports.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sdtrain import distributed
from sdtrain.checkpoints import protocol
from sdtrain.checkpoints.manifest import rank_file
from sdtrain.checkpoints.recut import KINDS, Layout, spans, tensor_name
from sdtrain.checkpoints.saver import Saver
from sdtrain.errors import SdtrainError

LAYOUT = Layout.of([{"weight": (40, 3), "scale": ()}, {"bias": (7,)}])


def vector(step: int, group: int, kind: str) -> torch.Tensor:
    """The state of a step: every element differs between steps, groups and kinds."""
    first = step * 10_000 + group * 1_000 + KINDS.index(kind) * 200
    return torch.arange(first, first + LAYOUT.groups[group].numel, dtype=torch.float32)


def owned(world_size: int) -> list[list[list[int]]]:
    sizes = [-(-group.numel // world_size) for group in LAYOUT.groups]
    return spans(LAYOUT, sizes, world_size)


def rank_files(step: int, rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    mine = owned(world_size)[rank]
    state = {
        tensor_name(group, kind): vector(step, group, kind)[slice(*mine[group])]
        for group in range(len(LAYOUT.groups))
        for kind in KINDS
    }
    return {rank_file("denoiser", rank): state, rank_file("extra", rank): {"rank": torch.tensor(rank)}}


def facts(step: int, world_size: int) -> dict[str, Any]:
    return {
        "samples_seen": step * 8,
        "parent": None,
        "layouts": {"denoiser": LAYOUT.to_json()},
        "spans": {"denoiser": owned(world_size)},
    }


def act(job: dict[str, Any], rank: int) -> str | None:
    """One rank's part of a job; `die` and `fail` name the rank and the stage, `boundary` being the one of training."""
    folder, world_size = Path(job["folder"]), job["world_size"]
    if job["action"] == "find":
        found = protocol.find(folder, job.get("resume", "auto"))
        return found.path.name if found else None

    def on_stage(stage: str) -> None:
        if job.get("die") == [rank, stage]:
            os.kill(os.getpid(), signal.SIGKILL)
        if job.get("fail") == [rank, stage]:
            raise OSError(28, "No space left on device")

    state: dict[str, Any] = {
        "step": job["step"],
        "attempt": job["attempt"],
        "files": rank_files(job["step"], rank, world_size),
        "facts": facts(job["step"], world_size),
        "texts": {"config.yaml": "schema_version: 1\n"},
    }
    if job.get("asynchronous"):
        path = save_beside_training(Saver(folder, asynchronous=True, on_stage=on_stage), state, on_stage)
    else:
        path = protocol.commit(folder, on_stage=on_stage, **state)
    return path.name if path else None


def save_beside_training(saver: Saver, state: dict[str, Any], on_stage: Callable[[str], None]) -> Path | None:
    """Take the state, go on changing it, and commit at the first boundary where no rank writes any more."""
    saver.begin(**state)
    while True:
        for tensors in state["files"].values():
            for tensor in tensors.values():
                tensor.add_(1)
        if not distributed.any_rank(saver.is_writing):
            break
    on_stage("boundary")
    saved = saver.finish()
    assert saved is not None
    return saved.path


def run_rank(job: dict[str, Any], rank: int, scratch: Path) -> int:
    world_size = job["world_size"]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{scratch}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=20),
        )
    try:
        outcome: dict[str, Any] = {"returned": act(job, rank)}
        code = 0
    except SdtrainError as error:
        outcome, code = {"error": str(error)}, int(error.exit_code)
    (scratch / f"{rank}.json").write_text(json.dumps(outcome))
    return code


def run_job(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's exit code (negative: the signal) and what it returned or raised."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        children = [fork(job, rank, scratch) for rank in range(job["world_size"])]
        outcomes = []
        for rank, child in enumerate(children):
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = scratch / f"{rank}.json"
            outcomes.append({"code": code, **(json.loads(said.read_text()) if said.exists() else {})})
        return outcomes


def fork(job: dict[str, Any], rank: int, scratch: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = run_rank(job, rank, scratch)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([run_job(job) for job in json.loads(sys.argv[1])]))
