"""Sends committed checkpoints to a store, one at a time, beside training; whatever fails there is only an alert."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress

from sdtrain.checkpoints.manifest import Checkpoint, content_digest, list_aside, list_checkpoints
from sdtrain.checkpoints.remote import Backoff, RemoteStore
from sdtrain.checkpoints.retention import Retention
from sdtrain.errors import ConfigError
from sdtrain.run_dir import RunDir

log = logging.getLogger(__name__)


class Uploader:
    """A thread that brings the store up to what the run's folder holds, newest first; rank 0 only.

    It compares rather than remembers, so what a killed attempt left half-sent is finished by the next one. A checkpoint
    that cannot be sent is tried again after the next commit. What a rollback set aside in the folder goes from the
    store, whatever its retention, or a run that lost its folder would resume from there.

    Attributes:
        uploading: Name of the checkpoint that is being read right now: retention leaves it alone.
        resumed_from: Name of the checkpoint that this attempt started from: it stays in the store too.
    """

    def __init__(
        self,
        run: RunDir,
        store: RemoteStore,
        *,
        retention: Retention | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        """Start the thread.

        Args:
            run: The run's folder, whose ledger tells every upload.
            store: Where to.
            retention: What stays in the store; None deletes nothing there.
            backoff: Patience with the network.
        """
        self.uploading: str | None = None
        self.resumed_from: str | None = None
        self._run = run
        self._store = store
        self._retention = retention
        self._backoff = backoff or Backoff()
        self._sent: set[str] = set()
        self._withdrawn: set[str] = set()
        self._rollbacks_told = 0
        self._told = {row.get("manifest_sha256") for row in run.ledger_rows() if row.get("event") == "upload"}
        self._is_refused = False
        self._turn = threading.Condition()
        self._asked, self._served = 0, 0
        threading.Thread(target=self._serve, name="checkpoint-uploader", daemon=True).start()

    def look(self) -> None:
        """Compare folder and store, soon: something was committed or set aside, or an earlier attempt left it so."""
        with self._turn:
            self._asked += 1
            self._turn.notify_all()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until everything is sent or given up; whether that came to pass in time."""
        with self._turn:
            return self._turn.wait_for(lambda: self._served == self._asked, timeout_seconds)

    def _serve(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._served != self._asked)
                asked = self._asked
            self._send_all()
            with self._turn:
                self._served = asked
                self._turn.notify_all()

    def _send_all(self) -> None:
        """Withdraw and send until the store is as the folder is, or until it fails for good."""
        name = "checkpoints"
        try:
            if not self._is_refused:
                self._withdraw()
            while not self._is_refused and (checkpoint := self._next()) is not None:
                name = checkpoint.path.name
                self._send(checkpoint)
        except Exception as error:
            self._is_refused = isinstance(error, ConfigError)
            self._alert(name, error)

    def _withdraw(self) -> None:
        """Take out of the store what a rollback set aside here, and tell the store's ledger of every rollback."""
        aside = {content_digest(one.manifest) for one in list_aside(self._run.checkpoints)} - self._withdrawn
        rollbacks = sum(row["event"] == "rollback" for row in self._run.ledger_rows())
        if not aside and rollbacks == self._rollbacks_told:
            return

        def follow() -> None:
            for held in self._store.checkpoints():
                if content_digest(held.manifest) in aside:  # by content: the step may have been committed again
                    self._store.delete(held.path.name)
                    self._run.log("withdraw", checkpoint=held.path.name, url=self._store.url)
                    log.info("%s is at %s no more: it was rolled back", held.path, self._store.url)
            if rollbacks:
                self._store.put_ledger(self._run)

        self._backoff.run(follow, f"withdrawal from {self._store.url} of what was rolled back")
        self._withdrawn |= aside
        self._rollbacks_told = rollbacks

    def _next(self) -> Checkpoint | None:
        """The newest whole checkpoint that is not in the store yet."""
        for checkpoint in list_checkpoints(self._run.checkpoints):
            whole = not checkpoint.damage and not checkpoint.marked_corrupt
            if whole and content_digest(checkpoint.manifest) not in self._sent:
                return checkpoint
        return None

    def _send(self, checkpoint: Checkpoint) -> None:
        name, digest = checkpoint.path.name, content_digest(checkpoint.manifest)
        started = time.monotonic()
        self.uploading = name
        try:
            sent = self._backoff.run(lambda: self._upload(checkpoint), f"upload of {name} to {self._store.url}")
        finally:
            self.uploading = None
        self._sent.add(digest)
        if sent is None:
            return
        if digest not in self._told:
            self._told.add(digest)
            facts = {"size_bytes": sent, "seconds": round(time.monotonic() - started, 3), "manifest_sha256": digest}
            self._run.log("upload", checkpoint=name, url=self._store.url, **facts)
            self._backoff.run(lambda: self._store.put_ledger(self._run), f"upload of the ledger to {self._store.url}")
        log.info("%s is at %s", name, self._store.url)
        self._thin_out()

    def _upload(self, checkpoint: Checkpoint) -> int | None:
        """The bytes that were sent; None where retention took the checkpoint away meanwhile."""
        try:
            return self._store.upload(checkpoint)
        except Exception:
            if checkpoint.path.is_dir():
                raise
        log.info("%s went before it was sent", checkpoint.path)
        self._store.delete(checkpoint.path.name)
        return None

    def _thin_out(self) -> None:
        """Apply the retention to the store; what cannot be deleted now is tried after the next upload."""
        if self._retention is None:
            return
        pinned = {one.path.name for one in list_checkpoints(self._run.checkpoints) if one.pinned}
        try:
            held = self._store.checkpoints()
            for old in self._retention.expendable(held, resumed_from=self.resumed_from, pinned=pinned):
                self._store.delete(old.path.name)
        except Exception as error:
            log.warning("old checkpoints at %s could not be deleted: %s", self._store.url, error)

    def _alert(self, name: str, error: Exception) -> None:
        hope = "nothing is uploaded any more" if self._is_refused else "tried again after the next checkpoint"
        reason = f"{type(error).__name__}: {error}"
        log.error("upload of %s to %s given up (%s); training goes on, %s", name, self._store.url, reason, hope)
        with suppress(OSError):  # a full disk is told by whoever saves
            self._run.log("upload_failed", checkpoint=name, url=self._store.url, error=reason)
