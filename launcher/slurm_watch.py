"""A run's Slurm job from outside: the ends of its logs, and its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

from launcher.slurm_journal import Journal, Start
from launcher.slurm_queue import cancel, find_job
from sdtrain.errors import ConfigError, ExitCode


def cancel_run(journal: Journal, *, now: bool) -> str:
    """End the newest job of a run; returns what was done about it.

    An ingestion is ended at once in any case, since what it has committed stays.

    Args:
        journal: Of the run.
        now: Do not wait for a save.

    Raises:
        ConfigError: There is no such job, or it has ended.
    """
    path, job = journal.run_dir.path, journal.newest_job()
    if job is None:
        raise ConfigError(f"{path}: no Slurm job of this run is known ({journal.path} is not there); nothing to cancel")
    queued = find_job(job)
    if queued is None or queued.is_over:
        state = "has left the queue" if queued is None else f"is {queued.state} already"
        raise ConfigError(f"{path}: its job {job} {state}; nothing to cancel")
    if queued.state == "RUNNING" and not now and not journal.is_ingestion():
        (path / "STOP").touch()
        return f"job {job}: saves after its next step and ends; to end it at once: sdtrain-launch cancel {path} --now"
    cancel(job)
    return f"job {job}: cancelled; go on with: sdtrain-launch resume {path}"


def tails(journal: Journal, rank: int | None, lines: int) -> Iterator[tuple[Path, str]]:
    """The last lines of the newest job's own output and of one rank's.

    Args:
        journal: Of the run.
        rank: Whose; None takes the rank that ended the last attempt badly, else rank 0.
        lines: Of each file.

    Raises:
        ConfigError: No job of this run has started, or it has no such rank.
    """
    starts = journal.starts()
    if not starts:
        raise ConfigError(f"{journal.run_dir.path}: no Slurm job of this run has started yet")
    start = starts[-1]
    word = journal.run_dir.read_exit()
    if rank is None:
        rank = 0 if word is None or word.code in (ExitCode.DONE, ExitCode.REQUEUE) else word.rank
    world_size = start.nodes * start.ranks_per_node
    if rank >= world_size:
        raise ConfigError(f"--rank {rank}: job {start.job} has ranks 0 to {world_size - 1}")
    for path in (journal.folder / f"slurm-{start.job}.out", _log_of(journal, start, rank)):
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                yield path, "".join(deque(file, maxlen=lines)).rstrip("\n")


def _log_of(journal: Journal, start: Start, rank: int) -> Path:
    """A rank's own file, or that of its node, where one agent speaks for all of a node's ranks."""
    folder = journal.folder / start.logs
    own = folder / f"rank-{rank}.log"
    return own if own.exists() else folder / f"node-{rank // start.ranks_per_node}.log"
