"""The word that an attempt leaves: typed, and the first cause before its consequences."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest

from sdtrain import distributed
from sdtrain.errors import ConfigError, DataError, DivergedError, ExitCode, NoProgressError, SdtrainError
from sdtrain.run_dir import REFUSALS, Exit, RunDir
from sdtrain.training import outcome
from sdtrain.training.outcome import (
    Refused,
    code_of,
    fruitless,
    leave_broken,
    leave_refused,
    leave_together,
    refuse_to_spin,
    refusing,
)
from sdtrain.training.peers import Answer, Peer, RollCall

LOST = RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), ExitCode.CONFIG),
        (DataError("x"), ExitCode.DATA),
        (DivergedError("x"), ExitCode.DIVERGED),
        (SdtrainError("x"), ExitCode.BUG),
        (KeyboardInterrupt(), ExitCode.REQUEUE),
        (OSError(28, "No space left on device"), ExitCode.STORAGE),
        (OSError(122, "Disk quota exceeded"), ExitCode.STORAGE),
        (OSError(30, "Read-only file system"), ExitCode.STORAGE),
        (OSError(2, "No such file"), ExitCode.BUG),
        (LOST, ExitCode.HANG),
        (RuntimeError("Timed out waiting 60000ms for recv operation"), ExitCode.HANG),
        (RuntimeError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."), ExitCode.HANG),
        (RuntimeError("shapes do not match"), ExitCode.BUG),
        (ValueError("connection closed by peer"), ExitCode.BUG),
        (ZeroDivisionError(), ExitCode.BUG),
    ],
)
def test_every_error_has_its_code(error: BaseException, code: ExitCode) -> None:
    assert code_of(error) is code


def test_a_planned_end_is_written_by_rank_0_before_anybody_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    standing: list[Exit | None] = []
    monkeypatch.setattr(distributed, "barrier", lambda: standing.append(run.read_exit()))
    monkeypatch.setenv("RANK", "1")
    leave_together(run, "a1", ExitCode.DONE, "complete", 4)
    assert standing == [None]
    monkeypatch.setenv("RANK", "0")
    leave_together(run, "a1", ExitCode.DONE, "complete", 4)
    assert standing[1] is not None
    assert (standing[1].code, standing[1].reason, standing[1].step, standing[1].attempt) == (0, "complete", 4, "a1")


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else is there to leave a word."""
    monkeypatch.setattr(outcome, "LOST_PEER_SECONDS", 0.2)


def word(run: RunDir) -> tuple[int, str, int, int, str]:
    left = run.read_exit()
    assert left is not None
    return left.code, left.reason, left.step, left.rank, left.attempt


def test_the_first_cause_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    monkeypatch.setenv("RANK", "3")
    assert leave_broken(run, "a1", DataError("shard is gone"), 7) is ExitCode.DATA
    first = (3, "DataError: shard is gone", 7, 3, "a1")
    assert word(run) == first
    monkeypatch.setenv("RANK", "0")
    assert leave_broken(run, "a1", LOST, 7) is ExitCode.HANG
    assert leave_broken(run, "a1", DivergedError("later"), 8) is ExitCode.DIVERGED
    assert word(run) == first


def test_a_lost_peer_gives_way_to_what_the_peer_died_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    leave_broken(run, "a1", LOST, 7)
    assert word(run)[0] == ExitCode.HANG
    monkeypatch.setenv("RANK", "1")
    leave_broken(run, "a1", DataError("shard is gone"), 7)
    assert word(run) == (3, "DataError: shard is gone", 7, 1, "a1")


def test_who_lost_a_peer_waits_for_the_one_that_knows_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's watchdog needs a moment to name it, and its word is worth more than `connection closed`."""
    run = RunDir(tmp_path)
    monkeypatch.setattr(outcome, "LOST_PEER_SECONDS", 10.0)
    named = Exit(6, "rank 1 on node7 died in phase data", 7, 1, "a1")
    timer = threading.Timer(0.3, run.leave_word, [named])
    timer.start()
    assert leave_broken(run, "a1", LOST, 7) is ExitCode.HANG
    timer.join()
    assert word(run) == (6, "rank 1 on node7 died in phase data", 7, 1, "a1")
    assert [row["reason"] for row in run.ledger_rows()] == ["rank 1 on node7 died in phase data"]


def test_who_lost_a_peer_that_left_no_word_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is emptied takes rank and watchdog with it."""
    run = RunDir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    roll = {rank: Peer(rank, f"node{rank}", "10.0.0.1", 4000) for rank in range(3)}
    leave_broken(run, "a1", LOST, 7, lambda: RollCall(0, roll, {1: Answer.HERE, 2: Answer.GONE}))
    code, reason, step, rank, _ = word(run)
    assert (code, step, rank) == (ExitCode.HANG, 7, 2)
    assert reason.startswith("rank 2 on node2 is gone, and no watchdog there says why: ")
    assert reason.endswith(
        "; rank 0 noticed it by RuntimeError: [../gloo/transport/tcp/pair.cc] Connection closed by "
        "peer [127.0.0.1]:1234"
    )


def test_nobody_is_looked_for_while_another_s_word_stands(tmp_path: Path) -> None:
    def never() -> RollCall:
        raise AssertionError("hundreds of ranks need not ask")

    run = RunDir(tmp_path)
    run.leave_word(Exit(6, "rank 1 on node7 died in phase data", 7, 1, "a1"))
    assert leave_broken(run, "a1", LOST, 7, never) is ExitCode.HANG
    assert leave_broken(run, "a2", DataError("shard is gone"), 7, never) is ExitCode.DATA


def test_ranks_take_turns_in_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(outcome, "_another_left_a_word", lambda run, attempt, seconds: waited.append(seconds))
    for rank in (0, 1, 20, 500):
        monkeypatch.setenv("RANK", str(rank))
        leave_broken(RunDir(tmp_path), "a1", LOST, 7)
    assert waited == pytest.approx([0.2, 0.45, 5.2, 5.2])


def test_an_older_attempt_s_word_does_not_stand_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    leave_broken(run, "a1", DataError("old"), 7)
    leave_broken(run, "a2", LOST, 9)
    assert word(run)[0::4] == (ExitCode.HANG, "a2")


def test_only_bugs_show_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_broken(RunDir(tmp_path), "a1", DataError("shard is gone"), 0)
    assert capsys.readouterr().err == f"rank {distributed.ranks().rank}: shard is gone\n"
    try:
        raise ZeroDivisionError("mine")
    except ZeroDivisionError as error:
        leave_broken(RunDir(tmp_path), "a2", error, 0)
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.endswith("ZeroDivisionError: mine\n")


def test_a_disk_that_takes_no_word_does_not_change_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)

    def full(self: RunDir, outcome: Exit) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDir, "write_exit", full)
    assert leave_broken(run, "a1", DataError("shard is gone"), 7) is ExitCode.DATA
    assert capsys.readouterr().err == (
        "rank 0: shard is gone\n"
        f"rank 0: no word of it could be left in {tmp_path}: [Errno 28] No space left on device\n"
    )


# Starts that become no attempt ----------------------------------------------------------------------------------------


def test_nothing_wrong_is_no_refusal() -> None:
    with refusing():
        pass
    with pytest.raises(ZeroDivisionError), refusing():
        raise ZeroDivisionError("a bug stays one")


@pytest.mark.parametrize(
    ("told", "code", "text"),
    [
        ([(2, "page"), (2, "page")], 2, "page"),
        ([None, (3, "no manifest")], 3, "rank 1: no manifest"),
        ([(8, "read-only"), (2, "a file")], 8, "rank 0: read-only"),
    ],
)
def test_all_ranks_are_refused_by_the_first_one_that_is(
    told: list[Any], code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: told)
    with pytest.raises(Refused, match=f"^{text}$") as refused, refusing():
        pass
    assert code_of(refused.value) == code


def test_a_refusal_is_said_once_and_told_to_a_launcher_that_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Refused) as caught, refusing():
        raise ConfigError("another page")
    monkeypatch.setenv(REFUSALS, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert leave_refused("a1", caught.value) is ExitCode.CONFIG
    assert (capsys.readouterr().err, list(tmp_path.iterdir())) == ("", [])
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert leave_refused("a1", caught.value) is ExitCode.CONFIG
    assert word(RunDir(tmp_path)) == (2, "another page", -1, 1, "a1"), "on every node"
    monkeypatch.setenv("RANK", "0")
    leave_refused("a1", caught.value)
    assert capsys.readouterr().err == "sdtrain: another page\n"


# A run that goes round in circles ------------------------------------------------------------------------------------


def attempt(
    name: str, *, step: int = 10, page: str = "p", commit: int | None = None, **end: Any
) -> list[dict[str, Any]]:
    """Ledger rows of one attempt: where it began, what it committed, and how it ended, if it said so."""
    rows: list[dict[str, Any]] = [{"event": "start", "attempt": name, "step": step, "config_sha256": page}]
    if commit is not None:
        rows.append({"event": "commit", "attempt": name, "step": commit})
    if end:
        rows.append({"event": "end", "attempt": name, **end})
    return rows


LOOP = [*attempt("a"), *attempt("b", code=6, reason="hang"), *attempt("c", code=85, reason="SIGUSR1")]


def test_attempts_that_came_to_nothing_are_counted_newest_first() -> None:
    endings = fruitless(LOOP, step=10, config_sha256="p")
    assert endings == ["c: SIGUSR1", "b: hang", "a: died without a word"]


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([], 0),
        ([*LOOP, *attempt("d", commit=12)], 0),
        ([*attempt("d", commit=12), *LOOP], 3),
        ([*LOOP, *attempt("d", code=0, reason="STOP file")], 0),
        ([*LOOP, *attempt("d", step=12)], 0),
        ([*LOOP, *attempt("d", page="other")], 0),
        ([*attempt("d", page="other"), *LOOP[1:]], 2),
        ([{"event": "start", "attempt": "old", "step": 10}, *LOOP], 3),
        ([*LOOP, {"event": "end", "attempt": "refused", "code": 7, "reason": "no progress"}], 3),
    ],
)
def test_what_breaks_the_circle(rows: list[dict[str, Any]], count: int) -> None:
    assert len(fruitless(rows, step=10, config_sha256="p")) == count


def test_the_fourth_start_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    refuse_to_spin(run, step=10, config_sha256="p")
    for row in LOOP[:-2]:
        run.log(**row)
    refuse_to_spin(run, step=10, config_sha256="p")
    for row in LOOP[-2:]:
        run.log(**row)
    text = (
        "the last 3 attempts began at step 10 as well and ended without a new checkpoint, the newest first:\n"
        "  c: SIGUSR1\n  b: hang\n  a: died without a word\nAnother start would end alike. Mend the cause and say "
        "where to start (--resume CHECKPOINT, or --resume never where nothing is saved yet), or change the page"
    )
    with pytest.raises(NoProgressError, match=re.escape(text)) as refused:
        refuse_to_spin(run, step=10, config_sha256="p")
    assert code_of(refused.value) is ExitCode.NO_PROGRESS
    refuse_to_spin(run, step=12, config_sha256="p")


def test_all_ranks_are_refused_by_what_rank_0_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "broadcast_object", lambda item: ["c: x", "b: x", "a: x"])
    with pytest.raises(NoProgressError, match="c: x"):
        refuse_to_spin(RunDir(tmp_path), step=10, config_sha256="p")
