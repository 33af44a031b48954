"""What happened in a run, told from its folder: attempts, losses, what was lost to kills and trained again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.checkpoints.manifest import step_of
from sdtrain.errors import ConfigError, ExitCode
from sdtrain.evaluation.charts import Chart, Line, Mark, chart_svg, smoothed
from sdtrain.run_dir import Exit, RunDir, read_json_lines
from sdtrain.training.metrics import read_metrics

LOG_AXIS_ABOVE = 30  # largest over smallest loss


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run.

    Attributes:
        name: Unique name.
        start_step: Finished steps that it began with.
        resumed_from: Name of the checkpoint that it began with; None for a fresh start.
        world_size: Number of ranks; None where the run did not write it down.
        last_step: The last step that it logged or saved.
        end: How it ended, in words.
        started: When its first row was written, seconds since the epoch.
        ended: When its last one was, its last sign of life.
        lost_steps: Steps that it trained and that did not survive; the next start began before them.
    """

    name: str
    start_step: int
    resumed_from: str | None
    world_size: int | None
    last_step: int
    end: str
    started: float
    ended: float
    lost_steps: int


@dataclass(frozen=True, slots=True)
class RunStory:
    """A run as the report shows it.

    Attributes:
        name: The run folder's name.
        attempts: In the order of their starts.
        last_step: The last step of the surviving attempts.
        final_loss: Mean training loss of the last tenth of the run; None where nothing was logged.
        figures: The last logged row, without the bookkeeping.
        charts: SVG elements by heading.
        config: The resolved page.
        environment: Versions, git commit, machine.
    """

    name: str
    attempts: tuple[Attempt, ...]
    last_step: int
    final_loss: float | None
    figures: Mapping[str, float]
    charts: Mapping[str, str]
    config: str
    environment: Mapping[str, Any]

    @property
    def num_restarts(self) -> int:
        """Starts after the first."""
        return max(0, len(self.attempts) - 1)


def read_run(path: Path, chart_name: str) -> RunStory:
    """Read a run folder.

    Args:
        path: The folder.
        chart_name: Prefix of the ids in its charts, unique on the page.

    Raises:
        ConfigError: it holds no metrics.
    """
    run = RunDir(path)
    if not run.metrics.is_file():
        raise ConfigError(f"{path}: holds no {run.metrics.name}; give the folder of a run that was started")
    raw = [row for row in read_json_lines(run.metrics) if isinstance(row, dict)]
    kept = read_metrics(run.metrics)
    attempts = read_attempts(run)
    losses = loss_names(kept)
    charts = {
        _heading(name): chart_svg(_loss_chart(name, raw, kept, attempts), f"{chart_name}-{i}")
        for i, name in enumerate(losses)
    }
    final = [float(row[losses[0]]) for row in kept if losses and losses[0] in row]
    tail = final[-max(1, len(final) // 10) :]
    return RunStory(
        name=path.resolve().name,
        attempts=attempts,
        last_step=kept[-1]["step"] if kept else 0,
        final_loss=sum(tail) / len(tail) if tail else None,
        figures=_last_figures(kept),
        charts=charts,
        config=run.config.read_text(encoding="utf-8") if run.config.is_file() else "",
        environment=json.loads(run.environment.read_text(encoding="utf-8")) if run.environment.is_file() else {},
    )


def loss_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the training losses: `train/loss`, or one per trainable, `train/<trainable>/loss`."""
    found = {name for row in rows for name in row if name.startswith("train/") and name.endswith("/loss")}
    return sorted(found, key=lambda name: (name.count("/"), name))


def _heading(loss: str) -> str:
    trainable = loss.removeprefix("train/").removesuffix("loss").strip("/")
    return f"Loss of the {trainable}" if trainable else "Loss"


def _last_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The newest value of every figure."""
    figures: dict[str, float] = {}
    for row in rows:
        figures |= {name: value for name, value in row.items() if "/" in name and isinstance(value, int | float)}
    return dict(sorted(figures.items()))


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    points = [(float(row["step"]), float(row[name])) for row in rows if "step" in row and name in row]
    return [x for x, _ in points], [y for _, y in points]


def _lost(raw: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows past the step at which a later attempt resumed, one list per kill."""
    lost: list[list[Mapping[str, Any]]] = []
    standing: list[Mapping[str, Any]] = []
    for row in raw:
        if "resumed_step" in row:
            resumed = row["resumed_step"]
            lost.append([past for past in standing if past["step"] > resumed])
            standing = [past for past in standing if past["step"] <= resumed]
        elif "step" in row:
            standing.append(row)
    return [rows for rows in lost if rows]


def _loss_chart(
    name: str, raw: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]], attempts: Sequence[Attempt]
) -> Chart:
    x, y = _series(kept, name)
    lines = [Line("", x, y, 0, faint=True), Line("training, smoothed", x, smoothed(y, round(len(y) / 40)), 0)]
    for i, rows in enumerate(_lost(raw)):
        lines.append(Line("lost to a kill, trained again" if i == 0 else "", *_series(rows, name), 2))
    validation = _series(kept, "validation/loss")
    if validation[0] and name == "train/loss":
        lines.append(Line("validation", *validation, 1, dots=True))
    marks = [
        Mark(attempt.start_step, f"resumed at {attempt.start_step}" + _on_ranks(attempt))
        for attempt in attempts
        if attempt.start_step > 0
    ]
    positive = [value for value in y if value > 0]
    is_wide = len(positive) == len(y) > 0 and max(positive) > LOG_AXIS_ABOVE * min(positive)
    return Chart(f"{_heading(name)} over optimiser steps", "step", "loss", lines, marks, log_y=is_wide)


def _on_ranks(attempt: Attempt) -> str:
    return "" if attempt.world_size is None else f", {attempt.world_size} rank{'s' * (attempt.world_size != 1)}"


def read_attempts(run: RunDir, *, saved_step: int | None = None) -> tuple[Attempt, ...]:
    """Every start, as the ledger and the metrics know it; the word of the last one is in `exit.json`.

    Args:
        run: The run's folder.
        saved_step: Where a next start would begin; None does not count what the last attempt has not saved as lost.
    """
    ledger = run.ledger_rows()
    ended = {row["attempt"]: row for row in ledger if row.get("event") == "end"}
    starts = [row for row in ledger if row.get("event") == "start"]
    known = {row["attempt"]: [row] for row in starts}
    for row in [*read_json_lines(run.metrics), *ledger]:
        if isinstance(row, dict) and row.get("attempt") in known:
            known[row["attempt"]].append(row)
    word = run.read_exit()
    survived = [*(row["step"] for row in starts[1:]), saved_step]
    attempts = []
    for start, next_start in zip(starts, survived, strict=False):
        name: str = start["attempt"]
        told = word if word is not None and word.attempt == name else None
        last_step, undone = _reached(known[name])
        times = [row["time"] for row in known[name] if "time" in row]
        attempts.append(
            Attempt(
                name=name,
                start_step=start["step"],
                resumed_from=start.get("resumed_from"),
                world_size=start.get("world_size"),
                last_step=last_step,
                end=_end(ended.get(name), told, is_last=start is starts[-1]),
                started=min(times),
                ended=max(times),
                lost_steps=undone + (0 if next_start is None else max(last_step - next_start, 0)),
            )
        )
    return tuple(attempts)


def _reached(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The last step of an attempt, and how many steps it undid by going back to an older checkpoint."""
    rollbacks = [row for row in rows if row.get("event") == "rollback"]
    if not rollbacks:
        return max(row["step"] for row in rows if "step" in row), 0
    back_at = [step_of(row["checkpoint"]) for row in rollbacks]
    since = [row["step"] for row in rows if "step" in row and row.get("time", 0) > rollbacks[-1]["time"]]
    return max([back_at[-1], *since]), sum(row["step"] - step for row, step in zip(rollbacks, back_at, strict=True))


def _end(row: Mapping[str, Any] | None, word: Exit | None, *, is_last: bool) -> str:
    if word is not None:
        return f"{ExitCode(word.code).name.lower().replace('_', ' ')}: {word.reason}"
    if row is not None:
        return f"{ExitCode(row['code']).name.lower().replace('_', ' ')}: {row.get('reason', '')}"
    return "running, or killed" if is_last else "killed or stopped; the next start resumed"
