"""The runner on real Ray: workers, actors, lost workers, and what is not there."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from data_pipeline import ray_pool, ray_start
from data_pipeline.cluster import InlineExecutor, RayExecutor
from data_pipeline.ledger import Ledger, sha256_file
from data_pipeline.runner import Needs, Runner
from data_pipeline.status import read_status
from sdtrain.errors import ConfigError, DataError, ExitCode, PeerLostError
from tests.data.slow_stages import Slow

pytestmark = pytest.mark.heavy


@dataclass
class World:
    path: Path
    screen: io.StringIO = field(default_factory=io.StringIO)

    def stage(self, out: str, **changes):
        folder = self.path / out / "01-slow"
        return Slow(self.path / "source", folder, self.path / "marks", **changes)

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
def world(tmp_path) -> World:
    """Eight units."""
    for name in ("source", "marks"):
        (tmp_path / name).mkdir()
    for index in range(8):
        (tmp_path / "source" / f"{index:05d}.txt").write_text(f"text {index}" * 100)
    return World(tmp_path)


@pytest.fixture(scope="module")
def ray_of_four(tmp_path_factory) -> Iterator[RayExecutor]:
    """One private Ray for all tests here: its start takes seconds. Tests take fewer workers by `workers`."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch, RayExecutor(4, None, 1_000_000_000) as executor:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        with executor.pool(Slow(folder, folder, folder), 1):
            yield executor


@pytest.fixture
def executor(ray_of_four) -> RayExecutor:
    ray_of_four.workers, ray_of_four.memory_per_worker_bytes = 2, 1_000_000_000
    return ray_of_four


def test_the_output_does_not_depend_on_the_number_of_workers(world, executor):
    reference = world.run("inline", InlineExecutor())
    assert len(reference) == 16  # eight texts and their stats
    for executor.workers in (1, 2, 4):
        assert world.run(f"ray-{executor.workers}", executor) == reference
        needs = Needs(keeps_worker=True)
        assert world.run(f"actors-{executor.workers}", executor, needs=needs) == reference


def test_a_private_ray_listens_on_loopback_and_leaves_no_token(executor, world):
    world.run("out", executor)
    own = [process for process in psutil.Process().children(recursive=True) if process.is_running()]
    listening = {
        connection.laddr.ip
        for process in own
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening and all(address.removeprefix("::ffff:").startswith("127.") for address in listening), listening
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_actors_are_made_once_and_lost_workers_are_replaced(world, executor):
    reference = world.run("inline", InlineExecutor())
    for mark in (world.path / "marks").iterdir():
        mark.unlink()
    assert world.run("actors", executor, needs=Needs(keeps_worker=True), crashes=1) == reference
    # Two actors and one for the one that died; on a busy machine all is done before the second one has started.
    assert world.marked("made") in (2, 3)
    assert world.marked("00001") == 2
    assert world.run("tasks", executor, crashes=3) == reference
    with pytest.raises(DataError, match=r"1 of 8 units failed\n  00001: the worker process was lost"):
        world.run("dead", executor, crashes=99)


def test_actors_that_find_no_room_hold_no_unit(world, executor):
    executor.workers, executor.memory_per_worker_bytes = 4, 3_000_000_000  # Ray has 4 GB: one of them fits
    assert len(world.run("out", executor, needs=Needs(keeps_worker=True), seconds=0.02)) == 16
    assert world.marked("made") == 1


@pytest.mark.parametrize("keeps_worker", [False, True])
def test_a_stage_that_no_node_can_take_ends_with_its_needs_and_the_nodes(world, executor, monkeypatch, keeps_worker):
    monkeypatch.setattr(ray_pool, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(ray_pool, "_LOOK_EVERY_SECONDS", 0.1)
    with pytest.raises(PeerLostError, match=r"no node could take a worker \(CPU 1, GPU 1, memory 1e\+09\)") as caught:
        world.run("out", executor, needs=Needs(num_gpus=1, keeps_worker=keeps_worker))
    assert "nodes alive: CPU 4, GPU 0, memory 4e+09. What is committed stands" in str(caught.value)
    assert caught.value.exit_code == ExitCode.HANG


def test_an_error_keeps_its_class_across_processes(world, executor):
    (world.path / "source" / "00003.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="00003: UnicodeDecodeError"):
        world.run("out", executor)
    assert len(Ledger(world.path / "out" / "01-slow").commits()) == 7


def test_status_follows_a_run_while_it_goes_on(world, executor):
    seen = []

    def watch():
        while not seen or seen[-1].attempt is None or seen[-1].attempt.state == "running":
            seen.append(read_status(world.path / "out", is_new=True))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    world.run("out", executor, seconds=0.8)  # the file is written once a second
    watcher.join()
    stages = [status.stages[0] for status in seen if status.stages]
    assert {"running", "done"} <= {stage.state for stage in stages}
    assert max(stage.in_flight for stage in stages) in (3, 4)  # two at work, two at hand
    assert any(0 < stage.done < 8 and stage.units_per_second and stage.seconds_left for stage in stages)
    assert (stages[-1].done, stages[-1].units, stages[-1].in_flight) == (8, 8, 0)


def test_a_cluster_that_is_not_there_is_a_config_error(world):
    with (
        RayExecutor(address="127.0.0.1:1") as executor,
        pytest.raises(ConfigError, match=r"runner\.address: '127\.0\.0\.1:1': no Ray cluster answers"),
    ):
        world.run("out", executor)


@pytest.mark.parametrize(
    ("environment", "advice"),
    [
        (
            {"RAY_AUTH_MODE": "disabled"},
            "the cluster asks for a token, and RAY_AUTH_MODE=disabled sends none: unset it",
        ),
        (
            {},
            "there is none here: put the head's (`ray get-auth-token` there) into a file of mode 600 and set RAY",
        ),
        ({"RAY_AUTH_TOKEN": "x"}, "cluster refuses the token from the environment variable RAY_AUTH_TOKEN: compare it"),
        ({"RAY_AUTH_TOKEN_PATH": "/run/t"}, "refuses the token from the file /run/t (RAY_AUTH_TOKEN_PATH): compare it"),
    ],
)
def test_what_may_be_wrong_with_a_token_is_said(monkeypatch, tmp_path, environment, advice):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert advice in ray_start.token_advice(ray_start.token_source())
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert ray_start.token_source() == f"the file {tmp_path}/.ray/auth_token"
