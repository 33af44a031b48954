"""Ledger rows as a training writes them, for tests of what is read out of them."""

from __future__ import annotations

from typing import Any

from sdtrain.checkpoints.manifest import folder_name as name

BATCH = 8


def start(attempt: str, resumed: int | None = None) -> dict[str, Any]:
    return {"event": "start", "attempt": attempt, "step": resumed or 0, "resumed_from": resumed and name(resumed)}


def commit(step: int, parent: int | None, attempt: str = "a", **changes: Any) -> dict[str, Any]:
    row = {
        "event": "commit",
        "checkpoint": name(step),
        "step": step,
        "attempt": attempt,
        "parent": None if parent is None else name(parent),
        "first_position": (parent or 0) * BATCH,
        "last_position": step * BATCH,
    }
    return row | changes


def rollback(to: int, *left_out: tuple[int, int], position: int | None = None) -> dict[str, Any]:
    place = {"checkpoint": name(to), "position": to * BATCH if position is None else position}
    return {
        "event": "rollback",
        "attempt": "a",
        "step": to + 1,
        "left_out": left_out,
        "reason": "the loss ran away",
        **place,
    }
