"""What a driver does that has joined a cluster: it takes the nodes' GPUs, and ends in time when the head is gone."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from data_pipeline.cluster import RayExecutor
from data_pipeline.ledger import Ledger
from data_pipeline.ray_pool import Room
from data_pipeline.runner import Needs, Runner, Unit, Work
from data_pipeline.stage import has_gpu
from data_pipeline.status import read_status
from sdtrain.errors import DataError, ExitCode
from tests.data.download_site import lone_loopback
from tests.data.ground import DOWNLOAD, Grounds, in_fresh_process
from tests.data.slow_stages import Slow
from tests.data.test_cluster import UNTIL, command_of, two_nodes

LIMIT_SECONDS = 55.0  # Ray itself ends the process after 60


@pytest.mark.long
def test_in_a_namespace(tmp_path: Path) -> None:
    cut_off = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*cut_off, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root or user namespaces, to cut the test off from every network")
    in_fresh_process("tests.data.test_cluster_head", tmp_path, *cut_off, limit_seconds=600)


@dataclass(frozen=True)
class Placed(Slow):
    """Says which GPU its worker was given.

    Attributes:
        asks_torch: Whether the worker asks for the GPU as the encoder does.
    """

    asks_torch: bool = False
    needs: Needs = field(default_factory=lambda: Needs(prefers_gpu=True, keeps_worker=True))

    def worker(self) -> Work:
        """Work as `Slow` does."""
        import ray

        if self.asks_torch:
            has_gpu()
        slow, given = super().worker(), ray.get_runtime_context().get_accelerator_ids()["GPU"]

        def work(unit: Unit, folder: Path) -> Mapping[str, Any]:
            return {**slow(unit, folder), "pid": os.getpid(), "gpus": given}

        return work


def check_gpus(folder: Path, address: str) -> None:
    """Two GPUs on the other node, none where the driver is: two actors, each with one of them."""
    assert os.environ.get("CUDA_VISIBLE_DEVICES", "") == "" and not torch.cuda.is_available()
    for name in ("source", "marks"):
        (folder / name).mkdir()
    for index in range(8):
        (folder / "source" / f"{index:05d}.txt").write_text("text")
    with RayExecutor(address=address) as executor:
        runner = Runner(output=folder / "out", executor=executor, console=Console(quiet=True))
        placed = Placed(folder / "source", folder / "out/placed", folder / "marks", seconds=0.5)
        runner.run([placed])
        rows = [json.loads(path.read_text()) for path in sorted(placed.folder.glob("*.stats.json"))]
        gpus = {row["pid"]: tuple(row["gpus"]) for row in rows}
        assert sorted(gpus.values()) == [("0",), ("1",)], rows
        asking = Placed(folder / "source", folder / "out/asking", folder / "marks", asks_torch=True)
        with pytest.raises(DataError, match=r"Ray gave a worker on .* GPU [01], but torch .* cannot use it: mend the"):
            runner.run([asking])
        only = Slow(folder / "source", folder / "out/cpu", folder / "marks", needs=Needs(keeps_worker=True))
        runner.run([only])
        assert Room("any", None, {"num_cpus": 1, "num_gpus": 1}).count() == 2
    print("GPUs of the nodes are taken", flush=True)


def lose_the_head(folder: Path, token: Path, how: signal.Signals) -> None:
    """A run whose head is killed, or frozen, in the middle of the download."""
    folder.mkdir()
    with Grounds(folder).served() as grounds:
        run = grounds.run()
        with two_nodes(token) as cluster, open(run.folder / "driver.log", "a") as log:
            driver = subprocess.Popen(command_of(run, cluster.address, *UNTIL), stdout=log, stderr=log)
            deadline = time.monotonic() + 180
            while len(Ledger(run.output / DOWNLOAD).commits()) < 1:
                assert time.monotonic() < deadline and driver.poll() is None, run.tail()
                time.sleep(0.05)
            head = [info.process for name, infos in cluster.head_node.all_processes.items() for info in infos]
            for process in head:
                process.send_signal(how)
            began = time.monotonic()
            try:
                assert driver.wait(timeout=LIMIT_SECONDS) == ExitCode.HANG, run.tail()
            finally:
                for process in head:
                    process.send_signal(signal.SIGCONT)
            print(f"{how.name}: ended after {time.monotonic() - began:.1f} s", flush=True)
            assert f"sdtrain-data: runner.address: '{cluster.address}': the head of the Ray cluster has" in run.tail()
            assert "What is committed stands: bring the cluster back and run again" in run.tail()
            assert "Traceback" not in run.tail()
        attempt = read_status(run.output).attempt
        assert attempt is not None and attempt.state in ("failed", "died"), attempt
        before = run.committed()
        again = [sys.executable, "-m", "data_pipeline.cli", "run", str(run.folder / "data.yaml"), *UNTIL]
        ended = subprocess.run(again, capture_output=True, text=True, timeout=240, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        after = run.committed()
        assert all(after[name] == commit for name, commit in before.items()) and not run.damaged()


def main(folder: Path) -> None:
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    lose_the_head(folder / "killed", token, signal.SIGKILL)
    lose_the_head(folder / "frozen", token, signal.SIGSTOP)
    with two_nodes(token, num_cpus=2, num_gpus=2) as cluster:
        (folder / "gpus").mkdir()
        check_gpus(folder / "gpus", cluster.address)


if __name__ == "__main__":
    lone_loopback()
    main(Path(sys.argv[1]))
