"""Commit and find checkpoints: all ranks or none, verified by digest, never overwritten, never silently fresh.

A commit is a rename. Every rank writes into `step-N.tmp-<attempt>`; rank 0 adds the manifest once all ranks have said
that their bytes are on the disk, and only then gives the folder its final name. A process killed at any point leaves
the previous checkpoint as it was, and at most a temporary folder that the next start sweeps away.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain import distributed
from sdtrain.checkpoints.manifest import (
    CORRUPT,
    LATEST,
    MANIFEST,
    Checkpoint,
    folder_name,
    list_checkpoints,
    seal,
    step_of,
)
from sdtrain.checkpoints.rankfile import Written, tensor_bytes, write_tensors, write_text
from sdtrain.checkpoints.verify import verify, verify_together
from sdtrain.errors import CheckpointError, ConfigError
from sdtrain.run_dir import nearest_existing, sync_folder, write_atomically

__all__ = [
    "CHECKPOINT_STAGES",
    "Begun",
    "Checkpoint",
    "RankFile",
    "Report",
    "begin",
    "commit",
    "compose",
    "find",
    "leftovers",
    "list_checkpoints",
    "publish",
    "putter",
    "space_problem",
    "sweep",
    "verify",
    "write",
]

RankFile = Mapping[str, Tensor]

CHECKPOINT_STAGES = ("begin", "folder", "writing", "written", "agreed", "manifest", "renamed", "latest", "done")
"""What `on_stage` is told, in order. `writing`: a file is torn. `renamed`: the checkpoint stands, LATEST is old.
`manifest`, `renamed` and `latest` happen on rank 0 alone."""

SPARE_BYTES = 256 * 2**10
"""What must stay free beside the tensors: headers, manifest and folder entries."""

log = logging.getLogger(__name__)


Put = Callable[[Path], Mapping[str, Written]]
"""Puts this rank's files into a folder and returns what it wrote by name."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A commit that all ranks have begun together.

    Attributes:
        final: `step-N`, the name that it will have.
        attempt: Unique name of this start of the run.
        temporary: Where every rank writes; None where there is nothing to write, because `standing` or because the
            commit is abandoned already.
        standing: Whether a valid checkpoint stands under the final name (a step replayed after a resume).
        tell: Is told every stage.
        began: `time.monotonic()` of the beginning.
    """

    final: Path
    attempt: str
    temporary: Path | None
    standing: bool = False
    tell: Callable[[str], None] = field(default=lambda stage: None, repr=False)
    began: float = field(default_factory=time.monotonic)

    @property
    def step(self) -> int:
        """Optimiser step."""
        return step_of(self.final.name)


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank tells the others after it wrote.

    Attributes:
        problem: Why it failed; empty means that all its bytes are on the disk.
        files: What it wrote, by name.
        seconds: How long writing took.
    """

    problem: str = ""
    files: Mapping[str, Written] = field(default_factory=dict)
    seconds: float = 0.0


def commit(
    folder: Path,
    *,
    step: int,
    attempt: str,
    files: Mapping[str, RankFile],
    facts: Mapping[str, Any],
    texts: Mapping[str, str] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Path | None:
    """Write a checkpoint on all ranks together, or leave everything as it was; collective.

    It is `begin`, `write` and `publish` in a row; `saver.Saver` lets training go on during `write`.

    Args:
        folder: The run's `checkpoints` folder, on a file system that all ranks share.
        step: Optimiser step.
        attempt: Unique name of this start of the run, the same on every rank.
        files: This rank's files: `manifest.rank_file(...)` -> tensors by name, on any device.
        facts: Goes into the manifest as it is, rank 0's counts: `applied_steps`, `samples_seen`, `layouts`
            (trainable -> `Layout.to_json()`), `spans` (trainable -> `recut.spans(...)`), `parent`, `git_commit`, ...
        texts: Small text files such as `config.yaml`; rank 0's count.
        on_stage: Called with each of `CHECKPOINT_STAGES` (fault tests).

    Returns:
        The committed folder on every rank; None, with the reason logged, where any rank failed.
    """
    begun = begin(
        folder,
        step=step,
        attempt=attempt,
        num_bytes=sum(map(tensor_bytes, files.values())),
        num_files=len(files),
        on_stage=on_stage,
    )
    report = write(begun, putter(files, texts or {}, begun.tell))
    return publish(begun, report, partial(compose, begun, facts))


def begin(
    folder: Path,
    *,
    step: int,
    attempt: str,
    num_bytes: int,
    num_files: int,
    on_stage: Callable[[str], None] | None = None,
) -> Begun:
    """Look for room and agree on a temporary folder; collective.

    Args:
        folder: The run's `checkpoints` folder.
        step: Optimiser step.
        attempt: Unique name of this start of the run, the same on every rank.
        num_bytes: What this rank is about to write.
        num_files: In how many files.
        on_stage: Called with each of `CHECKPOINT_STAGES` (fault tests).
    """
    tell = on_stage or (lambda stage: None)
    over = Begun(folder / folder_name(step), attempt, None, tell=tell)
    tell("begin")
    standing, existing_problems = _standing(over.final)
    if standing is not None and not existing_problems:
        log.info("%s stands already and verifies: kept", standing.path)
        _point_latest_at(standing.path)
        distributed.barrier()
        return replace(over, standing=True)
    problem = space_problem(folder, num_bytes, num_files)
    temporary = None if problem else distributed.broadcast_object(_make_temporary(over.final, attempt))
    if temporary is None or problem:
        _abandon(over, [problem or f"rank 0 cannot make a folder in {folder}"])
        return over
    tell("folder")
    return replace(over, temporary=temporary)


def write(begun: Begun, put: Put) -> Report:
    """Write this rank's files and wait for the disk; asks no other rank, so any thread may do it.

    Whatever goes wrong becomes a report that the others read.
    """
    if begun.temporary is None:
        return Report()
    started = time.monotonic()
    try:
        begun.temporary.mkdir(exist_ok=True)  # a network file system may not show rank 0's folder yet
        written = put(begun.temporary)
        sync_folder(begun.temporary)
        begun.tell("written")
    except Exception as error:
        log.exception("this rank's part of %s failed", begun.temporary.name)
        return Report(f"{type(error).__name__}: {error}")
    return Report("", written, time.monotonic() - started)


def publish(begun: Begun, report: Report, compose: Callable[[Sequence[Report]], Mapping[str, Any]]) -> Path | None:
    """Commit what all ranks have written, or remove it; collective.

    Args:
        begun: From `begin`.
        report: This rank's, from `write`.
        compose: All reports in rank order -> content of the manifest; asked on rank 0.

    Returns:
        The committed folder on every rank; None, with the reason logged, where any rank failed.
    """
    if begun.temporary is None:
        return begun.final if begun.standing else None
    reports = distributed.gather_objects(report)
    problems = [f"rank {rank}: {report.problem}" for rank, report in enumerate(reports) if report.problem]
    problems += _collisions(reports)
    if problems:
        return _abandon(begun, problems)
    begun.tell("agreed")
    problem = distributed.broadcast_object(
        _publish(begun, begun.temporary, compose(reports)) if distributed.ranks().is_main else ""
    )
    if problem:
        return _abandon(begun, [problem])
    distributed.barrier()
    begun.tell("done")
    _log_commit(begun, reports)
    return begun.final


def putter(files: Mapping[str, RankFile], texts: Mapping[str, str], tell: Callable[[str], None]) -> Put:
    """Puts tensors, and on rank 0 texts, into a folder."""

    def put(folder: Path) -> Mapping[str, Written]:
        written = {
            name: write_tensors(folder / name, tensors, after_header=partial(tell, "writing"))
            for name, tensors in files.items()
        }
        if distributed.ranks().is_main:
            written |= {name: write_text(folder / name, text) for name, text in texts.items()}
        return written

    return put


def compose(begun: Begun, facts: Mapping[str, Any], reports: Sequence[Report]) -> dict[str, Any]:
    """The manifest of freshly written files; `facts` cannot overrule what the protocol knows itself."""
    entries = {
        name: {**asdict(written), "rank": rank}
        for rank, report in enumerate(reports)
        for name, written in report.files.items()
    }
    return {
        **facts,
        "format": 1,
        "step": begun.step,
        "attempt": begun.attempt,
        "world_size": len(reports),
        "files": entries,
        "write_seconds": round(max(report.seconds for report in reports), 3),
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _standing(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """What stands under the final name already (a step replayed after a resume), and what is wrong with it."""
    checkpoint = distributed.broadcast_object(Checkpoint.open(path) if path.is_dir() else None)
    return (None, []) if checkpoint is None else (checkpoint, verify_together(checkpoint))


def space_problem(folder: Path, num_bytes: int, num_files: int) -> str:
    """Why the file system cannot hold what all ranks are about to write; empty if it can. Collective, changes nothing.

    Args:
        folder: Need not be there yet.
        num_bytes: What this rank is about to write.
        num_files: In how many files.
    """
    needed = distributed.sum_over_ranks(num_bytes) + SPARE_BYTES
    entries = distributed.sum_over_ranks(num_files) + 8
    free_bytes, free_entries = free_space(folder)
    free_bytes, free_entries = distributed.min_over_ranks(free_bytes), distributed.min_over_ranks(free_entries)
    if free_bytes < needed:
        return f"{folder}: {free_bytes / 2**20:.1f} MiB free, {needed / 2**20:.1f} MiB needed"
    if free_entries < entries:
        return f"{folder}: {free_entries:.0f} inodes free, {entries:.0f} needed"
    return ""


def free_space(folder: Path) -> tuple[float, float]:
    """Free bytes and inodes; file systems that do not count them have infinitely many, broken ones none."""
    try:
        stats = os.statvfs(nearest_existing(folder) or folder)
    except OSError:
        return 0.0, 0.0
    free_bytes = float(stats.f_bavail * stats.f_frsize) if stats.f_blocks else float("inf")
    return free_bytes, float(stats.f_favail) if stats.f_files else float("inf")


def _make_temporary(final: Path, attempt: str) -> Path | None:
    """Rank 0: an empty folder under a name that no reader looks at; None, logged, where the disk refuses."""
    if not distributed.ranks().is_main:
        return None
    temporary = final.with_name(f"{final.name}.tmp-{attempt}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        log.error("cannot make %s: %s", temporary, error)
        return None
    return temporary


def _collisions(reports: Iterable[Report]) -> list[str]:
    """File names that more than one rank wrote."""
    names = [name for report in reports for name in report.files]
    return [f"{name}: written by more than one rank" for name in sorted({n for n in names if names.count(n) > 1})]


def _publish(begun: Begun, temporary: Path, manifest: Mapping[str, Any]) -> str:
    """Rank 0: manifest, final name, hint. Returns what failed before the rename; what fails later costs nothing."""
    final, tell = begun.final, begun.tell
    try:
        write_text(temporary / MANIFEST, seal(manifest))
        sync_folder(temporary)
        tell("manifest")
        if final.exists():  # it did not verify, see `_standing`: kept beside for whoever looks into it
            final.rename(final.with_name(f"{final.name}.corrupt-{begun.attempt}-{secrets.token_hex(2)}"))
        temporary.rename(final)
    except Exception as error:
        log.exception("rank 0 could not commit %s", final)
        return f"rank 0: {type(error).__name__}: {error}"
    try:
        sync_folder(final.parent)
        tell("renamed")
    except OSError as error:
        log.warning("%s is committed, but its folder could not be synced: %s", final, error)
    _point_latest_at(final)
    tell("latest")
    return ""


def _point_latest_at(path: Path) -> None:
    """Rank 0: replace the hint; readers go by manifests, so a failure is only worth a warning."""
    if distributed.ranks().is_main:
        try:
            write_atomically(path.parent / LATEST, path.name + "\n")
        except OSError as error:
            log.warning("%s could not be replaced (only a hint): %s", path.parent / LATEST, error)


def _abandon(begun: Begun, problems: Iterable[str]) -> None:
    """Give up on a commit, on all ranks: nobody writes any more, so the temporary folder can go."""
    log.error("checkpoint of step %d abandoned: %s", begun.step, "; ".join(problems))
    if begun.temporary is not None and distributed.ranks().is_main:
        shutil.rmtree(begun.temporary, ignore_errors=True)
    distributed.barrier()


def _log_commit(begun: Begun, reports: Iterable[Report]) -> None:
    if distributed.ranks().is_main:
        size = sum(written.size_bytes for report in reports for written in report.files.values())
        log.info("committed %s: %.1f MiB in %.1f s", begun.final, size / 2**20, time.monotonic() - begun.began)


def sweep(folder: Path) -> list[str]:
    """Remove what killed attempts left half-written; returns the names. Rank 0, at start, before anyone writes."""
    found = leftovers(folder)
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        log.info("removed %s, left by an earlier attempt", path)
    return [path.name for path in found]


def leftovers(folder: Path) -> list[Path]:
    """What killed attempts left half-written or half-deleted."""
    return [path for pattern in ("*.tmp-*", ".trash-*", f".{LATEST}.*.tmp") for path in folder.glob(pattern)]


def find(folder: Path, resume: str | Path) -> Checkpoint | None:
    """The checkpoint to start from, the same on every rank, or None for a fresh start; collective.

    Args:
        folder: The run's `checkpoints` folder.
        resume: `auto` takes the newest one that verifies; a path takes that one or nothing; `never` insists on a
            fresh start.

    Returns:
        A checkpoint of which every byte was read and compared, or None where the folder holds none at all.

    Raises:
        CheckpointError: Checkpoints are present but none verifies, or the named one does not.
        ConfigError: `never`, and the folder holds checkpoints that a fresh start would mix with.
    """
    if resume not in ("auto", "never"):
        return _take(Path(resume))
    candidates = _survey(folder)
    if resume == "never" and candidates:
        raise ConfigError(
            f"{folder}: holds {len(candidates)} checkpoints (newest {candidates[0].path.name}) and resume is 'never'; "
            "resume with 'auto', or choose another run_dir, or move the folder away: nothing is overwritten"
        )
    refused: dict[str, list[str]] = {}
    for checkpoint in candidates:
        problems = verify_together(checkpoint)
        _mark(checkpoint, problems)
        if not problems:
            return checkpoint
        refused[checkpoint.path.name] = problems
    if refused:
        listed = "\n".join(f"  {name}: {'; '.join(problems)}" for name, problems in refused.items())
        raise CheckpointError(
            f"{folder}: {len(refused)} checkpoints are present and none is valid:\n{listed}\n"
            "Nothing was changed. Restore one of them, or move the folder away to start afresh."
        )
    return None


def _survey(folder: Path) -> list[Checkpoint]:
    """Rank 0's listing of the folder, on every rank."""
    listing: list[Checkpoint] | str = []
    if distributed.ranks().is_main:
        try:
            listing = list_checkpoints(folder)
        except OSError as error:
            listing = str(error)
    listing = distributed.broadcast_object(listing)
    if isinstance(listing, str):
        raise CheckpointError(f"{folder}: cannot be listed: {listing}")
    return listing


def _take(path: Path) -> Checkpoint:
    """The checkpoint that a person named; never replaced by another one."""
    checkpoint = distributed.broadcast_object(Checkpoint.open(path))
    problems = verify_together(checkpoint)
    if problems:
        raise CheckpointError(f"{path}: not a valid checkpoint to resume from: {'; '.join(problems)}")
    newer = [other.path.name for other in _survey(path.parent) if other.step > checkpoint.step]
    if newer:
        log.warning(
            "%s is resumed by name; %s beside it are newer, and `resume: auto` would take those", path, ", ".join(newer)
        )
    return checkpoint


def _mark(checkpoint: Checkpoint, problems: list[str]) -> None:
    """Rank 0: leave the reasons in a damaged checkpoint's folder, or take an old mark away if it is whole again."""
    if not distributed.ranks().is_main:
        return
    if problems:
        log.error("%s is corrupt and not used: %s", checkpoint.path, "; ".join(problems))
    try:
        if problems:
            write_atomically(checkpoint.path / CORRUPT, "\n".join(problems) + "\n")
        else:
            (checkpoint.path / CORRUPT).unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s could not be marked: %s", checkpoint.path, error)
