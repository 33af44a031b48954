"""Kill an ingestion at random moments, in chains, until it has come to its end with the bytes of an undisturbed run.

    python -m tests.data.kills --kills 50 --seed 1

One run is the yardstick: the digits world over real HTTP, from metadata to manifest, on real Ray. Then the same page is
started again and again in another folder; each start is the next victim: its driver, one of its Ray workers or its
raylet is killed with -9, or the driver dies inside a commit, before one of its changes to the disk or in the middle of
a row of the ledger. After each kill: what was committed before stands, nothing of it is asked of the web server again,
and no process stays behind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sdtrain.errors import ExitCode
from tests.data.ground import Grounds, Run, Start, raylet_of, workers_of

LIMIT_SECONDS = 150.0
"""No start may last longer without being struck."""
END_SECONDS = 60.0
"""How long a driver may take to notice that its raylet is dead."""
ORPHAN_SECONDS = 120.0
"""How long processes may outlive their driver: a raylet's agents wait a minute for a dead GCS before they give up."""
AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
COMMITS_BETWEEN = 8
CHANGES_BETWEEN = 120


class Broken(AssertionError):
    """A kill did not end as promised."""


# What is done to a start ----------------------------------------------------------------------------------------------


def plant_a_kill(run: Run, change: int) -> Callable[[], None]:
    """What lets a driver die before its `change`-th change to the output folder: rename, removal, opening to write."""

    def is_change(event: str, arguments: tuple[Any, ...]) -> bool:
        if "progress.json" in str(arguments[0]):
            return False  # it says nothing of the data, and changes every second
        if event == "open":
            return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        return event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")

    count = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not (arguments and str(arguments[0]).startswith(str(run.output)) and is_change(event, arguments)):
            return
        if next(count) == change:
            die(run, f"before {event} {Path(str(arguments[0])).relative_to(run.output)}")

    return lambda: sys.addaudithook(hook)


def plant_a_torn_row(run: Run, name: str, row: int) -> Callable[[], None]:
    """What lets a driver die in the middle of the `row`-th line that it appends to files called `name`."""

    count = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not str(arguments[0]).endswith(name) or "a" not in str(arguments[1]):
            return
        if next(count) == row:
            with open(arguments[0], "ab") as file:
                file.write(b'{"unit": "00003", "inputs": {"03-ded')
            die(run, f"in a row of {Path(arguments[0]).relative_to(run.output)}")

    return lambda: sys.addaudithook(hook)


def die(run: Run, what: str) -> None:
    """End this process as kill -9 does, and leave a note for the table."""
    note(run).write_text(what)
    os.kill(os.getpid(), signal.SIGKILL)


def note(run: Run) -> Path:
    """Where a planted kill says what it did."""
    return run.folder / "struck.txt"


PLANTED: dict[str, Callable[[Run, random.Random], Callable[[], None]]] = {
    "driver, in a commit": lambda run, chance: plant_a_kill(run, chance.randint(1, CHANGES_BETWEEN)),
    "driver, ledger row": lambda run, chance: plant_a_torn_row(run, "ledger.jsonl", chance.randint(1, COMMITS_BETWEEN)),
    "driver, digest row": lambda run, chance: plant_a_torn_row(run, "digests.jsonl", chance.randint(1, 20)),
}
VICTIMS: dict[str, Callable[[int], Sequence[int]]] = {
    "driver": lambda driver: [driver],
    "worker": workers_of,
    "raylet": lambda driver: [] if (raylet := raylet_of(driver)) is None else [raylet],
}
WEIGHTS = {
    "driver": 4,
    "worker": 5,
    "raylet": 4,
    "driver, in a commit": 4,
    "driver, ledger row": 2,
    "driver, digest row": 1,
}


# The campaign ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill and what came of it."""

    chain: int
    victim: str
    stage: str
    what: str
    end: str
    seconds: float


@dataclass
class Campaign:
    """Chains of starts, each killed once or more, until there were enough kills.

    Attributes:
        grounds: The world, served.
        chance: Draws victims and moments.
        words: Further words of the command line.
    """

    grounds: Grounds
    chance: random.Random
    words: Sequence[str] = ()
    console: Console = field(default_factory=Console)
    done: list[Kill] = field(default_factory=list)

    def __post_init__(self) -> None:
        run, began = self.grounds.run(), time.monotonic()
        self.finish(run)
        self.yardstick = run.end()
        self.say(f"the undisturbed run takes {time.monotonic() - began:.0f} s")

    def say(self, text: str) -> None:
        """A line for the reader."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def finish(self, run: Run) -> None:
        """One undisturbed start, up to the end."""
        code = run.finish(*self.words)
        if code != 0:
            raise Broken(f"an undisturbed start ended with {code}:\n{run.tail()}")

    def chain(self, kills: int) -> None:
        """Kill start after start of one run until it is complete."""
        number = 1 + max((kill.chain for kill in self.done), default=0)
        run = self.grounds.run()
        watched = Watched(run)
        while True:
            if len(self.done) >= kills:
                self.finish(run)
                break
            if self.disturb(number, run, watched) == 0:
                break
        watched.look()
        seconds = watched.gone()
        self.compare(run)
        self.say(f"complete, the same files and bytes; the last process was gone {seconds:.0f} s after the end")

    def disturb(self, number: int, run: Run, watched: Watched) -> int:
        """One start, killed once; a killed worker does not end it, so another kill follows. Returns its exit code."""
        victim = self.draw()
        if victim in PLANTED:
            note(run).unlink(missing_ok=True)
            start = run.start(*self.words, prepare=PLANTED[victim](run, self.chance))
            stage = follow(run, start, lambda: False)
            if note(run).exists():
                self.record(number, victim, stage, note(run).read_text(), start, watched)
            return self.ended(run, start)
        start = run.start(*self.words)
        while start.poll() is None:
            found = self.strike(run, start, victim)
            if found is not None:
                stage, what = found
                self.record(number, victim, stage, what, start, watched)
            if victim != "worker":
                break
            victim = self.draw(planted=False)
        return self.ended(run, start)

    def draw(self, *, planted: bool = True) -> str:
        """The next victim."""
        names = [name for name in WEIGHTS if planted or name in VICTIMS]
        return self.chance.choices(names, [WEIGHTS[name] for name in names])[0]

    def strike(self, run: Run, start: Start, victim: str) -> tuple[str, str] | None:
        """Wait for a random moment and kill; the stage and the words for the table, None where the run was over."""
        wanted = rows(run) + self.chance.randrange(COMMITS_BETWEEN)
        stage = follow(run, start, lambda: rows(run) >= wanted)
        moment = time.monotonic() + self.chance.random() * self.chance.choice((0.05, 1.0, 3.0))
        stage = follow(run, start, lambda: time.monotonic() >= moment and bool(VICTIMS[victim](start.pid)))
        pids = VICTIMS[victim](start.pid) if start.poll() is None else []
        if not pids:
            return None
        pid = self.chance.choice(pids)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
        return current(run) or stage, f"process {pid} of {len(pids)}"

    def record(self, number: int, victim: str, stage: str, what: str, start: Start, watched: Watched) -> None:
        """Look after a kill, and write it down."""
        end = "goes on"
        if victim != "worker":
            code = start.wait(END_SECONDS)
            end = {-signal.SIGKILL: "killed", 0: "done", ExitCode.HANG: "exit 6"}.get(code, f"exit {code}")
        watched.look()
        kill = Kill(number, victim, stage, what, end, time.monotonic() - start.began)
        self.done.append(kill)
        self.say(f"{len(self.done)}: chain {number}, {victim}, {stage}, {what}: {end}, after {kill.seconds:.1f} s")

    def ended(self, run: Run, start: Start) -> int:
        """The exit code of a start that was struck, or came to its end unscathed."""
        code = start.wait(LIMIT_SECONDS)
        if code not in (0, -signal.SIGKILL, ExitCode.HANG):
            raise Broken(f"a start ended with {code}:\n{run.tail()}")
        return code

    def compare(self, run: Run) -> None:
        """Hold the end of a chain against the undisturbed run.

        Raises:
            Broken: Files or commits differ.
        """
        ended = run.end()
        mine, theirs = ended.digests, self.yardstick.digests
        odd = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        if odd:
            raise Broken(f"not the same files or bytes: {odd[:5]}")
        if ended.committed != self.yardstick.committed:
            raise Broken("the ledgers hold other commits")

    def table(self) -> Table:
        """What was done and how it ended."""
        table = Table("#", "chain", "victim", "stage", "what", "ended", "seconds")
        for index, kill in enumerate(self.done, 1):
            row = (kill.victim, kill.stage, kill.what, kill.end, f"{kill.seconds:.1f}")
            table.add_row(str(index), str(kill.chain), *row)
        return table


class Watched:
    """What must hold after each kill of a run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.committed: dict[str, dict[str, Any]] = {}
        self.fetched: dict[str, int] = {}

    def look(self) -> None:
        """Compare with the last look.

        Raises:
            Broken: A commit is gone or other, a committed file is not whole, or a committed picture was fetched again.
        """
        committed = self.run.committed()
        lost = [name for name, commit in self.committed.items() if committed.get(name) != commit]
        if lost:
            raise Broken(f"commits were lost or changed: {lost[:5]}")
        if damaged := self.run.damaged():
            raise Broken(f"committed files are not whole: {damaged[:5]}")
        requests = self.run.grounds.requests()
        again = [path for path, count in self.fetched.items() if requests[path] != count]
        if again:
            raise Broken(f"{len(again)} committed pictures were fetched again: {again[:3]}")
        self.committed = committed
        self.fetched |= {path: requests[path] for path in self.run.committed_paths() if path not in self.fetched}

    def gone(self) -> float:
        """How long it takes until no process of any of the run's starts is left.

        Raises:
            Broken: One of them lives on.
        """
        began = time.monotonic()
        while left := self.run.processes():
            if time.monotonic() - began > ORPHAN_SECONDS:
                raise Broken(f"processes were left behind: {left}")
            time.sleep(0.1)
        return time.monotonic() - began


def rows(run: Run) -> int:
    """Commits of all stages, as lines of their ledgers."""
    return sum(path.read_bytes().count(b"\n") for path in run.output.glob("*/ledger.jsonl"))


def current(run: Run) -> str:
    """The stage that is worked on or looked at."""
    stages = run.progress().get("stages", ())
    return next((row["name"] for row in stages if row["state"] in ("running", "checking")), "")


def follow(run: Run, start: Start, is_enough: Callable[[], bool]) -> str:
    """Wait until it is enough, or the start has ended; the last stage that was seen. Kills what stands still."""
    stage, deadline = "start", time.monotonic() + LIMIT_SECONDS
    while start.poll() is None and not is_enough():
        if time.monotonic() > deadline:
            os.kill(start.pid, signal.SIGKILL)
            raise Broken(f"a start in stage {stage} stands still:\n{run.tail()}")
        stage = current(run) or stage
        time.sleep(0.01)
    return stage


def main() -> int:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(prog="python -m tests.data.kills", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how many kill -9 (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="of victims and moments")
    parser.add_argument("--output", type=Path, help="write the figures as JSON, too")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads would be missing in the forked drivers
    console, began = Console(width=150), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sdtrain-kills-") as folder, Grounds(Path(folder)).served() as grounds:
        campaign = Campaign(grounds, random.Random(given.seed), console=console)
        try:
            while len(campaign.done) < given.kills:
                campaign.chain(given.kills)
        except AssertionError as error:
            console.print(campaign.table())
            kept = Path(tempfile.mkdtemp(prefix="sdtrain-broken-"))
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            campaign.say(f"seed {given.seed} broke: {error}\nkept in {kept}")
            return 1
        console.print(campaign.table())
        seconds = time.monotonic() - began
        chains = max((kill.chain for kill in campaign.done), default=0)
        campaign.say(
            f"{len(campaign.done)} kills in {chains} chains in {seconds:.0f} s: nothing committed was lost or fetched "
            "twice, every chain ended with the files and bytes of the undisturbed run, no process was left"
        )
        if given.output:
            figures = {"kills": [vars_of(kill) for kill in campaign.done], "chains": chains, "seconds": round(seconds)}
            given.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def vars_of(kill: Kill) -> dict[str, Any]:
    """A kill as JSON."""
    return {name: getattr(kill, name) for name in kill.__slots__}


if __name__ == "__main__":
    sys.exit(main())
