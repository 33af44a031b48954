"""The run folder's list of samples that could not be read: every one once, with the step that met it first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdtrain import distributed
from sdtrain.records import Tombstone
from sdtrain.run_dir import append_json_line, read_json_lines


class TombstoneList:
    """Collects what all ranks could not read in one file, `tombstones.jsonl`, which rank 0 alone writes.

    Rows are `{"key", "shard", "reason", "step"}`. A resumed run goes on with the file that stands: what it lists is
    not listed again, whichever attempt, rank or epoch meets it.

    Args:
        path: The file, see `RunDir.tombstones`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listed = {row["key"] for row in read_json_lines(path) if "key" in row}
        self._noted: dict[str, dict[str, Any]] = {}

    def note(self, step: int, tombstones: Iterable[Tombstone]) -> None:
        """Remember what this rank could not read at `step`, until the next `write`."""
        for tombstone in tombstones:
            if tombstone.key not in self._listed:
                self._noted.setdefault(tombstone.key, {**tombstone._asdict(), "step": step})

    def write(self) -> int:
        """Append what is new on any rank; returns how many samples that are. Collective."""
        gathered = distributed.gather_objects(list(self._noted.values()))
        self._noted = {}
        new: dict[str, dict[str, Any]] = {}
        for row in sorted((row for rank in gathered for row in rank), key=lambda row: (row["step"], row["key"])):
            if row["key"] not in self._listed:
                new.setdefault(row["key"], row)
        self._listed |= new.keys()
        if distributed.ranks().is_main:
            for row in new.values():
                append_json_line(self._path, row)
        return len(new)
