"""What a run folder says about its run: how it ended, what is saved, where it stands."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.torchrun import checkpoint_names
from sdtrain.errors import ConfigError, ExitCode
from sdtrain.run_dir import Exit, RunDir, read_json_lines


@dataclass(frozen=True, slots=True)
class Status:
    """A run at a glance.

    Attributes:
        run: The run's folder.
        exit: How the newest attempt ended; None while it runs, or after a crash.
        newest_checkpoint: Path of the newest committed checkpoint; None where there is none.
        metrics: The last logged row; None where nothing was logged.
    """

    run: Path
    exit: Exit | None
    newest_checkpoint: Path | None
    metrics: dict[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """The same facts as plain JSON values."""
        checkpoint = None if self.newest_checkpoint is None else str(self.newest_checkpoint)
        outcome = None if self.exit is None else asdict(self.exit)
        return {"run": str(self.run), "exit": outcome, "newest_checkpoint": checkpoint, "metrics": self.metrics}


def read_status(run: Path) -> Status:
    """Read a run's folder.

    Raises:
        ConfigError: `run` is not a run folder.
    """
    run_dir = RunDir(run)
    known = (run_dir.config, run_dir.metrics, run_dir.ledger, run_dir.exit_file, run_dir.checkpoints)
    if not any(path.exists() for path in known):
        raise ConfigError(
            f"{run}: not a run folder (none of {', '.join(path.name for path in known)} is there); "
            "give the folder that `run_dir` names, by default runs/<name>"
        )
    names = sorted(checkpoint_names(run_dir), key=lambda name: int(name.removeprefix("step-")))
    figures = (row for row in read_json_lines(run_dir.metrics) if "step" in row)  # the others mark starts
    rows = deque(figures, maxlen=1)
    newest = run_dir.checkpoints / names[-1] if names else None
    return Status(run, run_dir.read_exit(), newest, rows[0] if rows else None)


def exit_name(code: int) -> str:
    """`diverged` for 5; `unknown` for a code that is none of ours."""
    return ExitCode(code).name.lower().replace("_", " ") if code in ExitCode.__members__.values() else "unknown"


def _outcome_text(outcome: Exit | None) -> str:
    if outcome is None:
        return "no word: still running, or crashed"
    when = datetime.fromtimestamp(outcome.time, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    text = f"code {outcome.code} ({exit_name(outcome.code)}) at step {outcome.step}, {when}"
    return f"{text}: {outcome.reason}" if outcome.reason else text


def _metrics_text(row: dict[str, Any] | None) -> str:
    if row is None:
        return "none logged"
    return "  ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
    )


def render(status: Status) -> str:
    """A few aligned lines for a terminal."""
    checkpoint = "none" if status.newest_checkpoint is None else str(status.newest_checkpoint)
    lines = {
        "run": str(status.run),
        "last exit": _outcome_text(status.exit),
        "checkpoint": checkpoint,
        "metrics": _metrics_text(status.metrics),
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())
