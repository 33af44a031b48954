"""Reading `.wandb` files of our own making; those of W&B itself are read in test_tracking."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2

from sdtrain.training.wandb_files import history, last_tracked_step

BLOCK = 32768


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """A header and log blocks, as LevelDB's log format has them; checksums are left at 0, which nobody reads."""
    content = b":W&B" + bytes(3)
    for row in rows:
        record = wandb_internal_pb2.Record()
        for key, value in row.items():
            item = record.history.item.add()
            item.key, item.value_json = key, json.dumps(value)
        content = appended(content, record.SerializeToString())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def appended(content: bytes, message: bytes) -> bytes:
    first = True
    while True:
        room = BLOCK - len(content) % BLOCK
        if room < 7:
            content += bytes(room)
            continue
        piece, message = message[: room - 7], message[room - 7 :]
        kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not message]
        content += struct.pack("<IHB", 0, len(piece), kind) + piece
        first = False
        if not message:
            return content


def test_records_run_over_the_edges_of_blocks(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"_step": step, "text": "x" * (step * 997)} for step in range(100)]
    path = write(tmp_path / "wandb/offline-run-1/run-1.wandb", rows)
    assert path.stat().st_size > 100 * BLOCK
    assert list(history(path)) == rows
    assert last_tracked_step(tmp_path) == 99


def test_the_torn_end_of_a_killed_writer_costs_the_last_record(tmp_path: Path) -> None:
    path = write(tmp_path / "wandb/run-1/run-1.wandb", [{"_step": 1}, {"_step": 2}])
    whole = path.read_bytes()
    for kept in range(7, len(whole)):
        path.write_bytes(whole[:kept])
        assert [row["_step"] for row in history(path)] == ([1] if kept >= len(whole) - len(whole[7:]) // 2 else [])
    path.write_bytes(whole + bytes(100))
    assert [row["_step"] for row in history(path)] == [1, 2]


def test_the_furthest_of_all_attempts_counts(tmp_path: Path) -> None:
    assert last_tracked_step(tmp_path) == -1
    write(tmp_path / "wandb/offline-run-1/run-1.wandb", [{"_step": 5}, {"_step": 9}])
    write(tmp_path / "wandb/offline-run-2/run-2.wandb", [{"_step": 7}, {"no": "step"}])
    assert last_tracked_step(tmp_path) == 9
