"""The layout of a run folder, and writes that survive a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdtrain.run_dir import Exit, RunDir, append_json_line, read_json_lines, write_atomically


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
