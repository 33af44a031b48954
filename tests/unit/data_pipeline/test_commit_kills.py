"""kill -9 of the driver before every single change that it makes to the disk, and rows torn at every length."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.cluster import InlineExecutor
from data_pipeline.ledger import Ledger, sha256_file
from data_pipeline.runner import Needs, Runner, Unit, one_to_one

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
RUN_FILES = {"ledger.jsonl", "digests.jsonl", "progress.json", "dead_letter.json", ".lock"}


@dataclass(frozen=True)
class Pair:
    """Two files for each input; in version 1 a third one, which version 2 has to remove."""

    source: Path
    folder: Path
    worked: Path
    version: str = "1"
    name: str = "pair"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self):
        return {}

    def units(self):
        return one_to_one(self.source, ".txt")

    def worker(self):
        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            text = unit.inputs[0].read_text()
            with open(self.worked, "a") as file:
                file.write(f"{unit.name}\n")
            (folder / f"{unit.name}.txt").write_text(f"{text} of version {self.version}")
            (folder / f"{unit.name}.again").write_text(text * 2)
            if self.version == "1":
                (folder / f"{unit.name}.old").write_text(text)
            return {"rows": len(text)}

        return work

    def report(self, stats):
        return None


class Bench:
    """Two inputs, worked on by version 1; the runs of interest bring them to version 2."""

    def __init__(self, path: Path):
        self.path, self.output, self.worked = path, path / "out", path / "worked"
        source = path / "source"
        source.mkdir()
        for index in range(2):
            (source / f"{index:05d}.txt").write_text("ab"[index] * (index + 1))
        self.run("1")

    def run(self, version: str) -> None:
        stage = Pair(self.path / "source", self.output / "01-pair", self.worked, version)
        self.worked.write_text("")
        Runner(output=self.output, executor=InlineExecutor(), console=Console(quiet=True)).run([stage])

    def committed(self) -> dict[str, str]:
        return {unit: commit.version for unit, commit in Ledger(self.output / "01-pair").commits().items()}

    def damaged(self) -> list[str]:
        commits = Ledger(self.output / "01-pair").commits().values()
        files = {name: digest for commit in commits if commit.version == "2" for name, digest in commit.files.items()}
        return [name for name, digest in files.items() if sha256_file(self.output / "01-pair" / name) != digest]

    def digests(self) -> dict[str, str]:
        files = (path for path in self.output.rglob("*") if path.is_file() and path.name not in RUN_FILES)
        return {str(path.relative_to(self.output)): sha256_file(path) for path in files}


def in_child(work: Callable[[], None]) -> int:
    """Do it in a forked process; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_and_die(bench: Bench, change: int) -> None:
    """Bring the bench to version 2, but die before the `change`-th change to the output folder."""
    left = [change]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(arguments[0]).startswith(str(bench.output)):
            left[0] -= 1
            if left[0] == 0:
                with open(bench.path / "struck", "a") as file:
                    file.write(f"{event} {arguments[0]}\n")
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    bench.run("2")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_driver_that_dies_before_any_of_its_changes_loses_nothing(tmp_path):
    bench = Bench(tmp_path)
    shutil.copytree(bench.output, tmp_path / "version-1")
    bench.run("2")
    reference = bench.digests()
    assert not any(name.endswith(".old") for name in reference)
    change = 0
    while True:
        change += 1
        shutil.rmtree(bench.output)
        shutil.copytree(tmp_path / "version-1", bench.output, copy_function=shutil.copy2)
        code = in_child(partial(run_and_die, bench, change))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert bench.damaged() == [], f"after {change} changes"
        standing = {unit for unit, version in bench.committed().items() if version == "2"}
        bench.run("2")
        assert bench.digests() == reference, f"after {change} changes"
        assert standing.isdisjoint(bench.worked.read_text().split()), "what was committed is not worked on again"
    places = (tmp_path / "struck").read_text()
    for place in ("os.rename ", "os.remove ", "os.rmdir ", "ledger.jsonl", "digests.jsonl", "progress.json"):
        assert place in places, "no kill fell there"
    assert change > 30


@pytest.mark.parametrize("name", ["01-pair/ledger.jsonl", "digests.jsonl"])
def test_a_row_torn_at_any_length_is_repaired(tmp_path, name):
    bench = Bench(tmp_path)
    reference, path = bench.digests(), bench.output / name
    whole = path.read_bytes()
    last = len(whole) - whole[:-1].rindex(b"\n") - 1
    for cut in (1, 2, last // 2, last - 1, last):
        path.write_bytes(whole[:-cut])
        bench.run("1")
        redone = bench.worked.read_text().split()
        assert redone == (["00001"] if name != "digests.jsonl" and cut > 1 else []), f"{cut} bytes are missing"
        bench.run("1")
        assert bench.worked.read_text() == "" and bench.digests() == reference
        assert json.loads(path.read_bytes().splitlines()[-1]), "the torn row is closed, and new ones stand apart"
