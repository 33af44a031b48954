"""Batches in the order of the run: torch's DataLoader over a plan of positions, with any number of workers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from sdtrain.data.dataset import Sample, ShardDataset
from sdtrain.data.plan import rank_slice
from sdtrain.errors import ConfigError, SdtrainError
from sdtrain.records import Batch

_SMALL_BYTES = 2**16  # what a pipe takes at once


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a micro-batch; draws and fields keep their types."""
    first = samples[0]
    return Batch(
        keys=tuple(sample.key for sample in samples),
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        fields={name: _stack([sample.fields[name] for sample in samples]) for name in first.fields},
        normals={name: _stack([sample.normals[name] for sample in samples]) for name in first.normals},
        uniforms={
            name: torch.tensor([sample.uniforms[name] for sample in samples], dtype=torch.float64)
            for name in first.uniforms
        },
        weights=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
        errors=tuple(sample.error for sample in samples if sample.error is not None),
    )


def _stack(arrays: Sequence[np.ndarray[Any, np.dtype[Any]]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))


def _collate_plain(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch as a plain mapping, which DataLoader can put into pinned memory; it does not look into records.

    Small tensors become arrays: those pass through a worker's pipe by value, where a tensor would take a shared file
    and a descriptor of its own, each 0.1 ms on both sides.
    """
    batch = collate(samples)
    return {part.name: _map_tensors(_small_as_array, getattr(batch, part.name)) for part in fields(Batch)}


def _as_batch(plain: dict[str, Any]) -> Batch:
    as_tuples = {name: tuple(plain[name]) for name in ("keys", "errors")}  # pinning turns tuples into lists
    return Batch(**{**{name: _map_tensors(_as_tensor, value) for name, value in plain.items()}, **as_tuples})


def _map_tensors(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` applied to a tensor, or to each one of a mapping; tuples and lists pass as they are."""
    if isinstance(value, dict):
        return {name: change(item) for name, item in value.items()}
    return value if isinstance(value, tuple | list) else change(value)


def _small_as_array(tensor: torch.Tensor) -> torch.Tensor | np.ndarray[Any, np.dtype[Any]]:
    return tensor.numpy() if tensor.nbytes <= _SMALL_BYTES else tensor


def _as_tensor(value: torch.Tensor | np.ndarray[Any, np.dtype[Any]]) -> torch.Tensor:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _leave_with_parent() -> None:
    """Heed SIGTERM from the parent only: a scheduler signals every process of a job, and the rank must still save."""
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == os.getppid():
            os._exit(0)


def _start_worker(_: int) -> None:
    """Set up a data worker: one thread, and deaf to the signals that a scheduler means for its rank."""
    torch.set_num_threads(1)
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_with_parent, daemon=True, name="leave-with-parent").start()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A worker's error as the worker raised it: torch puts a traceback into the text of what it passes on."""
    try:
        yield
    except SdtrainError as error:
        name = f"{type(error).__module__}.{type(error).__qualname__}: "
        raise type(error)(str(error).rpartition(name)[2].rstrip()) from error


class _Positions(Iterable[list[int]]):
    """A batch sampler: the positions of each batch, made anew for every pass."""

    def __init__(self, make: Callable[[], Iterator[Sequence[int]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[list[int]]:
        return (list(positions) for positions in self._make())


def _data_loader(
    dataset: ShardDataset,
    plan: Callable[[], Iterator[Sequence[int]]],
    *,
    num_workers: int,
    prefetch: int,
    persistent: bool,
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=_Positions(plan),
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        persistent_workers=persistent and num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_collate_plain,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else every pass would take a number from the run's own generator
    )


def train_loader(
    dataset: ShardDataset,
    *,
    start_step: int,
    max_steps: int,
    batch_size: int,
    micro_batch_size: int,
    world_size: int,
    rank: int,
    num_workers: int,
    prefetch: int,
    skipped_steps: int = 0,
) -> Generator[tuple[int, int, Batch]]:
    """This rank's micro-batches from `start_step` up to, and without, `max_steps`.

    Step s takes the positions [p, p + batch_size) of the order with p = (s + skipped_steps) * batch_size; nothing else
    is carried over, so a resumed run goes on at `start_step` = steps taken, at any world size. Close the iterator to
    stop its workers.

    Args:
        start_step: Steps taken.
        skipped_steps: Steps' worth of positions that the run has left out for good (a rollback).
        batch_size: Global batch.
        micro_batch_size: Per rank; batch_size = micro_batch_size x accumulation x world_size.
        num_workers: Processes that read ahead; 0 reads in this process. Does not change what comes out.
        prefetch: Micro-batches that each worker reads ahead.

    Yields:
        (step, micro_step, batch); steps are counted from 0.

    Raises:
        ConfigError: batch_size does not divide into micro-batches and ranks.
    """
    per_pass = micro_batch_size * world_size
    if per_pass < 1 or batch_size < 1 or batch_size % per_pass:
        raise ConfigError(
            f"data.batch_size {batch_size} is not a multiple of data.micro_batch_size {micro_batch_size} x "
            f"{world_size} ranks = {per_pass}; change one of the three"
        )
    grad_accum_steps = batch_size // per_pass

    def places() -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in range(start_step, max_steps) for micro in range(grad_accum_steps))

    def plan() -> Iterator[range]:
        for step, micro in places():
            yield rank_slice(
                step=step + skipped_steps,
                batch_size=batch_size,
                world_size=world_size,
                rank=rank,
                grad_accum_steps=grad_accum_steps,
                micro_step=micro,
            )

    loader = _data_loader(dataset, plan, num_workers=num_workers, prefetch=prefetch, persistent=False)

    def batches() -> Generator[tuple[int, int, Batch]]:
        try:
            with _plain_errors():
                for (step, micro), plain in zip(places(), loader, strict=True):
                    yield step, micro, _as_batch(plain)
        finally:
            dataset.close()

    return batches()


class ValidationLoader:
    """The same batches with the same draws at every pass; its workers live from the first pass until `close`."""

    def __init__(self, loader: DataLoader[Any], dataset: ShardDataset) -> None:
        self._loader: DataLoader[Any] | None = loader
        self._dataset = dataset

    def __iter__(self) -> Iterator[Batch]:
        if self._loader is None:
            raise ValueError("the validation loader is closed")
        return map(_as_batch, self._loader)

    def close(self) -> None:
        """Stop the workers, and close what was read in this process."""
        self._loader = None
        self._dataset.close()


def validation_loader(
    dataset: ShardDataset,
    *,
    num_samples: int,
    batch_size: int,
    world_size: int,
    rank: int,
    num_workers: int,
    prefetch: int,
) -> ValidationLoader:
    """This rank's part of the positions 0 .. num_samples - 1, in order; parts differ by at most one sample.

    A batch ends where the next sample is of another bucket.

    Args:
        dataset: Over an order made with `shuffle=False`.
        num_samples: Of all ranks together.
        batch_size: Per rank; the last batch of a bucket's neighbours may be smaller.

    Raises:
        ConfigError: num_samples is not within the split, which would count samples twice.
    """
    if not 1 <= num_samples <= len(dataset):
        raise ConfigError(
            f"validation.num_samples is {num_samples}; split {dataset.split!r} of {dataset.manifest.path} "
            f"allows 1 to {len(dataset)}"
        )
    if batch_size < 1:
        raise ConfigError(f"validation.batch_size is {batch_size}; at least 1 is needed")
    first, end = (num_samples * edge // world_size for edge in (rank, rank + 1))

    def plan() -> Iterator[list[int]]:
        for _, run in groupby(range(first, end), key=dataset.bucket_at):
            positions = list(run)
            yield from (positions[start : start + batch_size] for start in range(0, len(positions), batch_size))

    loader = _data_loader(dataset, plan, num_workers=num_workers, prefetch=prefetch, persistent=True)
    return ValidationLoader(loader, dataset)
