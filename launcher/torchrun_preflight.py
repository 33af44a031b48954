"""The preflight of `sdtrain-launch torchrun`: `sdtrain doctor --worker` as every rank of this node, before training.

On one node it is left out unless it is asked for: there is nobody to agree with, torch would be imported twice, and
what else could be wrong is refused by the start itself.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launcher.processes import run_together
from launcher.torchrun import Placement, added_environment
from sdtrain.errors import ExitCode
from sdtrain.run_dir import REFUSALS, RunDir, tell_launcher

LIMIT_SECONDS = 700.0
"""The ranks wait five minutes for absent ones, and need no longer than that for their checks."""


def meeting_point(placement: Placement) -> tuple[str, int]:
    """Where the ranks' doctors meet: one port above torchrun's, which the agents of quicker nodes may want already."""
    if placement.rdzv_endpoint is not None:
        address, _, port = placement.rdzv_endpoint.rpartition(":")
        return address.strip("[]"), int(port) + 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "127.0.0.1", int(probe.getsockname()[1])


def examine(placement: Placement, words: Sequence[str], log_dir: Path) -> ExitCode:
    """Check all nodes together; each of them calls this.

    Args:
        placement: Where the ranks run.
        words: The page and settings over it.
        log_dir: Folder that gets `preflight.json`.

    Returns:
        PREFLIGHT where a check failed, with the reason printed; REQUEUE where this was told to leave; else DONE.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    address, port = meeting_point(placement)
    command = [sys.executable, "-m", "sdtrain", "doctor", "--worker", "--output", str(log_dir), *words]
    common = {"WORLD_SIZE": placement.world_size, "MASTER_ADDR": address, "MASTER_PORT": port}
    with tempfile.TemporaryDirectory(prefix="sdtrain-refusals-") as refusals:
        base = {**os.environ, **added_environment(placement.nproc, os.environ), REFUSALS: refusals}
        environments = []
        for local in range(placement.nproc):
            own = {"RANK": placement.node_rank * placement.nproc + local, "LOCAL_RANK": local, **common}
            environments.append(base | {name: str(value) for name, value in own.items()})
        codes, told = run_together(command, environments, seconds=LIMIT_SECONDS)
        refused = RunDir(Path(refusals)).read_exit()
    if refused is not None:
        tell_launcher(refused)
        _say(f"the start was refused with code {refused.code}, nothing but {log_dir} was touched: {refused.reason}")
        return ExitCode(refused.code)
    if told is not None:
        return ExitCode.REQUEUE
    if any(codes):
        _say(f"the preflight of this node's ranks returned {', '.join(map(str, codes))}; training was not started")
        return ExitCode.PREFLIGHT
    return ExitCode.DONE


def _say(message: str) -> None:
    print(f"[sdtrain-launch] {message}", file=sys.stderr, flush=True)
