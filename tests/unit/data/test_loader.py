"""Batches: the same ones for any number of workers and ranks, and no worker left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sdtrain.data import loader as loader_module
from sdtrain.data.dataset import ShardDataset
from sdtrain.data.loader import collate, train_loader, validation_loader
from sdtrain.data.manifest import Manifest, describe_shard, write_manifest
from sdtrain.data.plan import order_of
from sdtrain.data.shard import ShardWriter
from sdtrain.data.shard_cache import ShardCache
from sdtrain.errors import ConfigError
from sdtrain.records import Batch, DrawSpec

DRAWS = DrawSpec(normals={"noise": (4, 2, 2)}, uniforms=("timestep",))
NUM_SHARDS, PER_SHARD = 5, 7
TOTAL = NUM_SHARDS * PER_SHARD


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("data")
    entries = []
    for shard in range(NUM_SHARDS):
        path = folder / f"{shard:05d}.tar"
        with ShardWriter(path) as writer:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                writer.write(f"k{number}", {"moments.npy": np.full((8, 2, 2), number, dtype=np.float16)})
        entries += [describe_shard(path, split=split, folder=folder) for split in ("train",)]
    return write_manifest(folder / "manifest.json", entries, fingerprint={})


def make(manifest: Manifest, *, shuffle: bool = True) -> ShardDataset:
    return ShardDataset(
        manifest=manifest,
        split="train",
        fields={"moments": "moments.npy"},
        order=order_of(manifest, "train", seed=5, window_shards=2, shuffle=shuffle),
        seed=5,
        draws=DRAWS,
        read_retries=0,
    )


def train(dataset: ShardDataset, **changes: int):
    arguments = {
        "start_step": 0,
        "max_steps": 4,
        "batch_size": 12,
        "micro_batch_size": 3,
        "world_size": 2,
        "rank": 0,
        "num_workers": 0,
        "prefetch": 2,
    }
    return train_loader(dataset, **(arguments | changes))


def rows(batch: Batch) -> list[tuple[object, ...]]:
    """Everything that a batch holds, sample by sample."""
    return [
        (
            int(batch.positions[item]),
            batch.keys[item],
            float(batch.weights[item]),
            float(batch.uniforms["timestep"][item]),
            batch.normals["noise"][item].numpy().tobytes(),
            batch.fields["moments"][item].numpy().tobytes(),
        )
        for item in range(len(batch))
    ]


def step_rows(dataset: ShardDataset, *, world_size: int, micro_batch_size: int, **changes: int) -> dict[int, list]:
    """All ranks' samples by step, in the order of their positions."""
    steps: dict[int, list] = {}
    for rank in range(world_size):
        loader = train(dataset, world_size=world_size, rank=rank, micro_batch_size=micro_batch_size, **changes)
        for step, _, batch in loader:
            steps.setdefault(step, []).extend(rows(batch))
    return {step: sorted(found) for step, found in steps.items()}


def test_a_batch_is_stacked_with_its_types(manifest: Manifest):
    dataset = make(manifest)
    batch = collate([dataset[position] for position in (4, 5, 6)])
    assert len(batch) == 3
    assert batch.positions.tolist() == [4, 5, 6]
    assert batch.positions.dtype == torch.int64
    assert batch.fields["moments"].shape == (3, 8, 2, 2)
    assert batch.fields["moments"].dtype == torch.float16
    assert batch.normals["noise"].shape == (3, 4, 2, 2)
    assert batch.normals["noise"].dtype == torch.float32
    assert batch.uniforms["timestep"].shape == (3,)
    assert batch.uniforms["timestep"].dtype == torch.float64
    assert batch.weights.tolist() == [1, 1, 1]
    assert batch.weights.dtype == torch.float32
    assert batch.errors == ()
    assert batch.fields["moments"][:, 0, 0, 0].tolist() == [int(key[1:]) for key in batch.keys]


def test_a_batch_survives_pinned_memory(manifest: Manifest):
    """Pinning hands tuples back as lists; imitated here, as it needs an accelerator."""
    dataset = make(manifest)
    plain = loader_module._collate_plain([dataset[position] for position in (4, 5)])
    lists = {name: list(part) if isinstance(part, tuple) else part for name, part in plain.items()}
    pinned, batch = loader_module._as_batch(lists), collate([dataset[position] for position in (4, 5)])
    assert (pinned.keys, pinned.errors) == (batch.keys, ())
    assert rows(pinned) == rows(batch)


def test_a_worker_passes_small_tensors_by_value(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    """Each one in shared memory costs a file and a descriptor; a batch is the same either way."""
    dataset = make(manifest)
    samples = [dataset[position] for position in (4, 5)]
    parts = loader_module._collate_plain(samples)
    assert all(isinstance(value, np.ndarray) for value in (parts["positions"], *parts["fields"].values()))
    monkeypatch.setattr(loader_module, "_SMALL_BYTES", 0)
    large = loader_module._collate_plain(samples)
    assert all(isinstance(value, torch.Tensor) for value in (large["positions"], *large["fields"].values()))
    assert rows(loader_module._as_batch(parts)) == rows(loader_module._as_batch(large)) == rows(collate(samples))


def test_steps_and_micro_steps_come_in_order(manifest: Manifest):
    found = [(step, micro, batch.positions.tolist()) for step, micro, batch in train(make(manifest), rank=1)]
    assert found == [
        (step, micro, list(range(step * 12 + 6 + micro * 3, step * 12 + 9 + micro * 3)))
        for step in range(4)
        for micro in range(2)
    ]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(manifest: Manifest, num_workers: int):
    alone = [(step, micro, rows(batch)) for step, micro, batch in train(make(manifest))]
    helped = [(step, micro, rows(batch)) for step, micro, batch in train(make(manifest), num_workers=num_workers)]
    assert helped == alone
    assert len(alone) == 8


def test_ranks_and_accumulation_change_nothing(manifest: Manifest):
    expected = step_rows(make(manifest), world_size=1, micro_batch_size=12)
    for world_size, micro_batch_size in ((1, 1), (2, 6), (3, 2), (12, 1)):
        assert step_rows(make(manifest), world_size=world_size, micro_batch_size=micro_batch_size) == expected
    assert [len(found) for found in expected.values()] == [12] * 4


def test_a_run_with_kills_sees_what_a_run_without_sees(manifest: Manifest):
    straight = step_rows(make(manifest), world_size=1, micro_batch_size=12, max_steps=9)
    pieces: dict[int, list] = {}
    for start, end, world_size, workers in ((0, 2, 2, 0), (2, 3, 6, 1), (3, 7, 1, 2), (7, 9, 3, 0)):
        pieces |= step_rows(
            make(manifest),
            world_size=world_size,
            micro_batch_size=2,
            start_step=start,
            max_steps=end,
            num_workers=workers,
        )
    assert pieces == straight
    epochs = [row[1] for step in sorted(straight) for row in straight[step]]
    for epoch in range(9 * 12 // TOTAL):
        assert sorted(epochs[epoch * TOTAL : (epoch + 1) * TOTAL]) == sorted(f"k{n}" for n in range(TOTAL))


def test_errors_of_tombstones_reach_the_batch(manifest: Manifest, tmp_path: Path):
    dataset = make(manifest)
    hidden = (manifest.folder / "00001.tar").rename(manifest.folder / "hidden")
    try:
        batches = [batch for _, _, batch in train(dataset, max_steps=3, world_size=1, num_workers=1)]
    finally:
        hidden.rename(manifest.folder / "00001.tar")
    seen, zeros = [], 0
    for batch in batches:
        assert len(batch) == 3
        assert len(batch.errors) == int((batch.weights == 0).sum())
        assert not batch.fields["moments"][batch.weights == 0].any()
        zeros += len(batch.errors)
        seen += batch.errors
    assert zeros == len([p for p in range(36) if dataset.order.sample_at(p).shard == 1]) >= PER_SHARD
    assert all("00001.tar: cannot open the shard: No such file" in error.reason for error in seen)
    assert {error.shard for error in seen} == {"00001.tar"}


def test_the_runs_own_random_state_is_left_alone(manifest: Manifest):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in train(make(manifest), num_workers=1, max_steps=1):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_closing_stops_the_workers(manifest: Manifest):
    loader = train(make(manifest), num_workers=2, max_steps=1000)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert multiprocessing.active_children() == []


def test_running_dry_stops_the_workers(manifest: Manifest):
    assert len(list(train(make(manifest), num_workers=2, max_steps=2))) == 4
    assert multiprocessing.active_children() == []


def test_workers_ignore_a_schedulers_signals_but_heed_their_parent(manifest: Manifest):
    loader = train(make(manifest), num_workers=1, max_steps=1000)
    next(loader)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGUSR1)
    os.kill(worker.pid, signal.SIGINT)
    sibling = multiprocessing.get_context("fork").Process(target=os.kill, args=(worker.pid, signal.SIGTERM))
    sibling.start()
    sibling.join()
    time.sleep(0.3)
    assert worker.is_alive()
    assert len([next(loader) for _ in range(20)]) == 20
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
    loader.close()


def test_validation_is_the_same_at_every_pass_and_split_over_ranks(manifest: Manifest):
    dataset = make(manifest, shuffle=False)
    whole: list = []
    for world_size in (1, 3):
        parts: list = []
        for rank in range(world_size):
            loader = validation_loader(
                dataset,
                num_samples=20,
                batch_size=4,
                world_size=world_size,
                rank=rank,
                num_workers=1,
                prefetch=2,
            )
            passes = [[row for batch in loader for row in rows(batch)] for _ in range(2)]
            loader.close()
            assert passes[0] == passes[1]
            parts += passes[0]
        assert [row[0] for row in parts] == list(range(20))
        assert [row[1] for row in parts] == [f"k{number}" for number in range(20)]
        whole = whole or parts
        assert parts == whole


def test_validation_workers_live_until_close(manifest: Manifest):
    loader = validation_loader(
        make(manifest, shuffle=False),
        num_samples=10,
        batch_size=4,
        world_size=1,
        rank=0,
        num_workers=1,
        prefetch=2,
    )
    sizes = [len(batch) for batch in loader]
    first = {child.pid for child in multiprocessing.active_children()}
    assert sizes == [4, 4, 2]
    assert [len(batch) for batch in loader] == sizes
    assert {child.pid for child in multiprocessing.active_children()} == first
    assert len(first) == 1
    loader.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(ValueError, match="the validation loader is closed"):
        iter(loader)


def test_files_and_threads_of_this_process_end_with_the_loader(manifest: Manifest, tmp_path: Path):
    """A run builds a data set for every validation; none may leave a thread, or hold shards in the node's cache."""
    cache = ShardCache(tmp_path, 2**30)
    remote = Manifest.load(f"file://{manifest.path}", cache=cache)
    before = {thread.name for thread in threading.enumerate()}

    def held() -> int:
        targets = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # another thread closed it since
                targets.append(link.readlink())
        return sum(target.is_relative_to(tmp_path) for target in targets)

    validation = validation_loader(
        make(remote, shuffle=False), num_samples=20, batch_size=4, world_size=1, rank=0, num_workers=0, prefetch=1
    )
    training = train(make(remote))
    for loader in (validation, training):
        next(iter(loader))
        assert held() > 0
        loader.close()
        assert held() == 0
        assert {thread.name for thread in threading.enumerate()} <= before  # those of earlier tests may end meanwhile


def test_impossible_batches_are_refused_before_anything_starts(manifest: Manifest):
    with pytest.raises(ConfigError, match=r"data.batch_size 12 is not a multiple of data.micro_batch_size 5 x 2 ranks"):
        train(make(manifest), micro_batch_size=5)
    for num_samples in (0, TOTAL + 1):
        with pytest.raises(
            ConfigError, match=rf"validation.num_samples is {num_samples}; split 'train' of .*manifest.j"
        ):
            validation_loader(
                make(manifest),
                num_samples=num_samples,
                batch_size=1,
                world_size=1,
                rank=0,
                num_workers=0,
                prefetch=1,
            )
    with pytest.raises(ConfigError, match=r"validation.batch_size is 0; at least 1 is needed"):
        validation_loader(make(manifest), num_samples=1, batch_size=0, world_size=1, rank=0, num_workers=0, prefetch=1)
