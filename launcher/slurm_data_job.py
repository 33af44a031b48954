"""What `slurm/data.sbatch` calls: the two ends of an ingestion's job, and Ray on each of its nodes between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.processes import run_forwarding, signal_name
from launcher.slurm_job import Surroundings, Work, write_end, write_start
from launcher.slurm_journal import Journal
from launcher.slurm_queue import ask, find_job
from launcher.torchrun import RESTARTABLE
from sdtrain.errors import ConfigError, ExitCode, PeerLostError, SdtrainError
from sdtrain.run_dir import RunDir, read_json_lines

OBJECT_STORE_BYTES = 128 << 20
"""Units travel as paths, so the store stays almost empty."""
_FIRST_PORT = 10_000
_NUM_PORTS = 20_000  # below those that kernels hand out
_LONGEST_TEMPORARY_FOLDER = 40
"""A socket's path has at most 107 characters, of which Ray takes 66 for its session and the socket's name."""
_HEAD_SECONDS = 300.0
_OF_RAY = {
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else a node that outlives its head waits for it in vain
    "RAY_prestart_worker_first_driver": "0",  # else one worker that dies as it starts keeps the driver waiting for ever
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave CUDA_VISIBLE_DEVICES of CPU tasks alone, as without a cluster
}
_FINAL = frozenset({ExitCode.DONE, ExitCode.CONFIG, ExitCode.DATA, ExitCode.STORAGE})


# The two ends ---------------------------------------------------------------------------------------------------------


def ingestion(output: Path) -> Work:
    """An ingestion's output folder and what its ledgers hold."""
    unit = f"commit in the ledgers under {output}"
    return Work(Journal(RunDir(output), "ingestion"), commit_counts(output), unit, "go on with what is missing")


def commit_counts(output: Path) -> set[str]:
    """`04-download: 17 commits` for every stage; another commit makes another name."""
    counts = {
        path.parent.name: sum("files" in row for row in read_json_lines(path)) for path in output.glob("*/ledger.jsonl")
    }
    return {f"{stage}: {count} commits" for stage, count in counts.items() if count}


def begin_ingestion(output: Path, here: Surroundings, max_restarts: int) -> Path:
    """Write a start down; returns the folder for what its processes say.

    Raises:
        NoProgressError: The job was started too often, or in vain.
        StorageError: The output folder cannot be written to.
    """
    work = ingestion(output)
    logs = write_start(work, here, max_restarts)
    _remove_secrets(work.journal, here.job)
    return logs


def _remove_secrets(journal: Journal, job: str) -> None:
    """Remove the tokens of starts that were killed before they could do so."""
    for secret in journal.folder.glob("slurm-*/secret"):
        other = secret.parent.name.removeprefix("slurm-").partition(".")[0]
        queued = None if other == job else find_job(other)
        if queued is None or queued.is_over:
            shutil.rmtree(secret, ignore_errors=True)


def end_ingestion(
    output: Path, here: Surroundings, max_restarts: int, status: int, *, was_told: bool, lost_ray: bool
) -> int:
    """Decide about another start, and ask the scheduler for it.

    Args:
        output: The output folder.
        here: The job.
        max_restarts: How often it may be started again.
        status: How `sdtrain-data run` ended, as a shell puts it.
        was_told: It was asked to leave by the time limit or a preemption.
        lost_ray: Ray had ended before it did.

    Returns:
        The batch script's exit code.
    """
    code, told = outcome_of(status, was_told=was_told, lost_ray=lost_ray)
    return write_end(ingestion(output), here, max_restarts, code, told, again=code in RESTARTABLE)


def outcome_of(status: int, *, was_told: bool, lost_ray: bool) -> tuple[int, str]:
    """Exit code and words for the end of an ingestion; arguments as of `end_ingestion`."""
    how = f"was ended by {signal_name(status - 128)}" if status > 128 else f"ended with code {status}"
    if status in _FINAL or status in RESTARTABLE:
        return status, f"the ingestion {how}"
    if was_told:
        return int(ExitCode.REQUEUE), f"the ingestion was told to leave, and {how}"
    if lost_ray:
        return int(ExitCode.HANG), f"Ray ended, and after it the ingestion {how}"
    if status > 128:
        return int(ExitCode.HANG), f"the ingestion {how}"
    return status, f"the ingestion {how}"


# Addresses ------------------------------------------------------------------------------------------------------------


def node_names(environment: Mapping[str, str]) -> list[str]:
    """Names of this job's nodes, the first one first."""
    return ask("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()


def head_address(names: Sequence[str], here: Surroundings, master: str | None) -> str:
    """Where Ray's head listens, `host:port`; asked on the first node.

    The host is the address that the first node has on its way to the second. Its own name will not do: on Debian it
    leads to 127.0.1.1. The port changes with job and start, and the one after it is left free.

    Args:
        names: The nodes.
        here: The job.
        master: What leads to the first node, where the site says so.

    Raises:
        ConfigError: A name leads nowhere.
    """
    host = _address_of(master or names[0]) if master or len(names) == 1 else _address_towards(names[1])
    if host.startswith("127."):  # all nodes are this machine. Ray would take an outer address in place of 127.0.0.1
        host = "127.0.0.2"
    return f"{host}:{_FIRST_PORT + 2 * (int(here.job) + here.restart) % _NUM_PORTS}"


def _address_towards(name: str) -> str:
    """This machine's address on the way to another one; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((_address_of(name), 9))
        return way.getsockname()[0]


def _address_of(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        raise ConfigError(
            f"{name}: this name leads to no address ({error.strerror}); set SDTRAIN_MASTER_ADDR, under environment of "
            "the site's file, to what leads to the first node from all nodes"
        ) from None


# Ray on a node --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RayNode:
    """Ray on one node.

    Attributes:
        address: The head's `host:port`.
        is_head: Whether this is the head.
        name: The node's name.
        num_cpus: Cores that the job has there.
        num_gpus: Its GPUs.
        memory_bytes: Its memory; None lets Ray look at the machine's.
    """

    address: str
    is_head: bool
    name: str
    num_cpus: int
    num_gpus: int
    memory_bytes: int | None

    @classmethod
    def of(cls, address: str, environment: Mapping[str, str]) -> RayNode:
        """What Slurm says of the node that this task runs on.

        Raises:
            ConfigError: This is no task of a job.
        """
        try:
            num_cpus = int(environment.get("SLURM_CPUS_PER_TASK") or environment["SLURM_CPUS_ON_NODE"])
            return cls(
                address=address,
                is_head=environment["SLURM_NODEID"] == "0",
                name=environment["SLURMD_NODENAME"],
                num_cpus=num_cpus,
                num_gpus=int(environment.get("SLURM_GPUS_ON_NODE", "0")),
                memory_bytes=_memory_of(environment, num_cpus),
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{error} is not set as in a task of Slurm: slurm/data.sbatch calls this") from None

    def command(self, folder: Path) -> list[str]:
        """The exact command.

        Args:
            folder: For sockets and logs of this node.

        Raises:
            ConfigError: Ray is not installed.
        """
        host, _, port = self.address.rpartition(":")
        head = [
            *("--head", "--node-ip-address", host, "--port", port, "--ray-client-server-port", str(int(port) + 1)),
            "--include-dashboard=false",
        ]
        memory = [] if self.memory_bytes is None else ["--memory", str(self.memory_bytes)]
        program = Path(sys.executable).with_name("ray")
        if not program.exists():
            raise ConfigError(f"{program} is not there: install what requirements.lock names on all nodes (make venv)")
        return [
            *(str(program), "start", "--block", "--node-name", self.name),
            *(head if self.is_head else ["--address", self.address]),
            *("--num-cpus", str(self.num_cpus), "--num-gpus", str(self.num_gpus), *memory),
            *("--object-store-memory", str(OBJECT_STORE_BYTES), "--temp-dir", str(folder)),
            *("--min-worker-port", "0", "--max-worker-port", "0"),  # any free ones
            *("--dashboard-agent-listen-port", "0"),
            *("--include-log-monitor=false", "--disable-usage-stats"),
            *("--log-style", "record", "--log-color", "false"),
        ]


def _memory_of(environment: Mapping[str, str], num_cpus: int) -> int | None:
    """What Slurm gave on a node beyond the object store; None where it does not count memory."""
    megabytes = int(environment.get("SLURM_MEM_PER_NODE", "0"))
    megabytes = megabytes or num_cpus * int(environment.get("SLURM_MEM_PER_CPU", "0"))
    left = (megabytes << 20) - OBJECT_STORE_BYTES
    return left if left > 0 else None


def run_node(node: RayNode, environment: Mapping[str, str]) -> int:
    """Run Ray on this node until it is told to end; returns the task's exit code.

    Not 0 at the head alone, whose end is the end of the whole step: an ingestion goes on without other nodes.
    """
    try:
        with temporary_folder(environment) as folder:
            if not node.is_head:
                _wait_for_head(node.address)
            of_workers = {"TMPDIR": str(folder)}  # what libraries leave there goes as well
            ended = run_forwarding(node.command(folder), {**environment, **_OF_RAY, **of_workers})
    except SdtrainError as error:
        _say(f"{node.name}: {error}")
        return int(error.exit_code) if node.is_head else 0
    how = "as it was told" if ended.told is not None else f"by itself, with code {ended.returncode}"
    _say(f"Ray on {node.name} ended {how}")
    return int(ExitCode.HANG) if node.is_head and ended.told is None else 0


@contextlib.contextmanager
def temporary_folder(environment: Mapping[str, str]) -> Iterator[Path]:
    """A folder on this node's own disk, with a path that is short enough for sockets; gone afterwards."""
    for base in (environment.get("TMPDIR"), "/tmp"):
        if base and os.access(base, os.W_OK | os.X_OK) and len(base) + len("/ray12345678") <= _LONGEST_TEMPORARY_FOLDER:
            break
    else:
        raise ConfigError("neither TMPDIR nor /tmp can be written to; set scratch in the site's file")
    with tempfile.TemporaryDirectory(prefix="ray", dir=base, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _wait_for_head(address: str) -> None:
    """Wait until the head answers; Ray's own patience is short.

    Raises:
        PeerLostError: It does not.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _HEAD_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLostError(
                    f"the head of Ray at {address} did not answer within {_HEAD_SECONDS:g} s: {error}"
                ) from None
        time.sleep(0.5)


def _say(message: str) -> None:
    print(f"[sdtrain-launch] {message}", file=sys.stderr, flush=True)
