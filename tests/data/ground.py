"""A small world and the whole way from its metadata to a manifest, run by real Ray: for tests that kill and compare."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from data_pipeline import cli
from data_pipeline.ledger import Ledger, sha256_file
from data_pipeline.progress import start_ticks
from data_pipeline.sources.digits import World, make_world
from data_pipeline.sources.digits_server import DigitsServer
from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.autoencoders.load import save_autoencoder
from sdtrain.errors import ExitCode

ROWS = 240
IMAGE_SIZE = 32
MARK = "SDTRAIN_TEST_RUN"
DOWNLOAD = "04-download"
_OF_THIS_RUN = {"ledger.jsonl", "digests.jsonl", "progress.json", "dead_letter.json", ".lock"}

PAGE = """# sdtrain-data run data.yaml
schema_version: 1
kind: ingestion
output: {output}
source: {{type: laion, metadata: {metadata}}}
filter: {{min_width: {size}, min_height: {size}}}
validation: {{num_samples: 20}}
download: {{image_size: {size}, samples_per_shard: 20, contact: someone@example.org, threads: 4, allow_loopback: true,
  allowed_ports: [{port}]}}
encode: {{autoencoder: {autoencoder}, batch_size: 8, check_samples: 1}}
runner: {{workers: 2, max_attempts: 10}}
"""


class CountingServer(DigitsServer):
    """Writes the path of every request into a file, one a line."""

    def __init__(self, world: World, port: int, log: Path):
        super().__init__(world, port, slow_seconds=0.2)  # slow, and soon enough: the same pictures in every run
        self.log = log

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Let a handler that counts answer."""
        handler: Any = self.RequestHandlerClass
        counted = type("Counted", (handler,), {"log_request": self._count})
        counted(request, client_address, self)

    @staticmethod
    def _count(handler: Any, code: object = "-", size: object = "-") -> None:
        with open(handler.server.log, "a") as file:
            file.write(f"{handler.path}\n")


@dataclass
class Grounds:
    """A world, its server in a process of its own, and an autoencoder: what runs share.

    Attributes:
        folder: Where all of it lies.
    """

    folder: Path
    port: int = 0

    def __post_init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        make_world(self.folder / "world", seed=0, rows=ROWS, image_size=IMAGE_SIZE, port=self.port)
        save_tiny_autoencoder(self.folder / "autoencoder")

    @contextlib.contextmanager
    def served(self) -> Iterator[Grounds]:
        """The world on the web."""
        context = multiprocessing.get_context("fork")
        ready = context.Event()
        server = context.Process(target=self._serve, args=(ready, os.getpid()), daemon=True)
        server.start()
        assert ready.wait(30), "the server did not come up"
        try:
            yield self
        finally:
            server.kill()
            server.join()

    def _serve(self, ready: Any, parent: int) -> None:
        with CountingServer(World.load(self.folder / "world"), self.port, self.log):
            ready.set()
            while os.getppid() == parent:  # a killed parent could not end this process
                time.sleep(0.5)

    @property
    def log(self) -> Path:
        """Paths of all requests so far."""
        return self.folder / "requests.log"

    def requests(self) -> Counter[str]:
        """How often each path was asked for."""
        return Counter(self.log.read_text().split()) if self.log.exists() else Counter()

    def run(self) -> Run:
        """A new run over this world, always in the same folder: paths are part of a data card."""
        folder = self.folder / "run"
        folder.mkdir()
        page = PAGE.format(
            output=folder / "out",
            metadata=self.folder / "world" / "metadata",
            size=IMAGE_SIZE,
            port=self.port,
            autoencoder=self.folder / "autoencoder",
        )
        (folder / "data.yaml").write_text(page)
        return Run(folder, self, f"{os.getpid()}-{time.monotonic_ns()}")


def save_tiny_autoencoder(folder: Path) -> None:
    """A KL autoencoder of a few thousand parameters, the same each time."""
    torch.manual_seed(0)
    network = AutoencoderKL(
        latent_channels=4, channels=[32, 32], layers_per_block=1, attention_in_middle=False, scaling_factor=1.0
    )
    save_autoencoder(network, folder)


@dataclass(frozen=True, slots=True)
class Ended:
    """What a run has come to.

    Attributes:
        digests: sha256 of every file.
        committed: Commits of all stages.
    """

    digests: dict[str, str]
    committed: dict[str, dict[str, Any]]


@dataclass
class Run:
    """One output folder, and the starts that bring it up to date.

    Attributes:
        folder: Page, output and log of the processes.
        grounds: The world that it reads.
        token: What the environment of all of its processes holds.
    """

    folder: Path
    grounds: Grounds
    token: str

    @property
    def output(self) -> Path:
        """The run's output folder."""
        return self.folder / "out"

    def start(self, *words: str, prepare: Callable[[], None] = lambda: None) -> Start:
        """Fork a driver, which has imported everything already; `prepare` runs in it first."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return Start(pid)
        code = ExitCode.BUG
        try:
            log = os.open(self.folder / "driver.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ[MARK] = self.token
            warnings.simplefilter("default")  # pytest's own filters are no part of a driver
            prepare()
            cli.main(["run", str(self.folder / "data.yaml"), *words])
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def finish(self, *words: str, limit_seconds: float = 240.0) -> int:
        """One undisturbed start; its exit code."""
        return self.start(*words).wait(limit_seconds)

    def committed(self) -> dict[str, dict[str, Any]]:
        """`stage/unit` -> its commit, of all stages; the seconds that it took left out."""
        found = {}
        for path in sorted(self.output.glob("*/ledger.jsonl")):
            for unit, commit in Ledger(path.parent).commits().items():
                found[f"{path.parent.name}/{unit}"] = {**asdict(commit), "seconds": None}
        return found

    def damaged(self) -> list[str]:
        """Files of committed units that are not what the ledger says."""
        return [
            f"{name.partition('/')[0]}/{file}"
            for name, commit in self.committed().items()
            for file, sha256 in commit["files"].items()
            if not (path := self.output / name.partition("/")[0] / file).exists() or sha256_file(path) != sha256
        ]

    def digests(self) -> dict[str, str]:
        """sha256 of every file of the output, but for those that tell of a run and not of the data."""
        files = (path for path in self.output.rglob("*") if path.is_file() and path.name not in _OF_THIS_RUN)
        return {str(path.relative_to(self.output)): sha256_file(path) for path in sorted(files)}

    def end(self) -> Ended:
        """What it has come to; its folder is gone afterwards."""
        ended = Ended(self.digests(), self.committed())
        shutil.rmtree(self.folder)
        return ended

    def committed_paths(self) -> set[str]:
        """Paths on the server of all pictures in committed download units."""
        parts = (self.output / "03-dedup" / f"{unit}.parquet" for unit in Ledger(self.output / DOWNLOAD).commits())
        prefix = f"http://127.0.0.1:{self.grounds.port}"
        return {
            url.removeprefix(prefix)
            for part in parts
            for url in pq.read_table(part, columns=["url"])["url"].to_pylist()
        }

    def processes(self) -> dict[int, str]:
        """Command lines of this run's processes, by number."""
        wanted, found = f"{MARK}={self.token}".encode(), {}
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted in environment.read_bytes().split(b"\0") and start_ticks(int(environment.parent.name)):
                    line = (environment.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    found[int(environment.parent.name)] = line
        return found

    def tail(self) -> str:
        """The last words of the drivers."""
        log = self.folder / "driver.log"
        return log.read_text(errors="replace")[-4000:] if log.exists() else ""

    def progress(self) -> Mapping[str, Any]:
        """What `progress.json` says."""
        with contextlib.suppress(OSError, json.JSONDecodeError):
            return json.loads((self.output / "progress.json").read_text())
        return {}


def in_fresh_process(module: str, folder: Path, *before: str, limit_seconds: float = 280.0) -> None:
    """Run a module of tests: a process that has used Ray itself must not fork drivers, which would hang.

    Args:
        module: Called with the folder as its one argument.
        folder: Where to work.
        before: Words before the command, such as those of unshare.
        limit_seconds: When it is ended.
    """
    command = [*before, sys.executable, "-W", "ignore", "-m", module, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-6000:]


@dataclass
class Start:
    """A driver process.

    Attributes:
        pid: Its number.
        began: When it was forked.
        code: Its exit code, -9 where it was killed; None while it runs.
    """

    pid: int
    began: float = field(default_factory=time.monotonic)
    code: int | None = None

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        if self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, limit_seconds: float) -> int:
        """Wait for the end; kills what takes longer and fails."""
        deadline = time.monotonic() + limit_seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"driver {self.pid} was not over after {limit_seconds:.0f} s")
            time.sleep(0.02)
        return code


def children(pid: int) -> list[int]:
    """Processes that a process started itself and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def command_line(pid: int) -> str:
    """A process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def raylet_of(driver: int) -> int | None:
    """The raylet that a driver started."""
    return next((pid for pid in children(driver) if command_line(pid).partition(" ")[0].endswith("/raylet")), None)


def workers_of(driver: int) -> list[int]:
    """The workers of that raylet, also those that are still starting; its two agents are none."""
    raylet = raylet_of(driver)
    return [] if raylet is None else [pid for pid in children(raylet) if is_worker(command_line(pid))]


def is_worker(command: str) -> bool:
    """Whether a raylet's child is a worker."""
    return "default_worker.py" in command or (command.startswith("ray::") and "Agent" not in command)
