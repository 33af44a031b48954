"""How a run's weights came to be: the proof, by its ledger, that they saw every position exactly once.

The ledger is read in the order in which it was written, with three kinds of rows:

- `start`: an attempt begins from the checkpoint `resumed_from`, or afresh. What came after that checkpoint is dead.
- `commit`: a checkpoint with its `parent`, and the positions `[first_position, last_position)` between the two.
- `rollback`: the run went back to `checkpoint`, which ends at `position`, and leaves out the ranges `left_out` on
  purpose, for a `reason`. What came after that checkpoint is dead, too.

The surviving lineage is the chain of commits from the newest one back to the start; its intervals have to meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdtrain.checkpoints.manifest import folder_name


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of the surviving lineage.

    Attributes:
        checkpoint: Its name.
        step: Finished optimiser steps.
        attempt: Who wrote it.
        first: First position since its parent.
        last: The position after the last one.
    """

    checkpoint: str
    step: int
    attempt: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Skip:
    """A range of positions, the last one excluded, that was left out on purpose."""

    first: int
    last: int
    reason: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """How a checkpoint came to be.

    Attributes:
        commits: Oldest first.
        skips: Positions within it that were left out on purpose.
        problems: Where it does not add up; empty is the proof.
    """

    commits: tuple[Commit, ...]
    skips: tuple[Skip, ...]
    problems: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The proof in one sentence, or that there is none."""
        if self.problems:
            return "not exactly once: " + "; ".join(self.problems)
        if not self.commits:
            return "no commit in the ledger"
        left_out = sum(skip.last - skip.first for skip in self.skips)
        but = f", but for {left_out} that were left out on purpose" if left_out else ""
        attempts = len({commit.attempt for commit in self.commits})
        return (
            f"samples 0 to {self.commits[-1].last - 1} were trained on exactly once{but}: "
            f"{len(self.commits)} contiguous ranges, {attempts} attempt{'s' if attempts > 1 else ''}"
        )


@dataclass(frozen=True, slots=True)
class _Node:
    """A commit with the very parent that it was written upon, and what was left out in between."""

    commit: Commit
    parent: _Node | None
    parent_name: str | None
    skips: tuple[Skip, ...]


def trace(rows: Iterable[Mapping[str, Any]], *, newest: str | None = None) -> Lineage:
    """The lineage of a checkpoint.

    Args:
        rows: Ledger rows in the order in which they were written.
        newest: The checkpoint that it leads to; None is the one that the next start would resume from.
    """
    known: dict[str, _Node] = {}
    skips: dict[tuple[str, int], tuple[Skip, ...]] = {}  # by the checkpoint that they follow, and where it ends
    head: str | None = None
    attempt = ""
    for row in rows:
        match row.get("event"):
            case "start":
                head, attempt = row.get("resumed_from"), str(row["attempt"])
            case "rollback":
                head, end = str(row["checkpoint"]), int(row["position"])
                ranges = [(int(first), int(last)) for first, last in row["left_out"]]
                skips[head, end] = tuple(Skip(*one, str(row["reason"])) for one in ranges if one[0] >= end)
            case "commit":
                node = _node(row, known, skips)
                known[node.commit.checkpoint] = node
                if node.commit.attempt == attempt:  # the row of a killed attempt may be written by the next one
                    head = node.commit.checkpoint
    lineage, problems = _chain(newest or head, known)
    skips_of_lineage = tuple(skip for node in lineage for skip in node.skips)
    return Lineage(tuple(node.commit for node in lineage), skips_of_lineage, (*_seams(lineage), *problems))


def _node(
    row: Mapping[str, Any], known: Mapping[str, _Node], skips: Mapping[tuple[str, int], tuple[Skip, ...]]
) -> _Node:
    name, parent_name = folder_name(row["step"]), row.get("parent")
    commit = Commit(name, row["step"], str(row.get("attempt")), row["first_position"], row["last_position"])
    parent = None if parent_name is None else known.get(parent_name)
    left_out = () if parent is None else skips.get((parent.commit.checkpoint, parent.commit.last), ())
    return _Node(commit, parent, parent_name, left_out)


def _chain(head: str | None, known: Mapping[str, _Node]) -> tuple[list[_Node], list[str]]:
    """Commits from the start to `head`, and what is missing on the way."""
    if head is not None and head not in known:
        return [], [f"{head} is in the lineage, the ledger holds no commit of it"]
    lineage: list[_Node] = []
    node = None if head is None else known[head]
    while node is not None:
        lineage.append(node)
        if node.parent is None and node.parent_name is not None:
            return lineage[::-1], [f"{node.parent_name} is in the lineage, the ledger holds no commit of it"]
        node = node.parent
    return lineage[::-1], []


def _seams(lineage: Sequence[_Node]) -> list[str]:
    """Where an interval does not begin where the one before it ended, and no skip says why."""
    problems: list[str] = []
    expected = 0
    for node in lineage:
        commit = node.commit
        start = _after_skips(expected, node.skips)
        if commit.last <= commit.first:
            problems.append(f"{commit.checkpoint} ends at sample {commit.last}, not after its start {commit.first}")
        if commit.first > start:
            problems.append(f"samples {start} to {commit.first - 1} were skipped before {commit.checkpoint}")
        elif commit.first < expected:
            problems.append(f"samples {commit.first} to {expected - 1} were trained on again in {commit.checkpoint}")
        expected = commit.last
    return problems


def _after_skips(position: int, skips: Iterable[Skip]) -> int:
    """The first position at or after `position` that was not left out on purpose."""
    for skip in sorted(skips, key=lambda skip: skip.first):
        if skip.first <= position < skip.last:
            position = skip.last
    return position
