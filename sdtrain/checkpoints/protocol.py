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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
)
from sdtrain.checkpoints.rankfile import Written, digest_file, tensor_bytes, write_tensors, write_text
from sdtrain.checkpoints.recut import coverage_problems
from sdtrain.errors import CheckpointError, ConfigError
from sdtrain.run_dir import sync_folder, write_atomically

__all__ = [
    "CHECKPOINT_STAGES",
    "Checkpoint",
    "RankFile",
    "commit",
    "find",
    "list_checkpoints",
    "sweep",
    "verify",
]

RankFile = Mapping[str, Tensor]

CHECKPOINT_STAGES = ("begin", "folder", "writing", "written", "agreed", "manifest", "renamed", "latest", "done")
"""What `on_stage` is told, in order. `writing`: a file is torn. `renamed`: the checkpoint stands, LATEST is old.
`manifest`, `renamed` and `latest` happen on rank 0 alone."""

SPARE_BYTES = 256 * 2**10
"""What must stay free beside the tensors: headers, manifest and folder entries."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Report:
    """What one rank tells the others after it wrote; an empty problem means that all its bytes are on the disk."""

    problem: str = ""
    files: Mapping[str, Written] = field(default_factory=dict)


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
    tell = on_stage or _tell_nobody
    began = time.monotonic()
    tell("begin")
    standing, existing_problems = _standing(folder / folder_name(step))
    if standing is not None and not existing_problems:
        log.info("%s stands already and verifies: kept", standing.path)
        _point_latest_at(standing.path)
        distributed.barrier()
        return standing.path
    problem = _space_problem(folder, files)
    temporary = None if problem else distributed.broadcast_object(_make_temporary(folder, step, attempt))
    if temporary is None or problem:
        return _abandon(None, step, [problem or f"rank 0 cannot make a folder in {folder}"])
    tell("folder")
    reports = distributed.gather_objects(_write_rank(temporary, files, texts or {}, tell))
    problems = [f"rank {rank}: {report.problem}" for rank, report in enumerate(reports) if report.problem]
    problems += _collisions(reports)
    if problems:
        return _abandon(temporary, step, problems)
    tell("agreed")
    publish = partial(_publish, temporary, folder / folder_name(step), attempt, tell)
    problem = distributed.broadcast_object(
        publish(_manifest(step, attempt, reports, facts)) if distributed.ranks().is_main else ""
    )
    if problem:
        return _abandon(temporary, step, [problem])
    distributed.barrier()
    tell("done")
    _log_commit(folder / folder_name(step), reports, time.monotonic() - began)
    return folder / folder_name(step)


def _tell_nobody(stage: str) -> None:
    """Stand in for `on_stage`."""


def _standing(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """What stands under the final name already (a step replayed after a resume), and what is wrong with it."""
    checkpoint = distributed.broadcast_object(Checkpoint.open(path) if path.is_dir() else None)
    return (None, []) if checkpoint is None else (checkpoint, _verify_together(checkpoint))


def _space_problem(folder: Path, files: Mapping[str, RankFile]) -> str:
    """Why the file system cannot hold what all ranks are about to write; empty if it can."""
    needed = distributed.sum_over_ranks(sum(map(tensor_bytes, files.values()))) + SPARE_BYTES
    entries = distributed.sum_over_ranks(len(files)) + 8
    free_bytes, free_entries = _free(folder)
    free_bytes, free_entries = distributed.min_over_ranks(free_bytes), distributed.min_over_ranks(free_entries)
    if free_bytes < needed:
        return f"{folder}: {free_bytes / 2**20:.1f} MiB free, {needed / 2**20:.1f} MiB needed"
    if free_entries < entries:
        return f"{folder}: {free_entries:.0f} inodes free, {entries:.0f} needed"
    return ""


def _free(folder: Path) -> tuple[float, float]:
    """Free bytes and inodes; file systems that do not count inodes have infinitely many, broken ones none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stats = os.statvfs(folder)
    except OSError:
        return 0.0, 0.0
    return float(stats.f_bavail * stats.f_frsize), float(stats.f_favail) if stats.f_files else float("inf")


def _make_temporary(folder: Path, step: int, attempt: str) -> Path | None:
    """Rank 0: an empty folder under a name that no reader looks at; None, logged, where the disk refuses."""
    if not distributed.ranks().is_main:
        return None
    temporary = folder / f"{folder_name(step)}.tmp-{attempt}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        log.error("cannot make %s: %s", temporary, error)
        return None
    return temporary


def _write_rank(
    temporary: Path, files: Mapping[str, RankFile], texts: Mapping[str, str], tell: Callable[[str], None]
) -> _Report:
    """Write this rank's files and wait for the disk; whatever goes wrong becomes a report that the others read."""
    written: dict[str, Written] = {}
    try:
        temporary.mkdir(exist_ok=True)  # a network file system may not show rank 0's folder yet
        for name, tensors in files.items():
            written[name] = write_tensors(temporary / name, tensors, after_header=partial(tell, "writing"))
        if distributed.ranks().is_main:
            written |= {name: write_text(temporary / name, text) for name, text in texts.items()}
        sync_folder(temporary)
        tell("written")
    except Exception as error:
        log.exception("this rank's part of %s failed", temporary.name)
        return _Report(f"{type(error).__name__}: {error}")
    return _Report("", written)


def _collisions(reports: Iterable[_Report]) -> list[str]:
    """File names that more than one rank wrote."""
    names = [name for report in reports for name in report.files]
    return [f"{name}: written by more than one rank" for name in sorted({n for n in names if names.count(n) > 1})]


def _manifest(step: int, attempt: str, reports: list[_Report], facts: Mapping[str, Any]) -> dict[str, Any]:
    entries = {
        name: {**asdict(written), "rank": rank}
        for rank, report in enumerate(reports)
        for name, written in report.files.items()
    }
    own = {"format": 1, "step": step, "attempt": attempt, "world_size": len(reports), "files": entries}
    return {**facts, **own, "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _publish(
    temporary: Path, final: Path, attempt: str, tell: Callable[[str], None], manifest: Mapping[str, Any]
) -> str:
    """Rank 0: manifest, final name, hint. Returns what failed before the rename; what fails later costs nothing."""
    try:
        write_text(temporary / MANIFEST, seal(manifest))
        sync_folder(temporary)
        tell("manifest")
        if final.exists():  # it did not verify, see `_standing`: kept beside for whoever looks into it
            final.rename(final.with_name(f"{final.name}.corrupt-{attempt}-{secrets.token_hex(2)}"))
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


def _abandon(temporary: Path | None, step: int, problems: Iterable[str]) -> None:
    """Give up on a commit, on all ranks: nobody writes any more, so the temporary folder can go."""
    log.error("checkpoint of step %d abandoned: %s", step, "; ".join(problems))
    if temporary is not None and distributed.ranks().is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    distributed.barrier()


def _log_commit(path: Path, reports: Iterable[_Report], seconds: float) -> None:
    if distributed.ranks().is_main:
        size = sum(written.size_bytes for report in reports for written in report.files.values())
        log.info("committed %s: %.1f MiB in %.1f s", path, size / 2**20, seconds)


def verify(checkpoint: Checkpoint) -> list[str]:
    """Read everything back and compare it with the manifest; empty if every bit is as it was written."""
    return _shape_problems(checkpoint) or _digest_problems(checkpoint, checkpoint.files)


def _shape_problems(checkpoint: Checkpoint) -> list[str]:
    """What is wrong as far as names and sizes tell; cheap, so every rank looks for itself."""
    if checkpoint.damage:
        return [f"{MANIFEST} {checkpoint.damage}"]
    problems = coverage_problems(checkpoint)
    if checkpoint.path.name.startswith("step-") and checkpoint.path.name != folder_name(checkpoint.step):
        problems.append(f"{MANIFEST} is of step {checkpoint.step}")
    for name, entry in checkpoint.files.items():
        try:
            found = (checkpoint.path / name).stat().st_size
        except OSError as error:
            problems.append(f"{name}: {'is missing' if isinstance(error, FileNotFoundError) else error}")
            continue
        if found < entry["size_bytes"]:
            problems.append(f"{name}: truncated to {found} of {entry['size_bytes']} bytes")
        elif found > entry["size_bytes"]:
            problems.append(f"{name}: {found} bytes, {entry['size_bytes']} were written")
    return problems


def _digest_problems(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    """What is wrong with the bytes of some files; a file that holds another one's bytes is named with it."""
    owners = {entry["sha256"]: name for name, entry in checkpoint.files.items()}
    problems: list[str] = []
    for name in names:
        try:
            found = digest_file(checkpoint.path / name).sha256
        except OSError as error:
            problems.append(f"{name}: {error}")
            continue
        if found != checkpoint.files[name]["sha256"]:
            swapped = f"holds the bytes of {owners[found]} (files swapped)" if found in owners else "bytes were changed"
            problems.append(f"{name}: {swapped}")
    return problems


def _verify_together(checkpoint: Checkpoint) -> list[str]:
    """`verify`, with the reading shared out over the ranks and one answer on all of them; collective."""
    shapes = distributed.gather_objects(_shape_problems(checkpoint))
    if any(shapes):
        return _merged(shapes)
    by_size = sorted(checkpoint.files, key=lambda name: (-checkpoint.files[name]["size_bytes"], name))
    mine = by_size[distributed.ranks().rank :: len(shapes)]
    return _merged(distributed.gather_objects(_digest_problems(checkpoint, mine)))


def _merged(per_rank: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(problem for problems in per_rank for problem in problems))


def sweep(folder: Path) -> list[str]:
    """Remove what killed attempts left half-written; returns the names. Rank 0, at start, before anyone writes."""
    leftovers = [path for pattern in ("*.tmp-*", ".trash-*", f".{LATEST}.*.tmp") for path in folder.glob(pattern)]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        log.info("removed %s, left by an earlier attempt", path)
    return [path.name for path in leftovers]


def find(folder: Path, resume: Path | Literal["auto", "never"]) -> Checkpoint | None:
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
        problems = _verify_together(checkpoint)
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
    problems = _verify_together(checkpoint)
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
