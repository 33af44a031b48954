from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdtrain.checkpoints import retention
from sdtrain.checkpoints.protocol import commit, find, list_checkpoints
from sdtrain.checkpoints.retention import retain
from sdtrain.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in range(1, 8):
        commit(tmp_path, step=step, attempt="a", files={"extra.rank00000.safetensors": {"x": torch.ones(2)}}, facts={})
    return tmp_path


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


def test_the_newest_stay(folder: Path) -> None:
    assert retain(folder, keep_last=3) == ["step-00000004", "step-00000003", "step-00000002", "step-00000001"]
    assert steps(folder) == [7, 6, 5]
    assert retain(folder, keep_last=3) == []
    assert sorted(path.name for path in folder.iterdir()) == [
        "LATEST",
        "step-00000005",
        "step-00000006",
        "step-00000007",
    ]


def test_periodic_pinned_and_resumed_from_stay(folder: Path) -> None:
    (folder / "step-00000002" / "PINNED").touch()
    retain(folder, keep_last=2, keep_every_steps=3, resumed_from=folder / "x" / ".." / "step-00000001")
    assert steps(folder) == [7, 6, 3, 2, 1]


def test_damaged_ones_neither_count_nor_go(folder: Path) -> None:
    (folder / "step-00000007" / "CORRUPT").touch()
    (folder / "step-00000001" / "CORRUPT").touch()
    (folder / "step-00000006" / "MANIFEST.json").unlink()
    retain(folder, keep_last=2)
    assert steps(folder) == [7, 6, 5, 4, 1]
    found = find(folder, "auto")
    assert found is not None
    assert found.step == 7  # the mark was wrong: it verifies


def test_one_is_not_enough(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.keep_last is 1; at least 2 are kept"):
        retain(folder, keep_last=1)
    with pytest.raises(ConfigError, match=r"checkpoint.keep_every_steps is 0; give a number of steps >= 1, or null"):
        retain(folder, keep_last=2, keep_every_steps=0)
    assert len(steps(folder)) == 7


def test_a_deletion_that_stops_half_way_leaves_nothing_under_a_final_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        (path / "MANIFEST.json").unlink()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(retention.shutil, "rmtree", refuse)
    retain(folder, keep_last=6)
    assert steps(folder) == [7, 6, 5, 4, 3, 2]
    assert "step-00000001 could not be deleted: [Errno 5] Input/output error" in caplog.text
    assert len(list(folder.glob(".trash-step-00000001-*"))) == 1
