"""Download and resize from a web server on loopback: our stage, hardening included, beside stock img2dataset.

    python -m benchmarks.download --images 2000 --rounds 3

Both get the same table, the same number of processes and of threads, write the same resized JPEGs into WebDataset
shards of the same number of samples, hash every file (img2dataset: sha256; ours: sha256 and md5), and ask the same
server. img2dataset runs by its own `download` with its multiprocessing distributor, in a program of its own; ours runs
on Ray, with its plan, digests, syncs and ledger.

The clock of a round runs from the first request at the server to the commit of the last shard, so neither pays for the
start of its processes. Rounds alternate, the figure is the median of their ratios: on a machine whose speed drifts only
that means anything.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.metadata
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console

from benchmarks.download_server import HOSTS
from data_pipeline.cluster import RayExecutor
from data_pipeline.runner import Runner
from data_pipeline.stages.download import DownloadStage
from sdtrain.config.ingestion import DownloadConfig

MIN_RATIO = 0.95
DISTINCT = 250
SHARD = 250  # img2dataset renews a process after five shards: with more of them it would pay for imports
STOCK = """
import sys
from img2dataset import download
if __name__ == "__main__":
    tables, out, processes, threads, shard, size = sys.argv[1:]
    download(tables, image_size=int(size), output_folder=out, processes_count=int(processes), thread_count=int(threads),
             resize_mode="center_crop", encode_quality=95, output_format="webdataset", input_format="parquet",
             url_col="url", caption_col="caption", number_sample_per_shard=int(shard), extract_exif=False,
             save_additional_columns=["split"], timeout=10, compute_hash="sha256", min_image_size=int(size))
"""


def make_pictures(folder: Path, count: int, seed: int = 0) -> None:
    """Like photographs in what they cost: 800x600 and around, smooth colours, edges and grain, some 140 KB each."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        width, height = (int(side * generator.uniform(0.8, 1.25)) for side in (800, 600))
        pixels = np.zeros((height, width, 3), np.float32)
        for cells, weight in ((4, 0.6), (24, 0.3), (120, 0.15)):
            layer = generator.integers(0, 255, (cells, cells, 3), dtype=np.uint8)
            pixels += weight * np.asarray(Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC))
        pixels += generator.normal(0, 5, pixels.shape)
        stream = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=88)
        (folder / f"{number:05d}.jpg").write_bytes(stream.getvalue())


@contextmanager
def server(pictures: Path) -> Iterator[int]:
    """The port of a server in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.download_server", str(pictures)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        yield int(process.stdout.readline())
        process.stdin.close()


def first_request(port: int) -> tuple[float, int]:
    """When the server was first asked since the last call, and how often."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/state")
    first, count = connection.getresponse().read().split()
    connection.close()
    return float(first), int(count)


def write_parts(folder: Path, images: int, port: int) -> None:
    """One parquet file for each shard."""
    folder.mkdir(parents=True)
    for index in range(images // SHARD):
        rows = range(index * SHARD, (index + 1) * SHARD)
        columns = {
            "key": [f"{row:032x}" for row in rows],
            "url": [f"http://{HOSTS[row % len(HOSTS)]}:{port}/{row}.jpg" for row in rows],
            "caption": [f"picture {row}" for row in rows],
            "split": ["train"] * SHARD,
        }
        pq.write_table(pa.table(columns), folder / f"{index:05d}.parquet")


class Ours:
    """The stage on Ray's workers."""

    def __init__(self, parts: Path, out: Path, port: int, arguments: argparse.Namespace):
        settings = DownloadConfig(
            contact="https://example.org/crawl",
            image_size=arguments.image_size,
            samples_per_shard=SHARD,
            processes=arguments.processes,
            threads=arguments.threads,
            allowed_ports=(port,),
            allow_loopback=True,
        )
        self.folder = out / "images"
        self._out = out
        self._stage = DownloadStage(parts, self.folder, settings, memory_limit_bytes=4_000_000_000)
        executor = RayExecutor(arguments.processes)
        self._runner = Runner(output=out, executor=executor, console=Console(quiet=True))

    def run(self) -> float:
        """Returns when the last shard was committed."""
        shutil.rmtree(self._out, ignore_errors=True)
        self._out.mkdir(parents=True)
        self._runner.run([self._stage])
        return (self.folder / "ledger.jsonl").stat().st_mtime


class Stock:
    """img2dataset's own program."""

    def __init__(self, parts: Path, out: Path, arguments: argparse.Namespace):
        self.folder = out
        sizes = (arguments.processes, arguments.threads, SHARD, arguments.image_size)
        self._command = [sys.executable, "-W", "ignore", str(out.with_suffix(".py")), str(parts), str(out)]
        self._command += [str(size) for size in sizes]
        out.with_suffix(".py").write_text(STOCK)

    def run(self) -> float:
        """Returns when the last shard's statistics were written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
        subprocess.run(self._command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return max(path.stat().st_mtime for path in self.folder.glob("*_stats.json"))


def measure(run: Callable[[], float], folder: Path, port: int, images: int) -> float:
    """Images a second of one round; all of them must have been asked for once, and stored."""
    first_request(port)
    end = run()
    first, asked = first_request(port)
    assert asked == images, f"{asked} requests for {images} images"
    stored = sum(_members(path) for path in folder.glob("*.tar"))
    assert stored == images, f"{folder}: {stored} of {images} images are stored"
    return images / (end - first)


def _members(path: Path) -> int:
    import tarfile

    with tarfile.open(path) as archive:
        return sum(name.endswith(".jpg") for name in archive.getnames())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="Example: python -m benchmarks.download --rounds 5"
    )
    parser.add_argument("--images", type=int, default=2000, help="a multiple of 250")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, default=32, help="of each process")
    parser.add_argument("--image-size", type=int, default=256)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        make_pictures(Path(scratch) / "pictures", DISTINCT)
        print(f"made {DISTINCT} pictures in {time.perf_counter() - began:.0f} s", flush=True)
        with server(Path(scratch) / "pictures") as port:
            _compare(Path(scratch), port, arguments)


def _compare(scratch: Path, port: int, arguments: argparse.Namespace) -> None:
    write_parts(scratch / "parts", arguments.images, port)
    ours = Ours(scratch / "parts", scratch / "ours", port, arguments)
    stock = Stock(scratch / "parts", scratch / "stock", arguments)
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("img2dataset", "opencv-python-headless", "ray")
    ]
    print(f"{arguments.images} images a round to {arguments.image_size}x{arguments.image_size}, ", end="")
    print(f"{arguments.processes} processes of {arguments.threads} threads; {', '.join(versions)}")
    rates: list[tuple[float, float]] = []
    for turn in range(arguments.rounds):
        pair = [measure(each.run, each.folder, port, arguments.images) for each in _order(turn, ours, stock)]
        rates.append((pair[0], pair[1]) if turn % 2 == 0 else (pair[1], pair[0]))
        mine, theirs = rates[-1]
        print(
            f"round {turn + 1}: ours {mine:6.1f}, img2dataset {theirs:6.1f} images/s, {mine / theirs:.3f}", flush=True
        )
    ratio = statistics.median(mine / theirs for mine, theirs in rates)
    print(f"ours / img2dataset: {ratio:.3f} (at least {MIN_RATIO})")


def _order(turn: int, ours: Ours, stock: Stock) -> tuple[Ours | Stock, Ours | Stock]:
    """Each goes first in every other round."""
    return (ours, stock) if turn % 2 == 0 else (stock, ours)


if __name__ == "__main__":
    main()
