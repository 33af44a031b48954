"""The list of unreadable samples: each one once, over ranks, epochs and attempts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtrain import distributed
from sdtrain.data.tombstones import TombstoneList
from sdtrain.records import Tombstone
from sdtrain.run_dir import RunDir, read_json_lines

A, B, C = (Tombstone(key, "0.tar", "torn") for key in "abc")


def row(tombstone: Tombstone, step: int) -> dict[str, object]:
    return {"key": tombstone.key, "shard": "0.tar", "reason": "torn", "step": step}


def test_every_sample_is_listed_once_with_its_first_step(tmp_path: Path) -> None:
    path = RunDir(tmp_path).tombstones
    found = TombstoneList(path)
    assert found.write() == 0
    assert not path.exists()
    found.note(3, [A, B])
    found.note(4, [B, A])
    assert found.write() == 2
    found.note(9, [A, C])
    assert found.write() == 1
    assert list(read_json_lines(path)) == [row(A, 3), row(B, 3), row(C, 9)]


def test_another_attempt_goes_on_with_the_file(tmp_path: Path) -> None:
    path = RunDir(tmp_path).tombstones
    first = TombstoneList(path)
    first.note(3, [A])
    first.write()
    with open(path, "a") as file:
        file.write('{"key": "torn by a ki')
    second = TombstoneList(path)
    second.note(1, [A, B])
    assert second.write() == 1
    assert list(read_json_lines(path)) == [row(A, 3), row(B, 1)]


def test_ranks_are_brought_together_and_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = RunDir(tmp_path).tombstones
    ranks = [TombstoneList(path), TombstoneList(path)]
    ranks[0].note(5, [A, B])
    ranks[1].note(2, [B, C])
    notes = [list(one._noted.values()) for one in ranks]
    monkeypatch.setattr(distributed, "gather_objects", lambda item: notes)
    monkeypatch.setenv("RANK", "1")
    assert ranks[1].write() == 3
    assert not path.exists()
    monkeypatch.setenv("RANK", "0")
    assert ranks[0].write() == 3
    assert list(read_json_lines(path)) == [row(B, 2), row(C, 2), row(A, 5)]
