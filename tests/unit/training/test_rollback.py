"""Where a sick run goes back to, and what it leaves behind; checkpoints are real, the engine is a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.checkpoints.manifest import list_checkpoints
from sdtrain.checkpoints.remote import RemoteStore
from sdtrain.checkpoints.retention import Retention
from sdtrain.checkpoints.uploader import Uploader
from sdtrain.errors import StorageError
from sdtrain.run_dir import RunDir
from sdtrain.training.keeper import CheckpointKeeper
from sdtrain.training.rollback import Restart, Rollback
from tests.engines import PlainEngine

BATCH = 8


def keeper_of(folder: Path, attempt: str = "a") -> CheckpointKeeper:
    return CheckpointKeeper(
        run=RunDir(folder),
        attempt=attempt,
        engines={"denoiser": PlainEngine()},
        batch_size=BATCH,
        config_text="seed: 1\n",
        identity={"seed": 1},
        environment={},
        retention=Retention(keep_last=9),
        asynchronous=True,
    )


class Told:
    """Writes down what a rollback asks for."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.restarts: list[int] = []

    def rollback(self, keeper: CheckpointKeeper) -> Rollback:
        return Rollback(keeper=keeper, batches_after=self.batches_after, on_restart=self.restarts.append)

    def batches_after(self, step: int) -> Any:
        self.batches.append(step)
        return iter(())


def saved(folder: Path, *steps: int) -> CheckpointKeeper:
    keeper = keeper_of(folder)
    keeper.before_save = lambda: {"denoiser": {"losses": [step / 4], "skipped": [[1, "loss spike"]], "row": []}}
    for step in steps:
        keeper.engines["denoiser"].applied_steps = step
        keeper.save(step)
    return keeper


def names(keeper: CheckpointKeeper) -> list[str]:
    return [checkpoint.path.name for checkpoint in list_checkpoints(keeper.run.checkpoints)]


def test_the_newest_checkpoint_that_is_not_younger_than_the_sickness(tmp_path: Path) -> None:
    keeper, told = saved(tmp_path, 2, 4, 6), Told()  # the save of step 6 is in flight
    restart = told.rollback(keeper)(5, 7, "denoiser: sick")
    assert isinstance(restart, Restart)
    assert (restart.step, told.batches, told.restarts) == (4, [4], [4])
    assert restart.health == {"denoiser": {"losses": [1.0], "skipped": [], "row": []}}, "what was known at step 4"
    engine = keeper.engines["denoiser"]
    assert engine.restored is not None
    assert engine.restored[1] == 4
    assert torch.equal(engine.restored[0]["group0/master"], engine.state["master"])
    assert names(keeper) == ["step-00000004", "step-00000002"]
    assert len(list(keeper.run.checkpoints.glob("step-00000006.rolled-back-*"))) == 1, "kept, under no final name"
    assert (keeper.run.checkpoints / "LATEST").read_text() == "step-00000004\n"
    assert (keeper.parent, keeper.saved_step, keeper.positions.left_out) == ("step-00000004", 4, ((32, 56),))
    row = keeper.run.ledger_rows()[-1]
    assert {key: row[key] for key in row if key != "time"} == {
        "event": "rollback",
        "attempt": "a",
        "step": 7,
        "checkpoint": "step-00000004",
        "reason": "denoiser: sick",
        "position": 32,
        "left_out": [[32, 56]],
    }


def test_copies_in_a_store_are_withdrawn_with_their_originals(tmp_path: Path) -> None:
    keeper, store = keeper_of(tmp_path / "run"), RemoteStore((tmp_path / "store").as_uri())
    keeper.uploader = Uploader(keeper.run, store)
    for step in (2, 4, 6):
        keeper.engines["denoiser"].applied_steps = step
        keeper.finish(step)
    assert keeper.uploader.wait(20)
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [6, 4, 2]
    assert Told().rollback(keeper)(3, 7, "sick") is not None
    assert keeper.uploader.wait(20)
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [2]
    assert '"event": "rollback"' in store.ledger(keeper.run), "what is left out is known there too"


def test_the_checkpoint_right_before_the_sickness_will_do(tmp_path: Path) -> None:
    restart = Told().rollback(saved(tmp_path, 2, 4))(4, 7, "sick")
    assert restart is not None
    assert restart.step == 4


def test_where_all_are_younger_it_is_the_oldest(tmp_path: Path) -> None:
    restart = Told().rollback(saved(tmp_path, 4, 6))(2, 7, "sick")
    assert restart is not None
    assert restart.step == 4


def test_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    keeper = saved(tmp_path, 2, 4, 6)
    keeper.join()
    victim = keeper.run.checkpoints / "step-00000004" / "denoiser.rank00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    restart = Told().rollback(keeper)(5, 7, "sick")
    assert restart is not None
    assert restart.step == 2
    assert names(keeper) == ["step-00000002"], "what is younger goes, damaged or not"


def test_without_a_checkpoint_there_is_no_way_back(tmp_path: Path) -> None:
    told = Told()
    assert told.rollback(keeper_of(tmp_path))(3, 7, "sick") is None
    assert told.restarts == []


def test_steps_committed_again_are_in_the_ledger_again(tmp_path: Path) -> None:
    keeper = saved(tmp_path, 2, 4)
    Told().rollback(keeper)(3, 5, "sick")
    keeper.save(4)
    keeper.join()
    rows = [row for row in keeper.run.ledger_rows() if row["event"] == "commit"]
    spans = [(row["checkpoint"], row["parent"], row["first_position"], row["last_position"]) for row in rows]
    assert spans == [
        ("step-00000002", None, 0, 16),
        ("step-00000004", "step-00000002", 16, 32),
        ("step-00000004", "step-00000002", 40, 56),
    ]
    again = keeper_of(tmp_path, "b")
    again.restore(list_checkpoints(keeper.run.checkpoints)[0])
    assert (again.positions.left_out, again.positions.at(4)) == (((16, 40),), 56)


def test_a_second_rollback_to_the_same_place_leaves_out_what_follows(tmp_path: Path) -> None:
    keeper = saved(tmp_path, 2)
    for _ in range(2):
        Told().rollback(keeper)(3, 5, "sick")
    assert keeper.positions.left_out == ((16, 40), (40, 64))


def test_checkpoints_that_cannot_be_set_aside_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = saved(tmp_path, 2, 4)
    keeper.join()

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError) as raised:
        Told().rollback(keeper)(3, 5, "sick")
    assert raised.value.exit_code == 8
    assert str(raised.value) == (
        f"{keeper.run.checkpoints}: checkpoints younger than step-00000002 hold a sick state and cannot be renamed: "
        "PermissionError: [Errno 13] Permission denied. Rename them by hand, then start again."
    )
