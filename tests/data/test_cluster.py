"""A cluster of two Ray nodes with tokens, on one machine and off every network: one node is killed in the middle.

Ray looks for its address by asking the way to the internet, so all of it happens in a network namespace that holds
nothing but `lo`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.ledger import Ledger
from tests.data.download_site import lone_loopback
from tests.data.ground import DOWNLOAD, Ended, Grounds, Run, in_fresh_process

UNTIL = ("--until", "images")


@pytest.mark.long
def test_in_a_namespace(tmp_path: Path) -> None:
    cut_off = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*cut_off, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root or user namespaces, to cut the test off from every network")
    in_fresh_process("tests.data.test_cluster", tmp_path, *cut_off, limit_seconds=1200)


@contextlib.contextmanager
def two_nodes(token: Path, **of_second: Any) -> Iterator[Any]:
    """A head and one more node, of one CPU each or with what is given, which ask everybody for the token."""
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"})
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets in it have short names
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "memory": 4_000_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**(node | of_second))
    try:
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)


def command_of(run: Run, address: str, *words: str) -> list[str]:
    page = str(run.folder / "data.yaml")
    return [sys.executable, "-m", "data_pipeline.cli", "run", page, f"runner.address={address}", *words]


def refused(run: Run, address: str, **environment: str) -> str:
    """The one message that a start without the right token ends with."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    began = time.monotonic()
    command = command_of(run, address, "metadata")
    ended = subprocess.run(command, capture_output=True, text=True, env=kept | environment, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr and time.monotonic() - began < 60
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, ended.stderr
    return lines[0]


def check_tokens(run: Run, address: str, folder: Path) -> None:
    home = {"HOME": str(folder)}
    missing = refused(run, address, **home)
    assert f"runner.address: '{address}': cannot join (" in missing
    assert "the cluster asks for a token, and there is none here: put the head's" in missing
    wrong = refused(run, address, **home, RAY_AUTH_TOKEN="b" * 64)
    assert "the cluster refuses the token from the environment variable RAY_AUTH_TOKEN" in wrong
    off = refused(run, address, **home, RAY_AUTH_MODE="disabled")
    assert "the cluster asks for a token, and RAY_AUTH_MODE=disabled sends none: unset it" in off
    found = refused(run, "auto", **home, RAY_AUTH_TOKEN="b" * 64)
    assert found.startswith("sdtrain-data: runner.address: 'auto': cannot join (")
    print("tokens are checked", flush=True)


def kill_a_node(cluster: Any, run: Run, address: str, yardstick: Ended) -> None:
    """A run over both nodes, of which one is gone after some downloads."""
    with open(run.folder / "driver.log", "a") as log:
        driver = subprocess.Popen(command_of(run, address, *UNTIL), stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while len(Ledger(run.output / DOWNLOAD).commits()) < 3:
            assert time.monotonic() < deadline and driver.poll() is None, run.tail()
            time.sleep(0.05)
        before, asked = run.committed(), run.grounds.requests()
        paths = run.committed_paths()
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)  # SIGKILL for its raylet; its workers follow
        print(f"killed a node after {len(before)} commits", flush=True)
        assert driver.wait(timeout=400) == 0, run.tail()
    after = run.committed()
    assert all(after[name] == commit for name, commit in before.items())
    requests = run.grounds.requests()
    assert {path: requests[path] for path in paths} == {path: asked[path] for path in paths}
    odd = {name for name, digest in run.digests().items() if yardstick.digests.get(name) != digest}
    assert odd <= {"data_card.json", "data_card.md"}  # they repeat the page, and so the address
    assert run.digests().keys() == yardstick.digests.keys() and after == yardstick.committed
    print("the run has finished on the other node", flush=True)


def main(folder: Path) -> None:
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    with Grounds(folder).served() as grounds:
        first = grounds.run()
        assert first.finish(*UNTIL) == 0, first.tail()
        yardstick = first.end()
        print("the yardstick stands", flush=True)
        with two_nodes(token) as cluster:
            run = grounds.run()
            check_tokens(run, cluster.address, folder)
            kill_a_node(cluster, run, cluster.address, yardstick)


if __name__ == "__main__":
    lone_loopback()
    main(Path(sys.argv[1]))
