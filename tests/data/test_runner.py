"""The runner on real Ray: workers, actors, lost workers, and a driver that is killed in the middle."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from data_pipeline.cluster import InlineExecutor, RayExecutor
from data_pipeline.ledger import Ledger, sha256_file
from data_pipeline.runner import Needs, Runner, one_to_one
from sdtrain.errors import ConfigError, DataError

pytestmark = pytest.mark.heavy

STAGES = '''
import os, time
from dataclasses import dataclass, field
from pathlib import Path
from data_pipeline.runner import Needs, one_to_one

@dataclass(frozen=True)
class Slow:
    """Reverses a text; `marks` counts what happened, across processes."""
    source: Path
    folder: Path
    marks: Path
    seconds: float = 0.0
    crashes: int = 0
    name: str = "slow"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self):
        return {}

    def units(self):
        return one_to_one(self.source, ".txt")

    def mark(self, what):
        count = len(list(self.marks.glob(f"{what}.*")))
        (self.marks / f"{what}.{count}.{os.getpid()}").touch()
        return count

    def worker(self):
        self.mark("made")
        def work(unit, folder):
            time.sleep(self.seconds)
            if self.mark(unit.name) < self.crashes and unit.index == 1:
                os._exit(9)
            text = unit.inputs[0].read_text()
            (folder / f"{unit.name}.txt").write_text(text[::-1])
            return {"chars": len(text)}
        return work

    def report(self, stats):
        return None
'''

DRIVER = """
import sys
from pathlib import Path
from data_pipeline.cluster import RayExecutor
from data_pipeline.runner import Runner
from slow_stages import Slow
root, seconds = Path(sys.argv[1]), float(sys.argv[2])
stage = Slow(root / "source", root / "out" / "01-slow", root / "marks", seconds)
with RayExecutor(workers=2) as executor:
    Runner(output=root / "out", executor=executor).run([stage])
"""


@dataclass
class World:
    path: Path
    stages: ModuleType
    screen: io.StringIO = field(default_factory=io.StringIO)

    def stage(self, out: str, **changes):
        folder = self.path / out / "01-slow"
        return self.stages.Slow(self.path / "source", folder, self.path / "marks", **changes)

    def run(self, out: str, executor, **changes) -> dict[str, str]:
        stage = self.stage(out, **changes)
        console = Console(file=self.screen, width=200)
        Runner(output=self.path / out, executor=executor, backoff_seconds=0.01, console=console).run([stage])
        return self.digests(out)

    def digests(self, out: str) -> dict[str, str]:
        return {path.name: sha256_file(path) for path in sorted((self.path / out / "01-slow").glob("0*.*"))}

    def marked(self, what: str) -> int:
        return len(list((self.path / "marks").glob(f"{what}.*")))


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    """Eight units, and stages in a module that Ray's workers can import."""
    (tmp_path / "slow_stages.py").write_text(STAGES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "slow_stages", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path.cwd())]))
    import slow_stages

    for name in ("source", "marks"):
        (tmp_path / name).mkdir()
    for index in range(8):
        (tmp_path / "source" / f"{index:05d}.txt").write_text(f"text {index}" * 100)
    return World(tmp_path, slow_stages)


def test_the_output_does_not_depend_on_the_number_of_workers(world):
    reference = world.run("inline", InlineExecutor())
    assert len(reference) == 16  # eight texts and their stats
    for workers in (1, 3):
        with RayExecutor(workers=workers) as executor:
            assert world.run(f"ray-{workers}", executor) == reference


def test_actors_are_made_once_and_lost_workers_are_replaced(world):
    reference = world.run("inline", InlineExecutor())
    for mark in (world.path / "marks").iterdir():
        mark.unlink()
    with RayExecutor(workers=2) as executor:
        assert world.run("actors", executor, needs=Needs(keeps_worker=True), crashes=1) == reference
        # Two actors and one for the one that died; on a busy machine all is done before the second one has started.
        assert world.marked("made") in (2, 3)
        assert world.marked("00001") == 2
        assert world.run("tasks", executor, crashes=3) == reference
        with pytest.raises(DataError, match=r"1 of 8 units failed\n  00001: the worker process was lost"):
            world.run("dead", executor, crashes=99)


def test_an_error_keeps_its_class_across_processes(world):
    (world.path / "source" / "00003.txt").write_bytes(b"\xff")
    with RayExecutor(workers=2) as executor, pytest.raises(DataError, match="00003: UnicodeDecodeError"):
        world.run("out", executor)
    assert len(Ledger(world.path / "out" / "01-slow").commits()) == 7


def test_a_cluster_that_is_not_there_is_a_config_error(world):
    with (
        RayExecutor(address="127.0.0.1:1") as executor,
        pytest.raises(ConfigError, match=r"runner\.address: '127\.0\.0\.1:1': no Ray cluster answers"),
    ):
        world.run("out", executor)


def test_a_driver_killed_in_the_middle_finishes_with_the_same_bytes(world):
    reference = world.run("reference", InlineExecutor())
    for mark in (world.path / "marks").iterdir():
        mark.unlink()
    driver = world.path / "driver.py"
    driver.write_text(textwrap.dedent(DRIVER))
    first = subprocess.Popen([sys.executable, str(driver), str(world.path), "0.6"], stdout=subprocess.DEVNULL)
    ledger = world.path / "out" / "01-slow" / "ledger.jsonl"
    deadline = time.monotonic() + 90
    while not (ledger.exists() and len(Ledger(ledger.parent).commits()) >= 2):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    committed = set(Ledger(ledger.parent).commits())
    assert 2 <= len(committed) < 8
    subprocess.run([sys.executable, str(driver), str(world.path), "0"], check=True, stdout=subprocess.DEVNULL)
    assert world.digests("out") == reference
    assert all(world.marked(unit) == 1 for unit in committed)  # nothing that was committed ran again
    assert not list(ledger.parent.glob(".tmp-*"))
    assert len(one_to_one(ledger.parent, ".txt")) == 8
