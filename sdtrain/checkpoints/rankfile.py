"""Writes safetensors files as a stream: the digest covers the bytes as they go to disk, and no second copy is made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CHUNK_BYTES = 16 * 2**20

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Written:
    """What was put on disk: the digest and the number of the bytes."""

    sha256: str
    size_bytes: int


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors' data, without the header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, after_header: Callable[[], None] = lambda: None
) -> Written:
    """Write one safetensors file, wait for the disk, and return what was written.

    Args:
        path: A new file; its folder exists.
        tensors: Any device and layout; copied to the host piece by piece.
        after_header: Called once the header is on its way, when the file is torn (fault tests).

    Raises:
        OSError: The disk is full or refuses.
        TypeError: A tensor's dtype has no name in the format.

    Source: the safetensors format, https://github.com/huggingface/safetensors#format.
    """
    # Large elements first, as the reference writer does, so that every tensor starts aligned to its element size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = _header(ordered)
    digest, size = hashlib.sha256(header), len(header)
    with open(path, "xb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(header))
        after_header()
        for tensor in ordered.values():
            for chunk in _chunks(tensor):
                digest.update(chunk)
                _write_all(file.fileno(), chunk)
                size += len(chunk)
        os.fsync(file.fileno())
    return Written(digest.hexdigest(), size)


def write_text(path: Path, text: str) -> Written:
    """Write a small text file, wait for the disk, and return what was written."""
    content = text.encode("utf-8")
    with open(path, "xb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(content))
        os.fsync(file.fileno())
    return Written(hashlib.sha256(content).hexdigest(), len(content))


def digest_file(path: Path) -> Written:
    """Digest and size of what the disk gives back."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return Written(digest.hexdigest(), size)


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length (8 bytes, little endian) and JSON, padded so that the data starts at a multiple of 8."""
    entries: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"tensor {name!r} has dtype {tensor.dtype}; a file can hold {', '.join(_DTYPES.values())}")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in pieces of at most `CHUNK_BYTES`, each brought to the host on its own."""
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    for start in range(0, raw.numel(), CHUNK_BYTES):
        yield raw[start : start + CHUNK_BYTES].cpu().numpy().data


def _write_all(handle: int, content: memoryview) -> None:
    """Write every byte: one `write` may take only part, as on a disk that is nearly full."""
    while content:
        content = content[os.write(handle, content) :]
