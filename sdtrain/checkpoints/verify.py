"""Reads checkpoints back and compares them with what their manifests say, alone or shared out over the ranks."""

from __future__ import annotations

from collections.abc import Iterable

from sdtrain import distributed
from sdtrain.checkpoints.manifest import MANIFEST, Checkpoint, folder_name
from sdtrain.checkpoints.rankfile import digest_file
from sdtrain.checkpoints.recut import coverage_problems


def verify(checkpoint: Checkpoint) -> list[str]:
    """Read everything back and compare it with the manifest; empty if every bit is as it was written."""
    return _shape_problems(checkpoint) or _digest_problems(checkpoint, checkpoint.files)


def verify_together(checkpoint: Checkpoint) -> list[str]:
    """`verify`, with the reading shared out over the ranks and one answer on all of them; collective."""
    shapes = distributed.gather_objects(_shape_problems(checkpoint))
    if any(shapes):
        return _merged(shapes)
    mine = share_of_files(checkpoint)
    return _merged(distributed.gather_objects(_digest_problems(checkpoint, mine)))


def share_of_files(checkpoint: Checkpoint) -> list[str]:
    """The files that this rank reads where all ranks read together: every n-th by size, so that shares are even."""
    place = distributed.ranks()
    by_size = sorted(checkpoint.files, key=lambda name: (-checkpoint.files[name]["size_bytes"], name))
    return by_size[place.rank :: place.world_size]


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


def _merged(per_rank: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(problem for problems in per_rank for problem in problems))
