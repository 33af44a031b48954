"""The launcher against real torchrun: small scripts stand where `-m sdtrain train` stands in production."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launcher import torchrun
from launcher.processes import Ended, run_forwarding, signal_name
from launcher.torchrun import (
    Placement,
    Supervisor,
    added_environment,
    checkpoint_names,
    crash_code,
    describe,
    outcome,
    shell_line,
    torchrun_command,
)
from sdtrain.errors import ConfigError, ExitCode
from sdtrain.run_dir import REFUSALS, REFUSED_STEP, Exit, RunDir

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from sdtrain.run_dir import Exit, RunDir

run, resume = RunDir(Path(sys.argv[1])), sys.argv[2]
rank = int(os.environ.get("RANK", 0))
starts = run.path / f"starts{rank}.txt"
starts.open("a").write(resume + "\\n")
start = len(starts.read_text().split())  # 1 for the first

def leave(code, reason, step=7):
    if rank == 0:
        run.write_exit(Exit(code, reason, step, 0, run.new_attempt()))
    sys.exit(code)

def checkpoint(step):
    if rank == 0:
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
"""


def supervisor(folder: Path, body: str, *, nproc: int = 1, max_restarts: int = 0) -> Supervisor:
    run = RunDir(folder / "run")
    run.path.mkdir()
    script = folder / "trainee.py"
    script.write_text(PRELUDE + textwrap.dedent(body))
    return Supervisor(run, Placement(nproc), lambda resume: [str(script), str(run.path), resume], max_restarts)


@pytest.fixture
def without_torchrun(monkeypatch):
    """One rank as a plain process: the decisions are the same, and a start costs 0.1 s in place of 5."""
    monkeypatch.setattr(torchrun, "torchrun_command", lambda _, trainee, __: [sys.executable, *trainee])


def resumes(run: RunDir, rank: int = 0) -> list[str]:
    return (run.path / f"starts{rank}.txt").read_text().split()


# --- the command -----------------------------------------------------------------------------------------------


def test_the_command_of_one_node():
    command = torchrun_command(Placement(8), ["-m", "sdtrain", "train", "c.yaml"], Path("runs/x/logs"))
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert shlex.join(command[3:]) == (
        "--nproc-per-node 8 --standalone --local-addr 127.0.0.1 --max-restarts 0 "
        "--signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 120 --log-dir runs/x/logs --tee 3 "
        "-m sdtrain train c.yaml"
    )


def test_the_command_of_the_second_of_two_nodes():
    command = shlex.join(torchrun_command(Placement(4, 2, 1, "head:29500"), ["t.py"], Path("logs")))
    assert "--nproc-per-node 4 --nnodes 2 --node-rank 1 --rdzv-backend static --rdzv-endpoint head:29500" in command
    assert "--standalone" not in command


def test_threads_are_shared_by_the_ranks_unless_the_user_set_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert added_environment(4, {}) == {"OMP_NUM_THREADS": "4", "PYTHONUNBUFFERED": "1"}
    assert added_environment(32, {})["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in added_environment(4, {"OMP_NUM_THREADS": "2"})


def test_the_shell_line_quotes():
    assert shell_line(["a b", "c"], {"NAME": "x y"}) == "NAME='x y' 'a b' c"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "--nproc is 0; give the number of ranks on this node, at least 1"),
        ((1, 0), "--nnodes is 0; give the number of nodes, at least 1"),
        ((1, 2, 2, "h:1"), "--node-rank is 2; with --nnodes 2 it is 0 to 1"),
        ((1, 2, 0, None), "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
        ((1, 2, 0, "head"), "found 'head'"),
        ((1, 1, 0, "h:1"), "--rdzv-endpoint h:1 has no effect on one node"),
    ],
)
def test_impossible_placements_are_named(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Placement(*arguments)


# --- what an attempt's end means --------------------------------------------------------------------------------


def test_only_committed_checkpoints_count(tmp_path):
    run = RunDir(tmp_path)
    assert checkpoint_names(run) == set()
    for name in ("step-00000010", "step-00000020.tmp-ab", ".trash-step-00000005", "LATEST", "step-00000030"):
        (run.checkpoints / name).mkdir(parents=True)
    assert checkpoint_names(run) == {"step-00000010", "step-00000030"}


def test_a_word_of_an_earlier_attempt_is_stale(tmp_path):
    run = RunDir(tmp_path)
    run.write_exit(Exit(0, "done", 10, 0, "first"))
    before = run.read_exit()
    assert outcome(run, before) is None
    run.write_exit(Exit(0, "done", 10, 0, "second"))
    found = outcome(run, before)
    assert found is not None and found.attempt == "second"


def test_crash_codes_and_words():
    by_signal, by_exception = Ended(1, signal.SIGKILL, 1, None), Ended(1, None, None, None)
    assert (crash_code(by_signal), crash_code(by_exception)) == (ExitCode.HANG, ExitCode.BUG)
    assert describe(None, by_signal, Path("r/logs")) == (
        "crash: the ranks left no exit.json (rank 1 of this node was killed by SIGKILL); "
        "every rank's output is under r/logs"
    )
    assert "(torchrun returned 1)" in describe(None, by_exception, Path("r/logs"))
    assert "(torchrun was killed by SIGTERM)" in describe(None, Ended(-15, 15, None, None), Path("r/logs"))
    found = Exit(5, "loss is not finite", 40, 0, "a1")
    assert describe(found, by_exception, Path("r")) == "attempt a1 ended with code 5 at step 40: loss is not finite"
    found = Exit(2, "another page", REFUSED_STEP, 0, "a1")
    assert describe(found, by_exception, Path("r/logs")) == (
        "the start was refused with code 2, nothing but r/logs was touched: another page"
    )


def test_a_signal_without_a_name():
    assert (signal_name(9), signal_name(99)) == ("SIGKILL", "signal 99")


# --- real torchrun ----------------------------------------------------------------------------------------------


def test_the_agreed_code_survives_torchrun(tmp_path, capfd):
    job = supervisor(tmp_path, "print(f'hello from {rank}'); leave(5, 'loss is not finite')", nproc=2)
    assert job.run("never") == ExitCode.DIVERGED
    out, err = capfd.readouterr()
    assert "hello from 0" in out and "hello from 1" in out
    assert "ended with code 5 at step 7: loss is not finite" in err
    assert (resumes(job.run_dir, 0), resumes(job.run_dir, 1)) == (["never"], ["never"])
    logged = "".join(path.read_text() for path in job.log_dir.rglob("stdout.log"))
    assert sorted(re.findall("hello from .", logged)) == ["hello from 0", "hello from 1"]


def test_a_rank_killed_by_a_signal_is_a_lost_peer_and_an_old_word_does_not_hide_it(tmp_path, capfd):
    job = supervisor(tmp_path, "os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)", nproc=2)
    job.run_dir.write_exit(Exit(0, "done", 99, 0, "old"))
    assert job.run() == ExitCode.HANG
    err = capfd.readouterr().err
    assert "(rank 1 of this node was killed by SIGKILL)" in err
    assert str(job.log_dir) in err
    assert job.run_dir.read_exit() is None


# --- decisions ----------------------------------------------------------------------------------------------------


def test_success_is_the_agreed_word_too(tmp_path, without_torchrun):
    assert supervisor(tmp_path, "leave(0, 'done')").run() == ExitCode.DONE


def test_a_refusal_has_its_code_and_touches_no_word(tmp_path, without_torchrun, capfd):
    body = """
    from sdtrain.run_dir import REFUSED_STEP, tell_launcher
    tell_launcher(Exit(8, "no room", REFUSED_STEP, 0, "none"))
    sys.exit(8)
    """
    job = supervisor(tmp_path, body, max_restarts=3)
    job.run_dir.write_exit(Exit(85, "time limit", 99, 0, "old"))
    before = job.run_dir.exit_file.stat().st_mtime_ns
    assert job.run() == ExitCode.STORAGE
    assert len(resumes(job.run_dir)) == 1
    assert job.run_dir.exit_file.stat().st_mtime_ns == before
    assert f"refused with code 8, nothing but {job.log_dir} was touched: no room" in capfd.readouterr().err


def test_a_refusal_is_passed_on_to_the_batch_script_that_started_the_launcher(tmp_path, without_torchrun, monkeypatch):
    body = """
    from sdtrain.run_dir import REFUSED_STEP, tell_launcher
    tell_launcher(Exit(8, "no room", REFUSED_STEP, 0, "none"))
    sys.exit(8)
    """
    monkeypatch.setenv(REFUSALS, str(tmp_path / "asked"))
    assert supervisor(tmp_path, body).run() == ExitCode.STORAGE
    told = RunDir(tmp_path / "asked").read_exit()
    assert told is not None and (told.code, told.reason, told.is_refusal) == (8, "no room", True)


def test_return_code_zero_without_a_word_is_a_crash(tmp_path, without_torchrun, capfd):
    job = supervisor(tmp_path, "sys.exit(0)")
    assert job.run() == ExitCode.BUG
    assert "crash: the ranks left no exit.json (torchrun returned 0)" in capfd.readouterr().err


def test_a_requeue_request_restarts_and_resumes(tmp_path, without_torchrun, capfd):
    body = "checkpoint(start); leave(85, 'time limit') if start < 3 else leave(0, 'done')"
    job = supervisor(tmp_path, body, max_restarts=5)
    assert job.run("never") == ExitCode.DONE
    assert resumes(job.run_dir) == ["never", "auto", "auto"]
    assert "4 more restarts allowed" in capfd.readouterr().err


def test_a_requeue_request_passes_through_without_restarts(tmp_path, without_torchrun):
    job = supervisor(tmp_path, "leave(85, 'time limit')")
    assert job.run() == ExitCode.REQUEUE
    assert resumes(job.run_dir) == ["auto"]


def test_a_crash_restarts(tmp_path, without_torchrun):
    job = supervisor(tmp_path, "leave(0, 'done') if start == 2 else os.abort()", max_restarts=1)
    assert job.run() == ExitCode.DONE
    assert resumes(job.run_dir) == ["auto", "auto"]


def test_restarts_end_with_the_last_crash(tmp_path, without_torchrun):
    job = supervisor(tmp_path, "checkpoint(start); sys.exit(3)", max_restarts=1)
    assert job.run() == ExitCode.BUG
    assert len(resumes(job.run_dir)) == 2


@pytest.mark.parametrize("code", [2, 3, 5, 8])
def test_an_outcome_that_a_restart_cannot_mend_is_final(tmp_path, without_torchrun, code):
    job = supervisor(tmp_path, f"leave({code}, 'so it is')", max_restarts=3)
    assert job.run() == code
    assert len(resumes(job.run_dir)) == 1


def test_two_restarts_without_a_new_checkpoint_stop_the_run(tmp_path, without_torchrun, capfd):
    job = supervisor(tmp_path, "start == 2 and checkpoint(1); sys.exit(1)", max_restarts=9)
    assert job.run() == ExitCode.NO_PROGRESS
    assert len(resumes(job.run_dir)) == 4  # first, one with progress, two without
    assert "2 restarts in a row made no new checkpoint" in capfd.readouterr().err


# --- signals and nodes --------------------------------------------------------------------------------------------

LAUNCH = """
import sys
from pathlib import Path
from launcher.torchrun import Placement, Supervisor
from sdtrain.run_dir import RunDir

script, run, *place = sys.argv[1:]
placement = Placement(1, 2, int(place[0]), place[1]) if place else Placement(2)
job = Supervisor(RunDir(Path(run)), placement, lambda resume: [script, run, resume], max_restarts=3)
sys.exit(int(job.run()))
"""


def launch(folder: Path, job: Supervisor, *place: str) -> subprocess.Popen[bytes]:
    """The launcher as a process of its own, which a signal can be sent to."""
    (folder / "launch.py").write_text(LAUNCH)
    scripts = [str(folder / "launch.py"), str(folder / "trainee.py")]
    return subprocess.Popen([sys.executable, *scripts, str(job.run_dir.path), *place], stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_which_saves_and_the_launcher_does_not_restart(tmp_path, number):
    job = supervisor(
        tmp_path,
        """
        told = []
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: told.append(number))
        (run.path / f"ready{rank}").touch()
        while not told:
            time.sleep(0.05)
        (run.path / f"told{rank}").write_text(str(told[0]))
        leave(85, "told to stop")
        """,
    )
    launcher = launch(tmp_path, job)
    deadline = time.monotonic() + 60
    while not all((job.run_dir.path / f"ready{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(number)
    assert launcher.wait(60) == ExitCode.REQUEUE
    assert [(job.run_dir.path / f"told{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2
    assert len(resumes(job.run_dir)) == 1


def test_two_nodes_meet_and_end_with_the_same_word(tmp_path):
    job = supervisor(tmp_path, "leave(4, os.environ['WORLD_SIZE'])")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [launch(tmp_path, job, str(node), endpoint) for node in (0, 1)]
    assert [node.wait(90) for node in nodes] == [ExitCode.CHECKPOINT, ExitCode.CHECKPOINT]
    found = job.run_dir.read_exit()
    assert found is not None and found.reason == "2"


def test_a_missing_program_is_an_error_of_its_own():
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        run_forwarding(["no-such-program"], {})
