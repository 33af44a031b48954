"""Which samples of the order a step takes, in a run that may have left some out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sdtrain import distributed
from sdtrain.checkpoints.manifest import Checkpoint
from sdtrain.run_dir import RunDir


@dataclass(frozen=True)
class Positions:
    """Where in the order of samples the steps of a lineage begin.

    Without a rollback, step s begins at s * batch_size. A rollback leaves out what the sick steps consumed: the run
    goes on behind it, so positions only ever grow, and no sample that was part of the sickness is seen twice.

    Attributes:
        batch_size: Samples of one step.
        left_out: (first, end) of every range that rollbacks left out, ascending.
    """

    batch_size: int
    left_out: tuple[tuple[int, int], ...] = ()

    @property
    def skipped_steps(self) -> int:
        """Steps' worth of samples that are left out."""
        return sum(end - first for first, end in self.left_out) // self.batch_size

    @property
    def rollbacks(self) -> int:
        """How often this lineage went back, over all its starts: every rollback leaves a range out."""
        return len(self.left_out)

    def at(self, step: int) -> int:
        """The position of the first sample after `step` finished steps, for steps behind the last range."""
        return (step + self.skipped_steps) * self.batch_size

    def leaving_out(self, first: int, end: int) -> Positions:
        """The same lineage without one more range."""
        return replace(self, left_out=(*self.left_out, (first, end)))

    def resumed(self, run: RunDir, checkpoint: Checkpoint) -> Positions:
        """Positions of a run that goes on from `checkpoint`; collective.

        The checkpoint knows what had been left out when it was written. Where the run came back to it later, and died
        before it had written another one, the ledger knows more.
        """
        manifest = checkpoint.manifest
        left_out = manifest.get("left_out", [])
        rows = run.ledger_rows() if distributed.ranks().is_main else []
        for row in rows:
            place = (row.get("checkpoint"), row.get("position"))
            if row["event"] == "rollback" and place == (checkpoint.path.name, manifest.get("last_position")):
                left_out = row["left_out"]
        left_out = distributed.broadcast_object(left_out)
        return replace(self, left_out=tuple((first, end) for first, end in left_out))
