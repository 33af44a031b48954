"""torchrun on two hosts made of network namespaces, with a cable between them that is pulled in the middle.

The hosts share this machine's disk, as nodes share a file system, and have names of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from sdtrain.errors import ExitCode
from sdtrain.run_dir import PREFLIGHT_FILE, RunDir, read_json_lines
from tests.slurm.cluster import REPOSITORY, wait_until
from tests.support import tiny_page

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.long,
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"),
]

HANG_SECONDS, LONG_SECONDS = 8.0, 30.0  # within a step, and while it saves
STEPS = 16

CABLE = """
set -e
mount -t tmpfs hosts /run
ip link add veth1 type veth peer name veth2
for n in 1 2; do
  ip netns add host$n
  ip link set veth$n netns host$n
  ip -n host$n address add 10.77.0.$n/24 dev veth$n
  ip -n host$n link set veth$n up
  ip -n host$n link set lo up
done
"""
HOST = """
hostname host$1
export GLOO_SOCKET_IFNAME=veth$1 NODE_RANK=$(($1 - 1))
shift
exec "$@" --node-rank "$NODE_RANK"
"""


@dataclass
class Hosts:
    """Two hosts and what runs on them."""

    holder: int
    folder: Path
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", "--target", str(self.holder), "--net", "--mount", *command]

    def cable(self, state: str) -> None:
        subprocess.run(self.inside("ip", "-n", "host1", "link", "set", "veth1", state), check=True)

    def launch(self, page: Path, *options: str) -> None:
        """`sdtrain-launch torchrun` on both, without a preflight unless options ask for it."""
        program = str(Path(sys.executable).with_name("sdtrain-launch"))
        meeting = ("--nproc", "1", "--nnodes", "2", "--rdzv-endpoint", "10.77.0.1:29500", "--no-preflight", *options)
        for host in ("1", "2"):
            named = ("ip", "netns", "exec", f"host{host}", "unshare", "--uts", "bash", "-c", HOST, "host", host)
            command = self.inside(*named, program, "torchrun", str(page), *meeting)
            with open(self.log(int(host)), "wb") as log:
                launcher = subprocess.Popen(
                    command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL, stderr=log
                )
            self.launchers.append(launcher)

    def log(self, host: int) -> Path:
        """What a host's launcher says."""
        return self.folder / f"host{host}.log"

    def empty(self, host: int) -> None:
        """Everything on a host ends at once, watchdogs too; with the cable down nobody hears of it."""
        launcher = psutil.Process(self.launchers[host - 1].pid)
        for one in (launcher, *launcher.children(recursive=True)):
            one.send_signal(signal.SIGKILL)

    def end(self, seconds: float) -> tuple[list[int], list[str]]:
        """What the launchers return and say."""
        deadline = time.monotonic() + seconds
        while any(one.poll() is None for one in self.launchers) and time.monotonic() < deadline:
            time.sleep(0.2)
        codes = [one.returncode for one in self.launchers]
        said = [self.log(host).read_text(errors="replace") for host in (1, 2)]
        assert None not in codes, (codes, "\n".join(said))
        self.launchers.clear()
        return codes, said


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    holder = subprocess.Popen(["unshare", "--net", "--mount", "sleep", "infinity"])
    found = Hosts(holder.pid, tmp_path)
    try:
        wait_until(lambda: psutil.Process(holder.pid).name() == "sleep", 5, "the namespaces")
        subprocess.run(found.inside("bash", "-c", CABLE), check=True)
        yield found
    finally:
        for launcher in found.launchers:
            launcher.terminate()
            launcher.wait(timeout=60)
        holder.kill()
        holder.wait()


LOST = {
    "cable": (
        "hang: rank 1 on host2 is lost: reports come through the run folder, but the host does not answer over the "
        "network: a cut link; rank 0 waits in phase "
    ),
    "power": (
        "hang: rank 1 on host2 is lost: the host does not answer over the network: it is down or cut off; "
        "rank 0 waits in phase "
    ),
    "emptied": "rank 1 on host2 is gone, and no watchdog there says why: the job was ended on that node; rank 0 ",
}


def test_both_hosts_are_checked_over_the_cable_before_they_train(hosts: Hosts, manifest: Path, tmp_path: Path) -> None:
    """A start that it refuses leaves nothing but logs."""
    page = tiny_page(tmp_path, manifest, trainer={"max_steps": 3})
    run = RunDir(tmp_path / "run")
    hosts.launch(page, "--preflight", "data.manifest=gone.json")
    codes, said = hosts.end(120)
    assert codes == [ExitCode.PREFLIGHT] * 2, said
    assert "the start was refused with code 9, nothing but" in said[0]
    assert [path.name for path in run.path.iterdir()] == ["logs"]
    hosts.launch(page, "--preflight")
    codes, said = hosts.end(150)
    assert codes == [0, 0], said
    report = json.loads((run.path / "logs" / PREFLIGHT_FILE).read_text())
    assert (report["passed"], report["hosts"]) == (True, ["host1", "host2"])
    assert report["measured"]["link_seconds"].keys() == {"host1", "host2"}


@pytest.mark.parametrize("what", sorted(LOST))
def test_a_host_is_lost_in_the_middle(hosts: Hosts, manifest: Path, tmp_path: Path, what: str) -> None:
    """Within the hang limit all that is left ends with code 6 and the lost host's name; then the run goes on."""
    trainer = {"max_steps": STEPS, "timeout_seconds": LONG_SECONDS, "hang_timeout_seconds": HANG_SECONDS}
    page = tiny_page(tmp_path, manifest, data={"batch_size": 16}, trainer=trainer)
    run = RunDir(tmp_path / "run")
    hosts.launch(page)
    wait_until(lambda: any(row.get("step") == 4 for row in read_json_lines(run.metrics)), 120, "step 4")
    if what != "emptied":
        hosts.cable("down")
    if what != "cable":
        hosts.empty(2)
    codes, said = hosts.end(LONG_SECONDS + 40)
    assert codes == [ExitCode.HANG, ExitCode.HANG if what == "cable" else -signal.SIGKILL], said
    word = run.read_exit()
    assert word is not None
    assert (word.code, word.rank) == (ExitCode.HANG, 1)
    assert word.reason.startswith(LOST[what]), word
    assert f"ended with code 6 at step {word.step}: {LOST[what]}" in said[0]
    hosts.cable("up")
    hosts.launch(page)
    codes, said = hosts.end(150)
    assert codes == [0, 0], said
    word = run.read_exit()
    assert word is not None and (word.code, word.step) == (0, STEPS)
    starts = [row for row in run.ledger_rows() if row["event"] == "start"]
    assert len(starts) == 2 and starts[1]["resumed_from"] is not None
