"""Pictures of several sizes become shards of one size each, and training gets batches of one shape."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from data_pipeline.build import stages_for
from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Runner
from data_pipeline.stage import numbered_files
from data_pipeline.stages.buckets import BucketSortStage, BucketStage, Span, bucket_of, bucket_stages, cut
from sdtrain.config.ingestion import IngestionConfig
from sdtrain.data.dataset import ShardDataset
from sdtrain.data.loader import train_loader, validation_loader
from sdtrain.data.manifest import Manifest, read_fields, verify
from sdtrain.data.plan import order_of
from sdtrain.data.shard import ShardReader, ShardWriter
from sdtrain.errors import DataError
from sdtrain.records import DrawSpec
from tests.data.ground import save_tiny_autoencoder

SHAPES = ((32, 32), (48, 24), (24, 48))
NAMES = sorted(f"{width}x{height}" for width, height in SHAPES)


def picture(number: int, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def size_of(number: int) -> tuple[int, int]:
    """Three squares for two wide pictures and a high one."""
    return SHAPES[(0, 1, 0, 2, 1, 0)[number % 6]]


def write_images(folder: Path, shards: list[tuple[str, int]]) -> None:
    """Image shards as the download writes them; `shards` gives split and samples of each."""
    number = 0
    for index, (split, samples) in enumerate(shards):
        with ShardWriter(folder / f"{index:05d}.tar") as writer:
            for _ in range(samples):
                facts = {"caption": f"caption {number}", "size": list(size_of(number)), "split": split}
                fields = {"jpg": picture(number, size_of(number)), "txt": f"caption {number}", "json": facts}
                writer.write(f"k{number:04d}", fields)
                number += 1


def run(folder: Path, stages: list[Any]) -> str:
    shown = io.StringIO()
    console = Console(file=shown, width=500)
    Runner(output=folder, executor=InlineExecutor(), max_attempts=1, console=console).run(stages)
    return shown.getvalue()


def contents(folder: Path) -> list[tuple[str, str, list[str]]]:
    """Split, size and keys of every shard; all samples of a shard agree in the first two, and pixels in theirs."""
    found = []
    for path in numbered_files(folder, ".tar"):
        with ShardReader(path) as reader:
            facts = [reader.decode(sample, "json") for sample in range(len(reader))]
            shapes = {reader.decode(sample, "jpg").shape for sample in range(len(reader))}
            keys = list(reader.keys)
        ((split, bucket),) = {(one["split"], bucket_of(one, "")) for one in facts}
        assert shapes == {(3, *map(int, reversed(bucket.split("x"))))}
        found.append((split, bucket, keys))
    return found


def stages_in(folder: Path, samples_per_shard: int = 4) -> list[Any]:
    return bucket_stages(folder / "images", folder / "sort", folder / "buckets", samples_per_shard)


# The stages -----------------------------------------------------------------------------------------------------------


def test_every_sample_comes_once_in_a_shard_of_its_split_and_size(tmp_path: Path) -> None:
    write_images(tmp_path / "images", [("train", 7), ("train", 0), ("train", 10), ("validation", 8)])
    shown = run(tmp_path, stages_in(tmp_path))
    found = contents(tmp_path / "buckets")
    groups: dict[tuple[str, str], list[list[str]]] = {}
    for split, bucket, keys in found:
        groups.setdefault((split, bucket), []).append(keys)
    assert list(groups) == sorted(groups) == [(split, name) for split in ("train", "validation") for name in NAMES]
    for (split, bucket), shards in groups.items():
        numbers = range(17) if split == "train" else range(17, 25)
        assert [key for keys in shards for key in keys] == [
            f"k{n:04d}" for n in numbers if "x".join(map(str, size_of(n))) == bucket
        ]
        assert [len(keys) for keys in shards[:-1]] == [4] * (len(shards) - 1), "only the last one is smaller"
    assert "buckets: 25 samples in 9 shards of one size each; 24x48: 4 in 2, 32x32: 13 in 4, 48x24: 8 in 3" in shown


def test_samples_are_copied_byte_by_byte(tmp_path: Path) -> None:
    write_images(tmp_path / "images", [("train", 7)])
    run(tmp_path, stages_in(tmp_path))
    with ShardReader(tmp_path / "images/00000.tar") as before:
        original = {key: [before.read(at, name) for name in before.fields] for at, key in enumerate(before.keys)}
    copies = {}
    for path in numbered_files(tmp_path / "buckets", ".tar"):
        with ShardReader(path) as after:
            copies |= {key: [after.read(at, name) for name in after.fields] for at, key in enumerate(after.keys)}
    assert copies == original


def test_only_shards_that_hold_what_changed_are_written_again(tmp_path: Path) -> None:
    write_images(tmp_path / "images", [("train", 6), ("train", 6), ("train", 6)])
    run(tmp_path, stages_in(tmp_path, 3))
    assert "buckets: 6 of 6 up to date" in run(tmp_path, stages_in(tmp_path, 3))
    with ShardWriter(tmp_path / "images/00002.tar") as writer:  # one picture less: its last square
        for number in range(12, 17):
            facts = {"size": list(size_of(number)), "split": "train"}
            writer.write(f"k{number:04d}", {"jpg": picture(number, size_of(number)), "txt": "x", "json": facts})
    shown = run(tmp_path, stages_in(tmp_path, 3))
    assert "buckets-sort: 2 of 3 up to date" in shown
    assert "buckets: 3 of 6 up to date" in shown
    assert sum(len(keys) for _, _, keys in contents(tmp_path / "buckets")) == 17


@given(
    lengths=st.lists(st.integers(0, 20), max_size=8),
    size=st.integers(1, 9),
)
def test_cutting_loses_nothing_and_fills_all_groups_but_the_last(lengths: list[int], size: int) -> None:
    spans = [Span(number, 0, length) for number, length in enumerate(lengths)]
    groups = list(cut(spans, size))
    placed = [(shard, first + at) for group in groups for shard, first, length in group for at in range(length)]
    assert placed == [(number, at) for number, length in enumerate(lengths) for at in range(length)]
    counts = [sum(span.length for span in group) for group in groups]
    assert all(count == size for count in counts[:-1]) and all(0 < count <= size for count in counts)
    assert all(span.length > 0 for group in groups for span in group)


@pytest.mark.parametrize("size", [None, [32], [32, "32"], [0, 32], [True, 32], "32x32"])
def test_a_sample_must_say_its_size(tmp_path: Path, size: Any) -> None:
    with ShardWriter(tmp_path / "images/00000.tar") as writer:
        writer.write("k", {"jpg": b"", "txt": "", "json": {"split": "train", "size": size}})
    message = r"00000.tar: sample 'k': its json has size .*, expected \[width, height\] in pixels, by which pictures"
    with pytest.raises(DataError, match=message):
        run(tmp_path, stages_in(tmp_path))


def test_a_shard_of_two_splits_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "images/00000.tar") as writer:
        for split in ("train", "validation"):
            writer.write(split, {"json": {"split": split, "size": [8, 8]}})
    with pytest.raises(
        DataError, match=r"00000.tar: holds splits \['train', 'validation'\]; a shard belongs to exactl"
    ):
        run(tmp_path, [BucketSortStage(tmp_path / "images", tmp_path / "sort")])


def test_no_sample_at_all_is_an_error(tmp_path: Path) -> None:
    write_images(tmp_path / "images", [("train", 0)])
    run(tmp_path, [BucketSortStage(tmp_path / "images", tmp_path / "sort")])
    with pytest.raises(DataError, match=r"images: not one of 1 shards holds a sample; see summary.json there"):
        BucketStage(tmp_path / "images", tmp_path / "sort", 4, tmp_path / "buckets").units()


# To training ----------------------------------------------------------------------------------------------------------


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """A page over pictures of three sizes."""
    page: dict[str, Any] = {
        "schema_version": 1,
        "kind": "ingestion",
        "output": str(folder / "out"),
        "source": {"type": "laion", "metadata": str(folder / "metadata")},
        "filter": {"min_width": 32, "min_height": 32},
        "validation": {"num_samples": 12},
        "download": {
            "image_size": 32,
            "resize_mode": "buckets",
            "bucket_shapes": [list(shape) for shape in SHAPES],
            "samples_per_shard": 8,
            "contact": "someone@example.org",
        },
        "encode": {"autoencoder": str(folder / "autoencoder"), "batch_size": 4, "check_samples": 1},
    }
    return page | changes


def check_training(manifest: Manifest, num_train: int, num_validation: int) -> None:
    """The manifest names three buckets; every batch of two ranks is of one shape, and every sample comes once."""
    verify(manifest, deep=True)
    assert manifest.buckets("train") == NAMES
    assert manifest.bucket_shapes == {
        name: {"moments.npy": (8, int(name.split("x")[1]) // 2, int(name.split("x")[0]) // 2)} for name in NAMES
    }
    assert (manifest.num_samples("train"), manifest.num_samples("validation")) == (num_train, num_validation)
    stored = {record.key: record.fields["json"]["size"] for record in read_fields(manifest, "train", ["json"])}
    seen, steps = Counter[str](), 3 * num_train // 4
    shapes: dict[int, set[tuple[int, ...]]] = {}
    for rank in range(2):
        loader = train_loader(
            open_data(manifest, "train"),
            start_step=0,
            max_steps=steps,
            batch_size=4,
            micro_batch_size=2,
            world_size=2,
            rank=rank,
            num_workers=0,
            prefetch=1,
        )
        for step, _, batch in loader:
            assert not batch.errors
            moments, noise = batch.fields["moments"], batch.normals["noise"]
            assert noise.shape == (2, 4, *moments.shape[2:])
            assert {tuple(stored[key]) for key in batch.keys} == {(2 * moments.shape[3], 2 * moments.shape[2])}
            shapes.setdefault(step, set()).add(tuple(moments.shape))
            seen.update(batch.keys)
    assert all(len(found) == 1 for found in shapes.values()), "both ranks see one shape a step"
    assert len(set.union(*shapes.values())) == 3
    assert set(seen) == set(stored) and set(seen.values()) <= {2, 3, 4}
    checked = validation_loader(
        open_data(manifest, "validation"),
        num_samples=num_validation,
        batch_size=4,
        world_size=1,
        rank=0,
        num_workers=0,
        prefetch=1,
    )
    assert sum(len(batch) for batch in checked) == num_validation
    checked.close()


def open_data(manifest: Manifest, split: str) -> ShardDataset:
    return ShardDataset(
        manifest=manifest,
        split=split,
        fields={"moments": "moments.npy", "tokens": "tokens.npy"},
        order=order_of(manifest, split, seed=5, window_shards=2, shuffle=split == "train", batch_size=4),
        seed=5,
        draws=DrawSpec(normals={"noise": (4, 16, 16)}, uniforms=("timestep",), follows="moments"),
    )


def test_three_sizes_reach_training_in_batches_of_one_shape(tmp_path: Path) -> None:
    save_tiny_autoencoder(tmp_path / "autoencoder")
    stages = stages_for(IngestionConfig.model_validate(values(tmp_path), strict=False))
    names = [stage.name for stage in stages]
    assert names[names.index("download") :][:4] == ["download", "buckets-sort", "buckets", "images"]
    write_images(tmp_path / "out/04-download", [("train", 30), ("train", 24), ("validation", 12)])
    shown = run(tmp_path / "out", stages[names.index("buckets-sort") :])
    assert "buckets: 66 samples in 12 shards of one size each; 24x48: 11 in 3, 32x32: 33 in 5, 48x24: 22 in 4" in shown
    manifest, images = (Manifest.load(tmp_path / "out" / name) for name in ("manifest.json", "images.json"))
    check_training(manifest, 54, 12)
    assert images.buckets("validation") == NAMES
    shapes = [[32, 32], [48, 24], [24, 48]]
    assert (
        manifest.fingerprint["transform"]["bucket_shapes"] == images.fingerprint["transform"]["bucket_shapes"] == shapes
    )


class Sizes(BaseHTTPRequestHandler):
    """Serves `/WIDTHxHEIGHT/NUMBER.jpg`."""

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""

    def do_GET(self) -> None:
        width, height, number = (int(part) for part in re.findall(r"\d+", self.path))
        body = picture(number, (width, height))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Sizes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.heavy
@pytest.mark.long
def test_pictures_of_three_aspect_ratios_from_the_web_to_training(tmp_path: Path, port: int) -> None:
    """Sizes on the web differ a little from each other; the download brings them to the three."""
    save_tiny_autoencoder(tmp_path / "autoencoder")
    sizes = [[(40, 40), (96, 48), (44, 40), (48, 100), (100, 52), (64, 60)][number % 6] for number in range(72)]
    count = len(sizes)
    table = pa.table(
        {
            "URL": [f"http://127.0.0.1:{port}/{w}x{h}/{number}.jpg" for number, (w, h) in enumerate(sizes)],
            "TEXT": [f"a patchwork of colours, number {number}" for number in range(count)],
            "WIDTH": pa.array([width for width, _ in sizes], pa.int32()),
            "HEIGHT": pa.array([height for _, height in sizes], pa.int32()),
            "similarity": [0.3] * count,
            "hash": pa.array(range(count), pa.int64()),
            "punsafe": pa.array([0.0] * count, pa.float32()),
            "pwatermark": pa.array([0.0] * count, pa.float32()),
            "AESTHETIC_SCORE": pa.array([7.0] * count, pa.float32()),
        }
    )
    (tmp_path / "metadata").mkdir()
    pq.write_table(table, tmp_path / "metadata/part-0.parquet")
    page = values(
        tmp_path, filter={"min_width": 32, "min_height": 32, "min_aspect_ratio": 0.4, "max_aspect_ratio": 2.5}
    )
    page["download"] |= {"allow_loopback": True, "allowed_ports": [port], "threads": 4, "processes": 2}
    digests = {}
    for workers in (1, 2):
        page["output"] = str(tmp_path / f"out-{workers}")
        path = tmp_path / f"data-{workers}.yaml"
        path.write_text(f"# sdtrain-data run {path}\n" + json.dumps(page))
        command = [sys.executable, "-m", "data_pipeline.cli", "run", str(path), f"runner.workers={workers}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        manifest = Manifest.load(tmp_path / f"out-{workers}" / "manifest.json")
        check_training(manifest, 60, 12)
        tars = [manifest.shard_path(shard).read_bytes() for shard in manifest.shards]
        digests[workers] = (manifest.sha256, [hashlib.sha256(tar).hexdigest() for tar in tars])
    assert digests[1] == digests[2]
