"""`make faults`: kill and damage runs at random moments, in chains, until a table says how each fault ended.

    python -m tests.faults.campaign --kills 200 --seed 1

One run is the yardstick: two ranks of the real trainer, undisturbed. Then the same page is started again and again;
every start is the next victim, until the run has come to its end and must hold the same bits as the yardstick. Now and
then a rank meets an error of its own instead: in reading, in a loss, in a save, in a load, in a validation. Between two
starts a checkpoint may be damaged, or the next start may have another number of ranks; such a chain must see the same
samples and end within 1e-4.

Ranks are forked from this process, which has imported everything: a cold start of two ranks would take twelve seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from rich.console import Console
from rich.table import Table

from sdtrain import cli
from sdtrain.checkpoints.manifest import Checkpoint, list_checkpoints
from sdtrain.checkpoints.protocol import verify
from sdtrain.checkpoints.recut import KINDS, assemble
from sdtrain.errors import ExitCode
from sdtrain.run_dir import RunDir
from sdtrain.training.engine import import_deepspeed
from sdtrain.training.metrics import read_metrics
from tests.faults.planted import PLACES, plant
from tests.support import free_port, make_latent_manifest, tiny_page

STEPS = 60
LIMIT_SECONDS = 60.0
"""No start may last longer, whatever was done to it."""
STALL_SECONDS = 6.0
"""What a stopped rank may cost before its watchdog acts."""
TOLERANCE = 1e-4
MARK = "SDTRAIN_FAULT_CAMPAIGN"


class Broken(AssertionError):
    """A fault did not end as promised."""


@dataclass
class Start:
    """One start of a run: its rank processes and how they ended."""

    pids: list[int]
    began: float = field(default_factory=time.monotonic)
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self) -> None:
        """Wait for the end.

        Raises:
            Broken: It did not come within `LIMIT_SECONDS`.
        """
        while not self.poll():
            if time.monotonic() - self.began > LIMIT_SECONDS:
                for pid in set(self.pids) - set(self.codes):
                    os.kill(pid, signal.SIGKILL)
                raise Broken(f"a start was not over after {LIMIT_SECONDS:.0f} s")
            time.sleep(0.01)


class Ground:
    """A folder with data, a page, and one run that is started again and again."""

    def __init__(self, folder: Path, manifest: Path) -> None:
        folder.mkdir()
        trainer = {"max_steps": STEPS, "timeout_seconds": 30.0, "hang_timeout_seconds": STALL_SECONDS}
        self.page = tiny_page(
            folder,
            manifest,
            trainer=trainer,
            checkpoint={"every_steps": 2, "keep_last": 3},
            data={"batch_size": 4},
            validation={"every_steps": 10, "num_samples": 8, "batch_size": 2},
        )
        self.run = RunDir(folder / "run")
        self.token = f"{os.getpid()}-{folder.name}"
        self._log = folder / "ranks.log"

    def start(self, world_size: int, planted: Mapping[int, tuple[str, int]] = MappingProxyType({})) -> Start:
        """Fork the ranks of one start; `planted` gives a rank the place and the call of its error."""
        sys.stdout.flush()
        port = free_port()
        return Start([self._fork(rank, world_size, port, planted.get(rank)) for rank in range(world_size)])

    def _fork(self, rank: int, world_size: int, port: int, planted: tuple[str, int] | None) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", MARK: self.token})
            if planted:
                plant(*planted)
            cli.main(["train", str(self.page)])
        except SystemExit as left:
            os._exit(int(left.code or 0))
        finally:
            os._exit(ExitCode.BUG)

    def orphans(self) -> list[str]:
        """Command lines of processes that a start left behind."""
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{MARK}={self.token}".encode() in environment.read_bytes().split(b"\0"):
                    found.append((environment.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def committed(self) -> list[Checkpoint]:
        """Checkpoints that stand, newest first."""
        return sorted(list_checkpoints(self.run.checkpoints), key=lambda one: one.step, reverse=True)

    def newest_step(self) -> int:
        """Step of the newest checkpoint; 0 if there is none."""
        return max((one.step for one in self.committed()), default=0)

    def is_done(self) -> bool:
        """Whether the run is complete."""
        word = self.run.read_exit()
        return word is not None and word.code == 0 and word.step == STEPS

    def tail(self) -> str:
        """The last words of the ranks."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-4000:] if self._log.exists() else ""


# Faults: each acts on a start that runs, or on what lies between two starts -------------------------------------------


def kill_one(ranks: Sequence[int], chance: random.Random) -> None:
    """kill -9 of one rank."""
    os.kill(chance.choice(ranks), signal.SIGKILL)


def kill_all(ranks: Sequence[int], chance: random.Random) -> None:
    """kill -9 of every rank, as a power cut."""
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)


def stop_one(ranks: Sequence[int], chance: random.Random) -> None:
    """SIGSTOP of one rank, as a hung driver; one without its watchdog yet could be ended by a launcher alone."""
    victim = chance.choice(ranks)
    children = Path(f"/proc/{victim}/task/{victim}/children")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        deadline = time.monotonic() + 10
        while not children.read_text().split() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(victim, signal.SIGSTOP)


def terminate(ranks: Sequence[int], chance: random.Random) -> None:
    """SIGTERM of every rank, as a scheduler that wants the node."""
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)


RUNNING: dict[str, tuple[Callable[[Sequence[int], random.Random], None], float]] = {
    "kill -9 of one rank": (kill_one, 12),
    "kill -9 of all ranks": (kill_all, 5),
    "SIGTERM of all ranks": (terminate, 2),
    "SIGSTOP of one rank": (stop_one, 1),
}
"""What is done to a running start, and how often beside the others."""


def a_file(checkpoint: Checkpoint, chance: random.Random) -> Path:
    """Some tensor file of a checkpoint."""
    return chance.choice(sorted(checkpoint.path.glob("*.safetensors")))


def flip_a_bit(checkpoint: Checkpoint, chance: random.Random) -> None:
    """One bit of one file."""
    path = a_file(checkpoint, chance)
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncate(checkpoint: Checkpoint, chance: random.Random) -> None:
    """The end of one file is missing."""
    path = a_file(checkpoint, chance)
    os.truncate(path, chance.randrange(path.stat().st_size))


def delete(checkpoint: Checkpoint, chance: random.Random) -> None:
    """One file is missing."""
    a_file(checkpoint, chance).unlink()


def swap(checkpoint: Checkpoint, chance: random.Random) -> None:
    """Two files of one kind have changed places."""
    one, other = sorted(checkpoint.path.glob("denoiser.*.safetensors"))[:2]
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


DAMAGES: dict[str, Callable[[Checkpoint, random.Random], None]] = {
    "a flipped bit": flip_a_bit,
    "a truncated file": truncate,
    "a deleted file": delete,
    "swapped rank files": swap,
}


# The campaign ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What was done and what came of it."""

    done: Counter[str] = field(default_factory=Counter)
    codes: dict[str, Counter[str]] = field(default_factory=dict)
    phases: Counter[str] = field(default_factory=Counter)
    lost_steps: list[int] = field(default_factory=list)
    chains: Counter[str] = field(default_factory=Counter)

    def note(self, fault: str, word: str, phase: str = "") -> None:
        """Count one fault and how the start ended."""
        self.done[fault] += 1
        self.codes.setdefault(fault, Counter())[word] += 1
        if phase:
            self.phases[phase] += 1

    @property
    def kills(self) -> int:
        """How many kill -9 there were."""
        return sum(count for fault, count in self.done.items() if fault.startswith("kill"))


def state(run: RunDir) -> dict[str, torch.Tensor]:
    """Master, moments and EMA at the end of a run, whole."""
    checkpoint = Checkpoint.open(run.checkpoints / f"step-{STEPS:08d}")
    return {f"{kind}/{name}": one for kind in KINDS for name, one in assemble(checkpoint, "denoiser", kind).items()}


def losses(run: RunDir) -> dict[int, float]:
    """Loss of every step of the surviving lineage."""
    return {row["step"]: row["train/loss"] for row in read_metrics(run.metrics) if "train/loss" in row}


def compare(run: RunDir, yardstick: RunDir, *, exactly: bool) -> None:
    """Hold the end of a chain against the undisturbed run.

    Raises:
        Broken: It ended elsewhere.
    """
    mine, theirs = losses(run), losses(yardstick)
    if mine.keys() != theirs.keys():
        raise Broken(f"steps {sorted(mine.keys() ^ theirs.keys())} are logged in one run only")
    found, expected = state(run), state(yardstick)
    if exactly:
        odd = [name for name in expected if not torch.equal(expected[name], found[name])]
        odd += [f"loss of step {step}" for step in theirs if mine[step] != theirs[step]]
        if odd:
            raise Broken(f"not the same bits: {odd[:5]}")
        return
    far = [step for step in theirs if abs(mine[step] - theirs[step]) > TOLERANCE * abs(theirs[step])]
    error = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).norm()
    size = torch.cat([one.flatten() for one in expected.values()]).norm()
    if far or error > TOLERANCE * size:
        raise Broken(f"losses of steps {far[:5]} and the state ({error / size:.1e}) are too far from the yardstick's")


def check_ledger(run: RunDir) -> None:
    """Every sample once: the commits of the surviving lineage join without gap or overlap.

    Raises:
        Broken: They do not.
    """
    by_name = {row["checkpoint"]: row for row in run.ledger_rows() if row["event"] == "commit"}
    position, name = STEPS * 4, f"step-{STEPS:08d}"
    while name is not None:
        row = by_name[name]
        if row["last_position"] != position:
            raise Broken(f"{name} ends at position {row['last_position']}, its successor begins at {position}")
        position, name = row["first_position"], row["parent"]
    if position != 0:
        raise Broken(f"the lineage begins at position {position}")


class Campaign:
    """Chains of starts, each disturbed once, until enough kills were made."""

    def __init__(self, folder: Path, *, seed: int, console: Console) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.console = console
        self.tally = Tally()
        self.manifest = make_latent_manifest(folder / "data", train=40, validation=8)
        self.yardstick = Ground(folder / "yardstick", self.manifest)
        began = time.monotonic()
        self.finish(self.yardstick, 2)
        self.seconds = time.monotonic() - began
        console.print(f"the undisturbed run takes {self.seconds:.1f} s", highlight=False)

    def finish(self, ground: Ground, world_size: int) -> None:
        """One undisturbed start, up to the end."""
        start = ground.start(world_size)
        start.wait()
        if not ground.is_done():
            raise Broken(f"an undisturbed start ended with {sorted(start.codes.values())}:\n{ground.tail()}")

    def chain(self, number: int, *, kills: int) -> None:
        """Disturb start after start of one run until it is complete."""
        resizes = self.chance.random() < 0.25
        ground = Ground(self.folder / f"chain-{number}", self.manifest)
        fruitless = 0
        while not ground.is_done():
            world_size = self.chance.choice((1, 2)) if resizes else 2
            before = ground.newest_step()
            if self.tally.kills >= kills:
                self.finish(ground, world_size)
                break
            in_training = fruitless >= 2 or self.chance.random() < 0.75  # three starts for nothing are refused
            if fruitless < 2 and self.chance.random() < 0.15:
                self._err(ground, world_size)
            else:
                self._disturb(ground, world_size, wait_for_commit=in_training)
            fruitless = 0 if ground.newest_step() > before else fruitless + 1
            if self.chance.random() < 0.15:
                self._damage(ground)
        compare(ground.run, self.yardstick.run, exactly=not resizes)
        check_ledger(ground.run)
        self.tally.chains["2 ranks or 1: within 1e-4" if resizes else "2 ranks: the same bits"] += 1
        shutil.rmtree(ground.page.parent)

    def _disturb(self, ground: Ground, world_size: int, *, wait_for_commit: bool) -> None:
        """Start, wait for a random moment, strike, and see that everything is over and nothing is lost."""
        fault = self.chance.choices([*RUNNING], [weight for _, weight in RUNNING.values()])[0]
        standing = {one.path.name for one in ground.committed()}
        newest = ground.newest_step()
        start = ground.start(world_size)
        if wait_for_commit:
            while ground.newest_step() <= newest and not start.poll():
                time.sleep(0.005)
            moment = time.monotonic() + self.chance.random() * self.seconds / 4
        else:
            moment = start.began + self.chance.random() * self.seconds
        while time.monotonic() < moment and not start.poll():
            time.sleep(0.002)
        alive = [pid for pid in start.pids if pid not in start.codes]
        if start.poll() or len(alive) < world_size:
            start.wait()  # it was over before it was struck: no fault, and the run may be complete
            return
        RUNNING[fault][0](alive, self.chance)
        start.wait()
        self._look_after(ground, fault, standing, newest)

    def _err(self, ground: Ground, world_size: int) -> None:
        """Start with an error planted in one rank, and see that all of them leave."""
        place = self.chance.choice([*PLACES])
        standing = {one.path.name for one in ground.committed()}
        newest = ground.newest_step()
        start = ground.start(
            world_size, {self.chance.randrange(world_size): (place, self.chance.randrange(PLACES[place][2]))}
        )
        start.wait()
        self._look_after(ground, f"error of one rank: {place}", standing, newest)

    def _look_after(self, ground: Ground, fault: str, standing: set[str], newest: int) -> None:
        word = ground.run.read_exit()
        self.tally.note(fault, "no word" if word is None else f"{word.code} {ExitCode(word.code).name}", _phase(ground))
        deadline = time.monotonic() + 10
        while (left := ground.orphans()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            raise Broken(f"{fault}: processes were left behind: {left}")
        if ground.newest_step() < newest or (standing and not ground.committed()):
            raise Broken(f"{fault}: {standing} stood before, {[one.path.name for one in ground.committed()]} after")
        problems = {one.path.name: verify(one) for one in ground.committed() if not one.marked_corrupt}
        torn = {name: found for name, found in problems.items() if found and name not in standing}
        if torn:
            raise Broken(f"{fault}: a committed checkpoint does not verify: {torn}")
        reached = max(losses(ground.run), default=0)
        self.tally.lost_steps.append(max(0, reached - ground.newest_step()))

    def _damage(self, ground: Ground) -> None:
        """Damage the newest checkpoint, if there is another one to fall back on."""
        whole = [one for one in ground.committed() if not verify(one)]
        if len(whole) < 2 or ground.is_done():
            return
        kinds = [kind for kind in DAMAGES if whole[0].world_size > 1 or kind != "swapped rank files"]
        kind = self.chance.choice(kinds)
        DAMAGES[kind](whole[0], self.chance)
        found = verify(whole[0])
        if not found:
            raise Broken(f"{kind} in {whole[0].path} goes unnoticed")
        self.tally.note(kind, "noticed, the older one used")

    def table(self) -> Table:
        """What was done, how often, and how the starts ended."""
        table = Table("fault", "times", "ended as")
        for fault, count in self.tally.done.most_common():
            ends = ", ".join(f"{word} x{times}" for word, times in self.tally.codes[fault].most_common())
            table.add_row(fault, str(count), ends)
        return table


def _phase(ground: Ground) -> str:
    """Where the killed rank was, as its watchdog told."""
    word = ground.run.read_exit()
    text = "" if word is None else word.reason
    return text.split("in phase ", 1)[1].split(" ", 1)[0] if "in phase " in text else ""


def main() -> int:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.campaign", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=200, help="how many kill -9 (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and the faults")
    parser.add_argument("--output", type=Path, help="write the figures as JSON, too")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a thread pool here would be missing in the forked ranks
    os.environ["OMP_NUM_THREADS"] = "1"
    import_deepspeed()
    console = Console()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sdtrain-faults-") as folder:
        campaign = Campaign(Path(folder), seed=given.seed, console=console)
        number = 0
        while campaign.tally.kills < given.kills:
            number += 1
            try:
                campaign.chain(number, kills=given.kills)
            except Broken as error:
                console.print(campaign.table())
                kept = Path(tempfile.mkdtemp(prefix="sdtrain-broken-")) / "chain"
                shutil.copytree(Path(folder) / f"chain-{number}", kept)
                console.print(f"chain {number} (seed {given.seed}) broke: {error}\nkept in {kept}", highlight=False)
                return 1
            console.print(f"chain {number} is complete; {campaign.tally.kills} kills so far", highlight=False)
        tally = campaign.tally
        console.print(campaign.table())
        where = ", ".join(f"{phase} {count}" for phase, count in tally.phases.most_common())
        lost = tally.lost_steps
        summary = {
            "kills": tally.kills,
            "chains": dict(tally.chains),
            "killed in phase": where,
            "steps lost to a fault, mean and most": f"{sum(lost) / len(lost):.1f}, {max(lost)}",
            "seconds": round(time.monotonic() - began),
        }
        for name, value in summary.items():
            console.print(f"{name}: {value}", highlight=False)
        if given.output:
            given.output.write_text(json.dumps(summary | {"faults": tally.codes}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
