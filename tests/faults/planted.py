"""Errors that one rank comes across: planted before it starts, each at the real call that would meet it.

python tests/faults/planted.py RANK PLACE CALLS train page.yaml
"""

from __future__ import annotations

import errno
import itertools
import os
import sys
from typing import Any

from sdtrain import cli
from sdtrain.checkpoints import rankfile, recut
from sdtrain.data.dataset import ShardDataset
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask

PLACES: dict[str, tuple[Any, str, int]] = {
    "data": (ShardDataset, "__getitem__", 120),
    "loss": (LatentDiffusionTask, "loss", 60),
    "save": (rankfile, "_write_all", 60),
    "load": (recut, "_open", 1),
    "validation": (LatentDiffusionTask, "validate", 4),
}
"""What is called there, and among how many calls the one that fails is drawn."""

TEXT = "planted by the campaign"


def error_at(place: str) -> Exception:
    """What fails there: a disk that cannot be read or written, else a bug."""
    if place in ("save", "load"):
        return OSError(errno.EIO, TEXT)
    return RuntimeError(TEXT)


def plant(place: str, calls_before: int) -> None:
    """Let a call of this process fail, once, after so many that went well."""
    owner, name, _ = PLACES[place]
    real, count = getattr(owner, name), itertools.count()

    def failing(*arguments: Any, **named: Any) -> Any:
        if next(count) == calls_before:
            raise error_at(place)
        return real(*arguments, **named)

    setattr(owner, name, failing)


if __name__ == "__main__":
    victim, where, calls, *command = sys.argv[1:]
    if os.environ["RANK"] == victim:
        plant(where, int(calls))
    cli.main(command)
