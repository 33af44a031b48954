"""`sdtrain inspect RUN --seen KEYS`: which steps of a run were trained on given samples.

Nothing is looked up in the run but its ledger: the order of samples is a pure function of manifest and seed, so a
sample's positions follow, and the ledger says which positions were trained on, by whom, and whether that survived.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sdtrain import build
from sdtrain.checkpoints.manifest import list_checkpoints, step_of
from sdtrain.config.load import load_training
from sdtrain.config.run import TrainingConfig
from sdtrain.data.manifest import Manifest
from sdtrain.data.plan import order_of
from sdtrain.data.storage import is_url
from sdtrain.errors import ConfigError, DataError
from sdtrain.evaluation.lineage import trace
from sdtrain.evaluation.run_story import read_attempts
from sdtrain.run_dir import RunDir

_SHOWN_STEPS = 8
_SHOWN_SAMPLES = 20
_SPLIT = "train"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive steps of one attempt, and the positions that they took.

    Attributes:
        first: First position.
        last: The position after the last one.
        step: Finished steps at its end.
        attempt: Who trained them.
        survives: Whether they are part of what the next start would resume from.
    """

    first: int
    last: int
    step: int
    attempt: str
    survives: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """Where a run was trained on one sample.

    Attributes:
        key: The sample.
        steps: Steps of the surviving lineage, counted as in `metrics.jsonl`: the weights have seen it.
        lost_steps: Steps that were rolled back, lost to a kill, or are not saved yet.
    """

    key: str
    steps: tuple[int, ...]
    lost_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Exposure:
    """What a run has seen of some samples.

    Attributes:
        run: The run's folder.
        manifest: The data set that it was trained on.
        manifest_sha256: Its digest.
        is_certain: Whether a checkpoint confirms that this is the manifest.
        last_step: The last step that is known of.
        seen: Samples that were trained on, in the order in which they were asked for.
        not_yet: Samples of the training split that no step has reached, or that were masked at every start.
        absent: Samples that are not in the training split of this data set.
        forked_from: The checkpoint of another run that it began with, which may have seen them too; None without one.
    """

    run: str
    manifest: str
    manifest_sha256: str
    is_certain: bool
    last_step: int
    seen: tuple[Seen, ...]
    not_yet: tuple[str, ...]
    absent: tuple[str, ...]
    forked_from: str | None


def show_seen(run: Path, keys: Path, *, as_json: bool = False, console: Console | None = None) -> Exposure:
    """Print which steps of a run were trained on the samples whose keys a file lists, one in each line.

    Raises:
        ConfigError: `run` is no run's folder, or the file cannot be read.
        DataError: The data set that it was trained on is gone or damaged.
    """
    try:
        wanted = list(dict.fromkeys(line for line in keys.read_text(encoding="utf-8").split("\n") if line))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{keys}: cannot be read ({error}); give a text file with one sample key in each line"
        ) from None
    found = exposure(run, wanted)
    console = console or Console()
    if as_json:
        console.print(json.dumps(asdict(found), indent=2), markup=False, highlight=False, soft_wrap=True)
    else:
        _print(found, console)
    return found


def exposure(run: Path, keys: Sequence[str]) -> Exposure:
    """What a run has seen of the samples with these keys.

    Raises:
        ConfigError: `run` is no run's folder.
        DataError: The data set that it was trained on is gone or damaged.
    """
    folder = RunDir(run)
    if not (folder.ledger.is_file() and folder.config.is_file()):
        raise ConfigError(
            f"{run}: holds no {folder.ledger.name} and {folder.config.name} of a run; give the run_dir of a "
            "`sdtrain train`"
        )
    config = load_training(folder.config)
    manifest, is_certain = _manifest_of(folder, config)
    stretches = list(stretches_of(folder, config.data.batch_size))
    places = _places(manifest, frozenset(keys))
    order = order_of(
        manifest,
        _SPLIT,
        seed=config.seed,
        window_shards=config.data.window_shards,
        batch_size=config.data.batch_size,
    )
    end = max((stretch.last for stretch in stretches), default=0)
    positions = order.positions_of((place for found in places.values() for place in found), end)
    honoured = _honoured(folder, manifest)
    seen = [
        _seen(
            key, (at for place in places[key] for at in positions[place]), stretches, honoured, config.data.batch_size
        )
        for key in keys
        if key in places
    ]
    rows = folder.ledger_rows()
    forks = [row["forked_from"] for row in rows if row.get("event") == "start" and row.get("forked_from")]
    return Exposure(
        run=str(run),
        manifest=str(manifest.path),
        manifest_sha256=manifest.sha256,
        is_certain=is_certain,
        last_step=max((stretch.step for stretch in stretches), default=0),
        seen=tuple(one for one in seen if one.steps or one.lost_steps),
        not_yet=tuple(one.key for one in seen if not (one.steps or one.lost_steps)),
        absent=tuple(key for key in keys if key not in places),
        forked_from=str(forks[-1]["checkpoint"]) if forks else None,
    )


def _manifest_of(run: RunDir, config: TrainingConfig) -> tuple[Manifest, bool]:
    """The manifest that a run was trained on, and whether a checkpoint confirms it.

    One that was superseded by a new build of the data set stands beside the new one under its digest.
    """
    known = {
        checkpoint.manifest.get("identity", {}).get("data_manifest_sha256")
        for checkpoint in list_checkpoints(run.checkpoints)
    }
    known.discard(None)
    manifest = build.load_manifest(config.data)
    if not known or manifest.sha256 in known:
        return manifest, bool(known)
    wanted = str(sorted(known)[0])
    if not is_url(manifest.path):
        path = Path(manifest.path)
        older = path.with_name(f"{path.stem}.superseded-{wanted[:12]}{path.suffix}")
        if older.is_file():
            return Manifest.load(older), True
    raise DataError(
        f"{manifest.path}: has sha256 {manifest.sha256}, the run {run.path} was trained on {wanted}; put that manifest "
        "back to learn which of its samples the run has seen"
    )


def stretches_of(run: RunDir, batch_size: int) -> Iterator[Stretch]:
    """All that a run was ever trained on, by its ledger and, behind the last commit, by its metrics."""
    rows = run.ledger_rows()
    last_steps = {attempt.name: attempt.last_step for attempt in read_attempts(run)}
    alive = {(commit.checkpoint, commit.attempt, commit.first, commit.last) for commit in trace(rows).commits}
    ends: dict[str, tuple[int, int]] = {}  # checkpoint -> finished steps, and the position that the next one begins at
    attempt, step, position = "", 0, 0

    def unsaved() -> Iterator[Stretch]:
        steps = last_steps.get(attempt, 0) - step
        if steps > 0:
            yield Stretch(position, position + steps * batch_size, step + steps, attempt, survives=False)

    for row in rows:
        match row.get("event"):
            case "start":
                yield from unsaved()
                attempt = str(row["attempt"])
                unknown = (row["step"], row["step"] * batch_size + position - step * batch_size)
                step, position = ends.get(row.get("resumed_from") or "", unknown if row["step"] else (0, 0))
            case "rollback":
                back, end = step_of(row["checkpoint"]), max(int(last) for _, last in row["left_out"])
                steps = (end - int(row["position"])) // batch_size
                yield Stretch(int(row["position"]), end, back + steps, attempt, survives=False)
                step, position = ends[row["checkpoint"]] = (back, end)
            case "commit":
                name, by = str(row["checkpoint"]), str(row.get("attempt"))
                first, last = int(row["first_position"]), int(row["last_position"])
                yield Stretch(first, last, row["step"], by, survives=(name, by, first, last) in alive)
                ends[name] = (row["step"], last)
                if by == attempt:
                    step, position = ends[name]
    yield from unsaved()


def _places(manifest: Manifest, keys: frozenset[str]) -> dict[str, list[tuple[int, int]]]:
    """(shard, sample) of each key in the training split; several where shards repeat a key."""
    places: dict[str, list[tuple[int, int]]] = {}
    for number, shard in enumerate(manifest.split(_SPLIT)):
        with manifest.open_shard(shard) as reader:
            for sample, key in enumerate(reader.keys):
                if key in keys:
                    places.setdefault(key, []).append((number, sample))
    return places


def _honoured(run: RunDir, manifest: Manifest) -> dict[str, frozenset[str]]:
    """The keys that every attempt had masked from its start on."""
    starts = [row for row in run.ledger_rows() if row.get("event") == "start"]
    return {row["attempt"]: manifest.takedown.as_of(row.get("takedown_sha256")).keys for row in starts}


def _seen(
    key: str,
    positions: Iterable[int],
    stretches: Sequence[Stretch],
    honoured: Mapping[str, frozenset[str]],
    batch_size: int,
) -> Seen:
    firsts, lasts = (np.array([getattr(one, name) for one in stretches], np.int64) for name in ("first", "last"))
    steps: set[int] = set()
    lost: set[int] = set()
    for position in positions:
        for number in np.flatnonzero((firsts <= position) & (position < lasts)).tolist():
            stretch = stretches[number]
            if key not in honoured.get(stretch.attempt, ()):
                step = stretch.step - (stretch.last - 1 - position) // batch_size
                (steps if stretch.survives else lost).add(step)
    return Seen(key, tuple(sorted(steps)), tuple(sorted(lost - steps)))


# Printing -----------------------------------------------------------------------------------------------------------


def _print(found: Exposure, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"run     {found.run}, {found.last_step:,} steps known")
    say(
        f"data    {found.manifest}, sha256 {found.manifest_sha256}"
        + ("" if found.is_certain else " (no checkpoint says so)")
    )
    if found.seen:
        table = Table("sample", "seen at steps", "seen at steps that did not survive, or are not saved yet")
        for one in found.seen[:_SHOWN_SAMPLES]:
            table.add_row(one.key, _steps_text(one.steps), _steps_text(one.lost_steps))
        console.print(table)
        if len(found.seen) > _SHOWN_SAMPLES:
            say(f"        and {len(found.seen) - _SHOWN_SAMPLES} more; --json lists all")
    say(
        f"seen    {len(found.seen):,} samples; {len(found.not_yet):,} were not reached or were masked, "
        f"{len(found.absent):,} are not in its training split"
    )
    if found.forked_from is not None:
        say(f"origin  it began with weights of {found.forked_from}: look there as well")


def _steps_text(steps: Sequence[int]) -> str:
    more = f" and {len(steps) - _SHOWN_STEPS} more" if len(steps) > _SHOWN_STEPS else ""
    return ", ".join(map(str, steps[:_SHOWN_STEPS])) + more or "-"
