"""The preflight of `sdtrain-launch torchrun`: all ranks of a node, an end in time, and when it is left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import cli, torchrun_preflight
from launcher.processes import run_together
from launcher.torchrun import Placement, Supervisor
from launcher.torchrun_preflight import examine, meeting_point
from sdtrain.errors import ExitCode
from sdtrain.run_dir import PREFLIGHT_FILE, REFUSALS, REFUSED_STEP, RunDir
from tests.support import make_latent_manifest, tiny_page


def test_the_meeting_point() -> None:
    assert meeting_point(Placement(8, 2, 1, "head:29500")) == ("head", 29501)
    assert meeting_point(Placement(8, 2, 1, "[fe80::1]:29500")) == ("fe80::1", 29501)
    address, port = meeting_point(Placement(8))
    assert address == "127.0.0.1" and port > 1024


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(["import os, sys, time", *lines])]


def test_all_ranks_run_at_a_time_and_each_has_its_own_environment() -> None:
    code = "time.sleep(0.5); sys.exit(int(os.environ['RANK']))"
    start = time.monotonic()
    assert run_together(python(code), [{"RANK": "0"}, {"RANK": "3"}], seconds=30) == ([0, 3], None)
    assert time.monotonic() - start < 5


def test_what_does_not_end_is_killed() -> None:
    code = "time.sleep(60 * int(os.environ['RANK']))"
    codes, told = run_together(python(code), [{"RANK": "0"}, {"RANK": "1"}], seconds=1.0)
    assert (codes, told) == ([0, -signal.SIGKILL], None)


def test_a_signal_reaches_all_ranks() -> None:
    code = "os.kill(os.getppid(), 15) if os.environ['RANK'] == '0' else None; time.sleep(60)"
    codes, told = run_together(python(code), [{"RANK": "0"}, {"RANK": "1"}], seconds=30)
    assert (codes, told) == ([-signal.SIGTERM] * 2, signal.SIGTERM)


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A script that runs in place of `python -m sdtrain ...`."""
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    monkeypatch.setattr(torchrun_preflight.sys, "executable", str(path))
    return path


def test_a_rank_that_cannot_even_start(
    instead: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert examine(Placement(2), ["page.yaml"], tmp_path / "logs") == ExitCode.DONE
    instead.write_text("#!/bin/sh\nexit $((RANK * 127))\n")
    assert examine(Placement(2), ["page.yaml"], tmp_path / "logs") == ExitCode.PREFLIGHT
    said = capsys.readouterr().err
    assert said == "[sdtrain-launch] the preflight of this node's ranks returned 0, 127; training was not started\n"


def test_the_ranks_word_is_passed_on(
    instead: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    word = {"code": 9, "reason": "n2: gpus: 7 visible", "step": REFUSED_STEP, "rank": 0, "attempt": "none"}
    instead.write_text(f"#!/bin/sh\ncat > $SDTRAIN_REFUSALS/exit.json <<'END'\n{json.dumps(word)}\nEND\nexit 9\n")
    asked = tmp_path / "asked"
    monkeypatch.setenv(REFUSALS, str(asked))
    assert examine(Placement(1), ["page.yaml"], tmp_path / "logs") == ExitCode.PREFLIGHT
    assert "was touched: n2: gpus: 7 visible" in capsys.readouterr().err
    told = RunDir(asked).read_exit()
    assert told is not None and (told.code, told.is_refusal) == (9, True)


def test_who_is_told_to_leave_may_be_started_again(instead: Path, tmp_path: Path) -> None:
    instead.write_text("#!/bin/sh\nkill -USR1 $PPID\nexec sleep 60\n")
    assert examine(Placement(1), ["page.yaml"], tmp_path / "logs") == ExitCode.REQUEUE


@pytest.mark.parametrize(
    ("arguments", "examined"),
    [
        (["--nproc", "2"], False),
        (["--nproc", "2", "--preflight"], True),
        (["--nnodes", "2", "--rdzv-endpoint", "head:29500"], True),
        (["--nnodes", "2", "--rdzv-endpoint", "head:29500", "--no-preflight"], False),
    ],
)
@pytest.mark.parametrize("found", [ExitCode.DONE, ExitCode.PREFLIGHT])
def test_it_comes_first_beyond_one_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], examined: bool, found: ExitCode
) -> None:
    calls = []
    page = tiny_page(tmp_path, tmp_path / "manifest.json")

    def examine(placement: Placement, words: list[str], log_dir: Path) -> ExitCode:
        calls.append((words, log_dir))
        return found

    def run(self: Supervisor, resume: str) -> ExitCode:
        return ExitCode.DIVERGED

    monkeypatch.setattr(torchrun_preflight, "examine", examine)
    monkeypatch.setattr(Supervisor, "run", run)
    monkeypatch.setattr(sys, "argv", ["sdtrain-launch", "torchrun", str(page), "trainer.max_steps=3", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert calls == ([([str(page), "trainer.max_steps=3"], tmp_path / "run" / "logs")] if examined else [])
    assert left.value.code == (ExitCode.PREFLIGHT if examined and found else ExitCode.DIVERGED)


@pytest.mark.heavy
@pytest.mark.long
def test_two_ranks_of_one_node_for_real(tmp_path: Path) -> None:
    page = tiny_page(tmp_path, make_latent_manifest(tmp_path / "data", train=16, validation=8))
    command = [Path(sys.executable).with_name("sdtrain-launch"), "torchrun", str(page), "trainer.max_steps=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 200, "env": environment}
    done = subprocess.run([*command, "--nproc", "2", "--preflight"], **options)
    assert done.returncode == 0, done.stderr
    assert "preflight of 1 node: passed in " in done.stdout
    report = json.loads((tmp_path / "run" / "logs" / PREFLIGHT_FILE).read_text())
    assert report["passed"] and report["measured"]["bus_bytes_per_second"] > 0
    refused = subprocess.run(
        [*command, "data.manifest=gone.json", "run_dir=" + str(tmp_path / "new"), "--preflight"], **options
    )
    assert refused.returncode == ExitCode.PREFLIGHT
    assert "the start was refused with code 9, nothing but" in refused.stderr
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["logs"]
