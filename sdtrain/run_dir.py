"""The layout of a run folder, in one place. Imports no torch, so the launcher can read a run."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdtrain.errors import ConfigError, ExitCode, StorageError

REFUSALS = "SDTRAIN_REFUSALS"
"""Environment variable: a folder outside the run's, in which a refused start leaves its word for the launcher."""
REFUSED_STEP = -1
PREFLIGHT_FILE = "preflight.json"
"""What `sdtrain doctor` leaves for its launcher, in the folder of a start's logs."""

_JOB_LOGS = frozenset({".out", ".err", ".log"})
_SHOWN = 5


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: temporary name, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file; lines torn by a killed writer are left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def append_json_line(path: Path, row: Mapping[str, Any], *, durable: bool = False) -> None:
    """Append one row in one write; `durable` waits for the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a killed writer's torn line must not swallow this one
                file.write(b"\n")
        file.write(json.dumps(row, default=str).encode() + b"\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())


def nearest_existing(path: Path) -> Path | None:
    """`path`, or the folder above it that is there; None where not even the root can be looked at."""
    return next((one for one in (path, *path.absolute().parents) if os.path.lexists(one)), None)


def _refuse_unwritable(folder: Path) -> None:
    """Refuse a folder, there or to be made, in which this user cannot make files."""
    there = nearest_existing(folder)
    if there is None or os.access(there, os.W_OK | os.X_OK):
        return
    is_read_only = os.statvfs(there).f_flag & os.ST_RDONLY
    why = "its file system is mounted read-only" if is_read_only else "this user has no permission"
    raise StorageError(
        f"run_dir: {there} cannot be written to: {why}. Make it writable, or give another run_dir; nothing was touched"
    )


@dataclass(frozen=True)
class Exit:
    """How an attempt ended, as its ranks agreed: launchers decide by this, never by their own `$?`.

    Attributes:
        code: An `ExitCode`.
        reason: Why, for people.
        step: Finished steps; `REFUSED_STEP` for a start that became no attempt.
        rank: Who says so.
        attempt: Name of the attempt.
        time: When it was written, seconds since the epoch.
    """

    code: int
    reason: str
    step: int
    rank: int
    attempt: str
    time: float = 0.0

    @property
    def is_refusal(self) -> bool:
        """Whether this start became no attempt, and left the run's folder as it was."""
        return self.step == REFUSED_STEP


def tell_launcher(refused: Exit) -> None:
    """Leave the word of a start that never became an attempt where the launcher asked for it, if one did."""
    asked = os.environ.get(REFUSALS)
    if asked:
        RunDir(Path(asked)).write_exit(refused)


@dataclass(frozen=True)
class RunDir:
    """Names of everything that a run leaves behind.

    Attributes:
        path: The run's folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration of the newest attempt."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """argv, git commit, versions and world size of the newest attempt."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON row per logged step; authoritative, W&B is a copy."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """Append-only record of attempts, commits and sample ranges."""
        return self.path / "ledger.jsonl"

    @property
    def lease(self) -> Path:
        """What an attempt that is alive holds a lock on."""
        return self.path / "attempt.lock"

    @property
    def exit_file(self) -> Path:
        """How the newest attempt ended."""
        return self.path / "exit.json"

    @property
    def tombstones(self) -> Path:
        """One JSON row per sample that could not be read: key, shard, reason and the step that met it first."""
        return self.path / "tombstones.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of committed checkpoints, `step-N`."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """Folder of EMA weight exports in diffusers' layout, `step-N`."""
        return self.path / "weights"

    @property
    def samples(self) -> Path:
        """Folder of sample grids."""
        return self.path / "samples"

    @property
    def sick(self) -> Path:
        """Folder of what is known about thrown-away steps, `step-N.json`."""
        return self.path / "sick"

    @property
    def hangs(self) -> Path:
        """Folder of what watchdogs report of ranks that stand still, `<launch>/rank-N.json`."""
        return self.path / "hangs"

    @property
    def stacks(self) -> Path:
        """Folder of the Python stacks of hung ranks, `<attempt>/rank-N.txt`."""
        return self.path / "stacks"

    @property
    def wandb_id(self) -> Path:
        """The W&B run id, generated by us so that it survives a resume."""
        return self.path / "wandb_id"

    def refuse_unusable(self) -> None:
        """Refuse a place that is no run's folder and must not become one; looks, and changes nothing.

        Raises:
            ConfigError: A file lies there, or a folder that holds other things than a run.
            StorageError: Nothing can be written there.
        """
        if (there := nearest_existing(self.path)) is not None and not there.is_dir():
            raise ConfigError(f"run_dir = {self.path}: {there} is a file; give a new folder, or the folder of a run")
        foreign = self._foreign_entries()
        if foreign:
            more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
            raise ConfigError(
                f"run_dir = {self.path}: not a run's folder: it holds {', '.join(foreign[:_SHOWN])}{more}, and no "
                f"{self.ledger.name} of a run. Give a new or an empty folder, or the folder of a run to go on with it; "
                "nothing was touched"
            )
        for folder in (self.path, self.checkpoints):
            _refuse_unwritable(folder)

    def _foreign_entries(self) -> list[str]:
        """Names in this folder that no run leaves; none where a run's ledger lies, whatever people put beside it."""
        if not self.path.is_dir() or "event" in next(read_json_lines(self.ledger), {}):
            return []
        parts = (self.config, self.environment, self.metrics, self.ledger, self.lease, self.exit_file, self.tombstones)
        parts += (self.checkpoints, self.weights, self.samples, self.sick, self.hangs, self.stacks, self.wandb_id)
        own = {path.name for path in parts if path != self.ledger} | {"SAVE", "STOP", "logs", "wandb"}
        names = (entry.name for entry in self.path.iterdir() if entry.suffix not in _JOB_LOGS)
        return sorted(name for name in names if name not in own and not name.startswith("."))

    def new_attempt(self) -> str:
        """A unique name for this start of the run; rank 0 makes it and broadcasts it."""
        return f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"

    def log(self, event: str, **facts: Any) -> None:
        """Append one row to the ledger and wait for the disk; rank 0 only."""
        append_json_line(self.ledger, {"event": event, "time": time.time(), **facts}, durable=True)

    def ledger_rows(self) -> list[dict[str, Any]]:
        """All rows of the ledger."""
        return list(read_json_lines(self.ledger))

    def write_exit(self, outcome: Exit) -> None:
        """Record how this attempt ends."""
        row = asdict(outcome) | {"time": time.time()}
        write_atomically(self.exit_file, json.dumps(row, indent=2) + "\n")

    def leave_word(self, outcome: Exit) -> bool:
        """Record an unplanned end, in `exit.json` and the ledger, unless this attempt's first cause stands already.

        A rank that merely lost a peer gives way to what the peer died of. A node that comes back with an attempt that
        others have followed has nothing to say any more. Returns whether `outcome` stands now.
        """
        if self._is_followed(outcome.attempt):
            return False
        standing = self.read_exit()
        if standing is not None and standing.attempt == outcome.attempt:
            is_cause = standing.code == ExitCode.HANG and outcome.code != ExitCode.HANG
            if not is_cause:
                return False
        self.write_exit(outcome)
        self.log("end", **{name: value for name, value in asdict(outcome).items() if name != "time"})
        return True

    def _is_followed(self, attempt: str) -> bool:
        """Whether a later attempt has begun in this folder."""
        begun = [row.get("attempt") for row in read_json_lines(self.ledger) if row.get("event") == "start"]
        return attempt in begun and begun[-1] != attempt

    def read_exit(self) -> Exit | None:
        """How the newest attempt ended; None where it left no word, which means a crash."""
        try:
            return Exit(**json.loads(self.exit_file.read_text(encoding="utf-8")))
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            return None

    def clear_exit(self, *, but: str = "") -> None:
        """Remove an earlier attempt's word, so that a crash cannot be mistaken for it; that of attempt `but` stays."""
        standing = self.read_exit()
        if standing is None or standing.attempt != but:
            self.exit_file.unlink(missing_ok=True)
