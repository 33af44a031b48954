"""Who is late: the judgement over every kind of report, and what it is made of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sdtrain.run_dir import RunDir
from sdtrain.training.peers import Answer, Peer, RollCall
from sdtrain.training.verdict import (
    Board,
    ProcessState,
    Report,
    decide,
    descendants,
    launch_name,
    look_at,
    lost_peers,
)

REPORT = Report(
    rank=0,
    host="node0",
    pid=100,
    attempt="a1",
    alarmed=True,
    quiet_seconds=600.0,
    phase="backward",
    step=7,
    micro_step=1,
    ticks=4,
    state="S",
    waits_in="",
    time=1000.0,
)


def reports(*changes: dict[str, object]) -> dict[int, Report]:
    """Rank i waits in the backward of step 7 on node i, but for its changes."""
    made = (
        replace(REPORT, rank=rank, host=f"node{rank}", pid=100 + rank, **change) for rank, change in enumerate(changes)
    )
    return {report.rank: report for report in made}


# The judgement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("T", "is stopped (state T: SIGSTOP or a suspended job)"),
        ("t", "is held by a debugger (state t)"),
        ("Z", "is dead (state Z)"),
        ("X", "is gone"),
    ],
)
def test_a_halted_process_explains_everything(state: str, words: str) -> None:
    """Even where another rank is further behind, and a fourth left no report."""
    verdict = decide(reports({}, {"state": state}, {"step": 6}), 4)
    assert verdict.rank == 1
    assert verdict.reason == (
        f"rank 1 on node1 {words} in phase backward of step 7; "
        "ranks 0, 2 wait in phase backward of step 6 and phase backward of step 7"
    )


def test_a_rank_without_a_report_is_on_a_node_that_is_gone() -> None:
    found = reports({}, {}, {}, {"ticks": 5})
    verdict = decide(found, 5)
    assert verdict.rank == 4
    assert verdict.reason == (
        "rank 4 of 5 is silent: the node is gone, or never came; ranks 0-3 wait in phase backward of step 7"
    )
    rest = {rank: report for rank, report in found.items() if rank not in (1, 2)}
    assert decide(rest, 8).reason.startswith("ranks 1-2, 4-7 of 8 are silent: ")


def heard(*answers: Answer, caller: int = 0) -> RollCall:
    """Rank i is on node i; what the others of the caller answered it, in order."""
    numbers = range(len(answers) + 1)
    roll = {rank: Peer(rank, f"node{rank}", f"10.0.0.{rank}", 4000) for rank in numbers}
    return RollCall(caller, roll, dict(zip([rank for rank in numbers if rank != caller], answers, strict=True)))


HERE, GONE, SILENT = Answer.HERE, Answer.GONE, Answer.SILENT


def test_a_host_that_reports_and_does_not_answer_is_cut_off() -> None:
    """Reports go through the storage, which may have a network of its own."""
    verdict = decide(reports({}, {}, {}), 3, heard(HERE, SILENT))
    assert verdict.rank == 2
    assert verdict.reason == (
        "rank 2 on node2 is lost: reports come through the run folder, but the host does not answer over the network: "
        "a cut link; ranks 0-1 wait in phase backward of step 7"
    )


def test_hosts_that_neither_report_nor_answer_are_down() -> None:
    verdict = decide(reports({}, {}), 4, heard(HERE, SILENT, SILENT))
    assert verdict.rank == 2
    assert verdict.reason == (
        "rank 2 on node2 and rank 3 on node3 are lost: the host does not answer over the network: it is down or cut "
        "off; ranks 0-1 wait in phase backward of step 7"
    )


def test_a_judge_whom_most_hosts_do_not_answer_names_its_own() -> None:
    verdict = decide(reports({}, {}, {}, {}), 4, heard(SILENT, SILENT, SILENT))
    assert verdict.rank == 0
    assert verdict.reason == (
        "rank 0 on node0 is cut off: most of the other hosts do not answer over the network; ranks 1-3 wait in phase "
        "backward of step 7"
    )


def test_a_stopped_rank_is_the_cause_whatever_the_network_says() -> None:
    assert decide(reports({}, {"state": "T"}, {}), 3, heard(HERE, SILENT)).rank == 1


def test_a_rank_without_a_report_is_told_by_what_its_host_answers() -> None:
    gone = decide(reports({}, {}), 3, heard(HERE, GONE))
    assert (gone.rank, gone.reason.split(";")[0]) == (
        2,
        "rank 2 on node2 is gone, and no watchdog there says why: the job was ended on that node",
    )
    silent = decide(reports({}, {}), 3, heard(HERE, HERE))
    assert silent.reason.startswith("rank 2 on node2 of 3 is silent: no report came, though the host answers; ")


def test_who_broke_a_connection() -> None:
    assert lost_peers(RollCall()) is None
    assert lost_peers(heard(HERE, HERE)) is None
    gone, silent = lost_peers(heard(HERE, GONE)), lost_peers(heard(GONE, SILENT))
    assert gone is not None and gone.reason.startswith("rank 2 on node2 is gone, and no watchdog there says why: ")
    assert silent is not None and silent.rank == 2, "a host that is down explains what others did then"
    assert silent.reason.startswith("rank 2 on node2 is lost: the host does not answer over the network: it is down or")


@pytest.mark.parametrize(
    "late", [{"step": 6, "ticks": 90, "phase": "data"}, {"ticks": 2, "phase": "data"}, {"ticks": 3, "phase": "forward"}]
)
def test_who_did_least_is_waited_for(late: dict[str, object]) -> None:
    found = reports({}, {}, late)
    verdict = decide(found, 3)
    assert verdict.rank == 2
    assert verdict.reason == (
        f"rank 2 on node2 stands still in phase {late['phase']} of step {late.get('step', 7)}; "
        "ranks 0-1 wait in phase backward of step 7"
    )


def test_a_rank_that_waits_for_a_disk_says_in_which_call() -> None:
    stuck = {"ticks": 1, "phase": "save", "state": "D"}
    assert decide(reports(stuck | {"waits_in": "nfs_wait_bit_killable"}, {}), 2).reason.startswith(
        "rank 0 on node0 waits for a disk or a file system (state D, in nfs_wait_bit_killable) in phase save of "
        "step 7; "
    )
    assert "(state D, in an unknown call)" in decide(reports(stuck, {}), 2).reason


def test_several_late_ranks_are_all_named_and_the_first_is_the_word_s_rank() -> None:
    verdict = decide(reports({}, {"ticks": 2}, {"ticks": 2}), 3)
    assert verdict.rank == 1
    assert "rank 1 on node1" in verdict.reason and "rank 2 on node2" in verdict.reason
    assert verdict.reason.endswith("; rank 0 waits in phase backward of step 7")


def test_nobody_is_behind_where_all_stand_alike() -> None:
    verdict = decide(reports({}, {}, {}), 3)
    assert verdict.rank == 0
    assert verdict.reason.startswith("all 3 ranks wait in phase backward of step 7 and none is behind: a collective")


def test_a_single_rank_has_nobody_to_wait_for() -> None:
    assert decide(reports({"phase": "data"}), 1).reason == "rank 0 on node0 stands still in phase data of step 7"


# The board ------------------------------------------------------------------------------------------------------------


def test_reports_are_read_as_they_were_written(tmp_path: Path) -> None:
    board = Board(RunDir(tmp_path), "job-1", since=0.0)
    assert board.read_all(3) == {}
    assert not (tmp_path / "hangs").exists(), "reading makes nothing"
    for report in reports({}, {}, {"alarmed": False}).values():
        board.publish(report)
    assert board.read_all(3) == reports({}, {}, {"alarmed": False})
    assert (tmp_path / "hangs" / "job-1" / "rank-2.json").exists()
    board.withdraw(1)
    board.withdraw(1)
    assert sorted(board.read_all(3)) == [0, 2]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rank": 1}'])
def test_a_damaged_report_is_none(tmp_path: Path, text: str) -> None:
    board = Board(RunDir(tmp_path), "job", since=0.0)
    board.publish(REPORT)
    (tmp_path / "hangs" / "job" / "rank-0.json").write_text(text)
    assert board.read(0) is None


def test_reports_of_an_earlier_launch_of_the_same_name_do_not_count(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    Board(run, "127.0.0.1-29500", since=0.0).publish(REPORT)
    assert Board(run, "127.0.0.1-29500", since=REPORT.time + 1).read(0) is None
    assert Board(run, "127.0.0.1-29500", since=REPORT.time).read(0) == REPORT


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "alone"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "HOME": "/root"}, "127.0.0.1-29500"),
        ({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "2", "RANK": "1"}, "12-0-2"),
        ({"TORCHELASTIC_RUN_ID": "a/b c", "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_PORT": ""}, "a_b_c-0"),
    ],
)
def test_a_launch_is_named_by_what_its_ranks_have_in_common(environment: dict[str, str], name: str) -> None:
    assert launch_name(environment) == name


# Processes ------------------------------------------------------------------------------------------------------------


def test_states_of_real_processes() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        seen = {look_at(child.pid).state}
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        seen.add(look_at(child.pid).state)
        os.kill(child.pid, signal.SIGKILL)
        end = time.monotonic() + 10
        while look_at(child.pid).state != "Z" and time.monotonic() < end:
            time.sleep(0.01)
        seen.add(look_at(child.pid).state)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert seen - {"R"} >= {"T", "Z"} and len(seen) == 3
    assert look_at(child.pid) == ProcessState("X")


def fake_process(proc: Path, pid: int, parent: int, *, name: str = "python", state: str = "S", wchan: str = "") -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "stat").write_text(f"{pid} ({name}) {state} {parent} 1 1 0 -1 4194560")
    if wchan:
        (proc / str(pid) / "wchan").write_text(wchan)


@pytest.mark.parametrize(
    ("wchan", "waits_in"), [("nfs_wait_bit_killable", "nfs_wait_bit_killable"), ("0", ""), ("", "")]
)
def test_states_of_fake_processes(tmp_path: Path, wchan: str, waits_in: str) -> None:
    fake_process(tmp_path, 7, 1, name="tricky) D (name\n", state="D", wchan=wchan)
    assert look_at(7, tmp_path) == ProcessState("D", waits_in)
    (tmp_path / "7" / "stat").write_text("what is this")
    assert look_at(7, tmp_path).state == "?"


def test_a_family_is_found_over_generations(tmp_path: Path) -> None:
    for pid, parent in ((2, 1), (10, 2), (11, 10), (12, 11), (13, 2), (20, 1)):
        fake_process(tmp_path, pid, parent)
    (tmp_path / "99").mkdir()
    (tmp_path / "self").mkdir()
    assert sorted(descendants(2, tmp_path)) == [10, 11, 12, 13]
    assert descendants(20, tmp_path) == []
