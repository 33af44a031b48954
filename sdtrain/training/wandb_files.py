"""What W&B has on the disk: the records of `.wandb` files, to know how far a run's history really got.

A file is a 7-byte header, then LevelDB log blocks of `wandb_internal_pb2.Record` messages. A killed writer leaves a
torn end, which is where reading stops.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER_BYTES = 7  # of the file, and of every piece of a record
_BLOCK_BYTES = 32768
_WHOLE, _LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """Every whole record of a `.wandb` file, in order."""
    from google.protobuf.message import DecodeError

    record_type: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    for message in _messages(path.read_bytes()):
        record = record_type()
        try:
            record.ParseFromString(message)
        except DecodeError:
            return
        yield record


def _messages(content: bytes) -> Iterator[bytes]:
    position, pending = _HEADER_BYTES, b""
    while position + _HEADER_BYTES <= len(content):
        room = _BLOCK_BYTES - position % _BLOCK_BYTES
        if room < _HEADER_BYTES:  # the rest of a block that is too short for a piece
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + _HEADER_BYTES])
        end = position + _HEADER_BYTES + length
        if kind == 0 or end > len(content):
            return
        pending += content[position + _HEADER_BYTES : end]
        position = end
        if kind in (_WHOLE, _LAST):
            yield pending
            pending = b""


def history(path: Path) -> Iterator[dict[str, Any]]:
    """Every logged row of a `.wandb` file, values decoded; `_step` is W&B's own counter."""
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def last_tracked_step(folder: Path) -> int:
    """The last step in the W&B files of all attempts of a run folder; -1 if there is none."""
    files = folder.glob("wandb/*run-*/*.wandb")
    return max((int(row["_step"]) for file in files for row in history(file) if "_step" in row), default=-1)
