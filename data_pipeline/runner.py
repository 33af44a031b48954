"""Stages over numbered files: bounded, retried, committed atomically, remembered in a ledger.

How a stage is written stands in `data_pipeline.stage`.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.cluster import Executor, Pool
from data_pipeline.ledger import Commit, DeadLetters, DigestCache, Ledger
from data_pipeline.outcome import Done, Failed, Outcome
from data_pipeline.progress import RunProgress, StageProgress, rows_of
from data_pipeline.stage import Needs, Stage, Unit, Work, numbered_files, one_to_one
from sdtrain.errors import DataError, StorageError
from sdtrain.run_dir import sync_folder

_POLL_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 30.0
_LIST_EVERY_SECONDS = 2.0
_MAX_SHOWN = 5
DEAD_LETTER_FILE = "dead_letter.json"

__all__ = ["Needs", "Plan", "Runner", "Stage", "Unit", "Work", "choose", "numbered_files", "one_to_one"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do for one stage.

    Attributes:
        stage: The stage.
        units: All units, in order.
        inputs: sha256 by input, by unit name, as they were when the plan was made.
        reasons: Why a unit must be worked on, by unit name; units that are up to date are not in it.
        obsolete: Names of committed units that are no longer part of the stage.
    """

    stage: Stage
    units: tuple[Unit, ...]
    inputs: Mapping[str, Mapping[str, str]]
    reasons: Mapping[str, str]
    obsolete: tuple[str, ...]

    @property
    def is_current(self) -> bool:
        """Whether there is nothing to do."""
        return not self.reasons and not self.obsolete

    def summary(self) -> str:
        """One line: what is up to date, and what is to be done for which reasons."""
        done = len(self.units) - len(self.reasons)
        text = f"{self.stage.name}: {done} of {len(self.units)} up to date"
        counts = Counter(self.reasons.values())
        shown = [f"{count} {reason}" for reason, count in counts.most_common(_MAX_SHOWN)]
        if len(counts) > _MAX_SHOWN:
            shown.append(f"{sum(counts.values()) - sum(n for _, n in counts.most_common(_MAX_SHOWN))} more")
        if self.obsolete:
            shown.append(f"{len(self.obsolete)} obsolete, to be removed")
        return f"{text}; {'; '.join(shown)}" if shown else text


class _StageWork:
    """What is still to be done for a stage.

    Attributes:
        waiting: A heap by (not before, number).
        in_flight: How many attempts the pool has.
        attempts: Attempts so far, by unit.
        failures: Units that will not be tried again, with their last outcome.
        shown: Follows it all.
    """

    def __init__(self, todo: Sequence[Unit], shown: StageProgress):
        self.waiting = [(0.0, unit.index, unit) for unit in todo]
        self.in_flight = 0
        self.attempts: Counter[str] = Counter()
        self.failures: list[tuple[Unit, Failed]] = []
        self.shown = shown
        self._listed = 0
        self._list_at = 0.0

    def is_list_due(self) -> bool:
        """Whether there are new failures to be listed; seldom, since the list is written as a whole."""
        if len(self.failures) == self._listed or time.monotonic() < self._list_at:
            return False
        self._listed, self._list_at = len(self.failures), time.monotonic() + _LIST_EVERY_SECONDS
        return True

    def dead_letters(self, stage_name: str) -> list[dict[str, Any]]:
        """The failures as rows of the dead-letter list, in the units' order."""
        return [
            {
                "stage": stage_name,
                "unit": unit.name,
                "inputs": [str(path) for path in unit.inputs],
                "error": failed.message,
                "traceback": failed.details,
                "attempts": self.attempts[unit.name],
            }
            for unit, failed in sorted(self.failures, key=lambda item: item[0].index)
        ]


class Runner:
    """Brings stages up to date, one after another.

    Args:
        output: The folder that all stages write under; holds the lock, the digests and the dead-letter list.
        executor: Gives each stage its workers.
        max_attempts: How often a unit is tried before it goes to the dead-letter list.
        backoff_seconds: Wait before the second attempt; doubles with each further one, up to 30 s.
        console: Where progress and reports are printed.
    """

    def __init__(
        self,
        *,
        output: Path,
        executor: Executor,
        max_attempts: int = 3,
        backoff_seconds: float = 1.0,
        console: Console | None = None,
    ):
        self._output = output
        self._executor = executor
        self._max_attempts = max_attempts
        self._backoff_seconds = backoff_seconds
        self._console = console or Console()
        self._digests = DigestCache(output / "digests.jsonl")
        self.dead_letters = DeadLetters(output / DEAD_LETTER_FILE)

    def run(self, stages: Sequence[Stage], only: Sequence[str] = ()) -> None:
        """Bring `stages`, or those that `only` names, up to date.

        Raises:
            DataError: Units failed for good (listed in the dead-letter file), a stage before the chosen ones is not up
                to date, or another run works on the same folder.
            PeerLostError: Ray died, or every node that could go on.
            StorageError: The disk is full or refuses writes.
        """
        chosen = choose(stages, only)
        last = max(index for index, stage in enumerate(stages) if stage.name in chosen)
        folders = {stage.name: stage.folder for stage in stages}
        with self._locked(), RunProgress(self._output, folders, sorted(chosen)) as progress:
            _sweep(self._output)
            for stage in stages[: last + 1]:
                if stage.name in chosen:
                    progress.tell(stage.name, {"state": "checking"})
                plan = self.plan(stage)
                if stage.name in chosen:
                    self._run_stage(plan, progress)
                elif not plan.is_current:
                    raise DataError(f"stage {stage.name} is not up to date ({plan.summary()}); run it as well")

    def plan(self, stage: Stage) -> Plan:
        """Compare a stage's units with its ledger."""
        ledger = Ledger(stage.folder)
        units = tuple(stage.units())
        inputs = {unit.name: self._input_digests(unit) for unit in units}
        reasons = {}
        for unit in units:
            reason = self._reason(stage, unit, inputs[unit.name], ledger.get(unit.name))
            if reason is not None:
                reasons[unit.name] = reason
        planned = {unit.name for unit in units}
        return Plan(stage, units, inputs, reasons, tuple(sorted(_present_units(stage.folder, ledger) - planned)))

    def _reason(self, stage: Stage, unit: Unit, inputs: Mapping[str, str], commit: Commit | None) -> str | None:
        """Why a unit must be worked on; None where its commit still holds."""
        if commit is None:
            return "new"
        if commit.version != stage.version:
            return f"of another version ({commit.version} -> {stage.version})"
        changes = _differences(dict(commit.facts), _facts(stage, unit))
        if changes:
            return f"with changed settings ({', '.join(changes)})"
        if list(inputs.values()) != list(commit.inputs.values()):
            return "with changed input"
        for name, sha256 in commit.files.items():
            path = stage.folder / name
            if not path.exists():
                return "with a missing output"
            if self._digests.sha256(path) != sha256:
                return "with a damaged output"
        return None

    def _input_digests(self, unit: Unit) -> dict[str, str]:
        digests = {}
        for path in unit.inputs:
            name = path.relative_to(self._output) if path.is_relative_to(self._output) else path
            digests[str(name)] = self._digests.sha256(path)
        return digests

    def _run_stage(self, plan: Plan, progress: RunProgress) -> None:
        stage = plan.stage
        self._console.print(plan.summary(), highlight=False, markup=False, soft_wrap=True)
        stage.folder.mkdir(parents=True, exist_ok=True)
        _sweep(stage.folder)
        ledger = Ledger(stage.folder)
        _remove_units(stage.folder, ledger, plan.obsolete)
        self._work(plan, ledger, progress)
        self.dead_letters.replace(stage.name, [])
        stats = [_commit_of(ledger, unit).stats for unit in plan.units]
        report = stage.report(stats)
        if report is not None:
            self._console.print(report, highlight=False, markup=False, soft_wrap=isinstance(report, str))
        progress.tell(stage.name, {"state": "done"})

    def _work(self, plan: Plan, ledger: Ledger, progress: RunProgress) -> None:
        """Keep the stage's workers busy until every unit is committed or dead."""
        stage, todo = plan.stage, [unit for unit in plan.units if unit.name in plan.reasons]
        standing = [ledger.get(unit.name) for unit in plan.units if unit.name not in plan.reasons]
        shown = StageProgress(
            self._console,
            stage.name,
            len(plan.units),
            len(standing),
            rows=sum(rows_of(commit.stats) for commit in standing if commit is not None),
            tell=lambda facts, at_once: progress.tell(stage.name, {"state": "running", **facts}, at_once=at_once),
        )
        if not todo:
            progress.tell(stage.name, shown.facts())
            return
        work = _StageWork(todo, shown)
        with ExitStack() as stack:
            pool = stack.enter_context(self._executor.pool(stage, len(todo)))
            stack.enter_context(shown)
            while work.waiting or work.in_flight:
                self._submit(pool, stage, work)
                for unit, outcome in pool.wait(_POLL_SECONDS):
                    self._settle(plan, ledger, work, unit, outcome)
                shown.beat()
                if any(outcome.is_storage for _, outcome in work.failures):
                    break  # every other unit would meet the same full disk
                if work.is_list_due():
                    self.dead_letters.replace(stage.name, work.dead_letters(stage.name))
        _sweep(stage.folder)
        if work.failures:
            self._give_up(stage, work, len(plan.units))

    def _settle(self, plan: Plan, ledger: Ledger, work: _StageWork, unit: Unit, outcome: Outcome) -> None:
        """Commit what is done; try again what may heal; bury the rest."""
        attempt = work.attempts[unit.name]
        work.in_flight -= 1
        if isinstance(outcome, Done):
            self._commit(plan, unit, outcome, ledger, attempt)
            work.shown.advance(unit.name, rows=rows_of(outcome.stats))
        elif outcome.is_final or attempt >= self._max_attempts:
            work.failures.append((unit, outcome))
            work.shown.advance(unit.name, failed=True)
        else:
            delay = min(self._backoff_seconds * 2 ** (attempt - 1), _MAX_BACKOFF_SECONDS)
            heapq.heappush(work.waiting, (time.monotonic() + delay, unit.index, unit))
            work.shown.retry(unit.name)

    def _submit(self, pool: Pool, stage: Stage, work: _StageWork) -> None:
        """Fill the pool with units whose time has come."""
        while work.waiting and work.in_flight < pool.capacity and work.waiting[0][0] <= time.monotonic():
            unit = heapq.heappop(work.waiting)[2]
            work.attempts[unit.name] += 1
            work.in_flight += 1
            work.shown.start(unit.name, work.attempts[unit.name])
            pool.submit(unit, _temporary_folder(stage.folder, unit, work.attempts[unit.name]))

    def _commit(self, plan: Plan, unit: Unit, done: Done, ledger: Ledger, attempt: int) -> None:
        """Rename the unit's files into place, then write the ledger row: only the row says that they count."""
        stage = plan.stage
        temporary = _temporary_folder(stage.folder, unit, attempt)
        previous = ledger.get(unit.name)
        try:
            for name in done.files:
                (temporary / name).replace(stage.folder / name)
            for name in set(previous.files if previous else ()) - set(done.files):
                (stage.folder / name).unlink(missing_ok=True)
            temporary.rmdir()
            sync_folder(stage.folder)
            for name, sha256 in done.files.items():
                self._digests.remember(stage.folder / name, sha256)
            commit = Commit(
                unit=unit.name,
                inputs=plan.inputs[unit.name],
                facts=_facts(stage, unit),
                version=stage.version,
                files=done.files,
                stats=done.stats,
                seconds=round(done.seconds, 3),
            )
            ledger.add(commit)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise StorageError(f"{stage.folder}: cannot commit unit {unit.name}: {error.strerror}") from error

    def _give_up(self, stage: Stage, work: _StageWork, total: int) -> None:
        """Say what failed, and stop.

        Raises:
            DataError: Always, unless the disk is at fault.
            StorageError: The disk is full or refuses writes.
        """
        failures = sorted(work.failures, key=lambda item: item[0].index)
        full = next(((unit, failed) for unit, failed in failures if failed.is_storage), None)
        if full is not None:
            raise StorageError(
                f"{stage.folder}: cannot write unit {full[0].name}: {full[1].message}; make room, run again"
            )
        self.dead_letters.replace(stage.name, work.dead_letters(stage.name))
        lines = [f"  {unit.name}: {failed.message}" for unit, failed in failures[:_MAX_SHOWN]]
        if len(failures) > _MAX_SHOWN:
            lines.append(f"  and {len(failures) - _MAX_SHOWN} more")
        raise DataError(
            f"stage {stage.name}: {len(failures)} of {total} units failed\n"
            + "\n".join(lines)
            + f"\nall are listed in {self.dead_letters.path}; running again tries only what is missing"
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep a second run out of the same folder; the lock ends with the process, however it ends."""
        self._output.mkdir(parents=True, exist_ok=True)
        with open(self._output / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{self._output}: another run works on this folder; wait for it or stop it") from None
            yield


def choose(stages: Sequence[Stage], only: Sequence[str]) -> set[str]:
    """Names of the stages that `only` asks for (`dedup` takes `dedup-split` too); all where it is empty.

    Raises:
        DataError: A name fits no stage.
    """
    chosen = set()
    for wanted in only:
        fits = {stage.name for stage in stages if stage.name == wanted or stage.name.startswith(f"{wanted}-")}
        if not fits:
            names = ", ".join(stage.name for stage in stages)
            raise DataError(f"there is no stage {wanted!r}; stages of this configuration: {names}")
        chosen |= fits
    return chosen if only else {stage.name for stage in stages}


def _temporary_folder(folder: Path, unit: Unit, attempt: int) -> Path:
    return folder / f".tmp-{unit.name}-{os.getpid()}-{attempt}"


def _sweep(folder: Path) -> None:
    """Remove what killed runs and failed attempts left behind: workers' folders, files that were not renamed yet."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.tmp"):  # of sdtrain.run_dir.write_atomically
        path.unlink(missing_ok=True)


def _present_units(folder: Path, ledger: Ledger) -> set[str]:
    """Units of the ledger, and numbered files that a killed run renamed but did not record."""
    strays = {path.name.split(".")[0] for path in folder.glob("[0-9]*.*")}
    return set(ledger.commits()) | {name for name in strays if name.isdecimal()}


def _remove_units(folder: Path, ledger: Ledger, names: Sequence[str]) -> None:
    """Remove units with all their files; the folder, which may hold a million of them, is listed once."""
    if not names:
        return
    obsolete = set(names)
    for path in folder.glob("[0-9]*.*"):
        if path.name.partition(".")[0] in obsolete:
            path.unlink()
    for name in names:
        ledger.remove(name)


def _commit_of(ledger: Ledger, unit: Unit) -> Commit:
    commit = ledger.get(unit.name)
    assert commit is not None, f"unit {unit.name} ended neither committed nor failed"
    return commit


def _facts(stage: Stage, unit: Unit) -> dict[str, Any]:
    """The facts of a commit's key, as they look after a round trip through JSON."""
    return json.loads(json.dumps({**stage.config_facts(), **unit.facts}))


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key before -> after` for every leaf that differs."""
    found = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} {old} -> {new}")
    return found
