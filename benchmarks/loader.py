"""Reading moments shards through our loader beside webdataset's own and, where there is one, mosaicml-streaming's.

    python -m benchmarks.loader --workers 2
    python -m benchmarks.loader --workers 2 --streaming-python /tmp/streaming/bin/python

All of them deliver the same samples in batches of the same size: float16 moments of 8 channels and int64 tokens,
stacked, from files in the page cache, with equally many worker processes and batches in flight. Ours reads in the order
of a training run (windows of shards, samples permuted), checks every field's checksum and that every number is finite;
webdataset streams its tars from beginning to end, and again through its shuffle buffer; streaming reads its own format
in its own shuffled order. Both others check nothing. Arrays are decoded by hand for webdataset, because its own
decoders execute pickles. Streaming's shards hold only the two fields that are wanted, the tars caption and facts too.

mosaicml-streaming asks for older numpy than this project's lock file, so it runs in an environment of its own:

    uv venv /tmp/streaming && uv pip install --python /tmp/streaming/bin/python mosaicml-streaming

Rounds alternate, figures are medians, counted from the first batch on; on a machine whose speed drifts only the ratio
means anything.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import webdataset as wds

from sdtrain.data.dataset import ShardDataset
from sdtrain.data.decode import decode_npy
from sdtrain.data.loader import train_loader
from sdtrain.data.manifest import Manifest, describe_shard, write_manifest
from sdtrain.data.plan import order_of
from sdtrain.data.shard import ShardReader, ShardWriter
from sdtrain.records import DrawSpec

SEED = 42
PREFETCH = 4
STREAMING_SCRIPT = Path(__file__).with_name("loader_streaming.py")


def write_data_set(folder: Path, *, shards: int, samples_per_shard: int, latent_side: int) -> Manifest:
    """Latent shards as the stage `encode` writes them."""
    entries = []
    for shard in range(shards):
        random = np.random.Generator(np.random.Philox(shard))
        path = folder / f"{shard:05d}.tar"
        with ShardWriter(path) as writer:
            for sample in range(samples_per_shard):
                moments = random.standard_normal((8, latent_side, latent_side), dtype=np.float32).astype(np.float16)
                tokens = random.integers(0, 49408, 77).astype(np.uint16)
                key = f"{shard * samples_per_shard + sample:032x}"
                caption = f"a picture that is number {sample} of shard {shard}"
                facts = {"caption": caption, "url_sha256": key * 2, "size": [512, 512], "split": "train"}
                writer.write(key, {"moments.npy": moments, "tokens.npy": tokens, "txt": caption, "json": facts})
        entries.append(describe_shard(path, split="train", folder=folder))
    return write_manifest(folder / "manifest.json", entries, fingerprint={})


class Engine(Protocol):
    """One way to read the data set."""

    def rate(self) -> float:
        """Samples a second over one pass, from the first batch on."""
        ...


def timed(batches: Iterator[tuple[int, float]]) -> float:
    """Samples a second, of batches given as (samples, a number that was read in them)."""
    next(batches)
    started, samples = time.perf_counter(), 0
    for count, _ in batches:
        samples += count
    return samples / (time.perf_counter() - started)


class Ours:
    """`train_loader` over a `ShardDataset`, with or without the noise of a training run."""

    def __init__(self, manifest: Manifest, *, batch_size: int, workers: int, noise: bool):
        self._manifest = manifest
        self._batch_size = batch_size
        self._workers = workers
        channels, height, width = manifest.field_shapes["moments.npy"]
        shape = (channels // 2, height, width)
        normals = {"noise": shape, "posterior": shape} if noise else {}
        self._draws = DrawSpec(normals=normals, uniforms=("timestep", "drop") if noise else ())

    def _batches(self) -> Iterator[tuple[int, float]]:
        dataset = ShardDataset(
            manifest=self._manifest,
            split="train",
            fields={"moments": "moments.npy", "tokens": "tokens.npy"},
            order=order_of(self._manifest, "train", seed=SEED, window_shards=16),
            seed=SEED,
            draws=self._draws,
        )
        loader = train_loader(
            dataset,
            start_step=0,
            max_steps=len(dataset) // self._batch_size,
            batch_size=self._batch_size,
            micro_batch_size=self._batch_size,
            world_size=1,
            rank=0,
            num_workers=self._workers,
            prefetch=PREFETCH,
        )
        for _, _, batch in loader:
            assert not batch.errors
            yield len(batch), float(batch.fields["moments"][0, 0, 0, 0])

    def rate(self) -> float:
        return timed(self._batches())


class Webdataset:
    """A `WebDataset` pipeline behind a `WebLoader`; `shuffle` is the size of its buffer, 0 streams."""

    def __init__(self, manifest: Manifest, *, batch_size: int, workers: int, shuffle: int):
        self._urls = [str(manifest.shard_path(shard)) for shard in manifest.split("train")]
        self._batch_size = batch_size
        self._workers = workers
        self._shuffle = shuffle

    def _batches(self) -> Iterator[tuple[int, float]]:
        data = wds.WebDataset(self._urls, shardshuffle=len(self._urls) if self._shuffle else False)
        if self._shuffle:
            data = data.shuffle(self._shuffle)
        data = data.map(decode_sample).batched(self._batch_size, collation_fn=stack, partial=False)
        prefetch = PREFETCH if self._workers else None
        loader = wds.WebLoader(data, batch_size=None, num_workers=self._workers, prefetch_factor=prefetch)
        for batch in loader:
            yield len(batch["keys"]), float(batch["moments"][0, 0, 0, 0])

    def rate(self) -> float:
        return timed(self._batches())


def decode_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The two fields that training reads, from raw bytes."""
    moments, tokens = decode_npy(sample["moments.npy"]), decode_npy(sample["tokens.npy"])
    return {"key": sample["__key__"], "moments": moments, "tokens": tokens.astype(np.int64)}


def stack(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of tensors."""
    stacked = {name: torch.from_numpy(np.stack([one[name] for one in samples])) for name in ("moments", "tokens")}
    return stacked | {"keys": [one["key"] for one in samples]}


class Streaming:
    """mosaicml-streaming in another interpreter; its data set is written there from ours, once."""

    def __init__(self, manifest: Manifest, python: Path, folder: Path, *, batch_size: int, workers: int):
        self._command = [str(python), str(STREAMING_SCRIPT), str(folder)]
        self._settings = [str(batch_size), str(workers), str(PREFETCH)]
        arrays = folder / "arrays"
        arrays.mkdir(parents=True)
        for shard in manifest.split("train"):
            with ShardReader(manifest.shard_path(shard)) as reader:
                rows = [
                    (reader.decode(at, "moments.npy"), reader.decode(at, "tokens.npy")) for at in range(len(reader))
                ]
            moments, tokens = (np.stack(column) for column in zip(*rows, strict=True))
            np.savez(arrays / f"{Path(shard.path).stem}.npz", moments=moments, tokens=tokens)
        self.version = self._run("write").strip()

    def _run(self, what: str) -> str:
        done = subprocess.run([*self._command, what, *self._settings], stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.splitlines()[-1]

    def rate(self) -> float:
        return float(self._run("read"))


# Report ---------------------------------------------------------------------------------------------------------------


def engines_for(arguments: argparse.Namespace, manifest: Manifest, folder: Path) -> dict[str, Callable[[], float]]:
    """Every way to read, by its name in the table."""
    same = {"batch_size": arguments.batch_size, "workers": arguments.workers}
    engines: dict[str, Engine] = {
        "ours": Ours(manifest, **same, noise=False),
        "webdataset": Webdataset(manifest, **same, shuffle=0),
        "webdataset, shuffled": Webdataset(manifest, **same, shuffle=arguments.samples_per_shard),
    }
    if arguments.streaming_python is None:
        print("mosaicml-streaming is left out: give an environment that has it as --streaming-python (see --help)")
    else:
        streaming = Streaming(manifest, arguments.streaming_python, folder / "streaming", **same)
        print(f"beside it mosaicml-streaming {streaming.version}")
        engines["mosaicml-streaming"] = streaming
    engines["ours, with noise"] = Ours(manifest, **same, noise=True)
    return {name: engine.rate for name, engine in engines.items()}


def compare(rates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples a second of every engine in every round; the first round only warms up."""
    found: dict[str, list[float]] = {name: [] for name in rates}
    for number in range(rounds + 1):
        for name in list(rates) if number % 2 else list(rates)[::-1]:
            rate = rates[name]()
            if number:
                found[name].append(rate)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.loader"
    )
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--samples-per-shard", type=int, default=1_000)
    parser.add_argument("--latent-side", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streaming-python", type=Path, help="an interpreter that has mosaicml-streaming")
    arguments = parser.parse_args()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"webdataset {wds.__version__}; {os.cpu_count()} cores, {arguments.workers} workers, "
        f"batches of {arguments.batch_size}"
    )
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_data_set(
            Path(folder) / "ours",
            shards=arguments.shards,
            samples_per_shard=arguments.samples_per_shard,
            latent_side=arguments.latent_side,
        )
        _report(compare(engines_for(arguments, manifest, Path(folder)), arguments.rounds))


def _report(found: Mapping[str, Sequence[float]]) -> None:
    """The table; ratios are medians over the rounds, so that a drift of the machine cancels."""
    for name, rates in found.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(found["ours"], rates, strict=True))
        print(f"{name:22} {statistics.median(rates):9,.0f} samples/s   ours is {ratio:5.2f} x")
    peers = [rates for name, rates in found.items() if not name.startswith("ours")]
    best = [max(rates) for rates in zip(*peers, strict=True)]
    ratio = statistics.median(mine / theirs for mine, theirs in zip(found["ours"], best, strict=True))
    print(f"without noise {ratio:.2f} x the best of the others in each round (limit 1.0)")
    sys.exit(ratio < 1.0)


if __name__ == "__main__":
    main()
