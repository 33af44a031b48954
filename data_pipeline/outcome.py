"""What comes of an attempt at a unit; `execute` makes it, in the worker process. Nothing here commits anything."""

from __future__ import annotations

import errno
import json
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.ledger import sha256_file
from sdtrain.errors import SdtrainError
from sdtrain.run_dir import sync_folder

if TYPE_CHECKING:
    from data_pipeline.stage import Unit, Work

_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True, slots=True)
class Done:
    """A unit whose files lie in its temporary folder, digested and on disk."""

    files: Mapping[str, str]
    stats: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that went wrong.

    Attributes:
        message: One line for the user.
        details: The traceback.
        is_final: Trying again would give the same error.
        is_storage: The disk is full or refuses writes.
    """

    message: str
    details: str
    is_final: bool
    is_storage: bool = False


Outcome = Done | Failed


def execute(work: Work, unit: Unit, folder: Path) -> Outcome:
    """Work on one unit inside its empty temporary folder; runs in the worker process and never raises."""
    started = time.monotonic()
    try:
        folder.mkdir(parents=True)
        stats = json.loads(json.dumps(work(unit, folder)))
        (folder / f"{unit.name}.stats.json").write_text(json.dumps(stats, sort_keys=True) + "\n", encoding="utf-8")
        return Done(_seal(unit, folder), stats, time.monotonic() - started)
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> Failed:
    """What the driver needs to know of an exception: ours are final, others may heal."""
    is_storage = isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS
    is_ours = isinstance(error, SdtrainError)
    message = str(error) if is_ours else f"{type(error).__name__}: {error}"
    return Failed(message, "".join(traceback.format_exception(error)), is_ours or is_storage, is_storage)


def _seal(unit: Unit, folder: Path) -> dict[str, str]:
    """Digest and sync everything that the worker wrote."""
    digests = {}
    for path in sorted(folder.iterdir()):
        assert path.is_file() and path.name.startswith(f"{unit.name}."), f"{path.name} is not named {unit.name}.*"
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        digests[path.name] = sha256_file(path)
    sync_folder(folder)
    return digests
