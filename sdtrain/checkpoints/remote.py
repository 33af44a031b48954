"""Checkpoints in an object store: put there file by file, the manifest last, and brought back verified.

Any URL that fsspec opens will do (`s3://bucket/runs/sd15`, `gs://...`, `file:///mnt/backup`). A folder in the store is
a checkpoint exactly if its manifest is there and whole; without one it is an upload that was interrupted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from sdtrain import distributed
from sdtrain.checkpoints.manifest import CORRUPT, FOLDER, MANIFEST, PINNED, Checkpoint, content_digest, unseal
from sdtrain.checkpoints.protocol import begin, find, publish, write
from sdtrain.checkpoints.rankfile import CHUNK_BYTES, Written
from sdtrain.checkpoints.verify import share_of_files
from sdtrain.errors import CheckpointError, ConfigError, StorageError
from sdtrain.run_dir import RunDir, write_atomically

log = logging.getLogger(__name__)

JOURNAL = "UPLOAD"
"""Lies in the store while an upload is under way: the digest of the manifest that its files belong to."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often, and after which pauses, something that a network may spoil is tried again."""

    attempts: int = 6
    first_seconds: float = 2.0

    def run(self, act: Callable[[], T], what: str) -> T:
        """Do it until it works; the last failure is raised."""
        for attempt in range(1, self.attempts):
            try:
                return act()
            except (ConfigError, CheckpointError):
                raise  # no patience mends these
            except Exception as error:
                pause = self.first_seconds * 2 ** (attempt - 1)
                log.warning("%s failed (%s: %s): again in %.1f s", what, type(error).__name__, error, pause)
                time.sleep(pause)
        return act()


def is_url(text: str) -> bool:
    """Whether a text names a place in a store rather than a folder."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


class RemoteStore:
    """The checkpoints of one run under a URL.

    Attributes:
        url: The folder that holds `step-N` folders.
    """

    def __init__(self, url: str) -> None:
        """Open a store; nothing is asked of it yet.

        Raises:
            ConfigError: No driver for this kind of URL, or one that is not installed.
        """
        self.url = url.rstrip("/")
        try:
            options = {"auto_mkdir": True} if self.url.startswith("file:") else {}
            self._fs, root = fsspec.url_to_fs(self.url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{url}: cannot be opened as a store of checkpoints: {error}. Give a URL such as s3://BUCKET/RUN "
                "(needs the package s3fs), gs://BUCKET/RUN (gcsfs) or file:///FOLDER."
            ) from error
        self._root = root.rstrip("/")
        self._manifests: dict[str, Checkpoint] = {}

    def checkpoints(self) -> list[Checkpoint]:
        """All complete ones, newest first; their paths are names, their marks are those in the store."""
        found = {name: files for name, files in self._listing().items() if MANIFEST in files}
        opened = {name: self._open(name, set(files)) for name, files in found.items()}
        whole = [checkpoint for checkpoint in opened.values() if not checkpoint.damage]
        return sorted(whole, key=lambda checkpoint: checkpoint.step, reverse=True)

    def upload(self, checkpoint: Checkpoint) -> int:
        """Put a checkpoint there, going on where an interrupted upload stopped; returns the bytes that were sent.

        Raises:
            ConfigError: A checkpoint of another run lies there under this name.
            OSError: Network or store failed (drivers raise others too).
        """
        name, digest = checkpoint.path.name, content_digest(checkpoint.manifest)
        there = self._listing(name).get(name, {})
        if MANIFEST in there:
            standing = self._open(name, set(there))
            if not standing.damage and content_digest(standing.manifest) == digest:
                self._forget_journal(name, there)
                return 0
            self._refuse_other_runs(standing, checkpoint)
        if self._journal(name, there) != digest:  # files of other bytes, even if they are as long
            self.delete(name)
            there = {}
            self._fs.pipe_file(f"{self._root}/{name}/{JOURNAL}", digest.encode())
        sent = 0
        for file, entry in checkpoint.files.items():
            if there.get(file) != entry["size_bytes"]:
                sent += self._put(checkpoint.path / file, f"{self._root}/{name}/{file}")
        sent += self._put(checkpoint.path / MANIFEST, f"{self._root}/{name}/{MANIFEST}")
        self._manifests.pop(name, None)
        self._forget_journal(name, {JOURNAL: 0})
        return sent

    def delete(self, name: str) -> None:
        """Remove a checkpoint, its manifest first, so that a half-removed one is none."""
        self._manifests.pop(name, None)
        if MANIFEST in self._listing(name).get(name, {}):
            self._fs.rm_file(f"{self._root}/{name}/{MANIFEST}")
        with suppress(FileNotFoundError):
            self._fs.rm(f"{self._root}/{name}", recursive=True)

    def download(self, name: str, file: str, target: Path) -> Written:
        """Bring one file here, wait for the disk, and say what came."""
        digest, size = hashlib.sha256(), 0
        with self._fs.open(f"{self._root}/{name}/{file}", "rb") as source, open(target, "wb") as copy:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
                size += len(chunk)
            copy.flush()
            os.fsync(copy.fileno())
        return Written(digest.hexdigest(), size)

    def put_ledger(self, run: RunDir) -> None:
        """Keep a copy of the run's ledger beside its checkpoints, which the proof of its sample order goes by."""
        self._put(run.ledger, f"{self._root}/{run.ledger.name}")

    def ledger(self, run: RunDir) -> str:
        """The copy of the ledger; empty where there is none."""
        try:
            return self._fs.cat_file(f"{self._root}/{run.ledger.name}").decode()
        except FileNotFoundError:
            return ""

    def _listing(self, name: str = "") -> dict[str, dict[str, int]]:
        """Folder name -> file name -> bytes, of all checkpoints or of one; empty where the store has none."""
        self._fs.invalidate_cache()
        try:
            found: Mapping[str, Mapping[str, Any]] = self._fs.find(f"{self._root}/{name}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        listing: dict[str, dict[str, int]] = {}
        for path, facts in found.items():
            folder, _, file = path.rpartition("/")
            step = folder.rpartition("/")[2]
            if FOLDER.fullmatch(step):
                listing.setdefault(step, {})[file] = int(facts["size"])
        return listing

    def _open(self, name: str, files: set[str]) -> Checkpoint:
        marks = frozenset(files & {CORRUPT, PINNED})
        known = self._manifests.get(name)
        if known is None:
            try:
                known = Checkpoint(Path(name), unseal(self._fs.cat_file(f"{self._root}/{name}/{MANIFEST}").decode()))
            except ValueError as error:
                return Checkpoint(Path(name), {}, str(error), marks)
            self._manifests[name] = known
        return Checkpoint(known.path, known.manifest, marks=marks)

    def _journal(self, name: str, there: Mapping[str, int]) -> str | None:
        return self._fs.cat_file(f"{self._root}/{name}/{JOURNAL}").decode() if JOURNAL in there else None

    def _forget_journal(self, name: str, there: Mapping[str, int]) -> None:
        if JOURNAL in there:
            self._fs.rm_file(f"{self._root}/{name}/{JOURNAL}")

    def _refuse_other_runs(self, standing: Checkpoint, mine: Checkpoint) -> None:
        theirs, ours = standing.manifest.get("run"), mine.manifest.get("run")
        if not standing.damage and theirs != ours:
            raise ConfigError(
                f"{self.url}: holds {standing.path} of another run (started as {theirs}, this one as {ours}): nothing "
                "is overwritten. Give checkpoint.upload_to a folder of its own."
            )

    def _put(self, source: Path, target: str) -> int:
        """Upload one file and see that all of it arrived."""
        self._fs.put_file(str(source), target)
        size, arrived = source.stat().st_size, int(self._fs.info(target)["size"])
        if arrived != size:
            raise OSError(f"{target}: {arrived} of {size} bytes arrived")
        return size


# Bringing checkpoints back --------------------------------------------------------------------------------------------


def find_or_fetch(run: RunDir, resume: str | Path, *, store_url: str | None, attempt: str) -> Checkpoint | None:
    """`protocol.find`, with a store behind the folder: where the folder holds none, its newest is taken; collective.

    Args:
        run: The run's folder.
        resume: As for `find`, or a URL: see `fetch`.
        store_url: Where this run uploads to; None where it does not.
        attempt: Unique name of this start of the run.

    Raises:
        CheckpointError: As `find` and `fetch`, and where a URL holds no checkpoint.
        ConfigError: As `find`, and where a fresh start would mix with what the store holds.
        StorageError: The store cannot be asked.
    """
    if isinstance(resume, str) and is_url(resume):
        checkpoint = fetch(resume, run, attempt=attempt)
        if checkpoint is None:
            raise CheckpointError(f"{resume}: holds no complete checkpoint to resume from")
        return checkpoint
    checkpoint = find(run.checkpoints, resume)
    if checkpoint is not None or store_url is None or resume not in ("auto", "never"):
        return checkpoint
    if resume == "auto":
        return fetch(store_url, run, attempt=attempt)
    held = _survey(RemoteStore(store_url), Backoff())
    if held:
        raise ConfigError(
            f"checkpoint.upload_to = {store_url}: holds {len(held)} checkpoints (newest {held[0].path}) and resume is "
            "'never'; resume with 'auto', or give checkpoint.upload_to a folder of its own: nothing is overwritten"
        )
    return None


def fetch(url: str, run: RunDir, *, attempt: str, backoff: Backoff | None = None) -> Checkpoint | None:
    """Bring a checkpoint from a store into a run's folder, verified byte by byte; collective.

    It is committed as a freshly written one is. The ranks share the files, and read only their own. A run without a
    ledger takes over the copy that lies in the store.

    Args:
        url: A store, of which the newest valid checkpoint is taken, or one checkpoint's folder in it.
        run: The run's folder.
        attempt: Unique name of this start of the run.
        backoff: Patience with the network.

    Returns:
        The checkpoint in the run's folder, or None where the store holds none.

    Raises:
        CheckpointError: Those that the store holds are damaged, or the one that was named is not there.
        ConfigError: The run holds another checkpoint of the same step, or there is no driver for the URL.
        StorageError: The store or the disk failed.
    """
    patience = backoff or Backoff()
    place, _, name = url.rstrip("/").rpartition("/")
    named = name if FOLDER.fullmatch(name) else None
    store = RemoteStore(place if named else url)
    complete = _survey(store, patience)
    candidates = [one for one in complete if named in (None, one.path.name)]
    if named and not candidates:
        held = ", ".join(one.path.name for one in complete) or "none"
        raise CheckpointError(f"{url}: no complete checkpoint lies there; {store.url} holds {held}")
    damaged: list[str] = []
    for candidate in candidates:
        problems = _bring(store, candidate, run.checkpoints, attempt, patience)
        if not problems:
            _take_over_ledger(store, run, patience)
            return distributed.broadcast_object(Checkpoint.open(run.checkpoints / candidate.path.name))
        log.error("%s/%s is damaged and not used: %s", store.url, candidate.path, "; ".join(problems))
        damaged.append(f"  {candidate.path}: {'; '.join(problems)}")
    if damaged:
        raise CheckpointError(
            f"{url}: {len(damaged)} checkpoints are there and none is valid:\n" + "\n".join(damaged) + "\n"
            "Nothing was changed. Restore one of them, or start afresh with --resume never and another "
            "checkpoint.upload_to."
        )
    return None


def _survey(store: RemoteStore, backoff: Backoff) -> list[Checkpoint]:
    """Rank 0's listing of the store, on every rank; collective."""
    listing: list[Checkpoint] | str = []
    if distributed.ranks().is_main:
        try:
            listing = backoff.run(store.checkpoints, f"listing {store.url}")
        except Exception as error:  # drivers raise errors of their own
            listing = f"{type(error).__name__}: {error}"
    listing = distributed.broadcast_object(listing)
    if isinstance(listing, str):
        raise StorageError(
            f"{store.url}: cannot be asked for checkpoints: {listing}. Start again when it can be reached; "
            "--resume never starts afresh without asking."
        )
    return listing


def _bring(store: RemoteStore, wanted: Checkpoint, folder: Path, attempt: str, backoff: Backoff) -> list[str]:
    """Commit a copy of a remote checkpoint in `folder`; returns what is damaged in it. Collective.

    Raises:
        ConfigError: Another checkpoint stands under its name.
        StorageError: The network or the disk failed.
    """
    name, mine = wanted.path.name, share_of_files(wanted)
    damage: list[str] = []

    def put(temporary: Path) -> Mapping[str, Written]:
        written: dict[str, Written] = {}
        for file in mine:
            fetched = backoff.run(
                lambda file=file: store.download(name, file, temporary / file), f"download of {store.url}/{name}/{file}"
            )
            if fetched.sha256 != wanted.files[file]["sha256"]:
                damage.append(f"{file}: bytes were changed")
            written[file] = fetched
        if damage:
            raise CheckpointError("; ".join(damage))
        return written

    num_bytes = sum(int(wanted.files[file]["size_bytes"]) for file in mine)
    begun = begin(folder, step=wanted.step, attempt=attempt, num_bytes=num_bytes, num_files=len(mine))
    if begun.standing:
        _refuse_another(begun.final, wanted, store)
        return []
    path = publish(begun, write(begun, put), lambda reports: wanted.manifest)
    if path is not None:
        return []
    problems = [problem for rank in distributed.gather_objects(damage) for problem in rank]
    if not problems:
        raise StorageError(
            f"{store.url}/{name}: could not be brought to {folder} (the log says why). Start again when store and disk "
            "can be used."
        )
    return problems


def _refuse_another(standing: Path, wanted: Checkpoint, store: RemoteStore) -> None:
    held = distributed.broadcast_object(Checkpoint.open(standing))
    if content_digest(held.manifest) != content_digest(wanted.manifest):
        raise ConfigError(
            f"{standing}: stands already and is another checkpoint than {store.url}/{wanted.path}: nothing is "
            "overwritten. Resume from the local one, or choose another run_dir, or move the folder away."
        )


def _take_over_ledger(store: RemoteStore, run: RunDir, backoff: Backoff) -> None:
    """Rank 0: put the store's copy of the ledger before what this folder's says, unless that knows commits itself."""
    rows = run.ledger_rows()
    if not distributed.ranks().is_main or any(row["event"] == "commit" for row in rows):
        return
    try:
        told = backoff.run(lambda: store.ledger(run), f"reading the ledger of {store.url}")
        mine = run.ledger.read_text(encoding="utf-8") if rows else ""
        write_atomically(run.ledger, told + mine)
    except Exception as error:  # drivers raise errors of their own
        log.warning("%s: its ledger could not be read (%s): the order of samples cannot be proven", store.url, error)
