"""Section `checkpoint`: when to save and what to keep."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sdtrain.config.base import PositiveInt, Section


class CheckpointConfig(Section):
    """Checkpoints; the last step is always saved.

    Attributes:
        every_steps: Steps between two checkpoints.
        keep_last: Newest checkpoints that are kept; at least 2, so that a damaged one has a predecessor.
        keep_every_steps: Keep every checkpoint whose step is a multiple of this; null keeps only the newest.
    """

    every_steps: PositiveInt = 1000
    keep_last: Annotated[int, Field(ge=2)] = 2
    keep_every_steps: PositiveInt | None = None
