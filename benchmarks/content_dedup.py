"""Near-duplicates among perceptual hashes: the passes of `content-dedup` after hashing, beside comparing all pairs.

    python -m benchmarks.content_dedup --pictures 2000000

A fifth of the hashes are copies of others, equal or with a few bits flipped. One process does all passes one after
another, so that its peak is the memory that a worker needs; a bucket has four million hashes, however many there are.
Comparing all pairs is timed on a sample of rows against all and scaled up, with the same vectorised count of bits. That
no two kept pictures are near each other, and that each dropped one is near one that is kept, is checked on that sample.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.dedup import peak_bytes
from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Runner
from data_pipeline.stages.content_dedup import content_dedup_stages
from sdtrain.config.curation import ContentDedupConfig
from sdtrain.config.ingestion import DownloadConfig

MAX_BYTES = 2 * 10**9
SHARD = 1000
SAMPLE = 200


def make_hashes(count: int, radius: int) -> np.ndarray:
    """Hashes by chance, a fifth of them copies of earlier ones with up to `radius` + 2 bits flipped."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    copies = np.sort(rng.choice(np.arange(1, count), count // 5, replace=False))
    flips = np.zeros(len(copies), np.uint64)
    wanted = rng.integers(0, radius + 3, len(copies))
    for step in range(radius + 2):
        flips ^= np.where(
            wanted > step, np.uint64(1) << rng.integers(0, 64, len(copies), dtype=np.uint64), np.uint64(0)
        )
    hashes[copies] = hashes[(rng.random(len(copies)) * copies).astype(np.int64)] ^ flips
    return hashes


def write_hashes(hashes: np.ndarray, folder: Path) -> None:
    """As `content-dedup-hash` leaves them."""
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, len(hashes), SHARD)):
        texts = [f"{value:016x}" for value in hashes[start : start + SHARD].tolist()]
        keys = [f"{start + row:032x}" for row in range(len(texts))]
        table = pa.table({"key": keys, "sha256": [key * 2 for key in keys], "phash": texts})
        pq.write_table(table, folder / f"{shard:05d}.parquet", compression="none")


def check(hashes: np.ndarray, kept: np.ndarray, radius: int) -> float:
    """Compare a sample of rows with all; returns the seconds that all pairs would take."""
    rows = np.random.default_rng(1).choice(len(hashes), SAMPLE, replace=False)
    is_kept = kept == np.arange(len(kept))
    started = time.perf_counter()
    near = [np.flatnonzero(np.bitwise_count(hashes ^ hashes[row]) <= radius) for row in rows]
    took = time.perf_counter() - started
    for row, others in zip(rows, near, strict=True):
        assert (kept[row] in others) or is_kept[row], "a dropped picture is not near the one that is kept for it"
        assert is_kept[kept[row]] and (not is_kept[row] or not is_kept[others[others != row]].any())
    return took / SAMPLE * len(hashes) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=2_000_000)
    parser.add_argument("--radius", type=int, default=4)
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, pyarrow {pa.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        hashes = make_hashes(arguments.pictures, arguments.radius)
        write_hashes(hashes, out / "04-content-dedup-hash")
        config = ContentDedupConfig(radius=arguments.radius)
        stages = content_dedup_stages(config, DownloadConfig(), out / "images", out / "04-content-dedup")[1:]
        runner = Runner(output=out, executor=InlineExecutor(), console=Console(quiet=True))
        print(f"{arguments.pictures:,} hashes, radius {arguments.radius}; peak before {peak_bytes() / 1e9:.2f} GB")
        total = 0.0
        for stage in stages:
            started = time.perf_counter()
            runner.run(stages, [stage.name] if stage.name != "content-dedup" else [])
            took = time.perf_counter() - started
            total += took
            print(f"{stage.name:22} {took:7.1f} s, peak {peak_bytes() / 1e9:.2f} GB")
        kept = np.load(out / "04-content-dedup-group/00000.kept.npy")
        dropped = int((kept != np.arange(len(kept))).sum())
        everything = check(hashes, kept, arguments.radius)
    print(f"dropped {dropped:,}; all passes {total:.1f} s in one process, {arguments.pictures / total / 1e3:.0f} k/s")
    print(f"comparing all pairs would take {everything:.0f} s: {everything / total:.0f} x as long")
    assert peak_bytes() < MAX_BYTES


if __name__ == "__main__":
    main()
