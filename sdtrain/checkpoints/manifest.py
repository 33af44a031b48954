"""What a committed checkpoint says about itself: names on disk, `MANIFEST.json`, and the folder listing.

A checkpoint is a folder `step-00001000` that holds, per trainable and rank, `denoiser.rank00000.safetensors` with the
rank's spans (see `recut`), `extra.rank00000.safetensors` (buffers, loss scaler), `config.yaml` and `MANIFEST.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
LATEST = "LATEST"
CORRUPT = "CORRUPT"
PINNED = "PINNED"

FOLDER = re.compile(r"step-(\d{8,})")
"""Names of committed checkpoints."""
_ASIDE = re.compile(FOLDER.pattern + r"\.rolled-back-[0-9a-f]+")
_SELF_DIGEST = "manifest_sha256"


def folder_name(step: int) -> str:
    """Name of the committed folder of `step`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step of a committed folder's name."""
    return int(name.removeprefix("step-"))


def rank_file(part: str, rank: int) -> str:
    """Name of the file that `rank` writes for `part`: a trainable's name, or `extra`."""
    return f"{part}.rank{rank:05d}.safetensors"


def buffer_key(trainable: str, name: str) -> str:
    """Tensor name, inside `extra.rank*.safetensors`, of a module's buffer."""
    return f"{trainable}/buffer/{name}"


def seal(content: Mapping[str, Any]) -> str:
    """The text of a manifest, with the digest of its own content inside, so that a flipped bit in it is seen."""
    return json.dumps({**content, _SELF_DIGEST: content_digest(content)}, indent=1, sort_keys=True) + "\n"


def unseal(text: str) -> dict[str, Any]:
    """The content of a manifest.

    Raises:
        ValueError: Not JSON, not an object, or changed after it was written.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("holds no JSON object")
    written = content.pop(_SELF_DIGEST, None)
    if written != content_digest(content):
        raise ValueError("was changed after it was written: its own digest does not fit its content")
    return content


def content_digest(content: Mapping[str, Any]) -> str:
    """What a manifest's content is known by, in hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A folder under a final name, and what its manifest says.

    Attributes:
        path: The folder, `.../step-00001000`.
        manifest: Content of `MANIFEST.json`; empty where it is missing or damaged.
        damage: Why the manifest could not be read; empty if it could.
        marks: Which of `CORRUPT` and `PINNED` lay beside the files when it was opened.
    """

    path: Path
    manifest: Mapping[str, Any]
    damage: str = ""
    marks: frozenset[str] = frozenset()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the manifest of a folder; a damaged one is kept as `damage` and never raises."""
        marks = frozenset(mark for mark in (CORRUPT, PINNED) if (path / mark).exists())
        try:
            return cls(path, unseal((path / MANIFEST).read_text(encoding="utf-8")), marks=marks)
        except FileNotFoundError:
            return cls(path, {}, "is missing", marks)
        except (OSError, ValueError) as error:
            return cls(path, {}, str(error), marks)

    @property
    def step(self) -> int:
        """Optimiser step, from the folder's name where the manifest is damaged; -1 if both are foreign."""
        match = FOLDER.fullmatch(self.path.name)
        return int(self.manifest.get("step", match[1] if match else -1))

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote it."""
        return int(self.manifest.get("world_size", 0))

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """File name -> {`sha256`, `size_bytes`, `rank`}."""
        return self.manifest.get("files", {})

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(int(entry["size_bytes"]) for entry in self.files.values())

    @property
    def trainables(self) -> tuple[str, ...]:
        """Names of the trainables whose state is inside."""
        return tuple(self.manifest.get("layouts", {}))

    @property
    def figures(self) -> Mapping[str, float]:
        """What validation measured at this step, by name (`validation/loss`); empty where it did not run."""
        return self.manifest.get("figures", {})

    @property
    def marked_corrupt(self) -> bool:
        """Whether an earlier start found it damaged."""
        return CORRUPT in self.marks

    @property
    def pinned(self) -> bool:
        """Whether a person asked to keep it for good (`touch step-N/PINNED`)."""
        return PINNED in self.marks


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Everything under a final name in `folder`, newest first, damaged ones included; empty if there is no folder."""
    if not folder.is_dir():
        return []
    names = sorted(
        (path.name for path in folder.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()), key=step_of
    )
    return [Checkpoint.open(folder / name) for name in reversed(names)]


def set_aside(checkpoint: Checkpoint) -> None:
    """Give a checkpoint a name that no start takes it by: a rollback abandoned what it holds.

    Raises:
        OSError: It cannot be renamed.
    """
    checkpoint.path.rename(checkpoint.path.with_name(f"{checkpoint.path.name}.rolled-back-{secrets.token_hex(4)}"))


def list_aside(folder: Path) -> list[Checkpoint]:
    """Everything in `folder` that rollbacks set aside, in no order."""
    if not folder.is_dir():
        return []
    return [Checkpoint.open(path) for path in folder.iterdir() if _ASIDE.fullmatch(path.name) and path.is_dir()]
