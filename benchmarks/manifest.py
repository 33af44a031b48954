"""A data set of 100,000 shards and 100 million samples: what it takes to open it, or to begin or resume anywhere in it.

    python -m benchmarks.manifest --shards 100000 --samples-per-shard 1000 --buckets 3

The manifest is real in every row; its shards are links to one shard, so every position can really be read. Each figure
comes from a process of its own: opening from one that imports nothing else, the batches from one that has never seen
the order before. A batch is read as a training run reads it: the order is made, the data set is built, and the first
global batch comes out of the loader with its noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sdtrain.data.manifest import Manifest, ShardEntry, describe_shard, write_manifest
from sdtrain.data.shard import ShardWriter, index_path

MAX_OPEN_SECONDS = 2.0
MAX_OPEN_BYTES = 300 * 10**6
MAX_BATCH_SECONDS = 1.0
EPOCHS = (0, 1, 2, 1_000, 1_000_000)
SEED = 42


def write_data_set(folder: Path, *, shards: int, samples_per_shard: int, buckets: int, latent_side: int) -> Manifest:
    """A manifest of many shards over one that exists.

    Args:
        buckets: How many; shapes are the same in all of them, as the order never looks at shapes. 1 names none.
        latent_side: Height and width of the moments.
    """
    names: list[str | None] = [None] if buckets == 1 else [f"bucket-{number}" for number in range(buckets)]
    base = write_base(folder / "base.tar", samples_per_shard, latent_side)
    described = describe_shard(base, split="train", folder=folder)
    (folder / "shards").mkdir()
    entries = list(_link(folder, base, described, names, shards))
    shapes = {"moments.npy": (8, latent_side, latent_side), "tokens.npy": (77,)}
    return write_manifest(folder / "manifest.json", entries, fingerprint={}, field_shapes=shapes)


def write_base(path: Path, samples: int, latent_side: int) -> Path:
    """One shard as the encoding writes it."""
    random = np.random.Generator(np.random.Philox(SEED))
    moments = random.standard_normal((8, latent_side, latent_side)).astype(np.float16)
    tokens = np.arange(77, dtype=np.uint16)
    with ShardWriter(path) as writer:
        for number in range(samples):
            name = hashlib.sha256(str(number).encode()).hexdigest()[:32]
            facts = {"caption": f"caption {number}", "split": "train", "url_sha256": name}
            fields = {"moments.npy": moments, "tokens.npy": tokens, "txt": f"caption {number}", "json": facts}
            writer.write(name, fields)
    return path


def _link(
    folder: Path, base: Path, described: ShardEntry, names: list[str | None], shards: int
) -> Iterator[ShardEntry]:
    """Entries as different from each other as real ones: every row has digests of its own but those that are read."""
    for number in range(shards):
        path = folder / "shards" / f"{number:06d}.tar"
        path.symlink_to(base)
        index_path(path).symlink_to(index_path(base))
        yield replace(
            described,
            path=path.relative_to(folder).as_posix(),
            sha256=hashlib.sha256(str(number).encode()).hexdigest(),
            bucket=names[number % len(names)],
        )


# Measured in processes of their own -----------------------------------------------------------------------------------


def peak_bytes() -> int:
    """Most memory that this process has held so far; `getrusage` would count what its parent held before the exec."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def measure_open(path: Path) -> dict[str, Any]:
    """Seconds and peak memory of opening the manifest, digest included."""
    before, started = peak_bytes(), time.perf_counter()
    manifest = Manifest.load(path)
    seconds = time.perf_counter() - started
    facts = {"seconds": seconds, "before_bytes": before, "peak_bytes": peak_bytes()}
    return facts | {"shards": len(manifest.shards), "samples": manifest.num_samples("train")}


def measure_first_batch(path: Path, position: int, batch_size: int, window_shards: int) -> dict[str, Any]:
    """Seconds until the global batch at a position is there, from an open manifest on."""
    from sdtrain.data.dataset import ShardDataset
    from sdtrain.data.loader import train_loader
    from sdtrain.data.plan import order_of
    from sdtrain.records import DrawSpec

    manifest = Manifest.load(path)
    before, started = peak_bytes(), time.perf_counter()
    order = order_of(manifest, "train", seed=SEED, window_shards=window_shards, batch_size=batch_size)
    channels, height, width = manifest.field_shapes["moments.npy"]
    dataset = ShardDataset(
        manifest=manifest,
        split="train",
        fields={"moments": "moments.npy", "tokens": "tokens.npy"},
        order=order,
        seed=SEED,
        draws=DrawSpec(normals={"noise": (channels // 2, height, width)}, uniforms=("timestep",)),
        max_open_shards=window_shards + 1,
    )
    step = position // batch_size
    loader = train_loader(
        dataset,
        start_step=step,
        max_steps=step + 1,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        world_size=1,
        rank=0,
        num_workers=0,
        prefetch=1,
    )
    ((_, _, batch),) = list(loader)
    seconds = time.perf_counter() - started
    assert len(batch) == batch_size
    assert not batch.errors, batch.errors[0]
    return {"seconds": seconds, "added_bytes": peak_bytes() - before}


def _in_child(arguments: argparse.Namespace, path: Path, position: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.manifest", "--measure", str(path)]
    command += ["--batch-size", str(arguments.batch_size), "--window-shards", str(arguments.window_shards)]
    command += [] if position is None else ["--position", str(position)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.manifest"
    )
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples-per-shard", type=int, default=1_000)
    parser.add_argument("--buckets", type=int, default=1)
    parser.add_argument("--latent-side", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--window-shards", type=int, default=16)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--position", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.measure is None:
        with tempfile.TemporaryDirectory() as folder:
            _report(arguments, Path(folder))
    elif arguments.position is None:
        print(json.dumps(measure_open(arguments.measure)))
    else:
        found = measure_first_batch(
            arguments.measure, arguments.position, arguments.batch_size, arguments.window_shards
        )
        print(json.dumps(found))


def _report(arguments: argparse.Namespace, folder: Path) -> None:
    started = time.perf_counter()
    manifest = write_data_set(
        folder,
        shards=arguments.shards,
        samples_per_shard=arguments.samples_per_shard,
        buckets=arguments.buckets,
        latent_side=arguments.latent_side,
    )
    total, path = manifest.num_samples("train"), folder / "manifest.json"
    print(
        f"Python {sys.version.split()[0]}, numpy {np.__version__}; {len(manifest.shards):,} shards, {total:,} samples, "
        f"{arguments.buckets} bucket(s); manifest of {path.stat().st_size / 1e6:.0f} MB, written in "
        f"{time.perf_counter() - started:.0f} s"
    )
    _report_open(arguments, path)
    _report_batches(arguments, path, total)


def _report_open(arguments: argparse.Namespace, path: Path) -> None:
    found = _in_child(arguments, path, None)
    print(
        f"open            {found['seconds']:6.2f} s (limit {MAX_OPEN_SECONDS:g}), peak of the process "
        f"{found['peak_bytes'] / 1e6:.0f} MB (limit {MAX_OPEN_BYTES / 1e6:.0f}), {found['before_bytes'] / 1e6:.0f} MB "
        "of it before"
    )
    assert found["seconds"] < MAX_OPEN_SECONDS
    assert found["peak_bytes"] < MAX_OPEN_BYTES


def _report_batches(arguments: argparse.Namespace, path: Path, total: int) -> None:
    resumes = [int(place) for place in np.random.Generator(np.random.Philox(SEED)).integers(0, 20 * total, 5)]
    starts = [(f"epoch {epoch:,}", epoch * total) for epoch in EPOCHS]
    starts += [(f"position {place:,}", place) for place in resumes]
    slowest = 0.0
    for name, position in starts:
        found = _in_child(arguments, path, position)
        print(
            f"{name:24} first batch of {arguments.batch_size} after {found['seconds']:5.2f} s, "
            f"+{found['added_bytes'] / 1e6:.0f} MB"
        )
        slowest = max(slowest, found["seconds"])
    print(f"slowest start {slowest:.2f} s (limit {MAX_BATCH_SECONDS:g})")
    assert slowest < MAX_BATCH_SECONDS


if __name__ == "__main__":
    main()
