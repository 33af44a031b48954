"""The layout of a run folder, and writes that survive a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdtrain.errors import ConfigError, StorageError
from sdtrain.run_dir import (
    REFUSALS,
    REFUSED_STEP,
    Exit,
    RunDir,
    append_json_line,
    read_json_lines,
    tell_launcher,
    write_atomically,
)


def test_names_are_a_contract(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    names = {
        run.config: "config.yaml",
        run.environment: "environment.json",
        run.metrics: "metrics.jsonl",
        run.ledger: "ledger.jsonl",
        run.exit_file: "exit.json",
        run.checkpoints: "checkpoints",
        run.weights: "weights",
        run.samples: "samples",
        run.hangs: "hangs",
        run.stacks: "stacks",
        run.wandb_id: "wandb_id",
    }
    assert all(path == tmp_path / name for path, name in names.items())
    assert list(tmp_path.iterdir()) == [], "looking at a run creates nothing"


# Atomic replacement ---------------------------------------------------------------------------------------------------


def test_write_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.txt"
    write_atomically(path, "old")
    write_atomically(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert [one.name for one in path.parent.iterdir()] == ["file.txt"], "no temporary file stays"


def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def die(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "half")
    assert path.read_text() == "old"


def test_order_of_a_durable_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's bytes, then its name, then the folder: any other order can lose both versions in a power cut."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(handle: int) -> None:
        calls.append("fsync folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "fsync file")
        fsync(handle)

    def watch_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    write_atomically(tmp_path / "file.txt", "text")
    assert calls == ["fsync file", "rename", "fsync folder"]


# JSON lines -----------------------------------------------------------------------------------------------------------


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "rows.jsonl"
    for step in range(3):
        append_json_line(path, {"step": step}, durable=step == 1)
    assert list(read_json_lines(path)) == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert list(read_json_lines(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("torn", [b'{"step": 1, "lo', b"\xff\xfe", b'{"step": 1'])
def test_a_torn_line_costs_itself_alone(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    append_json_line(path, {"step": 0})
    with open(path, "ab") as file:
        file.write(torn)
    append_json_line(path, {"step": 2})
    assert list(read_json_lines(path)) == [{"step": 0}, {"step": 2}]


def test_paths_become_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_json_line(path, {"file": Path("a/b")})
    assert json.loads(path.read_text()) == {"file": "a/b"}


def test_writers_in_several_processes_do_not_mix_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from pathlib import Path; from sdtrain.run_dir import append_json_line\n"
        "for row in range(50): append_json_line(Path(sys.argv[1]), {'who': sys.argv[2], 'row': row, 'pad': 'x' * 500})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    rows = list(read_json_lines(path))
    for name in "ab":
        assert [row["row"] for row in rows if row["who"] == name] == list(range(50))


# Words of a run -------------------------------------------------------------------------------------------------------


def test_exit_is_written_read_and_cleared(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.read_exit() is None
    run.write_exit(Exit(code=5, reason="diverged", step=7, rank=1, attempt="a"))
    found = run.read_exit()
    assert found is not None
    assert (found.code, found.reason, found.step, found.rank, found.attempt) == (5, "diverged", 7, 1, "a")
    assert found.time > 0
    run.clear_exit()
    assert run.read_exit() is None
    run.clear_exit()


def test_the_first_word_of_an_attempt_stands_unless_it_only_missed_a_peer(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    told = []
    for code, attempt in ((0, "a"), (6, "b"), (6, "b"), (3, "b"), (5, "b"), (6, "b"), (6, "c")):
        told.append(run.leave_word(Exit(code, f"{code}", 7, 1, attempt)))
    assert told == [True, True, False, True, False, False, True]
    rows = run.ledger_rows()
    assert [(row["attempt"], row["code"]) for row in rows] == [("a", 0), ("b", 6), ("b", 3), ("c", 6)]
    assert rows[-1]["rank"] == 1 and rows[-1]["step"] == 7
    assert run.read_exit() is not None and run.read_exit().attempt == "c"


def test_an_attempt_that_another_has_followed_leaves_no_word(tmp_path: Path) -> None:
    """A node that was cut off comes back, and its watchdog still wants to write."""
    run = RunDir(tmp_path)
    run.log("start", attempt="a")
    run.log("start", attempt="b")
    assert run.leave_word(Exit(0, "complete", 9, 0, "b"))
    assert not run.leave_word(Exit(6, "hang", 7, 1, "a"))
    assert run.read_exit() is not None and run.read_exit().attempt == "b"
    assert [row["event"] for row in run.ledger_rows()] == ["start", "start", "end"]
    assert run.leave_word(Exit(6, "never met its peers", 0, 0, "c")), "not every start comes to its row"


@pytest.mark.parametrize("text", ["", '{"code": 0', '{"code": 0}', "[]", '{"unknown": 1}'])
def test_a_damaged_exit_file_counts_as_a_crash(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path)
    run.exit_file.write_text(text)
    assert run.read_exit() is None


def test_ledger_rows_have_event_and_time(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.log("start", step=0)
    run.log("commit", step=10, path=Path("x"))
    first, second = run.ledger_rows()
    assert first["event"] == "start" and first["step"] == 0
    assert second["event"] == "commit" and second["path"] == "x"
    assert second["time"] >= first["time"] > 0


def test_attempts_have_names_of_their_own(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert len({run.new_attempt() for _ in range(100)}) == 100


def test_imports_no_torch() -> None:
    code = "import sys, sdtrain.run_dir, sdtrain.errors; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Places that cannot be a run's ----------------------------------------------------------------------------------------


def test_new_empty_and_own_folders_are_usable(tmp_path: Path) -> None:
    RunDir(tmp_path / "new" / "er").refuse_unusable()
    RunDir(tmp_path).refuse_unusable()
    run = RunDir(tmp_path / "run")
    for name in ("checkpoints", "logs", "wandb", "hangs", "samples"):
        (run.path / name).mkdir(parents=True)
    for name in ("STOP", "slurm-12.out", ".nfs01", "wandb_id", "config.yaml", "exit.json", "metrics.jsonl"):
        (run.path / name).touch()
    run.refuse_unusable()
    (run.path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"it holds notes.txt, and no ledger.jsonl of a run"):
        run.refuse_unusable()
    run.log("start", attempt="a")
    run.refuse_unusable()
    assert not (tmp_path / "new").exists()


def test_a_ledger_of_something_else_makes_no_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    append_json_line(run.ledger, {"unit": "part-0", "files": {}})
    for number in range(7):
        (tmp_path / f"{number}.tar").touch()
    text = r"not a run's folder: it holds 0.tar, 1.tar, 2.tar, 3.tar, 4.tar and 3 more, and no ledger.jsonl of a run"
    with pytest.raises(ConfigError, match=text):
        run.refuse_unusable()


def test_a_file_anywhere_on_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"^run_dir = {tmp_path}/file/run: {tmp_path}/file is a file; give a new"):
        RunDir(tmp_path / "file" / "run").refuse_unusable()


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # a root user may write everywhere
    with pytest.raises(StorageError, match=rf"^run_dir: {tmp_path} cannot be written to: this user has no permission"):
        RunDir(tmp_path / "run").refuse_unusable()


def test_a_launcher_that_asks_is_told_of_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Exit(8, "no room", REFUSED_STEP, 0, "a")
    monkeypatch.delenv(REFUSALS, raising=False)
    tell_launcher(refused)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(REFUSALS, str(tmp_path))
    tell_launcher(refused)
    told = RunDir(tmp_path).read_exit()
    assert told is not None and told.is_refusal
    assert (told.code, told.reason) == (8, "no room")
    assert not Exit(8, "3 saves failed", 0, 0, "a").is_refusal
