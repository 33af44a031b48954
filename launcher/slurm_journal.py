"""What Slurm jobs of a run leave in its folder: how they were submitted, each start of theirs, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.slurm_queue import find_job
from sdtrain.errors import ConfigError, StorageError
from sdtrain.run_dir import RunDir, append_json_line, read_json_lines

Kind = Literal["training", "ingestion"]


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as it was asked for.

    Attributes:
        job: Its number.
        folder: Where it was submitted, which relative paths of the page start from.
        config: The page.
        overrides: `key=value` settings over it.
        options: Options of `sdtrain-launch slurm` or `slurm-data` by name, those that were given.
        kind: What the job does.
    """

    job: str
    folder: str
    config: str
    overrides: list[str]
    options: dict[str, Any]
    kind: Kind = "training"


@dataclass(frozen=True, slots=True)
class Start:
    """A start of a job.

    Attributes:
        job: Its number.
        restart: How many starts it had before.
        logs: Folder of the ranks' output, in the run's `logs/`.
        ranks_per_node: One per GPU.
        nodes: Number of nodes.
        attempt_before: Attempt whose word stood in `exit.json`; its word again is stale.
        checkpoints: Names of what was committed.
        kind: What the job does.
    """

    job: str
    restart: int
    logs: str
    ranks_per_node: int
    nodes: int
    attempt_before: str | None
    checkpoints: list[str]
    kind: Kind = "training"


@dataclass(frozen=True, slots=True)
class Journal:
    """`logs/slurm.jsonl` of a run, or of an ingestion's output.

    Attributes:
        run_dir: The run; the output folder of an ingestion.
        kind: What its jobs do.
    """

    run_dir: RunDir
    kind: Kind = "training"

    @property
    def key(self) -> str:
        """What the page calls the folder."""
        return "run_dir" if self.kind == "training" else "output"

    @property
    def folder(self) -> Path:
        """Where jobs and ranks write what they say."""
        return self.run_dir.path / "logs"

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "slurm.jsonl"

    def prepare(self) -> None:
        """Make the folder and the file, as they are needed before a job is submitted and its output is opened.

        Raises:
            StorageError: They cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise StorageError(
                f"{self.key} = {self.run_dir.path}: {self.path} cannot be written: {error.strerror}; give another "
                f"{self.key}"
            ) from None

    def add(self, event: str, row: Submission | Start | dict[str, Any]) -> None:
        """Append one row."""
        facts = row if isinstance(row, dict) else asdict(row)
        append_json_line(self.path, {"event": event, "time": time.time(), **facts})

    def _rows(self, event: str) -> list[dict[str, Any]]:
        found = [row for row in read_json_lines(self.path) if row.get("event") == event]
        return [{name: value for name, value in row.items() if name not in ("event", "time")} for row in found]

    def submissions(self) -> list[Submission]:
        """All of them, in order."""
        return [Submission(**row) for row in self._rows("submit")]

    def starts(self) -> list[Start]:
        """All of them, in order."""
        return [Start(**row) for row in self._rows("start")]

    def counted_starts(self, job: str) -> list[Start]:
        """Those of a job that could come to something: all but those that only found out which nodes are bad."""
        left = {row["restart"] for row in self._rows("preflight") if row["job"] == job and row["excluded"]}
        return [start for start in self.starts() if start.job == job and start.restart not in left]

    def newest_preflight(self) -> dict[str, Any] | None:
        """What the last one found: job, restart, passed, reason, failing, slow, excluded."""
        rows = self._rows("preflight")
        return rows[-1] if rows else None

    def newest_job(self) -> str | None:
        """The job that was submitted or started last."""
        newest = self._newest()
        return None if newest is None else str(newest["job"])

    def is_ingestion(self) -> bool:
        """Whether that job fills an output folder with data, and trains nothing."""
        newest = self._newest()
        return newest is not None and newest.get("kind") == "ingestion"

    def newest_end(self) -> dict[str, Any] | None:
        """How the last start that ended did so: job, restart, code, reason, requeued."""
        ends = self._rows("end")
        return ends[-1] if ends else None

    def _newest(self) -> dict[str, Any] | None:
        rows = [row for row in read_json_lines(self.path) if row.get("event") in ("submit", "start")]
        return rows[-1] if rows else None


def fruitless_starts(starts: Sequence[Start], checkpoints: set[str]) -> int:
    """How many of the last starts of the newest job came to no new checkpoint.

    Args:
        starts: In order.
        checkpoints: Names of the checkpoints that there are now.
    """
    count, later = 0, checkpoints
    for start in reversed([start for start in starts if start.job == starts[-1].job]):
        if later - set(start.checkpoints):
            break
        count, later = count + 1, set(start.checkpoints)
    return count


def refuse_second_job(journal: Journal) -> None:
    """Refuse another job of a run that one is still working on.

    Raises:
        ConfigError: Its job waits or runs.
    """
    newest, run = journal.newest_job(), journal.run_dir
    queued = None if newest is None else find_job(newest)
    if queued is not None and not queued.is_over:
        raise ConfigError(
            f"{run.path}: its job {newest} is {queued.state}; it goes on by itself, or end it first with: "
            f"sdtrain-launch cancel {run.path}"
        )


def resubmission(journal: Journal, changed: dict[str, Any]) -> Submission:
    """The newest submission once more, with the page that the newest attempt left in the run's folder.

    Args:
        journal: Of the run.
        changed: Options that win over those of then.

    Raises:
        ConfigError: The run never was a job, or the folder that it was submitted from is gone.
    """
    run, submissions, newest = journal.run_dir, journal.submissions(), journal.newest_job()
    if journal.is_ingestion() and not submissions:
        raise ConfigError(
            f"{run.path}: its job {newest} was submitted by hand, so its page is not known here; submit it with: "
            "sdtrain-launch slurm-data CONFIG"
        )
    if newest is None or not (submissions or run.config.exists()):
        raise ConfigError(
            f"{run.path}: no Slurm job of this run is known ({journal.path}); submit it with: "
            f"sdtrain-launch slurm {run.config} --nodes N --gpus-per-node G run_dir={run.path}"
        )
    last = submissions[-1] if submissions else _as_submitted(journal.starts()[-1])
    if not Path(last.folder).is_dir():
        command = "slurm-data CONFIG" if journal.is_ingestion() else f"slurm {run.config} run_dir={run.path}"
        raise ConfigError(
            f"{run.path}: was submitted from {last.folder}, which is gone, and paths of its page may start there; go "
            f"to where they do and submit it with: sdtrain-launch {command}"
        )
    if not run.config.exists():
        return replace(last, options={**last.options, **changed})
    return Submission(
        job=newest,
        folder=last.folder,
        config=str(run.config.absolute()),
        overrides=[f"run_dir={run.path.absolute()}"],
        options={**last.options, **changed},
    )


def _as_submitted(start: Start) -> Submission:
    """What a job that was submitted by hand must have asked for."""
    options = {"nodes": start.nodes, "gpus_per_node": start.ranks_per_node}
    return Submission(start.job, str(Path.cwd()), "", [], options)
