"""Synthetic LAION metadata, any number of rows: the same bytes every time, with what real tables are hard for.

The schema is that of LAION-Aesthetics V2. Three rows in twenty repeat a URL, a few URLs hundreds of times, over all
files, with captions of their own; size and scores belong to the URL. Some values are absent (null or NaN), some
captions hold more than ASCII. All of it is arithmetic on row numbers, so that ten million rows take seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

pc: Any = pyarrow.compute

REPEATED_SHARE = 0.15
ROW_GROUP = 250_000
WORDS = (
    *("red", "vintage", "portrait", "of", "the", "mountain", "stock photo", "wedding", "café", "dress", "kitchen"),
    *("painting", "print", "on canvas", "2019", "map", "für", "logo", "car", "house", "with", "blue", "logo design"),
    *("garden", "poster", "free download", "naïve", "sunset", "beach", "city", "woman", "cat"),
)
SIZES = np.array([120, 236, 300, 400, 450, 512, 600, 640, 768, 800, 1000, 1024, 1200, 1500, 1920, 2048])


def mixed(values: npt.NDArray[np.uint64], stream: int) -> npt.NDArray[np.uint64]:
    """64 well mixed bits of each number (the finalizer of splitmix64)."""
    with np.errstate(over="ignore"):
        bits = values + np.uint64((stream + 1) * 0x9E3779B97F4A7C15 % 2**64)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def uniform(values: npt.NDArray[np.uint64], stream: int) -> npt.NDArray[np.float64]:
    """In [0, 1)."""
    return (mixed(values, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def bell(values: npt.NDArray[np.uint64], stream: int) -> npt.NDArray[np.float64]:
    """Mean 0, variance 1, bounded: the sum of four uniform numbers."""
    return (sum(uniform(values, stream + step) for step in range(4)) - 2.0) * np.sqrt(3.0)


def rows(start: int, count: int, total: int) -> pa.Table:
    """Rows [start, start + count) of a table of `total` rows."""
    row = np.arange(start, start + count, dtype=np.uint64)
    repeated = uniform(row, 0) < REPEATED_SHARE
    pool = max(total // 20, 1)
    picture = np.where(repeated, total + (pool * uniform(row, 1) ** 2).astype(np.uint64), row).astype(np.uint64)
    columns = {"URL": _urls(picture), "TEXT": _captions(row), **_scores(picture)}
    return pa.table(columns)


def _scores(picture: npt.NDArray[np.uint64]) -> Mapping[str, pa.Array]:
    width = SIZES[(uniform(picture, 2) * len(SIZES)).astype(np.int64)]
    height = (width * np.exp(0.45 * bell(picture, 3))).astype(np.int32)
    similarity = 0.30 + 0.035 * bell(picture, 7)
    pwatermark = (uniform(picture, 11) ** 2).astype(np.float32)
    punsafe = (uniform(picture, 12) ** 6).astype(np.float32)
    aesthetic = (6.6 + 0.6 * bell(picture, 13)).astype(np.float32)
    punsafe[uniform(picture, 17) < 0.01] = np.nan
    return {
        "WIDTH": pa.array(width.astype(np.int32)),
        "HEIGHT": pa.array(height),
        "similarity": pa.array(similarity, mask=uniform(picture, 18) < 0.002),
        "hash": pa.array(mixed(picture, 19).astype(np.int64)),
        "punsafe": pa.array(punsafe),
        "pwatermark": pa.array(pwatermark, mask=uniform(picture, 20) < 0.02),
        "AESTHETIC_SCORE": pa.array(aesthetic),
    }


def _urls(picture: npt.NDArray[np.uint64]) -> pa.Array:
    hosts = pa.array([f"https://cdn{index}.images-{index % 97}.example/media/catalog/" for index in range(1000)])
    host = hosts.take(pa.array((uniform(picture, 21) ** 2 * 1000).astype(np.int64)))
    return pc.binary_join_element_wise(host, _hex(mixed(picture, 22)), _hex(picture), ".jpg", "")


def _hex(values: npt.NDArray[np.uint64]) -> pa.Array:
    letters = np.frombuffer(b"0123456789abcdef", np.uint8)
    pairs = values.astype(">u8").view(np.uint8).reshape(-1, 8)
    text = np.empty((len(values), 16), np.uint8)
    text[:, 0::2], text[:, 1::2] = letters[pairs >> 4], letters[pairs & 15]
    offsets = pa.py_buffer(np.arange(0, 16 * len(values) + 1, 16, dtype=np.int32))
    return pa.StringArray.from_buffers(len(values), offsets, pa.py_buffer(text.reshape(-1)))


def _captions(row: npt.NDArray[np.uint64]) -> pa.Array:
    """One to fourteen words; one in a thousand is absent."""
    words = pa.array(WORDS)
    length = 1 + (uniform(row, 24) * 14).astype(np.int64)
    parts = []
    for place in range(14):
        number = (uniform(row, 25 + place) * len(WORDS)).astype(np.int64)
        word = words.take(pa.array(number))
        parts.append(pc.if_else(pa.array(length > place), word, pa.scalar(None, pa.string())))
    text = pc.binary_join_element_wise(*parts, " ", null_handling="skip")
    return pc.if_else(pa.array(uniform(row, 40) < 0.001), pa.scalar(None, pa.string()), text)


def write_table(folder: Path, total: int, files: int = 4) -> list[Path]:
    """Write the table once; a folder that holds all its files, and no others, is taken as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"part-{index:05d}.parquet" for index in range(files)]
    bounds = [total * index // files for index in range(files + 1)]
    for path, start, end in zip(paths, bounds[:-1], bounds[1:], strict=True):
        if not path.exists():
            _write_file(path, start, end, total)
        assert pq.read_metadata(path).num_rows == end - start, f"{path} is of another table; give an empty folder"
    assert sorted(folder.glob("*.parquet")) == paths, f"{folder} holds other tables; give an empty folder"
    return paths


def _write_file(path: Path, start: int, end: int, total: int) -> None:
    unfinished = path.with_suffix(".unfinished")
    writer = None
    for first in range(start, end, ROW_GROUP):
        table = rows(first, min(ROW_GROUP, end - first), total)
        writer = writer or pq.ParquetWriter(unfinished, table.schema, compression="snappy")
        writer.write_table(table)
    if writer is not None:
        writer.close()
        unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=4)
    arguments = parser.parse_args()
    write_table(arguments.folder, arguments.rows, arguments.files)


if __name__ == "__main__":
    main()
