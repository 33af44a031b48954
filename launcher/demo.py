"""`make demo`: the whole product on handwritten digits, by the commands that a user would type.

    python -m launcher.demo --help

A web server on this machine stands in for the web, and scikit-learn's real handwritten digits for its pictures;
everything else is what a run on LAION uses. Nothing is picked by hand: seeds are fixed, and every prompt counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from sdtrain.errors import ConfigError, ExitCode, SdtrainError
from sdtrain.run_dir import RunDir, read_json_lines, write_atomically

CONFIGS = Path("configs/digits")
DEMO = Path("demo")
MARKER = DEMO / ".made-by-make-demo"
USUAL_PORT = 8123
NUM_PROMPTS = 280
KILL_AFTER_STEP = 850
NEEDED_DIGIT_ACCURACY = 0.88
NEEDED_COLOUR_ACCURACY = 0.97


class Stopwatch:
    """Runs commands, shows them before, and remembers how long each phase took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside under `name`."""
        print(f"\n━━ {name}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        print(f"   {self.seconds[name]:.0f} s", flush=True)

    def run(self, *command: str) -> None:
        """Run a public command in the foreground; its failure ends the demo with its exit code."""
        code = subprocess.call(self.shown(command))
        if code != 0:
            raise SystemExit(code)

    def shown(self, command: Sequence[str]) -> list[str]:
        """Print a command as a user would type it; returns it with this environment's programs."""
        print(f"$ {shlex.join(command)}", flush=True)
        return [str(Path(sys.executable).with_name(command[0])), *command[1:]]


def choose_port() -> int:
    """The usual port, so that every demo sees the same URLs and thus the same samples; a free one if it is taken."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", USUAL_PORT))
        except OSError:
            print(f"port {USUAL_PORT} is taken: another one gives other sample keys, and so another order of samples")
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def digits_server(watch: Stopwatch, port: int) -> Iterator[None]:
    """The web of this demo, for as long as pictures are fetched."""
    command = ["sdtrain-data", "serve-digits", str(DEMO / "world"), "--port", str(port), "--image-size", "32"]
    with (DEMO / "server.log").open("w") as log:
        server = subprocess.Popen(watch.shown(command), stdout=log, stderr=log)
    try:
        wait_until_ready(server, port)
        yield
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait for the server's first answer.

    Raises:
        ConfigError: It ended before it answered.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(600):
        if server.poll() is not None:
            raise ConfigError(f"the digits server ended with code {server.returncode}; see {DEMO / 'server.log'}")
        try:
            with opener.open(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise ConfigError(f"the digits server did not answer on port {port} for a minute; see {DEMO / 'server.log'}")


def rank_process(launcher: psutil.Process, rank: int) -> psutil.Process | None:
    """The process of one rank below the launcher."""
    for child in launcher.children(recursive=True):
        try:
            if child.environ().get("RANK") == str(rank) and child.environ().get("LOCAL_RANK") is not None:
                return child
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


def train_and_kill(watch: Stopwatch) -> int:
    """Train on two ranks, kill rank 1 with -9 in the middle, let the launcher resume; returns the step of the kill."""
    command = ["sdtrain-launch", "torchrun", str(CONFIGS / "train.yaml"), "--nproc", "2", "--max-restarts", "2"]
    launcher = subprocess.Popen(watch.shown(command))
    metrics = RunDir(DEMO / "runs" / "train").metrics
    step = 0
    while step < KILL_AFTER_STEP and launcher.poll() is None:
        time.sleep(0.2)
        step = max((row.get("step", 0) for row in read_json_lines(metrics)), default=0)
    victim = rank_process(psutil.Process(launcher.pid), 1) if launcher.poll() is None else None
    if victim is not None:
        print(f"\n$ kill -9 {victim.pid}    # rank 1, in the middle of training, at step {step} or a little later")
        os.kill(victim.pid, signal.SIGKILL)
    code = launcher.wait()
    if code != 0:
        raise SystemExit(code)
    return step


def choose_prompts(world: dict[str, Any]) -> list[str]:
    """All combinations that were never seen together in training, and a seeded choice of the others."""
    held_out = [tuple(row) for row in world["held_out_combinations"]]
    everything = [
        (digit, foreground, background)
        for digit, foreground, background in itertools.product(range(10), world["colours"], world["colours"])
        if foreground != background
    ]
    seen = [combination for combination in everything if combination not in set(held_out)]
    chosen = held_out + random.Random(0).sample(seen, NUM_PROMPTS - len(held_out))
    names = world["digit_names"]
    return [f"a {stroke} handwritten {names[digit]} on a {ground} background" for digit, stroke, ground in chosen]


def run_demo() -> ExitCode:
    """Metadata to samples; returns DONE if the accuracies are reached."""
    watch = Stopwatch()
    port = choose_port()
    data = ["sdtrain-data", "run", str(CONFIGS / "data.yaml"), f"download.allowed_ports=[{port}]"]
    with watch.phase("metadata, filter, dedup, download"), digits_server(watch, port):
        watch.run(*data, "--until", "images")
    with watch.phase("train the autoencoder on the pictures, ZeRO-2 on two ranks"):
        watch.run("sdtrain-launch", "torchrun", str(CONFIGS / "autoencoder.yaml"), "--nproc", "2")
    with watch.phase("tokens, latents, manifest"):
        watch.run(*data, "tokens", "encode", "manifest")
    with watch.phase("train the text-conditioned UNet, ZeRO-2 on two ranks, one killed in the middle"):
        killed_at = train_and_kill(watch)
    with watch.phase("samples and prompt accuracy"):
        world = json.loads((DEMO / "world" / "world.json").read_text(encoding="utf-8"))
        write_atomically(DEMO / "prompts.txt", "\n".join(choose_prompts(world)) + "\n")
        watch.run("sdtrain", "sample", str(CONFIGS / "sample.yaml"))
        accuracy = DEMO / "accuracy.json"
        world_json = str(DEMO / "world" / "world.json")
        watch.run("sdtrain", "evaluate", str(DEMO / "samples"), "--world", world_json, "--output", str(accuracy))
    write_report(watch)
    return verdict(json.loads(accuracy.read_text(encoding="utf-8")), watch, killed_at)


def write_report(watch: Stopwatch) -> None:
    """One page of everything."""
    timings = DEMO / "timings.json"
    write_atomically(timings, json.dumps(watch.seconds, indent=2) + "\n")
    runs = DEMO / "runs"
    watch.run("sdtrain", "inspect", str(runs / "train"))
    watch.run(
        *("sdtrain", "report", str(runs / "autoencoder"), str(runs / "train"), "--output", str(DEMO / "report.html")),
        *("--title", "Handwritten digits: metadata to samples"),
        *("--funnel", str(DEMO / "data" / "02-filter" / "funnel.json")),
        *("--download", str(DEMO / "data" / "04-download" / "summary.json")),
        *("--grid", str(DEMO / "samples" / "grid.png")),
        *("--accuracy", str(DEMO / "accuracy.json"), "--timings", str(timings)),
    )


def verdict(accuracy: dict[str, Any], watch: Stopwatch, killed_at: int) -> ExitCode:
    """Print what counts, and whether it is enough."""
    starts = [row for row in RunDir(DEMO / "runs" / "train").ledger_rows() if row["event"] == "start"]
    resumed = ", ".join(str(row["resumed_from"]) for row in starts[1:]) or "nothing: the kill came too late"
    print(f"\nprompts: {accuracy['n']}")
    print(f"digit accuracy: {accuracy['digit_accuracy']:.3f}")
    print(f"colour accuracy: {accuracy['colour_accuracy']:.3f}")
    print(f"judge on real held-out digits: {accuracy['judge_accuracy']:.3f}")
    for name in ("seen", "unseen"):
        part = accuracy[name]
        print(
            f"{name} combinations: {part['n']} prompts, digit {part['digit_accuracy']:.3f}, "
            f"colour {part['colour_accuracy']:.3f}"
        )
    print(f"rank 1 was killed with -9 at step {killed_at}; resumed from {resumed}")
    print(f"total: {sum(watch.seconds.values()):.0f} s")
    print(f"report: {DEMO / 'report.html'}")
    enough = (
        accuracy["digit_accuracy"] >= NEEDED_DIGIT_ACCURACY
        and accuracy["colour_accuracy"] >= NEEDED_COLOUR_ACCURACY
        and len(starts) > 1
    )
    if not enough:
        print(
            f"not enough: {NEEDED_DIGIT_ACCURACY} and {NEEDED_COLOUR_ACCURACY} and a resume are needed", file=sys.stderr
        )
    return ExitCode.DONE if enough else ExitCode.BUG


def start_afresh() -> None:
    """Make an empty `demo` folder; only one that an earlier demo made is removed.

    Raises:
        ConfigError: Somebody else's `demo` folder stands there, or this is not the project's folder.
    """
    if not CONFIGS.is_dir():
        raise ConfigError(f"{Path.cwd()} holds no {CONFIGS}; call `make demo` in the project's folder")
    if DEMO.exists():
        if not MARKER.exists():
            raise ConfigError(f"{DEMO.resolve()} exists and was not made by the demo; move it away")
        shutil.rmtree(DEMO)
    DEMO.mkdir()
    MARKER.touch()


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    try:
        start_afresh()
        return int(run_demo())
    except SdtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
