"""The word that an attempt leaves: typed, and the first cause before its consequences."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtrain import distributed
from sdtrain.errors import ConfigError, DataError, DivergedError, ExitCode, SdtrainError
from sdtrain.run_dir import Exit, RunDir
from sdtrain.training.outcome import code_of, leave_broken, leave_together

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
        (OSError(2, "No such file"), ExitCode.BUG),
        (LOST, ExitCode.HANG),
        (RuntimeError("Timed out waiting 60000ms for recv operation"), ExitCode.HANG),
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
