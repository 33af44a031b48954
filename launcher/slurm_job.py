"""The two ends of a batch script: before the ranks start, and after they have gone.

srun and torchrun lose exit codes. What the ranks agreed on stands in `exit.json`; a file that is missing, or that an
earlier attempt left, means a crash. From it follows whether the job is requeued.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.processes import Ended, signal_name
from launcher.slurm_journal import Journal, Start, fruitless_starts
from launcher.slurm_queue import find_job, requeue
from launcher.torchrun import MAX_FRUITLESS_RESTARTS, RESTARTABLE, checkpoint_names, crash_code, outcome
from sdtrain.errors import ConfigError, ExitCode, NoProgressError
from sdtrain.run_dir import REFUSALS, Exit, RunDir

MAX_FRUITLESS_STARTS = 1 + MAX_FRUITLESS_RESTARTS
BACKOFF_SECONDS = 120
"""How long a job waits at least that found an earlier start of its own alive, doubled with every start in vain."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What Slurm tells a batch script of its job.

    Attributes:
        job: Its number.
        restart: How many starts it had before.
        nodes: Number of nodes.
        ranks_per_node: Tasks on each.
        partition: Where it runs.
        node_list: Its nodes, as Slurm writes lists.
    """

    job: str
    restart: int
    nodes: int
    ranks_per_node: int
    partition: str = ""
    node_list: str = ""

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Surroundings:
        """Read them.

        Raises:
            ConfigError: This is no batch script's environment.
        """
        try:
            return cls(
                job=environment["SLURM_JOB_ID"],
                restart=int(environment.get("SLURM_RESTART_COUNT", "0")),  # unset on the first start
                nodes=int(environment["SLURM_NNODES"]),
                ranks_per_node=int(environment["SLURM_NTASKS_PER_NODE"]),
                partition=environment.get("SLURM_JOB_PARTITION", ""),
                node_list=environment.get("SLURM_JOB_NODELIST", ""),
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"{error} is not set as in a batch job of Slurm: slurm/train.sbatch and data.sbatch call this, submit "
                "them with --ntasks-per-node; people call `sdtrain-launch slurm CONFIG` or `slurm-data CONFIG`"
            ) from None


@dataclass(frozen=True, slots=True)
class Work:
    """What the starts of a job bring forward together.

    Attributes:
        journal: Where they are written down.
        committed: Names of what stands of it now.
        unit: What a start must add, in words.
        next_start: What another start does, in words.
    """

    journal: Journal
    committed: set[str]
    unit: str
    next_start: str

    @property
    def folder(self) -> Path:
        """The run's, or an ingestion's output."""
        return self.journal.run_dir.path


def training(run_dir: RunDir) -> Work:
    """A run and its checkpoints."""
    unit = f"checkpoint under {run_dir.checkpoints}"
    return Work(Journal(run_dir), checkpoint_names(run_dir), unit, "go on from the newest checkpoint")


def begin(run_dir: RunDir, here: Surroundings, max_restarts: int) -> Path:
    """Write a start of a run down; returns the folder for the ranks' output.

    Raises:
        NoProgressError: The job was started too often, or in vain.
        StorageError: The run's folder cannot be written to.
    """
    before = run_dir.read_exit()
    return write_start(training(run_dir), here, max_restarts, None if before is None else before.attempt)


def write_start(work: Work, here: Surroundings, max_restarts: int, attempt_before: str | None = None) -> Path:
    """Write a start down; returns the folder for what its processes say.

    Raises:
        NoProgressError: The job was started too often, or in vain.
        StorageError: The folder cannot be written to.
    """
    journal = work.journal
    starts = journal.counted_starts(here.job)
    if here.restart > max_restarts:
        raise NoProgressError(_capped(work, here.restart - 1, max_restarts))
    if starts and fruitless_starts(starts, work.committed) >= MAX_FRUITLESS_STARTS:
        raise NoProgressError(_in_vain(work))
    journal.prepare()
    logs = journal.folder / f"slurm-{here.job}.{here.restart}"
    logs.mkdir(exist_ok=True)
    placement = (here.job, here.restart, logs.name, here.ranks_per_node, here.nodes)
    journal.add("start", Start(*placement, attempt_before, sorted(work.committed), journal.kind))
    return logs


def end(run_dir: RunDir, here: Surroundings, max_restarts: int, step_status: int) -> ExitCode | int:
    """Decide by the ranks' word about another start of a run, and ask the scheduler for it.

    Args:
        run_dir: The run.
        here: The job.
        max_restarts: How often it may be started again.
        step_status: What srun returned; it tells people how a crash looked from outside.

    Returns:
        The batch script's exit code.
    """
    journal = Journal(run_dir)
    starts = [start for start in journal.starts() if start.job == here.job]
    found = _word(run_dir, starts[-1])
    if found is None and run_dir.path.is_dir():
        run_dir.clear_exit()  # nobody shall take an older word for this crash's
    ended = Ended(step_status, step_status - 128 if step_status > 128 else None, None, None)
    code = int(crash_code(ended)) if found is None else found.code
    told = _told(found, ended, journal.folder / starts[-1].logs)
    again = found is None or found.code in RESTARTABLE
    is_refused = found is not None and found.is_refusal
    return write_end(training(run_dir), here, max_restarts, code, told, again=again, is_refused=is_refused)


def write_end(
    work: Work,
    here: Surroundings,
    max_restarts: int,
    code: int,
    told: str,
    *,
    again: bool,
    is_refused: bool = False,
    exclude: Sequence[str] = (),
) -> int:
    """Write down how a start ended, and ask the scheduler for another one unless enough were made.

    Args:
        work: What it worked on.
        here: The job.
        max_restarts: How often it may be started again.
        code: How it ended.
        told: The same in words.
        again: Whether another start can mend that.
        is_refused: Whether it could not begin yet; the next one is later each time.
        exclude: Nodes that the next one must do without.

    Returns:
        The batch script's exit code.
    """
    journal = work.journal
    starts = journal.counted_starts(here.job)
    in_vain = fruitless_starts(starts, work.committed)
    delay = BACKOFF_SECONDS * 2**in_vain if is_refused else 0
    if again and in_vain >= MAX_FRUITLESS_STARTS:
        again, code, told = False, int(ExitCode.NO_PROGRESS), f"{told}; {_in_vain(work)}"
    elif again:
        why_not = _why_not_again(work, here, max_restarts)
        when = f" in {delay // 60} minutes or later" if delay else ""
        when += f" without {', '.join(exclude)}" if exclude else ""
        again, told = why_not is None, f"{told}; {why_not or f'requeued, to {work.next_start}{when}'}"
    _say(told)
    try:
        journal.add("end", {"job": here.job, "restart": here.restart, "code": code, "reason": told, "requeued": again})
    except OSError as error:  # a full disk must not keep the job from its next start, which may find room
        _say(f"{journal.path} could not be written: {error.strerror}")
    if again:
        try:
            requeue(here.job, delay_seconds=delay, exclude=exclude)
        except ConfigError as error:
            _say(f"{error}. Go on with: sdtrain-launch resume {work.folder}")
    return code


def _word(run_dir: RunDir, start: Start) -> Exit | None:
    """What the ranks agreed on, or why they refused to start; None after a crash."""
    refusals = os.environ.get(REFUSALS)
    refused = RunDir(Path(refusals)).read_exit() if refusals else None
    if refused is not None:
        return refused
    before = None if start.attempt_before is None else Exit(0, "", 0, 0, start.attempt_before)
    return outcome(run_dir, before)


def _told(found: Exit | None, ended: Ended, logs: Path) -> str:
    if found is not None and found.is_refusal:
        return f"the start was refused with code {found.code}, nothing but {logs.parent} was touched: {found.reason}"
    if found is not None:
        return f"attempt {found.attempt} ended with code {found.code} at step {found.step}: {found.reason}"
    how = f"was ended by {signal_name(ended.killed_by)}" if ended.killed_by else f"returned {ended.returncode}"
    return f"crash: the ranks left no exit.json (srun {how}); every rank's output is in {logs}"


def _why_not_again(work: Work, here: Surroundings, max_restarts: int) -> str | None:
    """What keeps this job from being requeued; None where nothing does."""
    if here.restart >= max_restarts:
        return _capped(work, here.restart, max_restarts)
    job = find_job(here.job)
    if job is None or job.state not in ("RUNNING", "TIMEOUT"):
        state = "gone" if job is None else f"{job.state} ({job.reason})"
        return f"not requeued by this script: to the scheduler job {here.job} is {state}"
    return None


def _capped(work: Work, restarts: int, max_restarts: int) -> str:
    return (
        f"not requeued: job had {restarts} restarts, and --max-restarts is {max_restarts}. "
        f"Go on with: sdtrain-launch resume {work.folder}"
    )


def _in_vain(work: Work) -> str:
    return (
        f"not requeued: {MAX_FRUITLESS_STARTS} starts in a row made no new {work.unit}. "
        f"See sdtrain-launch logs {work.folder}, mend the cause, then: sdtrain-launch resume {work.folder}"
    )


def _say(message: str) -> None:
    print(f"[sdtrain-launch] {message}", file=sys.stderr, flush=True)
