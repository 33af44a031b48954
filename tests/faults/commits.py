"""Jobs for the commit worker, and what their folders must hold afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.checkpoints.manifest import Checkpoint, list_checkpoints
from sdtrain.checkpoints.recut import KINDS, assemble

WORKER = Path(__file__).with_name("commit_worker.py")
COMMITTED = ("renamed", "latest", "done")  # killed here, the checkpoint stands already


def run_jobs(jobs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Every job's ranks: exit code and what they returned; see the worker."""
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(jobs)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def job(folder: Path, step: int, world_size: int, **more: Any) -> dict[str, Any]:
    base = {"action": "commit", "folder": str(folder), "step": step, "attempt": f"a{step}", "world_size": world_size}
    return {**base, **more}


def final_names(folder: Path) -> list[str]:
    return [checkpoint.path.name for checkpoint in list_checkpoints(folder)]


def assert_state_is(checkpoint: Checkpoint, step: int) -> None:
    """Every element of the worker's state of that step, at whatever world size it was written."""
    for kind in KINDS:
        whole = assemble(checkpoint, "denoiser", kind)
        first = step * 10_000 + KINDS.index(kind) * 200
        assert torch.equal(whole["weight"].flatten(), torch.arange(first, first + 120, dtype=torch.float32))
        assert torch.equal(whole["bias"], torch.arange(first + 1000, first + 1007, dtype=torch.float32))


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB and 40 inodes."""
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("needs root and mount(8) for a small tmpfs")
    command = [mount, "-t", "tmpfs", "-o", "size=1m,nr_inodes=40", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs is not allowed here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
