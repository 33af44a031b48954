"""Where steps begin in the order, after nothing, one or several ranges were left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdtrain.checkpoints.manifest import Checkpoint
from sdtrain.run_dir import RunDir
from sdtrain.training.positions import Positions


def test_steps_begin_behind_what_is_left_out() -> None:
    plain = Positions(8)
    assert (plain.skipped_steps, plain.at(0), plain.at(5)) == (0, 0, 40)
    once = plain.leaving_out(plain.at(4), plain.at(7))
    assert (once.left_out, once.skipped_steps, once.at(4)) == (((32, 56),), 3, 56)
    twice = once.leaving_out(once.at(4), once.at(6))
    assert (twice.left_out, twice.skipped_steps, twice.at(4)) == (((32, 56), (56, 72)), 5, 72)
    assert (plain.rollbacks, once.rollbacks, twice.rollbacks) == (0, 1, 2)
    assert plain.left_out == (), "a value, not a place"


def checkpoint(**facts: Any) -> Checkpoint:
    return Checkpoint(Path("step-00000004"), {"last_position": 32} | facts)


BACK = {"checkpoint": "step-00000004", "position": 32, "left_out": [[32, 56]]}


@pytest.mark.parametrize(
    ("facts", "rows", "expected"),
    [
        ({}, [], ()),  # a checkpoint from before there were rollbacks
        ({"left_out": [[8, 16]], "last_position": 40}, [], ((8, 16),)),
        ({"left_out": []}, [BACK], ((32, 56),)),
        ({"left_out": []}, [BACK, BACK | {"left_out": [[32, 56], [56, 72]]}], ((32, 56), (56, 72))),
        ({"left_out": []}, [BACK | {"checkpoint": "step-00000002"}], ()),
        ({"left_out": [[8, 16]], "last_position": 40}, [BACK], ((8, 16),)),  # the same step, written again later
    ],
)
def test_a_resume_knows_what_the_checkpoint_and_the_ledger_know(
    tmp_path: Path, facts: dict[str, Any], rows: list[dict[str, Any]], expected: tuple[tuple[int, int], ...]
) -> None:
    run = RunDir(tmp_path)
    run.log("start", attempt="a")
    for row in rows:
        run.log("rollback", **row)
    assert Positions(8).resumed(run, checkpoint(**facts)).left_out == expected
