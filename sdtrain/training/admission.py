"""What is decided before a run's folder is touched: whether this start may become an attempt, from where, with what.

A start that is refused leaves the folder as it found it. It may belong to another run, to a run that is alive, or to
nobody; so what is wrong with a page, its data or its folder is said on standard error and to the launcher alone. What
is wrong with the run's own checkpoints is the run's affair, and becomes its word in `exit.json` like any other end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdtrain import build, distributed
from sdtrain.checkpoints.protocol import Checkpoint, leftovers, list_checkpoints, space_problem
from sdtrain.checkpoints.remote import find_or_fetch
from sdtrain.checkpoints.verify import verify_together
from sdtrain.checkpoints.weights import open_checkpoint
from sdtrain.config.load import load_training, refuse_on_resume
from sdtrain.config.run import TrainingConfig, grad_accum_steps
from sdtrain.data.manifest import Manifest
from sdtrain.data.plan import ORDER_VERSION
from sdtrain.data.takedown import Takedown
from sdtrain.errors import ConfigError, ExitCode
from sdtrain.records import Task
from sdtrain.run_dir import RunDir
from sdtrain.training.keeper import refuse_other_runs
from sdtrain.training.lease import Lease
from sdtrain.training.outcome import Refused, refusing
from sdtrain.training.state import expected_bytes

log = logging.getLogger(__name__)

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Admitted:
    """What a start that may begin begins with.

    Attributes:
        manifest: Of its data.
        takedown: What of it must not be read; what is added later counts from the next start.
        task: With all its networks, on the CPU.
        identity: What a resume must find unchanged.
        grad_accum_steps: Micro-steps per step at this number of ranks.
        max_steps: Steps of the whole run.
        checkpoint: Where it goes on; None for a fresh start.
        source: Whose state a fresh start begins with; None for fresh weights.
    """

    manifest: Manifest
    takedown: Takedown
    task: Task
    identity: Mapping[str, Any]
    grad_accum_steps: int
    max_steps: int
    checkpoint: Checkpoint | None
    source: Checkpoint | None

    @property
    def step(self) -> int:
        """Finished steps that it starts from."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def occupy(folder: RunDir, lease: Lease, *, begins: bool = False) -> None:
    """Keep other starts of a run out of its folder from now on, or be kept out; collective, rank 0 holds the lease.

    Raises:
        Refused: Another attempt is alive in this folder. With REQUEUE if it is an earlier start of the same Slurm job,
            as when a node was cut off: its watchdogs end it, so that a later start finds the folder free.
    """
    holder = lease.take(begins=begins) if distributed.ranks().is_main else None
    holder = distributed.broadcast_object(holder)
    if holder is not None and holder.is_of_this_job:
        raise Refused(
            ExitCode.REQUEUE,
            f"run_dir = {folder.path}: {holder.words}: an earlier start of this job, which the scheduler took for "
            "ended. Start this job again later; if that process never ends, end it there; nothing was touched",
        )
    if holder is not None:
        raise Refused(
            ExitCode.PREFLIGHT,
            f"run_dir = {folder.path}: {holder.words}. Wait for its end or stop it (`touch {folder.path / 'STOP'}`), "
            "then start again, or give another run_dir; nothing was touched",
        )


def admit(
    config: TrainingConfig, folder: RunDir, resume: str | Path, *, attempt: str, beat: Callable[[str, int], None]
) -> Admitted:
    """Look at page, data, folder, checkpoints and room, and build the networks; collective.

    Args:
        config: The page.
        folder: The run's folder, which need not be there.
        resume: See `checkpoints.protocol.find`; or a URL.
        attempt: Name of this start.
        beat: Told (phase, step).

    Raises:
        Refused: The start must not become an attempt.
        SdtrainError: The run's own checkpoints, or those that it begins with, cannot be used.
    """
    with refusing():
        accumulation = grad_accum_steps(config, distributed.ranks().world_size)
        folder.refuse_unusable()
        manifest = build.load_manifest(config.data)
        build.check_manifest(config, manifest)
        takedown = manifest.takedown
    identity = identity_of(config, manifest)
    checkpoint = _find(config, folder, resume, attempt)
    with refusing():
        if checkpoint is not None:
            refuse_on_resume(load_training(checkpoint.path / "config.yaml"), config)
            refuse_other_runs(checkpoint, identity)
    source = None
    if checkpoint is None and config.init_from is not None:
        source = open_checkpoint(config.init_from.checkpoint, check=verify_together)
    beat("build", 0 if checkpoint is None else checkpoint.step)
    with refusing():
        torch.manual_seed(config.seed)  # every rank initialises the same network
        task = build.build_task(config, manifest)
        max_steps = build.max_steps(config, manifest)
    admitted = Admitted(manifest, takedown, task, identity, accumulation, max_steps, checkpoint, source)
    if admitted.step < max_steps:
        _refuse_without_room(config, folder, admitted)
    return admitted


def identity_of(config: TrainingConfig, manifest: Manifest) -> dict[str, Any]:
    """What a resume must find unchanged, or it would see other samples or another order."""
    return {
        "data_manifest_sha256": manifest.sha256,
        "seed": config.seed,
        "order_version": ORDER_VERSION,
        "window_shards": config.data.window_shards,
        "batch_size": config.data.batch_size,
    }


def _find(config: TrainingConfig, folder: RunDir, resume: str | Path, attempt: str) -> Checkpoint | None:
    """The checkpoint to start from; a wrong wish is refused, on all ranks for the same reason."""
    try:
        return find_or_fetch(folder, resume, store_url=config.checkpoint.upload_to, attempt=attempt)
    except ConfigError as error:
        raise Refused(error.exit_code, str(error)) from error


def _refuse_without_room(config: TrainingConfig, folder: RunDir, admitted: Admitted) -> None:
    """Refuse a start whose first checkpoint would find no room, and warn of one whose later ones would; collective."""
    place, trained = distributed.ranks(), admitted.task.trainables
    size = sum(expected_bytes(one.module, has_ema=config.ema is not None) for one in trained.values())
    num_files = place.world_size * (len(trained) + 1)
    swept = _size_of(leftovers(folder.checkpoints)) if place.is_main else 0  # what killed attempts left goes first
    problem = space_problem(folder.checkpoints, *((max(size - swept, 0), num_files) if place.is_main else (0, 0)))
    if problem:
        raise Refused(
            ExitCode.STORAGE,
            f"{problem} for one checkpoint: training could not save. Free some space, or give another run_dir; "
            "nothing was touched",
        )
    number = _most_at_a_time(config, admitted)
    standing = sum(one.size_bytes for one in list_checkpoints(folder.checkpoints)) if place.is_main else 0
    problem = space_problem(folder.checkpoints, max(number * size - standing - swept, 0) if place.is_main else 0, 0)
    if problem and place.is_main:
        log.warning(
            "%s for the %d checkpoints of %.1f MiB that section checkpoint keeps at a time: free some space, or keep "
            "fewer, before saves fail",
            problem,
            number,
            size / MIB,
        )


def _most_at_a_time(config: TrainingConfig, admitted: Admitted) -> int:
    """How many checkpoints a run holds at most, the one that is being written among them; pinned ones not counted."""
    wanted, steps = config.checkpoint, admitted.max_steps
    for_good = 0 if wanted.keep_every_steps is None else steps // wanted.keep_every_steps
    return min(wanted.keep_last + 1 + (wanted.keep_best or 0) + for_good, -(-steps // wanted.every_steps))


def _size_of(paths: list[Path]) -> int:
    """Bytes of files and of folders with all that is in them; what goes meanwhile does not count."""
    size = 0
    for path in paths:
        for file in (path, *path.rglob("*")):
            with suppress(OSError):
                size += file.stat().st_size if file.is_file() else 0
    return size
