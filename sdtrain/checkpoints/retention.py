"""Which checkpoints stay, and how the others go: renamed first, so that none is half-deleted under a final name."""

from __future__ import annotations

import logging
import math
import secrets
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdtrain.checkpoints.manifest import Checkpoint, list_checkpoints
from sdtrain.errors import ConfigError

log = logging.getLogger(__name__)

LEAST_KEPT = 2
"""With a single one, damage to it would end the run."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints of a run stay; those that a person pinned stay always.

    Attributes:
        keep_last: How many of the newest stay; ones marked corrupt do not count. At least 2.
        keep_every_steps: Those at multiples of it stay for good; None keeps no such ones.
        keep_best: How many of those with the best figure stay; None keeps none for it.
        best_by: The figure, as the manifest's `figures` name it; a checkpoint without a finite one is no candidate.
        best_is: Which end of it is good.

    Raises:
        ConfigError: `keep_last` below 2, or another number below 1.
    """

    keep_last: int
    keep_every_steps: int | None = None
    keep_best: int | None = None
    best_by: str = "validation/loss"
    best_is: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        if self.keep_last < LEAST_KEPT:
            raise ConfigError(
                f"checkpoint.keep_last is {self.keep_last}; at least {LEAST_KEPT} are kept, so that one may be damaged"
            )
        if self.keep_every_steps is not None and self.keep_every_steps < 1:
            raise ConfigError(
                f"checkpoint.keep_every_steps is {self.keep_every_steps}; give a number of steps >= 1, or null"
            )
        if self.keep_best is not None and self.keep_best < 1:
            raise ConfigError(f"checkpoint.keep_best is {self.keep_best}; give a number of checkpoints >= 1, or null")

    def best(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """The `keep_best` best ones, best first; of equal ones the newer."""
        sign = 1.0 if self.best_is == "lowest" else -1.0
        judged = [
            (sign * figure, -checkpoint.step, checkpoint)
            for checkpoint in checkpoints
            if (figure := checkpoint.figures.get(self.best_by)) is not None and math.isfinite(figure)
        ]
        judged.sort(key=lambda entry: entry[:2])
        return [checkpoint for *_, checkpoint in judged[: self.keep_best or 0]]

    def expendable(
        self, checkpoints: Sequence[Checkpoint], *, resumed_from: str | None, pinned: Collection[str] = ()
    ) -> list[Checkpoint]:
        """Those that may go, newest first.

        Args:
            checkpoints: All of a run, in any order.
            resumed_from: Name of the one that this attempt started from: it stays.
            pinned: Names that stay beside those with a mark of their own.
        """
        # Damaged ones never count and never go: they are evidence, and a person decides about them.
        whole = [checkpoint for checkpoint in checkpoints if not checkpoint.damage and not checkpoint.marked_corrupt]
        by_step = sorted(whole, key=lambda checkpoint: checkpoint.step, reverse=True)
        best = {checkpoint.path.name for checkpoint in self.best(whole)}

        def stays(checkpoint: Checkpoint) -> bool:
            periodic = self.keep_every_steps is not None and checkpoint.step % self.keep_every_steps == 0
            return periodic or checkpoint.pinned or checkpoint.path.name in {*best, *pinned, resumed_from}

        return [checkpoint for checkpoint in by_step[self.keep_last :] if not stays(checkpoint)]


def retain(
    folder: Path, retention: Retention, *, resumed_from: str | None = None, pinned: Collection[str] = ()
) -> list[str]:
    """Delete what is expendable in `folder`; returns the names. Rank 0, after a commit; never fails a training."""
    gone: list[str] = []
    for checkpoint in retention.expendable(list_checkpoints(folder), resumed_from=resumed_from, pinned=pinned):
        trash = folder / f".trash-{checkpoint.path.name}-{secrets.token_hex(4)}"
        try:
            checkpoint.path.rename(trash)
            gone.append(checkpoint.path.name)
            shutil.rmtree(trash)
        except OSError as error:
            log.warning("%s could not be deleted: %s", checkpoint.path, error)
    return gone
