"""What a run folder says about its run: how it ended, what is saved, where it stands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from launcher.slurm_journal import Journal
from launcher.slurm_queue import QueuedJob, find_job
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
        progress: The last row of a training step; None where there is none.
        restarts: Starts of the run beyond its first one.
        job: Number of its newest Slurm job; None where it never was one.
        queued: How the scheduler sees that job; None where it does not know it any more.
        preflight: What the newest preflight found and led to; None where there was none.
    """

    run: Path
    exit: Exit | None
    newest_checkpoint: Path | None
    metrics: dict[str, Any] | None
    progress: dict[str, Any] | None
    restarts: int
    job: str | None
    queued: QueuedJob | None
    preflight: str | None

    def as_json(self) -> dict[str, Any]:
        """The same facts as plain JSON values."""
        checkpoint = None if self.newest_checkpoint is None else str(self.newest_checkpoint)
        outcome = None if self.exit is None else asdict(self.exit)
        queued = None if self.queued is None else asdict(self.queued)
        return {
            "run": str(self.run),
            "exit": outcome,
            "newest_checkpoint": checkpoint,
            "metrics": self.metrics,
            "progress": self.progress,
            "restarts": self.restarts,
            "job": self.job,
            "queued": queued,
            "preflight": self.preflight,
        }


def read_status(run: Path) -> Status:
    """Read a run's folder.

    Raises:
        ConfigError: `run` is not a run folder.
    """
    run_dir = RunDir(run)
    journal = Journal(run_dir)
    known = (run_dir.config, run_dir.metrics, run_dir.ledger, run_dir.exit_file, run_dir.checkpoints, journal.path)
    if not any(path.exists() for path in known):
        raise ConfigError(
            f"{run}: not a run folder (none of {', '.join(path.name for path in known)} is there); "
            "give the folder that `run_dir` names, by default runs/<name>"
        )
    names = sorted(checkpoint_names(run_dir), key=lambda name: int(name.removeprefix("step-")))
    rows = [row for row in read_json_lines(run_dir.metrics) if "step" in row]  # the others mark starts
    newest = run_dir.checkpoints / names[-1] if names else None
    job = journal.newest_job()
    return Status(
        run=run,
        exit=run_dir.read_exit(),
        newest_checkpoint=newest,
        metrics=rows[-1] if rows else None,
        progress=next((row for row in reversed(rows) if "train/images_per_second" in row), None),
        restarts=max(0, sum(row.get("event") == "start" for row in run_dir.ledger_rows()) - 1),
        job=job,
        queued=None if job is None else queued_job(job),
        preflight=preflight_text(journal.newest_preflight()),
    )


def queued_job(job: str) -> QueuedJob | None:
    """How the scheduler sees a job; a machine without Slurm's commands can still read the rest of a run."""
    try:
        return find_job(job)
    except ConfigError:
        return None


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


def _progress_text(status: Status) -> str:
    """Step, losses, speed, restarts and what is left, which a run that has ended does not need."""
    row = status.progress
    if row is None:
        return f"no step logged yet, {status.restarts} restarts"
    losses = {
        name.removeprefix("train/"): value for name, value in row.items() if re.fullmatch(r"train/(.+/)?loss", name)
    }
    parts = [f"step {row['step']}", *(f"{name} {value:.4f}" for name, value in losses.items())]
    parts += [f"{row['train/images_per_second']:.1f} images/s", f"{status.restarts} restarts"]
    if status.exit is None or status.exit.code == ExitCode.REQUEUE:
        seconds = row.get("train/eta_seconds", float("inf"))
        parts.append(f"ETA {'?' if seconds == float('inf') else timedelta(seconds=round(seconds))}")
    return ", ".join(parts)


def job_text(job: str, queued: QueuedJob | None) -> str:
    """A job's number and what the scheduler says of it."""
    if queued is None:
        return f"{job}: not known to a scheduler here"
    facts = [queued.state] if queued.reason == "None" else [queued.state, queued.reason]
    if queued.state == "RUNNING":
        facts += [f"for {queued.elapsed} of {queued.limit}", f"on {queued.nodes}"]
    elif queued.state == "PENDING" and queued.starts_at != "N/A":
        facts.append(f"starts about {queued.starts_at}")
    return f"{job}: {', '.join(facts)}"


def preflight_text(row: Mapping[str, Any] | None) -> str | None:
    """What the newest job's preflight found and led to, in a line; None where there was none."""
    if row is None:
        return None
    bad = {**row["slow"], **row["failing"]}
    named = "; ".join(f"{node} ({', '.join(why)})" for node, why in bad.items()) or row["reason"]
    found = "passed" if row["passed"] else "failed"
    without = f"; requeued without {', '.join(row['excluded'])}" if row["excluded"] else ""
    return f"{found}{': ' if named else ''}{named}{without}"


def render(status: Status) -> str:
    """A few aligned lines for a terminal."""
    checkpoint = "none" if status.newest_checkpoint is None else str(status.newest_checkpoint)
    lines = {
        "run": str(status.run),
        "last exit": _outcome_text(status.exit),
        "checkpoint": checkpoint,
        "metrics": _metrics_text(status.metrics),
        "progress": _progress_text(status),
    }
    if status.preflight is not None:
        lines["preflight"] = status.preflight
    if status.job is not None:
        lines["job"] = job_text(status.job, status.queued)
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())
