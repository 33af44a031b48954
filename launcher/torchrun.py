"""Start a run through torchrun, restart it where that helps, and exit by what its ranks agreed on.

torchrun returns 1 whatever its workers returned, so the outcome is read from the run folder's `exit.json`. A file
that is missing, or that an earlier attempt left, means that the ranks had no time to agree: a crash. A start that the
ranks refuse leaves the run folder alone; its word comes through a folder of the launcher's own.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.processes import Ended, run_forwarding, signal_name
from sdtrain.errors import ConfigError, ExitCode
from sdtrain.run_dir import REFUSALS, Exit, RunDir, tell_launcher

SIGNALS = "SIGTERM,SIGINT,SIGUSR1"  # torchrun's default list lets SIGUSR1 kill its agent
MAX_FRUITLESS_RESTARTS = 2
_CHECKPOINT_NAME = re.compile(r"step-\d+")
# Outcomes that another start can mend: a saved state that asks for it, and a peer that hung or went away.
RESTARTABLE = frozenset({ExitCode.REQUEUE, ExitCode.HANG})


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the ranks run.

    Attributes:
        nproc: Ranks on this node, one per GPU.
        nnodes: Number of nodes.
        node_rank: This node's place among them, in [0, nnodes).
        rdzv_endpoint: `host:port` of node 0, where the nodes meet; needed beyond one node.
        shutdown_timeout_seconds: How long ranks may take to save after a signal before they are killed.
    """

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None
    shutdown_timeout_seconds: int = 120

    def __post_init__(self) -> None:
        if self.nproc < 1:
            raise ConfigError(f"--nproc is {self.nproc}; give the number of ranks on this node, at least 1")
        if self.nnodes < 1:
            raise ConfigError(f"--nnodes is {self.nnodes}; give the number of nodes, at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"--node-rank is {self.node_rank}; with --nnodes {self.nnodes} it is 0 to {self.nnodes - 1}"
            )
        if self.nnodes > 1 and not re.fullmatch(r"\S+:\d+", self.rdzv_endpoint or ""):
            raise ConfigError(
                f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT, the address of node 0 that every node "
                f"reaches; found {self.rdzv_endpoint!r}"
            )
        if self.nnodes == 1 and self.rdzv_endpoint is not None:
            raise ConfigError(
                f"--rdzv-endpoint {self.rdzv_endpoint} has no effect on one node; leave it out or give --nnodes"
            )

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nproc * self.nnodes


def torchrun_command(placement: Placement, trainee: Sequence[str], log_dir: Path) -> list[str]:
    """The exact torchrun command.

    Args:
        placement: Where the ranks run.
        trainee: What every rank runs, as `python` arguments: `-m sdtrain train ...`, or a script with its arguments.
        log_dir: Folder that receives a copy of every rank's stdout and stderr.
    """
    if placement.nnodes == 1:
        meeting = ["--standalone", "--local-addr", "127.0.0.1"]  # a node's own name need not resolve
    else:
        assert placement.rdzv_endpoint is not None
        meeting = [
            *("--nnodes", str(placement.nnodes), "--node-rank", str(placement.node_rank)),
            *("--rdzv-backend", "static", "--rdzv-endpoint", placement.rdzv_endpoint),
        ]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(placement.nproc), *meeting),
        *("--max-restarts", "0"),  # ours are decided by exit.json, torchrun's are blind
        *("--signals-to-handle", SIGNALS, "--shutdown-timeout", str(placement.shutdown_timeout_seconds)),
        *("--log-dir", str(log_dir), "--tee", "3"),
        *trainee,
    ]


def added_environment(nproc: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that the ranks get beside the launcher's own, where the user has not set them.

    Threads are the node's usable cores shared by its ranks; torchrun's own default of 1 starves CPU work.
    """
    cores = len(os.sched_getaffinity(0))
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // nproc)), "PYTHONUNBUFFERED": "1"}
    return {name: value for name, value in wanted.items() if name not in environment}


def shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as one line for a shell, with the variables in front."""
    assignments = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*assignments, shlex.join(command)])


def checkpoint_names(run_dir: RunDir) -> set[str]:
    """Names of the committed checkpoints, `step-N`; unfinished and discarded ones have other names."""
    if not run_dir.checkpoints.is_dir():
        return set()
    return {entry.name for entry in run_dir.checkpoints.iterdir() if _CHECKPOINT_NAME.fullmatch(entry.name)}


def outcome(run_dir: RunDir, before: Exit | None) -> Exit | None:
    """What the ranks agreed on; None where they left no word of their own, which means a crash.

    Args:
        run_dir: The run's folder.
        before: What stood there when the attempt began; the same attempt's word again is stale.
    """
    found = run_dir.read_exit()
    if found is None or (before is not None and found.attempt == before.attempt):
        return None
    return found


def crash_code(ended: Ended) -> ExitCode:
    """HANG (a lost peer) where a signal ended a rank, BUG otherwise."""
    return ExitCode.BUG if ended.killed_by is None else ExitCode.HANG


def describe(found: Exit | None, ended: Ended, log_dir: Path) -> str:
    """One sentence on how an attempt ended, for people."""
    if found is not None and found.is_refusal:
        return f"the start was refused with code {found.code}, nothing but {log_dir} was touched: {found.reason}"
    if found is not None:
        return f"attempt {found.attempt} ended with code {found.code} at step {found.step}: {found.reason}"
    if ended.killed_rank is not None:
        how = f"rank {ended.killed_rank} of this node was killed by {signal_name(ended.killed_by or 0)}"
    elif ended.killed_by is not None:
        how = f"torchrun was killed by {signal_name(ended.killed_by)}"
    else:
        how = f"torchrun returned {ended.returncode}"
    return f"crash: the ranks left no exit.json ({how}); every rank's output is under {log_dir}"


@dataclass(frozen=True, slots=True)
class Supervisor:
    """Starts a run and decides about restarts.

    Attributes:
        run_dir: The run's folder.
        placement: Where the ranks run.
        trainee: Maps `auto`, `never` or a checkpoint path to what every rank runs.
        max_restarts: How often a crashed run, or one that asked for it, is started again.
    """

    run_dir: RunDir
    placement: Placement
    trainee: Callable[[str], Sequence[str]]
    max_restarts: int = 0

    @property
    def log_dir(self) -> Path:
        """Folder of the ranks' output."""
        return self.run_dir.path / "logs"

    def run(self, resume: str = "auto") -> ExitCode | int:
        """Run to an end that no restart can mend.

        Args:
            resume: Where the first start begins; every restart resumes from the newest checkpoint.

        Returns:
            The exit code that the launcher ends with.
        """
        fruitless = 0
        for restarts_left in range(self.max_restarts, -1, -1):
            known = checkpoint_names(self.run_dir)
            found, ended = self._attempt(resume)
            self._say(describe(found, ended, self.log_dir))
            code = crash_code(ended) if found is None else found.code
            if found is not None and found.code not in RESTARTABLE:
                return code
            if ended.told is not None or restarts_left == 0:  # who stops the launcher decides about the next start
                return code
            is_restart = restarts_left < self.max_restarts
            fruitless = 0 if checkpoint_names(self.run_dir) - known else fruitless + is_restart
            if fruitless >= MAX_FRUITLESS_RESTARTS:
                self._say(
                    f"{fruitless} restarts in a row made no new checkpoint under {self.run_dir.checkpoints}; stopping"
                )
                return ExitCode.NO_PROGRESS
            self._say(f"restarting from the newest checkpoint, {restarts_left - 1} more restarts allowed")
            resume = "auto"
        raise AssertionError("the last round returns")

    def _attempt(self, resume: str) -> tuple[Exit | None, Ended]:
        before = self.run_dir.read_exit()
        self.log_dir.mkdir(parents=True, exist_ok=True)
        command = torchrun_command(self.placement, self.trainee(resume), self.log_dir)
        added = added_environment(self.placement.nproc, os.environ)
        with tempfile.TemporaryDirectory(prefix="sdtrain-refusals-") as refusals:
            ended = run_forwarding(command, {**os.environ, **added, REFUSALS: refusals})
            found = RunDir(Path(refusals)).read_exit() or outcome(self.run_dir, before)
        if found is not None and found.is_refusal:
            tell_launcher(found)  # a batch script that started this launcher asks as well
        if found is None and self.placement.node_rank == 0:
            self.run_dir.clear_exit()  # nobody shall take an older word for this crash's
        return found, ended

    @staticmethod
    def _say(message: str) -> None:
        print(f"[sdtrain-launch] {message}", file=sys.stderr, flush=True)
