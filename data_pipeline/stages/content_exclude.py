"""Stage `content-dedup-exclude`: hashes of pictures that must not be trained on, such as those of an evaluation set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.layout import shapes_of
from data_pipeline.perceptual import hash_of_file
from data_pipeline.stage import Needs, Unit, Work
from data_pipeline.transport_policy import RefusedError
from sdtrain.config.ingestion import DownloadConfig
from sdtrain.errors import DataError

if TYPE_CHECKING:
    from data_pipeline.resize import Resizer

_PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_SHA256_DIGITS, _HASH_DIGITS = 64, 16


@dataclass(frozen=True)
class ExcludeStage:
    """sha256 digests and perceptual hashes: `00000.sha256.npy` and `00000.phash.npy`.

    A folder's pictures count as they are and as the download would have stored them.
    """

    exclude: tuple[Path, ...]
    pictures: DownloadConfig
    folder: Path
    name: str = "content-dedup-exclude"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """How pictures are brought to one size."""
        settings = self.pictures
        return {"mode": settings.resize_mode, "shapes": shapes_of(settings), "jpeg_quality": settings.jpeg_quality}

    def units(self) -> list[Unit]:
        """One, made from all lists and pictures.

        Raises:
            DataError: A list or folder is not there, or a folder holds no picture.
        """
        return [Unit(0, tuple(file for path in self.exclude for file in _files_of(path)))]

    def worker(self) -> Work:
        """Read the lists, hash the pictures."""

        from data_pipeline.resize import Resizer  # imports OpenCV, which the driver does without

        resizer = Resizer(
            mode=self.pictures.resize_mode,
            shapes=shapes_of(self.pictures),
            only_if_bigger=False,
            jpeg_quality=self.pictures.jpeg_quality,
        )

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            digests, hashes = set(), set()
            for path in unit.inputs:
                data = path.read_bytes()
                is_picture = path.suffix.lower() in _PICTURES
                more_digests, more_hashes = _of_picture(path, data, resizer) if is_picture else _listed(path, data)
                digests |= more_digests
                hashes |= more_hashes
            np.save(folder / f"{unit.name}.sha256.npy", np.array(sorted(digests), "S64"), allow_pickle=False)
            np.save(folder / f"{unit.name}.phash.npy", np.array(sorted(hashes), np.uint64), allow_pickle=False)
            return {"files": len(unit.inputs), "sha256": len(digests), "phash": len(hashes)}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """How many hashes are excluded."""
        (row,) = stats
        return f"{self.name}: {row['sha256']:,} sha256 and {row['phash']:,} perceptual hashes of {row['files']:,} files"


def _of_picture(path: Path, data: bytes, resizer: Resizer) -> tuple[set[str], set[int]]:
    """Digest and perceptual hashes of a picture: as it is, and as it would be stored.

    Raises:
        DataError: It cannot be decoded.
    """
    try:
        hashes = {hash_of_file(data), hash_of_file(resizer(data).jpeg)}
    except (OSError, ValueError, RefusedError) as error:
        raise DataError(f"content_dedup.exclude: {path}: no readable picture ({error}); take it out") from None
    return {hashlib.sha256(data).hexdigest()}, hashes


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"content_dedup.exclude: {path}: no such file or folder")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _PICTURES and file.is_file())
    if not found:
        raise DataError(f"content_dedup.exclude: {path}: no picture in it; known are {', '.join(sorted(_PICTURES))}")
    return found


def _listed(path: Path, data: bytes) -> tuple[set[str], set[int]]:
    """sha256 digests and perceptual hashes of a list.

    Raises:
        DataError: It is no text, holds nothing, or a line is neither.
    """
    try:
        lines = [line.strip().lower() for line in data.decode().splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"content_dedup.exclude: {path}: is no text ({error}); give a hash in each line") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    digests, hashes = set(), set()
    for line in lines:
        if len(line) not in (_SHA256_DIGITS, _HASH_DIGITS) or not set(line) <= set("0123456789abcdef"):
            raise DataError(
                f"content_dedup.exclude: {path}: {line[:80]!r} is no hash; give 64 hexadecimal digits for a sha256, 16 "
                "for a perceptual hash"
            )
        if len(line) == _SHA256_DIGITS:
            digests.add(line)
        else:
            hashes.add(int(line, 16))
    if not lines:
        raise DataError(f"content_dedup.exclude: {path} is empty; give a hash in each line, or take it off the list")
    return digests, hashes


def exclusions(folder: Path) -> tuple[Path, Path]:
    """Where the stage left the digests and the perceptual hashes."""
    return folder / "00000.sha256.npy", folder / "00000.phash.npy"
