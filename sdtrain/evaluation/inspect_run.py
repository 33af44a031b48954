"""`sdtrain inspect`: what a run folder holds, whether it is whole, and that every sample was trained on exactly once.

The proof goes by the ledger, see `lineage`. Attempts that died trained on samples whose updates are lost; they are in
no link of the chain that leads from the newest valid checkpoint back to the start, so the chain alone says what the
weights have seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdtrain.checkpoints.manifest import Checkpoint, content_digest, folder_name, list_checkpoints
from sdtrain.checkpoints.protocol import verify as verify_checkpoint
from sdtrain.checkpoints.retention import Retention
from sdtrain.config.load import load_training
from sdtrain.errors import ConfigError, ExitCode
from sdtrain.evaluation.lineage import Lineage, trace
from sdtrain.run_dir import Exit, RunDir

LONGEST_CHAIN = 8
"""Links of a lineage that are shown."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint as the table shows it.

    Attributes:
        problems: What is wrong with it; None if it was not verified.
        retained: Why it stays beyond its turn: `pinned`, `best`, both or empty.
        uploaded: URL of the store that holds a copy of exactly these files; empty where none was sent.
    """

    name: str
    step: int
    world_size: int
    size_bytes: int
    samples_seen: int | None
    parent: str | None
    attempt: str | None
    written_at: str | None
    problems: list[str] | None
    retained: str
    uploaded: str

    @property
    def notes(self) -> str:
        """What the table says beside the name."""
        return ", ".join(filter(None, [self.retained, "uploaded" if self.uploaded else ""]))

    @property
    def status(self) -> str:
        """One word for the table."""
        if self.problems is None:
            return "not verified"
        return "corrupt" if self.problems else "valid"


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that `sdtrain inspect` says.

    Attributes:
        ancestry: The checkpoint that the run was forked from, then the one that that run was forked from, and so on as
            far as they can still be read; each as the manifest's `forked_from` has it.
    """

    run: str
    checkpoints: list[Entry]
    lineage: Lineage
    ancestry: list[dict[str, Any]]
    last_exit: Exit | None
    events: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the verdict beside the lineage that it is drawn from."""
        return asdict(self) | {"verdict": self.lineage.verdict}


def inspect(run: Path, *, verify: bool = True, as_json: bool = False, console: Console | None = None) -> Inspection:
    """Print what a run folder holds.

    Args:
        run: The run's folder.
        verify: Read every byte of every checkpoint back; False shows only what the manifests say.
        as_json: One JSON object in place of tables.
        console: Where to print; standard output by default.

    Raises:
        ConfigError: `run` is no run folder.
    """
    found = examine(run, verify=verify)
    console = console or Console()
    if as_json:
        console.print(json.dumps(found.to_json(), indent=2), markup=False, highlight=False, soft_wrap=True)
    else:
        _print(found, console)
    return found


def examine(run: Path, *, verify: bool = True) -> Inspection:
    """What `inspect` prints, as a record."""
    run_dir = RunDir(run)
    if not any(path.exists() for path in (run_dir.checkpoints, run_dir.ledger, run_dir.metrics, run_dir.config)):
        raise ConfigError(
            f"{run}: no run folder; it holds none of {run_dir.checkpoints.name}/, {run_dir.ledger.name}, "
            f"{run_dir.metrics.name}, {run_dir.config.name}. Give the run_dir of a `sdtrain train`."
        )
    checkpoints = list_checkpoints(run_dir.checkpoints)
    rows = run_dir.ledger_rows()
    best = _best(run_dir, checkpoints)
    sent = {row["manifest_sha256"]: row["url"] for row in rows if row.get("event") == "upload"}
    entries = [_entry(checkpoint, verify, best, sent) for checkpoint in checkpoints]
    newest = next((entry.step for entry in entries if not entry.problems), None)
    lineage = Lineage((), (), ())
    if newest is not None:
        lineage = trace(_completed(rows, _unwritten(checkpoints, rows)), newest=folder_name(newest))
    events: dict[str, int] = {}
    for row in rows:
        events[str(row.get("event"))] = events.get(str(row.get("event")), 0) + 1
    ancestry = _ancestry(checkpoints, rows)
    return Inspection(str(run), entries, lineage, ancestry, run_dir.read_exit(), events)


def _best(run_dir: RunDir, checkpoints: list[Checkpoint]) -> set[str]:
    """Names that `checkpoint.keep_best` of the run's page keeps; none where the page cannot be read."""
    try:
        page = load_training(run_dir.config).checkpoint
    except ConfigError:
        return set()
    keep = Retention(keep_last=page.keep_last, keep_best=page.keep_best, best_by=page.best_by, best_is=page.best_is)
    return {checkpoint.path.name for checkpoint in keep.best(checkpoints)}


def _ancestry(checkpoints: Iterable[Checkpoint], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Forks, youngest first; a manifest knows, and before the first one the ledger's start."""
    said = [checkpoint.manifest.get("forked_from") for checkpoint in checkpoints]
    said += [row.get("forked_from") for row in rows if row.get("event") == "start"]
    fork = next(filter(None, said), None)
    found: list[dict[str, Any]] = []
    while fork and fork not in found:
        found.append(dict(fork))
        fork = Checkpoint.open(Path(fork["checkpoint"])).manifest.get("forked_from")
    return found


def _entry(checkpoint: Checkpoint, verify: bool, best: set[str], sent: Mapping[str, str]) -> Entry:
    said = checkpoint.manifest
    reasons = {"pinned": checkpoint.pinned, "best": checkpoint.path.name in best}
    return Entry(
        name=checkpoint.path.name,
        step=checkpoint.step,
        world_size=checkpoint.world_size,
        size_bytes=checkpoint.size_bytes,
        samples_seen=said.get("samples_seen"),
        parent=said.get("parent"),
        attempt=said.get("attempt"),
        written_at=said.get("written_at"),
        problems=verify_checkpoint(checkpoint) if verify or checkpoint.damage else None,
        retained=", ".join(reason for reason, holds in reasons.items() if holds),
        uploaded=sent.get(content_digest(said), ""),
    )


def _unwritten(checkpoints: Iterable[Checkpoint], rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Rows that the ledger lacks where an attempt was killed between a commit and its row; manifests know them."""
    ends = {folder_name(row["step"]): row["last_position"] for row in rows if row.get("event") == "commit"}
    added: dict[str, Mapping[str, Any]] = {}
    for checkpoint in sorted(checkpoints, key=lambda checkpoint: checkpoint.step):
        said = checkpoint.manifest
        name, parent = folder_name(checkpoint.step), said.get("parent")
        if name in ends or "samples_seen" not in said or (parent is not None and parent not in ends):
            continue
        ends[name] = said.get("last_position", said["samples_seen"])
        first = said.get("first_position", 0 if parent is None else ends[parent])
        facts = {"step": checkpoint.step, "parent": parent, "attempt": said["attempt"]}
        added[name] = {"event": "commit", **facts, "first_position": first, "last_position": ends[name]}
    return added


def _completed(rows: Iterable[Mapping[str, Any]], missing: dict[str, Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The ledger with missing commits where they belong: before the first one that was written upon them."""
    left = dict(missing)

    def and_its_missing_parents(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        if row.get("parent") in left:
            yield from and_its_missing_parents(left.pop(row["parent"]))
        yield row

    for row in rows:
        yield from and_its_missing_parents(row)
    yield from left.values()


def _print(found: Inspection, console: Console) -> None:
    table = Table(title=f"checkpoints of {found.run}", title_justify="left")
    for column, side in (
        ("checkpoint", "left"),
        ("ranks", "right"),
        ("size", "right"),
        ("samples", "right"),
        ("state", "left"),
        ("parent", "left"),
        ("attempt", "left"),
    ):
        table.add_column(column, justify="right" if side == "right" else "left", overflow="fold")
    colours = {"valid": "green", "corrupt": "red", "not verified": "yellow"}
    for entry in found.checkpoints:
        table.add_row(
            f"{entry.name} [dim]{entry.notes}[/dim]" if entry.notes else entry.name,
            str(entry.world_size or "?"),
            f"{entry.size_bytes / 2**20:,.1f} MiB",
            "?" if entry.samples_seen is None else f"{entry.samples_seen:,}",
            f"[{colours[entry.status]}]{entry.status}[/]",
            entry.parent or "-",
            entry.attempt or "?",
        )
    console.print(table if found.checkpoints else f"no checkpoints in {found.run}")
    for entry in found.checkpoints:
        for problem in entry.problems or []:
            console.print(f"  {entry.name}: {problem}", style="red", markup=False, highlight=False)
    console.print(f"order   {found.lineage.verdict}", markup=False, highlight=False)
    console.print(f"chain   {_chain(found.lineage)}", markup=False, highlight=False)
    for fork in found.ancestry:
        text = f"{fork['load']} of {fork['checkpoint']} (step {fork['step']} of the run begun as {fork['run']})"
        console.print(f"forked  from {text}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"ledger  {', '.join(f'{count} {event}' for event, count in found.events.items()) or 'empty'}")
    console.print(f"exit    {_exit_text(found.last_exit)}", markup=False, highlight=False)


def _chain(lineage: Lineage) -> str:
    """The newest checkpoint's parents, oldest first; the middle of a long chain is left out."""
    names = ["start", *(commit.checkpoint for commit in lineage.commits)]
    if len(names) > LONGEST_CHAIN:
        left_out = len(names) - LONGEST_CHAIN + 1
        names[2 : 2 + left_out] = [f"... {left_out} more ..."]
    return " > ".join(names)


def _exit_text(last: Exit | None) -> str:
    if last is None:
        return "no word from the newest attempt: it still runs, or it crashed"
    name = ExitCode(last.code).name if last.code in list(ExitCode) else "?"
    return f"{last.code} {name} at step {last.step}, said by rank {last.rank} of attempt {last.attempt}: {last.reason}"
