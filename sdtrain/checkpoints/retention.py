"""Which checkpoints stay, and how the others go: renamed first, so that none is half-deleted under a final name."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from sdtrain.checkpoints.manifest import Checkpoint, list_checkpoints
from sdtrain.errors import ConfigError

log = logging.getLogger(__name__)

LEAST_KEPT = 2
"""With a single one, damage to it would end the run."""


def expendable(
    checkpoints: Sequence[Checkpoint], *, keep_last: int, keep_every_steps: int | None, resumed_from: Path | None
) -> list[Checkpoint]:
    """Those that may go, newest first.

    Args:
        checkpoints: All of a run, in any order.
        keep_last: How many of the newest stay; ones marked corrupt do not count. At least 2.
        keep_every_steps: Those at multiples of it stay for good; None keeps no such ones.
        resumed_from: The one that this attempt started from stays.

    Raises:
        ConfigError: `keep_last` below 2, or `keep_every_steps` below 1.
    """
    if keep_last < LEAST_KEPT:
        raise ConfigError(
            f"checkpoint.keep_last is {keep_last}; at least {LEAST_KEPT} are kept, so that one may be damaged"
        )
    if keep_every_steps is not None and keep_every_steps < 1:
        raise ConfigError(f"checkpoint.keep_every_steps is {keep_every_steps}; give a number of steps >= 1, or null")
    # Damaged ones never count and never go: they are evidence, and a person decides about them.
    whole = [checkpoint for checkpoint in checkpoints if not checkpoint.damage and not checkpoint.marked_corrupt]
    by_step = sorted(whole, key=lambda checkpoint: checkpoint.step, reverse=True)
    resumed = resumed_from.resolve() if resumed_from else None

    def stays(checkpoint: Checkpoint) -> bool:
        periodic = keep_every_steps is not None and checkpoint.step % keep_every_steps == 0
        return periodic or checkpoint.pinned or checkpoint.path.resolve() == resumed

    return [checkpoint for checkpoint in by_step[keep_last:] if not stays(checkpoint)]


def retain(
    folder: Path, *, keep_last: int, keep_every_steps: int | None = None, resumed_from: Path | None = None
) -> list[str]:
    """Delete what `expendable` names in `folder`; returns the names. Rank 0, after a commit; never fails a training."""
    gone: list[str] = []
    checkpoints = list_checkpoints(folder)
    for checkpoint in expendable(
        checkpoints, keep_last=keep_last, keep_every_steps=keep_every_steps, resumed_from=resumed_from
    ):
        trash = folder / f".trash-{checkpoint.path.name}-{secrets.token_hex(4)}"
        try:
            checkpoint.path.rename(trash)
            gone.append(checkpoint.path.name)
            shutil.rmtree(trash)
        except OSError as error:
            log.warning("%s could not be deleted: %s", checkpoint.path, error)
    return gone
