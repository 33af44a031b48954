"""Saves and restores a run: what goes into a checkpoint beside the tensors, retention, the ledger."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdtrain import distributed
from sdtrain.checkpoints.protocol import Checkpoint, commit
from sdtrain.checkpoints.retention import retain
from sdtrain.errors import CheckpointError, StorageError
from sdtrain.run_dir import RunDir
from sdtrain.training.engine import Engine
from sdtrain.training.state import rank_files, restore, state_facts

log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3


@dataclass
class CheckpointKeeper:
    """Commits checkpoints of one attempt and remembers what the ledger has to say.

    Attributes:
        identity: What a resume must find unchanged: manifest digest, seed, order version, batch size.
        config_text: The resolved page, stored in every checkpoint.
        parent: Name of the newest checkpoint in this lineage; None before the first.
    """

    run: RunDir
    attempt: str
    engines: Mapping[str, Engine]
    batch_size: int
    config_text: str
    identity: Mapping[str, Any]
    environment: Mapping[str, Any]
    keep_last: int
    keep_every_steps: int | None
    parent: str | None = None
    saved_step: int = 0
    resumed_from: Path | None = None
    _failed: int = field(default=0, init=False)

    def save(self, step: int) -> Path | None:
        """Commit the state after `step` finished steps; collective. A failed save leaves training going on.

        Raises:
            StorageError: The third save in a row failed.
        """
        if step == self.saved_step:
            return self.run.checkpoints / self.parent if self.parent else None
        facts = {
            "first_position": self.saved_step * self.batch_size,
            "last_position": step * self.batch_size,
            "samples_seen": step * self.batch_size,
            "parent": self.parent,
            "config_sha256": hashlib.sha256(self.config_text.encode()).hexdigest(),
            "identity": dict(self.identity),
            **self.environment,
            **state_facts(self.engines),
        }
        path = commit(
            self.run.checkpoints,
            step=step,
            attempt=self.attempt,
            files=rank_files(self.engines),
            facts=facts,
            texts={"config.yaml": self.config_text},
        )
        if path is None:
            self._failed += 1
            if self._failed >= MAX_FAILED_SAVES:
                raise StorageError(
                    f"{self.run.checkpoints}: {self._failed} saves in a row failed (see the log). Free some space or "
                    "repair the file system, then start again: the newest committed checkpoint is intact."
                )
            return None
        self._failed = 0
        self._record(step, path)
        return path

    def _record(self, step: int, path: Path) -> None:
        if distributed.ranks().is_main:
            self._log_commit(Checkpoint.open(path))
            retain(
                self.run.checkpoints,
                keep_last=self.keep_last,
                keep_every_steps=self.keep_every_steps,
                resumed_from=self.resumed_from,
            )
        self.saved_step, self.parent = step, path.name

    def _log_commit(self, checkpoint: Checkpoint) -> None:
        """One ledger row per commit; a rank killed between the commit and its row leaves this to the next attempt."""
        told = {
            (row.get("checkpoint"), row.get("attempt")) for row in self.run.ledger_rows() if row["event"] == "commit"
        }
        manifest = checkpoint.manifest
        if (checkpoint.path.name, manifest["attempt"]) in told:
            return
        shown = ("attempt", "step", "parent", "world_size", "first_position", "last_position")
        self.run.log("commit", checkpoint=checkpoint.path.name, **{name: manifest[name] for name in shown})

    def restore(self, checkpoint: Checkpoint) -> int:
        """Take over a checkpoint; returns its step. Collective.

        Raises:
            CheckpointError: It was written over other data, another seed or another order.
        """
        saved = checkpoint.manifest.get("identity", {})
        changed = [
            f"{key}: {saved.get(key)!r} then, {value!r} now"
            for key, value in self.identity.items()
            if saved.get(key) != value
        ]
        if changed:
            raise CheckpointError(
                f"{checkpoint.path}: belongs to another run:\n  "
                + "\n  ".join(changed)
                + "\nA resume must see the same "
                "samples in the same order: restore these settings, or choose another run_dir for a new run."
            )
        restore(checkpoint, self.engines)
        if distributed.ranks().is_main:
            self._log_commit(checkpoint)
        self.parent, self.saved_step, self.resumed_from = checkpoint.path.name, checkpoint.step, checkpoint.path
        return checkpoint.step
