"""Ray inside a real Slurm job of two nodes ingests the digits world on both of them.

Ray listens on all addresses of its machine and looks for its own by asking the way to the internet, so all of it, the
Slurm included, happens in a network namespace with a cable that leads nowhere.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from data_pipeline.ledger import Ledger
from launcher.slurm_journal import Journal
from sdtrain.errors import ExitCode
from sdtrain.run_dir import RunDir, read_json_lines
from tests.data.download_site import in_namespace, lone_loopback
from tests.data.ground import DOWNLOAD, Ended, Grounds, Run
from tests.slurm.cluster import ENDED, REPOSITORY, ClusterJob, local_cluster, slurm, wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.long, pytest.mark.timeout(900)]

STAGES = ("metadata", "filter", "dedup", "download", "images")
UNHURRIED = "download.host_gap_seconds=0.02"  # time to look and to kill; the pictures are the same
ADDRESS = "10.77.0.1"  # Slurm looks up names only where there is an address beside loopback's


@pytest.mark.parametrize("scenario", ["both_nodes", "faults", "missing_node"])
def test_in_a_namespace(slurm_is_here: None, tmp_path: Path, scenario: str) -> None:
    in_namespace(__file__, scenario, tmp_path, limit_seconds=800)


# The set-up -----------------------------------------------------------------------------------------------------------


@dataclass
class DataJob(ClusterJob):
    """An ingestion that is a job; everybody's temporary files lie in one folder with a short name."""

    ingestion: Run
    variables: dict[str, str] = field(default_factory=dict)
    scratch: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sc-", dir="/tmp")))

    @property
    def run(self) -> RunDir:
        return RunDir(self.ingestion.output)

    def submit(self, *words: str) -> None:
        environment = {"SDTRAIN_MASTER_ADDR": ADDRESS, "OMP_NUM_THREADS": "1", **self.variables}
        lines = "".join(f"  {name}: '{value}'\n" for name, value in environment.items())
        self.site.write_text(f"environment:\n{lines}shared_folders: [/]\nscratch: {self.scratch}\n")
        options = ("--nodes", "2", "--cpus-per-node", "1", "--time", "01:00:00", "--site", str(self.site))
        done = self.launch("slurm-data", str(self.ingestion.folder / "data.yaml"), *words, *options)
        assert done.returncode == 0, done.stderr
        self.job = str(Journal(self.run).newest_job())
        assert f"job {self.job}: 2 nodes, output folder {self.run.path}\n" in done.stdout
        assert f"  sdtrain-data status {self.run.path}\n" in done.stdout

    def look(self) -> Iterator[tuple[str, psutil.Process]]:
        """Processes of Ray's, each with the node that it belongs to."""
        for one in psutil.process_iter():
            try:
                environment, name = one.environ(), one.name()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            facts = (environment.get("SLURM_CONF"), environment.get("SLURM_JOB_ID"))
            is_rays = name == "raylet" or name.startswith("ray::")
            if is_rays and facts == (os.environ["SLURM_CONF"], self.job):
                yield environment["SLURMD_NODENAME"], one

    def raylet(self, node: str) -> psutil.Process:
        return next(one for at, one in self.look() if at == node and one.name() == "raylet")

    def busy_nodes(self) -> set[str]:
        """Nodes where a worker is at work on a download."""
        return {node for node, one in self.look() if "_Keeper.run" in " ".join(one.cmdline())}

    def downloads(self) -> int:
        assert self.state() not in ENDED, self.said()
        return len(Ledger(self.run.path / DOWNLOAD).commits())

    def data_files(self) -> dict[str, str]:
        """sha256 by file, without what tells of jobs, and without the card, which repeats the page."""
        of_jobs = ("logs/", "data_card.")
        return {name: digest for name, digest in self.ingestion.digests().items() if not name.startswith(of_jobs)}


def cut_off() -> None:
    """Nothing but loopback and a cable that leads nowhere."""
    lone_loopback()
    for command in (
        "ip link add nodes type veth peer name cable",
        f"ip address add {ADDRESS}/32 dev nodes",
        "ip link set nodes up",
        "ip link set cable up",
    ):
        subprocess.run(command.split(), check=True)


@contextmanager
def a_cluster() -> Iterator[None]:
    """A Slurm of two nodes."""
    folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    with local_cluster(folder):
        yield
    shutil.rmtree(folder)


def on_one_machine(grounds: Grounds, *words: str) -> Ended:
    """What the same page comes to without Slurm and without a cluster."""
    run = grounds.run()
    assert run.finish(*words) == 0, run.tail()
    return run.end()


def assert_alike(job: DataJob, yardstick: Ended) -> None:
    wanted = {name: digest for name, digest in yardstick.digests.items() if not name.startswith("data_card.")}
    assert job.data_files() == wanted
    assert job.ingestion.committed() == yardstick.committed
    assert not list(job.run.path.glob("logs/*/secret")), "the token goes with the job"
    left = {path.name for path in job.scratch.iterdir()}
    assert left <= {"sdtrain-cache"}, "temporary folders go with the job, the compile cache serves the next one"
    shutil.rmtree(job.scratch)


# Scenarios ------------------------------------------------------------------------------------------------------------


def both_nodes(folder: Path) -> None:
    """From submission to the last byte; meanwhile an outsider tries to join."""
    with Grounds(folder).served() as grounds:
        yardstick = on_one_machine(grounds, *STAGES)
        with a_cluster():
            job = DataJob(folder, folder / "site.yaml", ingestion=grounds.run())
            job.submit(*STAGES, UNHURRIED)
            seen: set[str] = set()

            def both_were_busy() -> bool:
                assert job.state() not in ENDED, job.said()
                seen.update(job.busy_nodes())
                return seen == {"n1", "n2"}

            wait_until(both_were_busy, 200, f"downloads on both nodes, not only on {seen}: {job.said()}")
            (secret,) = job.run.path.glob("logs/slurm-*.0/secret")
            modes = [stat.S_IMODE(path.stat().st_mode) for path in (secret, secret / "token")]
            assert modes == [0o700, 0o600]
            assert_refused(job, folder)
            assert "RUNNING" in job.launch("status", str(job.run.path)).stdout
            assert_not_submitted(job)
            assert job.wait_for_end() == "COMPLETED", job.said()
            assert_alike(job, yardstick)
            logs = job.launch("logs", str(job.run.path), "--rank", "1").stdout
            assert "node-1.log <==\n" in logs and "Ray on n2 ended as it was told" in logs
            by_hand(job, "metadata")


def assert_not_submitted(job: DataJob) -> None:
    """A second job of the same output, and jobs that this cluster can never start."""
    local = job.folder / "local.yaml"
    local.write_text("{}\n")
    for arguments, message in (
        (("--site", str(job.site)), f"its job {job.job} is RUNNING; it goes on by itself, or end it first with: sdtr"),
        (
            ("--site", str(local), "output=/dev/shm/sdtrain-data"),
            "output = /dev/shm/sdtrain-data: lies on /dev/shm, a ",
        ),
        (("--site", str(job.site), "--partition", "mian"), "--partition mian: the cluster has no such partition, only"),
        (("--site", str(job.site), "--nodes", "4"), "--nodes 4 --gpus-per-node 0: partition main has 2 such nodes"),
        (("--site", str(job.site), "--time", "00:01:00"), "--time 00:01:00: a job is told to leave 120 s before the"),
    ):
        done = job.launch("slurm-data", str(job.ingestion.folder / "data.yaml"), *arguments)
        assert done.returncode == ExitCode.CONFIG and message in done.stderr, done.stderr


def by_hand(job: DataJob, *words: str) -> None:
    """The script as it stands, on one node; what it is asked for stands already."""
    page, script = str(job.ingestion.folder / "data.yaml"), str(REPOSITORY / "slurm" / "data.sbatch")
    log = job.folder / "by-hand.log"
    variables = f"SDTRAIN_MASTER_ADDR={ADDRESS},OMP_NUM_THREADS=1"
    options = (f"--chdir={REPOSITORY}", f"--output={log}", f"--export=ALL,{variables}", "--cpus-per-task=1")
    job.job = slurm("sbatch", "--parsable", *options, script, page, *words)
    assert job.wait_for_end() == "COMPLETED", log.read_text()
    assert "metadata: 3 of 3 up to date\n" in log.read_text()
    refused = job.launch("resume", str(job.run.path))
    assert refused.returncode == 0, "it is known from the job before"
    slurm("scancel", str(Journal(job.run).newest_job()))


def assert_refused(job: DataJob, folder: Path) -> None:
    """Who is on the machine and has no token cannot join."""
    (address,) = {word.partition("=")[2] for word in job.raylet("n2").cmdline() if word.startswith("--gcs-address=")}
    outsider = {name: value for name, value in os.environ.items() if not name.startswith(("RAY", "SLURM"))}
    words = ("run", str(job.ingestion.folder / "data.yaml"), "metadata", f"output={folder / 'other'}")
    command = [sys.executable, "-m", "data_pipeline.cli", *words, f"runner.address={address}"]
    home = {"HOME": str(folder)}
    done = subprocess.run(command, env=outsider | home, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == ExitCode.CONFIG
    assert "the cluster asks for a token, and there is none here" in done.stderr


def faults(folder: Path) -> None:
    """A node's raylet is killed, the time limit comes near, a node goes down: requeued twice, and the same bytes."""
    with Grounds(folder).served() as grounds:
        yardstick = on_one_machine(grounds)
        with a_cluster():
            job = DataJob(folder, folder / "site.yaml", ingestion=grounds.run())
            job.submit(UNHURRIED)
            wait_until(lambda: job.downloads() >= 2, 240, f"two downloads: {job.said()}")
            job.raylet("n2").send_signal(signal.SIGKILL)
            before = job.downloads()
            wait_until(lambda: job.downloads() > before, 240, f"a download without n2: {job.said()}")
            kept, asked, paths = job.ingestion.committed(), grounds.requests(), job.ingestion.committed_paths()
            slurm("scancel", "--batch", "--signal=USR1", job.job)  # what Slurm sends ahead of the time limit
            wait_until(lambda: job.state() == "PENDING", 90, f"the job is back in the queue: {job.said()}")
            assert not list(job.run.path.glob("logs/*/secret"))
            goes_down(job)
            assert job.wait_for_end(seconds=400) == "COMPLETED", job.said()
            assert job.restarts() == 2
            ends = [row for row in read_json_lines(Journal(job.run).path) if row["event"] == "end"]
            assert (ends[0]["code"], ends[0]["requeued"]) == (ExitCode.REQUEUE, True)
            assert (ends[-1]["code"], ends[-1]["requeued"]) == (0, False)
            assert (
                "Ray on n2 ended by itself" in (job.run.path / "logs" / f"slurm-{job.job}.0" / "node-1.log").read_text()
            )
            after, requests = job.ingestion.committed(), grounds.requests()
            assert all(after[name] == commit for name, commit in kept.items()), "what was committed stays"
            assert {path: requests[path] for path in paths} == {path: asked[path] for path in paths}, "fetched once"
            assert_alike(job, yardstick)


def goes_down(job: DataJob) -> None:
    """Slurm requeues the second start by itself, as one of its nodes is gone."""
    before = len(job.ingestion.committed())

    def has_gone_on() -> bool:
        job.hurry()
        assert job.state() not in ENDED, job.said()
        return job.state() == "RUNNING" and len(job.ingestion.committed()) > before

    wait_until(has_gone_on, 240, f"a commit of the second start: {job.said()}")
    slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    wait_until(lambda: job.state() == "PENDING", 90, f"the job is back in the queue: {job.said()}")
    resume = ("scontrol", "update", "nodename=n2", "state=resume")  # refused where its slurmd has registered again
    subprocess.run(resume, capture_output=True, check=False)


def missing_node(folder: Path) -> None:
    """A node on which Ray does not come up is named, and after three starts a person is asked."""
    with Grounds(folder).served() as grounds, a_cluster():
        broken = folder / "bin" / "sitecustomize.py"
        broken.parent.mkdir()
        broken.write_text(BROKEN)
        variables = {"PYTHONPATH": str(broken.parent), "SDTRAIN_JOIN_SECONDS": "25"}
        job = DataJob(folder, folder / "site.yaml", ingestion=grounds.run(), variables=variables)
        job.submit("metadata")
        assert job.wait_for_end(seconds=500) == "FAILED", job.said()
        assert (job.exit_code(), job.restarts()) == (ExitCode.NO_PROGRESS, 2)
        said = (job.run.path / "logs" / f"slurm-{job.job}.out").read_text()
        assert said.count(f"1 of 2 nodes did not join Ray at {ADDRESS}:") == 3, said
        assert "within 25 s: n2; see their logs" in said
        assert "not requeued: 3 starts in a row made no new commit in the ledgers under" in said
        assert not list(job.run.path.glob("logs/*/secret"))
        shutil.rmtree(job.scratch)


BROKEN = """
import os, sys
if os.environ.get("SLURMD_NODENAME") == "n2" and "start" in sys.orig_argv:
    sys.exit("no Ray today")
"""


if __name__ == "__main__":
    began = time.monotonic()
    cut_off()
    {"both_nodes": both_nodes, "faults": faults, "missing_node": missing_node}[sys.argv[1]](Path(sys.argv[2]))
    print(f"{sys.argv[1]}: {time.monotonic() - began:.0f} s")
