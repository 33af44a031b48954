"""What sampled rows say of the pictures that they promise: how large they are stored, and what stands beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.layout import lay_out, shapes_of, stored_areas
from sdtrain.config.ingestion import DownloadConfig
from sdtrain.data.decode import encode

_TAR_BLOCK = 512
_ROWS_WRITTEN_OUT = 1000
_ADDED: dict[str, Any] = {"hash": -(2**62), "sample_id": 10**9, "copies": 1}
"""Columns that the stages in between add, with values of usual length."""
_ORIGIN = {"shard": "00000.tar", "key": "000000000"}


def in_tar(size: int) -> int:
    """Bytes that a file of `size` bytes takes in a tar: its header, and the file up to a whole block."""
    return _TAR_BLOCK + -(-size // _TAR_BLOCK) * _TAR_BLOCK


@dataclass(frozen=True, slots=True)
class Pictures:
    """Means over the pictures of rows that pass the filter.

    Attributes:
        found_pixels: Pixels of a picture as it is found; None where no row says.
        stored_pixels: Pixels of it as it is stored.
        large_enough: Share of the pictures that `download.only_if_bigger` takes.
        text_bytes: What its caption and its facts take in a tar.
    """

    found_pixels: float | None
    stored_pixels: float
    large_enough: float
    text_bytes: float


class PictureTally:
    """Adds up rows.

    Args:
        settings: How pictures are stored.
        is_adopted: Whether they come from shards of others, which is said in their facts.
    """

    def __init__(self, settings: DownloadConfig, *, is_adopted: bool = False):
        self._settings = settings
        self._origin = {"adopted": _ORIGIN} if is_adopted else {}
        self._found = self._stored = 0.0
        self._rows = self._taken = 0
        self._text: list[int] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Take in rows that pass the filter."""
        for row in batch.slice(0, max(_ROWS_WRITTEN_OUT - len(self._text), 0)).to_pylist():
            self._text.append(self._text_bytes(row))
        if not {"width", "height"} <= set(batch.schema.names):
            return
        sizes = np.stack([_numbers(batch, "width"), _numbers(batch, "height")], 1)
        sizes = sizes[(sizes > 0).all(1)].astype(np.int64)
        stored, is_enlarged = stored_areas(sizes, self._settings.resize_mode, shapes_of(self._settings))
        is_taken = ~is_enlarged if self._settings.only_if_bigger else np.ones(len(sizes), bool)
        self._rows += len(sizes)
        self._taken += int(is_taken.sum())
        self._found += float(sizes.prod(1).sum())
        self._stored += float(stored[is_taken].sum())

    def means(self) -> Pictures:
        """What has been found; a square of `image_size` where no row says its size."""
        side = self._settings.image_size
        return Pictures(
            found_pixels=self._found / self._rows if self._rows else None,
            stored_pixels=self._stored / self._taken if self._taken else float(side * side),
            large_enough=self._taken / self._rows if self._rows else 1.0,
            text_bytes=sum(self._text) / len(self._text) if self._text else 2.0 * in_tar(_TAR_BLOCK),
        )

    def _text_bytes(self, row: dict[str, Any]) -> int:
        """What `txt` and `json` of a sample take, written out as the run writes them."""
        from data_pipeline.engine import Arrived
        from data_pipeline.resize import Resized
        from data_pipeline.stages.download import Part, sample_fields

        side = self._settings.image_size
        size = (int(row.get("width") or 0) or side, int(row.get("height") or 0) or side)
        layout = lay_out(size, self._settings.resize_mode, shapes_of(self._settings))
        columns = [name for name in row if name not in ("url", "caption", "width", "height")]
        part = Part(Path(), (), (), "train", (*columns, *_ADDED))
        arrived = Arrived(Resized(b"", layout), {"md5": "0" * 32, "sha256": "0" * 64}, row | _ADDED)
        fields = sample_fields(arrived, part)
        fields["json"] |= self._origin
        return sum(in_tar(len(encode(name, fields[name]))) for name in ("txt", "json"))


def _numbers(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.float64]:
    return np.nan_to_num(batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False))
