"""Section `checkpoint`: when to save and what to keep."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sdtrain.config.base import NonEmptyStr, PositiveInt, Section


class CheckpointConfig(Section):
    """Checkpoints; the last step is always saved.

    Attributes:
        every_steps: Steps between two checkpoints.
        asynchronous: Copy the state to host memory and write it beside training; false stands still until it is on
            the disk, and needs no memory for the copy (16 bytes a parameter, over all ranks).
        keep_last: Newest checkpoints that are kept; at least 2, so that a damaged one has a predecessor.
        keep_every_steps: Keep every checkpoint whose step is a multiple of this; null keeps only the newest.
        keep_best: Keep this many of those with the best figure `best_by`; null keeps none for it.
        best_by: The figure of validation that `keep_best` goes by; a checkpoint counts if validation ran at its step.
        best_is: Which end of `best_by` is good.
        upload_to: URL that committed checkpoints are copied to, such as `s3://bucket/runs/sd15`; of this run alone. A
            run whose own folder holds none resumes from there; null copies nothing.
        upload_keep: `same` keeps there what is kept here, `all` deletes nothing there; what a rollback (section
            `health`) set aside here goes there in any case.
    """

    every_steps: PositiveInt = 1000
    asynchronous: bool = True
    keep_last: Annotated[int, Field(ge=2)] = 2
    keep_every_steps: PositiveInt | None = None
    keep_best: PositiveInt | None = None
    best_by: Annotated[str, Field(pattern="^validation/.+")] = "validation/loss"
    best_is: Literal["lowest", "highest"] = "lowest"
    upload_to: NonEmptyStr | None = None
    upload_keep: Literal["all", "same"] = "all"
