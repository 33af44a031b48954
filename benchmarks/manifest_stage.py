"""What the ingestion's stage `manifest` takes to list 100,000 shards of 1,000 samples and to write their manifest.

    python -m benchmarks.manifest_stage --shards 100000 --samples-per-shard 1000

The stage runs as in a data set's own run: by the runner, on a private Ray with one worker for each core, with the
digests of the sidecars known since their shards were committed. Sidecars are real in every byte; they are hard links to
a few files, so they come out of the page cache: a network file system adds its own time for two small files a shard.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.manifest import peak_bytes, write_base
from data_pipeline.cluster import RayExecutor
from data_pipeline.ledger import DigestCache, sha256_file
from data_pipeline.runner import Runner
from data_pipeline.stage import Unit, Work, unit_name
from data_pipeline.stages.manifest import ManifestStage
from sdtrain.data.manifest import Manifest
from sdtrain.data.shard import index_path

MAX_SECONDS = 300.0
MAX_BYTES = 2 * 10**9
LINKS_PER_FILE = 10_000  # file systems allow some tens of thousands


def write_shards(folder: Path, *, shards: int, samples_per_shard: int) -> None:
    """What the stage finds: shards, and the digests of their sidecars."""
    digests = DigestCache(folder / "digests.jsonl")
    base, sha256 = folder, ""
    (folder / "shards").mkdir()
    for number in range(shards):
        if number % LINKS_PER_FILE == 0:
            base = write_base(folder / f"base-{number}.tar", samples_per_shard, latent_side=8)
            sha256 = sha256_file(index_path(base))
        path = folder / "shards" / f"{unit_name(number)}.tar"
        path.hardlink_to(base)
        index_path(path).hardlink_to(index_path(base))
        digests.remember(index_path(path), sha256)


class MeasuredStage(ManifestStage):
    """The stage, whose workers leave their peak memory in a file each."""

    def worker(self) -> Work:
        """List shards; say how much memory that has taken so far."""
        work = super().worker()

        def measured(unit: Unit, folder: Path) -> Mapping[str, Any]:
            stats = work(unit, folder)
            (self.target.parent / f"peak-{os.getpid()}").write_text(f"{peak_bytes()}")
            return stats

        return measured


def measure(folder: Path) -> dict[str, Any]:
    """Seconds of the stage, and the peak memory of the driver and of a worker."""
    stage = MeasuredStage("manifest", folder / "shards", folder / "08-manifest", folder / "manifest.json", ())
    with RayExecutor(workers=os.cpu_count()) as executor:
        started = time.perf_counter()
        Runner(output=folder, executor=executor, console=Console(quiet=True)).run([stage])
        facts = {"seconds": time.perf_counter() - started, "driver_bytes": peak_bytes()}
    of_workers = [int(path.read_text()) for path in folder.glob("peak-*")]
    manifest = Manifest.load(stage.target)
    samples = manifest.num_samples("train")
    return facts | {"worker_bytes": max(of_workers), "shards": len(manifest.shards), "samples": samples}


def report(folder: Path, shards: int, samples_per_shard: int) -> None:
    """Measure in a process of its own, print, compare with the limits."""
    write_shards(folder, shards=shards, samples_per_shard=samples_per_shard)
    command = [sys.executable, "-m", "benchmarks.manifest_stage", "--measure", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = json.loads(done.stdout)
    print(
        f"stage manifest: {found['seconds']:.1f} s (limit {MAX_SECONDS:g}) with {os.cpu_count()} workers, Ray's start "
        f"included, for {found['shards']:,} shards of {found['samples']:,} samples; peak of the driver "
        f"{found['driver_bytes'] / 1e6:.0f} MB, of a worker {found['worker_bytes'] / 1e6:.0f} MB (limit "
        f"{MAX_BYTES / 1e6:.0f})"
    )
    assert found["seconds"] < MAX_SECONDS
    assert max(found["driver_bytes"], found["worker_bytes"]) < MAX_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.manifest_stage",
    )
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples-per-shard", type=int, default=1_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder), arguments.shards, arguments.samples_per_shard)


if __name__ == "__main__":
    main()
