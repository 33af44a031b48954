"""`sdtrain-data status`: how far a data set is, from its files alone; a run that goes on is not disturbed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from data_pipeline.ledger import DeadLetters, Ledger
from data_pipeline.progress import PROGRESS_FILE, read_progress, rows_of, start_ticks
from data_pipeline.runner import DEAD_LETTER_FILE
from sdtrain.errors import ConfigError

TABLE_WIDTH = 110
_MAX_SHOWN = 20
_SILENT_SECONDS = 60.0
"""A run on another machine that wrote nothing for so long may be dead; it writes each second while units are done."""


@dataclass(frozen=True, slots=True)
class StageStatus:
    """How far one stage is.

    Attributes:
        name: The stage.
        state: `waiting`, `checking` (comparing files with the ledger), `running`, `done`, `failed`, `interrupted`; or
            `stopped`, where its run died in the middle.
        units: All of them; None while nobody has counted.
        done: Units that are committed and up to date.
        failed: Units on the dead-letter list.
        in_flight: Units that workers have.
        oldest: Those of them that began first: unit, attempt and since when (seconds since the epoch).
        retries: Attempts of this run that failed and were, or will be, made again.
        rows: Rows in what is done; 0 where the stage counts none.
        units_per_second: Of this run; None before its first unit.
        rows_per_second: Likewise.
        seconds_left: At that rate; None where nothing is running or nothing is known.
        seconds: Time that this run has spent on it.
    """

    name: str
    state: str
    units: int | None = None
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    oldest: tuple[dict[str, Any], ...] = ()
    retries: int = 0
    rows: int = 0
    units_per_second: float | None = None
    rows_per_second: float | None = None
    seconds_left: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run: the one that goes on, or the last one.

    Attributes:
        host: Where.
        pid: Process number there.
        since: Start, seconds since the epoch.
        updated: Its last sign of life.
        state: `running`, `done`, `failed`, `interrupted`, `died` (no such process any more), or `silent` (on another
            machine, no sign of life for a minute).
        message: Why it ended.
    """

    host: str
    pid: int
    since: float
    updated: float
    state: str
    message: str | None


@dataclass(frozen=True, slots=True)
class Status:
    """How far a data set is.

    Attributes:
        folder: Its output folder.
        attempt: The newest start; None where no run has begun.
        stages: In the order in which they run.
        dead_letters: Units that failed for good, with inputs, error, traceback and attempts.
    """

    folder: str
    attempt: Attempt | None
    stages: tuple[StageStatus, ...]
    dead_letters: tuple[dict[str, Any], ...]


def read_status(folder: Path, *, is_new: bool = False) -> Status:
    """Read what a run left in its output folder.

    Args:
        folder: The output folder.
        is_new: Whether an empty or absent folder is no mistake, since a page names it.

    Raises:
        ConfigError: No ingestion run has worked there.
    """
    progress = read_progress(folder)
    ledgers = sorted(folder.glob("*/ledger.jsonl"))
    if not progress and not ledgers and not is_new:
        raise ConfigError(
            f"{folder}: no ingestion run has worked here: it is no folder with {PROGRESS_FILE} or with stages that "
            "have a ledger.jsonl; give a page of kind ingestion (YAML), or the folder that its key output names"
        )
    dead = tuple(DeadLetters(folder / DEAD_LETTER_FILE).rows())
    attempt = _attempt(progress["attempt"]) if progress else None
    rows = progress.get("stages", [])
    known = {row["folder"] for row in rows}
    lost = (path.parent for path in ledgers if path.parent.name not in known)
    stages = (*(_stage(row, attempt) for row in rows), *(_from_ledger(path) for path in lost))
    return Status(str(folder), attempt, stages, dead)


def _attempt(row: dict[str, Any]) -> Attempt:
    state = row["state"]
    if state == "running":
        if row["host"] == socket.gethostname():
            if start_ticks(row["pid"]) != row["start_ticks"]:
                state = "died"
        elif time.time() - row["updated"] > _SILENT_SECONDS:
            state = "silent"
    return Attempt(row["host"], row["pid"], row["since"], row["updated"], state, row["message"])


def _stage(row: dict[str, Any], attempt: Attempt | None) -> StageStatus:
    state = row["state"]
    if state in ("checking", "running") and attempt is not None and attempt.state == "died":
        state = "stopped"
    is_going = state == "running"
    finished, seconds = row.get("finished", 0), row.get("seconds", 0.0)
    rate = finished / seconds if finished and seconds else None
    left = (row.get("units") or 0) - row.get("done", 0) - row.get("failed", 0)
    return StageStatus(
        name=row["name"],
        state=state,
        units=row.get("units"),
        done=row.get("done", 0),
        failed=row.get("failed", 0),
        in_flight=row.get("in_flight", 0) if is_going else 0,
        oldest=tuple(row.get("oldest", ())) if is_going else (),
        retries=row.get("retries", 0),
        rows=row.get("rows", 0),
        units_per_second=rate,
        rows_per_second=None if rate is None else row["finished_rows"] / seconds,
        seconds_left=left / rate if is_going and rate is not None else None,
        seconds=seconds,
    )


def _from_ledger(folder: Path) -> StageStatus:
    """A stage that no progress file knows: of an older version, or of a page that had another list of stages."""
    commits = Ledger(folder).commits().values()
    name = folder.name.partition("-")[2] or folder.name
    return StageStatus(name, "unknown", done=len(commits), rows=sum(rows_of(commit.stats) for commit in commits))


def to_json(status: Status) -> str:
    """The status as JSON text."""
    return json.dumps(asdict(status), indent=2) + "\n"


def table_of(status: Status) -> Table:
    """The stages, for the terminal."""
    table = Table(title=status.folder, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("stage", "state"):
        table.add_column(header, no_wrap=True)
    for header in ("units", "failed", "in flight", "rows", "units/s", "rows/s", "left"):
        table.add_column(header, no_wrap=True, justify="right")
    for stage in status.stages:
        total = "?" if stage.units is None else f"{stage.units:,}"
        table.add_row(
            stage.name,
            stage.state,
            f"{stage.done:,}/{total}",
            f"{stage.failed:,}" if stage.failed else "",
            f"{stage.in_flight:,}" if stage.in_flight else "",
            f"{stage.rows:,}" if stage.rows else "",
            "" if stage.units_per_second is None else f"{stage.units_per_second:.3g}",
            f"{stage.rows_per_second:,.0f}" if stage.rows_per_second else "",
            "" if stage.seconds_left is None else duration(stage.seconds_left),
        )
    return table


def lines_of(status: Status) -> Iterator[str]:
    """What is said beside the table: who runs, what is slow, what failed."""
    now, attempt = time.time(), status.attempt
    if attempt is not None:
        yield _attempt_in_words(attempt, now)
    elif status.stages:
        yield f"no {PROGRESS_FILE}: counts are those of the ledgers"
    else:
        yield "nothing has run yet"
    for stage in status.stages:
        for row in stage.oldest[:1]:
            begun = duration(now - row["since"])
            yield f"{stage.name}: the oldest in flight is unit {row['unit']}, attempt {row['attempt']}, for {begun}"
    for row in status.dead_letters[:_MAX_SHOWN]:
        yield f"failed: {row['stage']} {row['unit']} after {row['attempts']} attempts: {row['error']}"
    if len(status.dead_letters) > _MAX_SHOWN:
        yield f"failed: {len(status.dead_letters) - _MAX_SHOWN:,} more, see {status.folder}/{DEAD_LETTER_FILE}"


def _attempt_in_words(attempt: Attempt, now: float) -> str:
    who = f"process {attempt.pid} on {attempt.host}"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.since))
    silence = duration(now - attempt.updated)
    match attempt.state:
        case "running":
            return f"running: {who}, since {since} ({duration(now - attempt.since)}), last sign of life {silence} ago"
        case "died":
            return f"not running: {who} died {silence} ago or later without a word; run again to go on"
        case "silent":
            return f"perhaps running: {who}, since {since}, but without a sign of life for {silence}"
        case state:
            lasted = duration(attempt.updated - attempt.since)
            because = f": {attempt.message}" if attempt.message else ""
            return f"not running: {who} ended as {state} after {lasted}, {silence} ago{because}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`, `5 d 3 h`."""
    whole = max(0, round(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit} {rest} {smaller}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"
