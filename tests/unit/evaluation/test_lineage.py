"""The proof by hand-written ledgers."""

from __future__ import annotations

from typing import Any

import pytest

from sdtrain.checkpoints.manifest import folder_name as name
from sdtrain.evaluation.lineage import Commit, Skip, trace
from tests.ledgers import commit, rollback, start


def steps(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    lineage = trace(rows)
    assert lineage.problems == ()
    return [(one.step, one.attempt) for one in lineage.commits]


def told(rows: list[dict[str, Any]]) -> tuple[tuple[Commit, ...], tuple[Skip, ...], tuple[str, ...]]:
    lineage = trace(rows)
    return lineage.commits, lineage.skips, lineage.problems


def test_a_chain_of_attempts_adds_up() -> None:
    rows = [start("a"), commit(2, None), commit(4, 2), start("b", 4), commit(6, 4, "b")]
    commits, skips, problems = told(rows)
    assert (skips, problems) == ((), ())
    assert commits == (
        Commit(name(2), 2, "a", 0, 16),
        Commit(name(4), 4, "a", 16, 32),
        Commit(name(6), 6, "b", 32, 48),
    )


def test_what_a_later_start_went_behind_is_dead() -> None:
    rows = [start("a"), commit(2, None), commit(4, 2), commit(6, 4), start("b", 2), commit(4, 2, "b"), start("c", 4)]
    assert steps(rows) == [(2, "a"), (4, "b")]
    assert steps([*rows, commit(7, 4, "c")]) == [(2, "a"), (4, "b"), (7, "c")]


def test_a_commit_keeps_the_parent_that_it_was_written_upon() -> None:
    """Step 4 was written again by b; c resumed from a's step 6, whose parent is a's step 4."""
    rows = [start("a"), commit(2, None), commit(4, 2), commit(6, 4), start("b", 2), commit(4, 2, "b")]
    assert steps([*rows, start("c", 6), commit(8, 6, "c")]) == [(2, "a"), (4, "a"), (6, "a"), (8, "c")]


def test_the_row_of_a_killed_attempt_may_be_written_by_the_next_one() -> None:
    rows = [start("a"), commit(2, None), start("b", 4), commit(4, 2, "a"), commit(6, 4, "b")]
    assert steps(rows) == [(2, "a"), (4, "a"), (6, "b")]
    assert steps(rows[:4]) == [(2, "a"), (4, "a")]


def test_a_fresh_start_in_the_same_folder_begins_anew() -> None:
    assert steps([start("a"), commit(2, None), start("b")]) == []
    assert steps([start("a"), commit(2, None), start("b"), commit(3, None, "b")]) == [(3, "b")]


SICK = "the loss ran away"


def test_positions_left_out_on_purpose_are_no_gap_and_are_listed() -> None:
    """Steps 4 to 6 went wrong and were saved: the run goes on from 4 behind what they consumed."""
    later = commit(6, 4, first_position=48, last_position=64)
    rows = [start("a"), commit(4, None), commit(6, 4), rollback(4, (32, 48)), later]
    commits, skips, problems = told(rows)
    assert (skips, problems) == ((Skip(32, 48, SICK),), ())
    assert [(one.first, one.last) for one in commits] == [(0, 32), (48, 64)]
    _, skips, problems = told([start("a"), commit(4, None), rollback(4, (32, 40)), later])
    assert problems == (f"samples 40 to 47 were skipped before {name(6)}",)


def test_a_rollback_alone_kills_what_came_after() -> None:
    rows = [start("a"), commit(2, None), commit(4, 2), rollback(2, (16, 40))]
    assert steps(rows) == [(2, "a")]
    assert told(rows)[1] == (), "nothing was trained beyond what was left out"


def test_a_second_rollback_to_the_same_place_leaves_out_both_ranges() -> None:
    rows = [
        start("a"),
        commit(4, None),
        rollback(4, (32, 48)),
        rollback(4, (32, 48), (48, 56)),
        commit(6, 4, first_position=56, last_position=72),
    ]
    assert told(rows)[1:] == ((Skip(32, 48, SICK), Skip(48, 56, SICK)), ())


def test_a_later_rollback_does_not_list_the_ranges_of_an_earlier_one_again() -> None:
    rows = [
        start("a"),
        commit(4, None),
        rollback(4, (32, 48)),
        commit(6, 4, first_position=48, last_position=64),
        rollback(6, (32, 48), (64, 80), position=64),
        commit(7, 6, first_position=80, last_position=88),
    ]
    assert told(rows)[1:] == ((Skip(32, 48, SICK), Skip(64, 80, SICK)), ())


def test_a_rollback_outlives_its_attempt() -> None:
    """It died before it had saved again; the next start reads the ledger and leaves out the same range."""
    rows = [start("a"), commit(4, None), rollback(4, (32, 48)), start("b", 4)]
    assert told([*rows, commit(6, 4, "b", first_position=48, last_position=64)])[1:] == ((Skip(32, 48, SICK),), ())


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([commit(2, None, first_position=8)], f"samples 0 to 7 were skipped before {name(2)}"),
        (
            [commit(2, None), commit(4, 2, first_position=24)],
            f"samples 16 to 23 were skipped before {name(4)}",
        ),
        ([commit(2, None), commit(4, 2, first_position=8)], f"samples 8 to 15 were trained on again in {name(4)}"),
        (
            [commit(4, None), rollback(4, (32, 48)), commit(6, 4, first_position=64, last_position=80)],
            f"samples 48 to 63 were skipped before {name(6)}",
        ),
        ([commit(2, None), commit(4, 2, last_position=16)], f"{name(4)} ends at sample 16, not after its start 16"),
        ([commit(4, 2)], f"{name(2)} is in the lineage, the ledger holds no commit of it"),
        (
            [commit(2, None), start("b", 3)],
            f"{name(3)} is in the lineage, the ledger holds no commit of it",
        ),
    ],
)
def test_what_does_not_add_up_is_named(rows: list[dict[str, Any]], problem: str) -> None:
    assert problem in told([start("a"), *rows])[2]


def test_verdicts() -> None:
    assert trace([]).verdict == "no commit in the ledger"
    whole = trace([start("a"), commit(2, None), start("b", 2), commit(4, 2, "b")])
    assert whole.verdict == "samples 0 to 31 were trained on exactly once: 2 contiguous ranges, 2 attempts"
    torn = trace([start("a"), commit(2, None, first_position=8)])
    assert torn.verdict == f"not exactly once: samples 0 to 7 were skipped before {name(2)}"


def test_the_lineage_of_an_older_checkpoint() -> None:
    rows = [start("a"), commit(2, None), commit(4, 2), commit(6, 4)]
    assert [one.step for one in trace(rows, newest=name(4)).commits] == [2, 4]
