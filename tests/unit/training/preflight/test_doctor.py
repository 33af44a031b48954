"""`sdtrain doctor`, alone and as two real ranks on two "hosts" of which one is sick."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from sdtrain import cli
from sdtrain.errors import ExitCode
from sdtrain.run_dir import PREFLIGHT_FILE
from tests.faults.confined import NOT_ALLOWED
from tests.ranks import Ranks, Start
from tests.support import make_latent_manifest, tiny_page

RANK = """
import os, signal, sys, time
from functools import partial
from pathlib import Path

rank = int(os.environ["RANK"])
os.environ.update(SLURMD_NODENAME=f"n{rank + 1}", WORLD_SIZE="2")
page, output, sick, limits = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], eval(sys.argv[4])

import torch
from sdtrain.config.load import load_training
from sdtrain.training import environment
from sdtrain.training.preflight import collective, doctor, meeting

if rank == 1 and sick == "many things":
    limits["clock"] = lambda: time.time() + 500
    here, multiply = environment.versions(), torch.matmul
    environment.versions = lambda: here | {"deepspeed": "0.18.0"}
    def throttled(left, right, *, out):
        time.sleep(0.05)
        return multiply(left, right, out=out)
    torch.matmul = throttled
if rank == 1 and sick == "unshared":
    from tests.faults.confined import NOT_ALLOWED, leave_namespace, mount
    try:
        leave_namespace()
        mount("tmpfs", page.parent / "run" / "logs", "tmpfs", 0)
    except OSError:
        output.joinpath("not-allowed").touch()
    collective.check_shared.__kwdefaults__["seconds"] = 0.5
meeting.PULSE_SECONDS, meeting.LISTEN_SECONDS, doctor.LATER_SECONDS = 0.2, 1.0, 3.0
if rank == 1 and sick == "dead":
    collective.clock_offsets = lambda *_: os._exit(1)
if rank == 1 and sick == "stopped":
    collective.clock_offsets = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
if rank == 1 and sick == "behind":
    doctor.examine_device = lambda _: time.sleep(60)
if rank == 1 and sick == "blind":
    page = Path("/nowhere/page.yaml")
sys.exit(doctor.examine_as_rank(partial(load_training, page), output, expected=["n1", "n2"], **limits))
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tiny_page(tmp_path, make_latent_manifest(tmp_path / "data", train=16, validation=8))


# One machine ----------------------------------------------------------------------------------------------------------


def doctor(*arguments: object) -> int:
    try:
        cli.main(["doctor", *map(str, arguments)])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_the_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == ExitCode.DONE
    said = capsys.readouterr().out
    assert "computing       ok       cpu: products right, " in said
    assert "preflight of 1 node: passed in " in said and "manifest" not in said


def test_a_page_that_cannot_run_here(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(page, "data.manifest=nowhere.json", "--json") == ExitCode.PREFLIGHT
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    (failed,) = [one for one in found["findings"] if one["status"] == "failed"]
    assert (found["passed"], failed["check"]) == (False, "manifest")
    assert "manifest: nowhere.json: cannot read the manifest: No such file or directory" in captured.err
    assert captured.err.count("\n") == 1
    assert not (page.parent / "run").exists()


def test_a_worker_needs_its_launcher(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(page, "--worker") == ExitCode.CONFIG
    assert "doctor --worker needs CONFIG and --output FOLDER; sdtrain-launch gives both" in capsys.readouterr().err


# Two ranks ------------------------------------------------------------------------------------------------------------


def begin(ranks: Ranks, page: Path, sick: str = "", *, size: int = 2, **limits: float) -> Start:
    """Ranks of a job of two, with something wrong on the second."""
    script, output = page.parent / "rank.py", page.parent / "output"
    script.write_text(RANK)
    output.mkdir()
    (page.parent / "run" / "logs").mkdir(parents=True)
    return ranks.start(size, script, page, output, sick, repr(limits))


def together(ranks: Ranks, page: Path, sick: str = "", **arguments: Any) -> tuple[Any, str, list[int]]:
    """What `preflight.json` has, what the ranks said and their exit codes."""
    output = page.parent / "output"
    start = begin(ranks, page, sick, **arguments)
    start.wait(60)
    if (output / "not-allowed").exists():
        pytest.skip("mounts are not allowed here")
    said = start.log.read_text()
    assert "Traceback" not in said, said
    assert list((page.parent / "run" / "logs").iterdir()) == [], "what was written to be seen is removed again"
    return json.loads((output / PREFLIGHT_FILE).read_text()), said, start.codes


@pytest.mark.heavy
def test_two_sound_ranks(ranks: Ranks, page: Path) -> None:
    start = time.monotonic()
    found, said, codes = together(ranks, page)
    print(f"doctor on two ranks: {found['seconds']:.2f} s, from the fork on {time.monotonic() - start:.2f} s")
    assert codes == [0, 0], said
    assert (found["passed"], found["hosts"], found["failing"]) == (True, ["n1", "n2"], {})
    assert "preflight of 2 nodes: passed in " in said and said.count("preflight of") == 1
    checks = {one["check"] for one in found["findings"]}
    assert {"page", "equality", "shared folder", "clock", "all-reduce"} <= checks
    measured = found["measured"]
    assert measured["bus_bytes_per_second"] > 1e6 and 0 < measured["latency_seconds"] < 1
    assert abs(measured["clock_offset_seconds"]["n2"]) < 0.5
    assert {host: len(each) for host, each in measured["matmul_seconds"].items()} == {"n1": 1, "n2": 1}
    assert set(measured["link_seconds"]) == {"n1", "n2"}


@pytest.mark.heavy
def test_a_node_with_other_versions_another_time_and_a_slow_chip(ranks: Ranks, page: Path) -> None:
    found, said, codes = together(ranks, page, "many things")
    assert codes == [ExitCode.PREFLIGHT] * 2, said
    by_name = {one["check"]: one for one in found["findings"] if one["status"] != "ok"}
    assert "deepspeed is " in by_name["equality"]["found"] and "0.18.0 on n2" in by_name["equality"]["found"]
    assert by_name["clock"]["found"] == "n2 is 500.0 s ahead of the other nodes"
    assert by_name["speed"]["hosts"] == ["n2"] and "a product of two matrices takes " in by_name["speed"]["found"]
    assert list(found["slow"]) == ["n2"]
    assert found["failing"] == {}, "of two nodes nobody can say who is wrong"
    assert said.count("sdtrain: preflight failed: n1, n2: equality: deepspeed is ") == 1


@pytest.mark.heavy
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_folder_that_is_not_shared(ranks: Ranks, page: Path) -> None:
    found, said, codes = together(ranks, page, "unshared")
    assert codes == [ExitCode.PREFLIGHT] * 2, said
    assert found["reason"] == (f"n1, n2: shared folder: {page.parent}/run/logs: n2 does not see what n1 writes there")
    assert found["failing"] == {}, "the folder is at fault where no other node shares it"


@pytest.mark.heavy
def test_a_node_that_never_comes(ranks: Ranks, page: Path) -> None:
    found, said, codes = together(ranks, page, size=1, join_seconds=1.0)
    assert codes == [ExitCode.PREFLIGHT]
    assert found["failing"] == {"n2": ["ranks: none of its ranks came within 1 s"]}
    assert "sdtrain: preflight failed: n2: ranks: none of its ranks came within 1 s" in said


@pytest.mark.heavy
def test_a_node_that_dies(ranks: Ranks, page: Path) -> None:
    found, said, codes = together(ranks, page, "dead")
    assert codes == [ExitCode.PREFLIGHT, 1], said
    assert found["failing"]["n2"][0].startswith("ranks: rank 1 died or was stopped in 'clocks' (")


@pytest.mark.heavy
@pytest.mark.long
def test_a_node_that_is_stopped(ranks: Ranks, page: Path) -> None:
    """It cannot even leave, but rank 0 can."""
    start = begin(ranks, page, "stopped", check_seconds=8.0)
    report = page.parent / "output" / PREFLIGHT_FILE
    end = time.monotonic() + 30
    while not report.exists() and time.monotonic() < end:
        time.sleep(0.1)
    start.kill()
    failing = json.loads(report.read_text())["failing"]
    assert failing == {"n2": ["ranks: rank 1 died or was stopped in 'clocks' (not over after 8 s)"]}


@pytest.mark.heavy
@pytest.mark.long
def test_a_node_that_stands_still(ranks: Ranks, page: Path) -> None:
    """As where a disk does not answer: only its own time limit ends it, a little after rank 0's."""
    found, said, codes = together(ranks, page, "behind", check_seconds=8.0)
    assert codes == [ExitCode.PREFLIGHT] * 2, said
    why = "ranks: rank 1 has not left 'this node', and others have (not over after 8 s)"
    assert found["failing"] == {"n2": [why]}


@pytest.mark.heavy
def test_a_node_that_does_not_see_the_page(ranks: Ranks, page: Path) -> None:
    found, _, codes = together(ranks, page, "blind")
    assert codes == [ExitCode.PREFLIGHT] * 2
    assert list(found["failing"]) == ["n2"]
    assert found["failing"]["n2"][0].startswith("page: /nowhere/page.yaml: no such file")


# A full disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_a_disk_without_room(
    ranks: Ranks, page: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path_factory.mktemp("small")
    answer = page.parent / "answer"
    settings = ("size=128k,nr_inodes=40", small, "doctor", page, f"run_dir={small / 'run'}")
    start = ranks.run(1, "-m", "tests.faults.confined", answer, *settings, timeout=60)
    if start.codes == [NOT_ALLOWED]:
        pytest.skip("mounts are not allowed here")
    assert start.codes == [ExitCode.PREFLIGHT], start.said()
    said = start.log.read_text()
    assert f"run folder      FAILED   {small}/run: 0.1 MiB, 3" in said and " inodes free" in said
    assert "-> free some space, or give another run_dir" in said
