"""What has been committed, by which input, configuration and version; and the digests that prove it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.stage import in_number_order
from sdtrain.run_dir import append_json_line, read_json_lines, write_atomically

_BLOCK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Digest of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Digest of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class DigestCache:
    """sha256 of files, remembered as long as a file's size and modification time stand still.

    Args:
        path: JSON-lines file that the digests are remembered in.
    """

    def __init__(self, path: Path):
        self._path = path
        self._folders: dict[Path, Path] = {}
        self._known: dict[str, tuple[int, int, str]] = {}
        for row in read_json_lines(path):
            if isinstance(row, dict) and {"file", "size", "mtime_ns", "sha256"} <= row.keys():
                self._known[row["file"]] = (row["size"], row["mtime_ns"], row["sha256"])

    def sha256(self, path: Path) -> str:
        """The digest of `path`, read again only where size or time changed.

        Raises:
            FileNotFoundError: There is no such file.
        """
        name, stat = self._name(path), path.stat()
        known = self._known.get(name)
        if known is not None and known[:2] == (stat.st_size, stat.st_mtime_ns):
            return known[2]
        return self.remember(path, sha256_file(path))

    def remember(self, path: Path, sha256: str) -> str:
        """Take over a digest that was computed while the file was written."""
        name, stat = self._name(path), path.stat()
        self._known[name] = (stat.st_size, stat.st_mtime_ns, sha256)
        row = {"file": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}
        append_json_line(self._path, row)
        return sha256

    def _name(self, path: Path) -> str:
        """What a file is remembered as; only its folder is resolved, once, which takes ten times as long as a stat."""
        folder = self._folders.get(path.parent)
        if folder is None:
            folder = self._folders[path.parent] = path.parent.resolve()
        return f"{folder}/{path.name}"


@dataclass(frozen=True, slots=True)
class Commit:
    """One committed unit of work.

    Attributes:
        unit: The unit's number as text, `00000`.
        inputs: sha256 by input path (relative to the output folder where it lies inside).
        facts: The stage's and the unit's configuration facts.
        version: The stage's code or model version.
        files: sha256 by output file name.
        stats: What the worker reported.
        seconds: Wall-clock time of the successful attempt.
    """

    unit: str
    inputs: Mapping[str, str]
    facts: Mapping[str, Any]
    version: str
    files: Mapping[str, str]
    stats: Mapping[str, Any]
    seconds: float


class Ledger:
    """Append-only record of a stage's commits; the last row of a unit counts.

    Args:
        folder: The stage's folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / "ledger.jsonl"
        self._commits: dict[str, Commit] = {}
        for row in read_json_lines(self.path):
            self._take(row)

    def _take(self, row: Any) -> None:
        if not isinstance(row, dict) or "unit" not in row:
            return
        if row.get("removed"):
            self._commits.pop(row["unit"], None)
        elif row.keys() == Commit.__dataclass_fields__.keys():
            self._commits[row["unit"]] = Commit(**row)

    def commits(self) -> dict[str, Commit]:
        """The commit of every unit, by unit, in the units' order."""
        return {unit: self._commits[unit] for unit in sorted(self._commits, key=in_number_order)}

    def get(self, unit: str) -> Commit | None:
        """The commit of one unit, if it has one."""
        return self._commits.get(unit)

    def add(self, commit: Commit) -> None:
        """Record a commit and wait for the disk."""
        append_json_line(self.path, asdict(commit), durable=True)
        self._commits[commit.unit] = commit

    def remove(self, unit: str) -> None:
        """Record that a unit is no longer part of the stage."""
        append_json_line(self.path, {"unit": unit, "removed": True}, durable=True)
        self._commits.pop(unit, None)


class DeadLetters:
    """The units that failed for good, of all stages: stage, unit, inputs, error, traceback, attempts.

    Args:
        path: `dead_letter.json`, replaced as a whole at every change.
    """

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """The list as it stands."""
        if not self.path.exists():
            return []
        return json.loads(self.path.read_text(encoding="utf-8"))

    def replace(self, stage: str, dead: Iterable[Mapping[str, Any]]) -> None:
        """Make `dead` the whole list of one stage; the others' stay."""
        before = self.rows()
        after = [*(row for row in before if row["stage"] != stage), *dead]
        if after != before:
            write_atomically(self.path, json.dumps(after, indent=2) + "\n")
