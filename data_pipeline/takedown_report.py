"""What a take-down came to: what was masked, in which manifests, and which trainings had seen it by which step."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdtrain.errors import DataError

_SHOWN = 20


@dataclass(frozen=True)
class Masked:
    """What was done in one manifest.

    Attributes:
        path: The manifest.
        sha256: Its digest, the same before and after.
        samples: Samples that the list asks for.
        new: Keys among them that were not masked before.
    """

    path: str
    sha256: str
    samples: int
    new: int


@dataclass(frozen=True)
class Report:
    """What one list came to.

    Attributes:
        list_name: Of the list's file.
        list_sha256: Digest of the list.
        date: UTC.
        reason: Why.
        is_dry_run: Whether nothing was written.
        manifests: Where samples were masked.
        samples: Every masked key -> the lines that asked for it.
        unmatched: Lines that fit no sample; they are kept, for manifests to come.
        unreadable: What could not be looked into.
        runs: What training runs had seen, one `sdtrain inspect --seen --json` each, or `run` and `error`.
    """

    list_name: str
    list_sha256: str
    date: str
    reason: str
    is_dry_run: bool
    manifests: tuple[Masked, ...]
    samples: Mapping[str, tuple[str, ...]]
    unmatched: tuple[str, ...]
    unreadable: tuple[str, ...]
    runs: tuple[Mapping[str, Any], ...]


# Who had seen them --------------------------------------------------------------------------------------------------


def seen_by(run: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Which steps of a training were trained on samples; asked of `sdtrain`, which knows runs.

    Returns:
        What `sdtrain inspect RUN --seen KEYS --json` prints, or `run` and the `error` that kept it from it.
    """
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "keys.txt"
        listed.write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
        command = [sys.executable, "-m", "sdtrain", "inspect", str(run), "--seen", str(listed), "--json"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        return {"run": str(run), "error": asked.stderr.strip().removeprefix("sdtrain: ")}
    return json.loads(asked.stdout)


# Showing ------------------------------------------------------------------------------------------------------------


def to_json(report: Report) -> str:
    """The whole report, for machines."""
    return json.dumps(asdict(report), indent=2) + "\n"


def show(report: Report, console: Console) -> None:
    """The report in words and tables, long lists cut."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    table = Table("manifest", "asked for", "newly masked", title="take-down", title_justify="left")
    for one in report.manifests:
        table.add_row(one.path, f"{one.samples:,}", f"{one.new:,}")
    console.print(table)
    for key, lines in list(report.samples.items())[:_SHOWN]:
        say(f"masked: {key}, asked for by {', '.join(lines)}")
    _say_rest(say, "masked", len(report.samples))
    for line in report.unmatched[:_SHOWN]:
        say(f"fits no sample: {line}")
    _say_rest(say, "fit no sample", len(report.unmatched))
    for run in report.runs:
        _show_run(run, say)
    if report.is_dry_run:
        say("dry run: nothing was written")
    elif any(one.new for one in report.manifests):
        say("manifests and order stay as they are; a training that runs now honours the list from its next start")


def _say_rest(say: Callable[[str], None], what: str, count: int) -> None:
    if count > _SHOWN:
        say(f"{what}: {count - _SHOWN:,} more, --json lists all")


def _show_run(run: Mapping[str, Any], say: Callable[[str], None]) -> None:
    if "error" in run:
        say(f"run {run['run']}: {run['error']}")
        return
    origin = f"; it began with weights of {run['forked_from']}" if run["forked_from"] else ""
    say(f"run {run['run']}: {len(run['seen'])} of the samples were trained on by step {run['last_step']}{origin}")
    for one in run["seen"][:_SHOWN]:
        lost = (
            f"; at steps that did not survive or are not saved: {_steps(one['lost_steps'])}"
            if one["lost_steps"]
            else ""
        )
        say(f"  {one['key']}: at steps {_steps(one['steps'])}{lost}")
    _say_rest(say, "  seen", len(run["seen"]))


def _steps(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "-"


def refuse_gaps(report: Report) -> None:
    """End with an error where the list could not be answered in full.

    Raises:
        DataError: Shards or runs could not be looked into; what was found is masked all the same.
    """
    lines = [f"  {line}" for line in report.unreadable[:_SHOWN]]
    lines += [f"  {run['run']}: {run['error']}" for run in report.runs if "error" in run]
    if lines:
        more = len(report.unreadable) - _SHOWN
        raise DataError(
            "not everything could be looked into; what was found is masked, run again when this is repaired:\n"
            + "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))
        )
