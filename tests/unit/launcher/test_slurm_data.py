"""An ingestion's job: its batch script, what is refused, what its ends decide, and Ray's command on each node."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher import slurm_data_job, slurm_job
from launcher.processes import Ended
from launcher.site import Site
from launcher.slurm_data import DATA_TEMPLATE, DataJob, checked_page, hints, render_data
from launcher.slurm_data_job import (
    RayNode,
    begin_ingestion,
    commit_counts,
    end_ingestion,
    head_address,
    outcome_of,
    run_node,
    temporary_folder,
)
from launcher.slurm_job import Surroundings
from launcher.slurm_journal import Journal, Start, Submission
from launcher.slurm_queue import QueuedJob
from sdtrain.errors import ConfigError, ExitCode, NoProgressError
from sdtrain.run_dir import RunDir, append_json_line
from tests.unit.launcher.commands import GOLDEN, SHELLCHECK, launch

REPOSITORY = Path(__file__).parents[3]
FIRST = Surroundings("7", 0, 2, 1)
NODE = {"SLURM_NODEID": "1", "SLURMD_NODENAME": "n2", "SLURM_CPUS_ON_NODE": "32", "SLURM_JOB_ID": "7"}


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs that the scheduler was asked to start again; to it all of them are running."""
    jobs: list[str] = []
    monkeypatch.setattr(slurm_job, "find_job", lambda job: QueuedJob("RUNNING", "None", "1:00", "1:00", "n1", "N/A"))
    monkeypatch.setattr(slurm_job, "requeue", lambda job, **_: jobs.append(job))
    return jobs


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "data.yaml"
    path.write_text((REPOSITORY / "configs" / "digits" / "data.yaml").read_text().replace("demo/", f"{tmp_path}/"))
    return path


def commit(output: Path, stage: str, unit: int) -> None:
    append_json_line(output / stage / "ledger.jsonl", {"unit": f"{unit:05d}", "files": {}})


# The script -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 8])
def test_the_script_of_a_dry_run_is_the_golden_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nodes: int
) -> None:
    """Renew them with SDTRAIN_RENEW_GOLDEN=1 after a change that is meant."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "executable", "/opt/sdtrain/bin/python")
    options = {
        1: ["encode", "--gpus-per-node", "8", "--cpus-per-node", "64"],
        8: ["--site", "slurm/site.example.yaml", "--time", "12:00:00", "--partition", "cpu", "seed=7"],
    }
    command = ["slurm-data", "configs/sd15/data.yaml", "--nodes", str(nodes), *options[nodes], "--dry-run"]
    assert launch(monkeypatch, *command) == 0
    script = capsys.readouterr().out.replace(str(REPOSITORY), "/home/me/sdtrain")
    golden = GOLDEN / f"slurm-data-{nodes}.sbatch"
    if os.environ.get("SDTRAIN_RENEW_GOLDEN"):
        golden.write_text(script)
    assert script == golden.read_text()


def test_a_shell_and_shellcheck_accept_the_script_as_it_stands() -> None:
    """The filled in ones are among those of `test_slurm_render`."""
    subprocess.run(["bash", "-n", DATA_TEMPLATE], check=True)
    subprocess.run([SHELLCHECK, DATA_TEMPLATE], check=True)


def test_whole_nodes_or_some_of_their_cores(tmp_path: Path) -> None:
    def options(cpus: int | None, gpus: int) -> list[str]:
        job = DataJob(2, cpus, gpus, "01:00:00", 3, "n")
        script = render_data(job, Site(save_seconds=60), tmp_path, tmp_path, Path("my page.yaml"), ["seed=a b"])
        assert "set -- 'my page.yaml' 'seed=a b'\n" in script and "#SBATCH --signal=B:USR1@60\n" in script
        lines = script[: script.index("max_restarts=")].splitlines()
        return [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")]

    whole, some = options(None, 0), options(4, 2)
    assert {"exclusive", "mem=0", "nodes=2", "ntasks-per-node=1"} <= set(whole)
    assert not any(option.startswith(("gpus", "cpus")) for option in whole)
    assert {"gpus-per-node=2", "cpus-per-task=4"} <= set(some)
    assert not any(option.startswith(("exclusive", "mem")) for option in some)


# Refused before submission --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["filter.min_aesthetik=6"], "filter.min_aesthetik"),
        (["runner.address=auto"], "runner.address = auto: a Slurm job starts a Ray cluster of its own; leave the key"),
        (["output=/proc/version/x"], "output = /proc/version/x: /proc/version is a file; give a folder"),
        (["--time", "soon"], "--time soon: give HH:MM:SS or D-HH:MM:SS, such as 24:00:00 or 2-00:00:00"),
        (["--site", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_what_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], page: Path, arguments: list[str], message: str
) -> None:
    assert launch(monkeypatch, "slurm-data", page, *arguments, "--dry-run") == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert message in error and error.startswith("sdtrain-launch: ")


def test_a_page_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    training = REPOSITORY / "configs" / "digits" / "train.yaml"
    assert launch(monkeypatch, "slurm-data", training, "--dry-run") == ExitCode.CONFIG
    assert "ingestion" in capsys.readouterr().err


def test_an_output_folder_that_nobody_can_write_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    journal = Journal(RunDir(Path("/proc/out")), "ingestion")
    with pytest.raises(Exception, match=r"output = /proc/out: /proc/out/logs/slurm.jsonl cannot be written: No such"):
        journal.prepare()


def test_what_will_surprise_is_said(page: Path) -> None:
    found = list(hints(checked_page(page, ["runner.workers=2"]), DataJob(8, 16, 0, "01:00:00", 1, "n")))
    assert found == [
        "runner.workers = 2: no more tasks than that run at a time on all 8 nodes together; runner.workers=null takes "
        "all cores of the job"
    ]
    free = checked_page(page, ["runner.workers=null", "encode=null"])
    assert list(hints(free, DataJob(8, 16, 2, "01:00:00", 1, "n"))) == [
        "--gpus-per-node 2: no stage of this page uses a GPU"
    ]


# The two ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "was_told", "lost_ray", "code", "words"),
    [
        (0, True, False, 0, "the ingestion ended with code 0"),
        (3, False, True, 3, "the ingestion ended with code 3"),
        (85, True, False, 85, "the ingestion ended with code 85"),
        (6, False, False, 6, "the ingestion ended with code 6"),
        (138, True, False, 85, "the ingestion was told to leave, and was ended by SIGUSR1"),
        (1, True, True, 85, "the ingestion was told to leave, and ended with code 1"),
        (1, False, True, 6, "Ray ended, and after it the ingestion ended with code 1"),
        (137, False, False, 6, "the ingestion was ended by SIGKILL"),
        (1, False, False, 1, "the ingestion ended with code 1"),
    ],
)
def test_how_an_ingestion_ended(status: int, was_told: bool, lost_ray: bool, code: int, words: str) -> None:
    assert outcome_of(status, was_told=was_told, lost_ray=lost_ray) == (code, words)


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (2, False), (3, False), (6, True), (85, True)])
def test_another_start_is_asked_for_where_it_helps(
    tmp_path: Path, requeued: list[str], status: int, again: bool
) -> None:
    begin_ingestion(tmp_path, FIRST, 5)
    assert end_ingestion(tmp_path, FIRST, 5, status, was_told=False, lost_ray=False) == status
    assert requeued == (["7"] if again else [])
    (end,) = [json.loads(line) for line in (tmp_path / "logs" / "slurm.jsonl").read_text().splitlines()][1:]
    assert (end["event"], end["code"], end["requeued"]) == ("end", status, again)
    assert end["reason"].endswith("requeued, to go on with what is missing") == again


def test_starts_that_commit_nothing_are_in_vain(
    tmp_path: Path, requeued: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    commit(tmp_path, "04-download", 0)
    codes = []
    for restart in range(5):
        here = Surroundings("7", restart, 2, 1)
        begin_ingestion(tmp_path, here, 50)
        if restart == 1:
            commit(tmp_path, "04-download", 1)
        codes.append(end_ingestion(tmp_path, here, 50, 85, was_told=True, lost_ray=False))
    assert codes == [85, 85, 85, 85, ExitCode.NO_PROGRESS]
    assert len(requeued) == 4
    said = (
        f"not requeued: 3 starts in a row made no new commit in the ledgers under {tmp_path}. See sdtrain-launch logs"
    )
    assert said in capsys.readouterr().err
    with pytest.raises(NoProgressError, match="3 starts in a row made no new commit in the ledgers under"):
        begin_ingestion(tmp_path, Surroundings("7", 5, 2, 1), 50)


def test_commits_are_counted_by_stage_and_removals_are_none(tmp_path: Path) -> None:
    assert commit_counts(tmp_path) == set()
    commit(tmp_path, "04-download", 0)
    commit(tmp_path, "04-download", 1)
    append_json_line(tmp_path / "04-download" / "ledger.jsonl", {"unit": "00001", "removed": True})
    commit(tmp_path, "01-metadata", 0)
    assert commit_counts(tmp_path) == {"04-download: 2 commits", "01-metadata: 1 commits"}


def test_tokens_of_killed_starts_are_removed_and_those_of_a_live_job_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = [tmp_path / "logs" / f"slurm-{start}" / "secret" for start in ("7.0", "5.1", "6.0")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "token").touch()
    states = {"5": None, "6": QueuedJob("RUNNING", "None", "", "", "", "")}
    monkeypatch.setattr(slurm_data_job, "find_job", states.get)
    begin_ingestion(tmp_path, Surroundings("7", 1, 2, 1), 5)
    assert [folder.exists() for folder in folders] == [False, False, True]


# Watched from outside -------------------------------------------------------------------------------------------------


def test_status_cancel_and_resume_know_an_ingestion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, page: Path, requeued: list[str]
) -> None:
    output = tmp_path / "data"
    journal = Journal(RunDir(output), "ingestion")
    journal.prepare()
    journal.add("submit", Submission("7", str(tmp_path), str(page), ["seed=7"], {"nodes": 2}, "ingestion"))
    begin_ingestion(output, FIRST, 5)
    end_ingestion(output, FIRST, 5, 85, was_told=True, lost_ray=False)
    capsys.readouterr()
    monkeypatch.setattr("launcher.status.find_job", lambda job: None)
    assert launch(monkeypatch, "status", output) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"output      {output}",
        "last end    the ingestion ended with code 85; requeued, to go on with what is missing",
        "job         7: not known to a scheduler here, 0 restarts",
        f"stages      sdtrain-data status {output}",
    ]
    assert launch(monkeypatch, "status", output, "--json") == 0
    assert json.loads(capsys.readouterr().out)["last_end"]["code"] == 85
    cancelled: list[str] = []
    running = QueuedJob("RUNNING", "None", "", "", "", "")
    monkeypatch.setattr("launcher.slurm_watch.find_job", lambda job: running)
    monkeypatch.setattr("launcher.slurm_watch.cancel", cancelled.append)
    assert launch(monkeypatch, "cancel", output) == 0
    assert cancelled == ["7"] and not (output / "STOP").exists()
    assert launch(monkeypatch, "resume", output, "--mode", "srun") == ExitCode.CONFIG
    assert f"--mode srun: {output} is an ingestion's output, and this is for training" in capsys.readouterr().err
    assert launch(monkeypatch, "resume", output, "--nodes", "3", "--dry-run") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=3\n" in script and f"set -- {page} seed=7\n" in script


def test_an_ingestion_that_was_submitted_by_hand_is_submitted_by_hand_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Journal(RunDir(tmp_path)).add("start", Start("7", 0, "slurm-7.0", 1, 2, None, [], "ingestion"))
    assert launch(monkeypatch, "resume", tmp_path) == ExitCode.CONFIG
    assert "its job 7 was submitted by hand, so its page is not known here; submit it with: sdtrain-launch slurm-d" in (
        capsys.readouterr().err
    )


# Addresses ------------------------------------------------------------------------------------------------------------


def resolve(monkeypatch: pytest.MonkeyPatch, names: Mapping[str, str]) -> None:
    def getaddrinfo(name: str, *_: object) -> list[tuple[object, ...]]:
        if name not in names:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (names[name], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_the_heads_address(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, {"n1": "10.0.0.1", "head": "10.0.0.9", "here": "127.0.0.1"})
    assert head_address(["n1"], FIRST, None) == "10.0.0.1:10014"
    assert head_address(["n1", "n2"], FIRST, "head") == "10.0.0.9:10014"
    assert head_address(["n1", "n2"], Surroundings("7", 1, 2, 1), "here") == "127.0.0.2:10016"
    assert head_address(["n1", "here"], FIRST, None) == "127.0.0.2:10014", "the way to the second node is asked"
    assert head_address(["n1"], Surroundings("12345678", 0, 1, 1), None) == "10.0.0.1:21356"
    with pytest.raises(ConfigError, match=r"n2: this name leads to no address \(Name or service not known\); set SDT"):
        head_address(["n1", "n2"], FIRST, None)


# Ray on a node --------------------------------------------------------------------------------------------------------


def test_rays_command_on_a_worker_and_at_the_head() -> None:
    worker = RayNode.of("10.0.0.1:10014", NODE)
    assert worker == RayNode("10.0.0.1:10014", False, "n2", 32, 0, None)
    command = " ".join(worker.command(Path("/tmp/ray1")))
    assert "start --block --node-name n2 --address 10.0.0.1:10014 --num-cpus 32 --num-gpus 0 --object-sto" in command
    limited = {
        "SLURM_NODEID": "0",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_MEM_PER_NODE": "65536",
        "SLURM_GPUS_ON_NODE": "2",
    }
    head = RayNode.of("10.0.0.1:10014", NODE | limited)
    assert head.memory_bytes == (65536 - 128) << 20
    command = " ".join(head.command(Path("/tmp/ray1")))
    assert "--head --node-ip-address 10.0.0.1 --port 10014 --ray-client-server-port 10015" in command
    assert f"--num-cpus 8 --num-gpus 2 --memory {head.memory_bytes} --object-store-memory {128 << 20}" in command
    assert "--address" not in command.replace("--node-ip-address", "")


def test_a_node_without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match=r"/ray is not there: install what requirements.lock names on all nodes"):
        RayNode.of("10.0.0.1:10014", NODE).command(tmp_path)


@pytest.mark.parametrize(
    ("environment", "memory"),
    [
        ({"SLURM_MEM_PER_CPU": "1000"}, (32000 << 20) - (128 << 20)),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_NODE": "1"}, None),
    ],
)
def test_memory_where_slurm_counts_it(environment: dict[str, str], memory: int | None) -> None:
    assert RayNode.of("h:1", NODE | environment).memory_bytes == memory


def test_ray_is_started_by_a_task_of_slurm_alone() -> None:
    with pytest.raises(ConfigError, match=r"'SLURM_CPUS_ON_NODE' is not set as in a task of Slurm: slurm/data.sbatch"):
        RayNode.of("h:1", {})


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with (
        pytest.raises(ConfigError, match="neither TMPDIR nor /tmp can be written to; set scratch in the site's file"),
        temporary_folder({}),
    ):
        pass


def test_the_temporary_folder_has_a_short_path_and_goes_again(tmp_path: Path) -> None:
    long = tmp_path / ("long" * 10)
    long.mkdir()
    with temporary_folder({"TMPDIR": str(long)}) as folder:
        assert folder.parent == Path("/tmp") and folder.is_dir()
    assert not folder.exists()
    with temporary_folder({"TMPDIR": "/dev/shm"}) as folder:
        assert folder.parent == Path("/dev/shm")


@pytest.mark.parametrize(("node_id", "code"), [("0", ExitCode.HANG), ("1", 0)])
def test_the_end_of_the_head_alone_ends_the_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], node_id: str, code: int
) -> None:
    monkeypatch.setattr(slurm_data_job, "_wait_for_head", lambda address: None)
    monkeypatch.setattr(slurm_data_job, "run_forwarding", lambda command, env: Ended(1, None, None, None))
    node = RayNode.of("h:1", NODE | {"SLURM_NODEID": node_id})
    assert run_node(node, {}) == code
    assert "Ray on n2 ended by itself, with code 1" in capsys.readouterr().err
    monkeypatch.setattr(slurm_data_job, "run_forwarding", lambda command, env: Ended(1, None, None, 15))
    assert run_node(node, {}) == 0
    assert "Ray on n2 ended as it was told" in capsys.readouterr().err


def test_a_worker_whose_head_does_not_answer_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_data_job, "_HEAD_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert run_node(RayNode.of(f"127.0.0.1:{port}", NODE), {}) == 0
    assert f"n2: the head of Ray at 127.0.0.1:{port} did not answer within 0 s: " in capsys.readouterr().err
