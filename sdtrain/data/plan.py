"""Which sample stands at which position: one pure function of manifest, seed and epoch, and one global cursor.

Shards are permuted once an epoch, cut into windows of K shards, and the samples of a window are permuted among
themselves. Positions run on across epochs, so there is no short batch and no dropped tail. Windows are computed when
they are asked for: memory is that of a few windows, however large the data set. Samples of several sizes have such an
order for every size, and one of batches over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdtrain.data.lru import Lru
from sdtrain.data.manifest import Manifest
from sdtrain.data.randomness import permutation
from sdtrain.errors import DataError

ORDER_VERSION = 1
"""Raised by every change that moves a sample; a run refuses to go on under another version."""

_CACHED_EPOCHS = 2
_CACHED_WINDOWS = 4
_CACHED_BATCHES = 8


class Place(NamedTuple):
    """Where a position's sample lies."""

    epoch: int
    shard: int
    sample: int


class _Epoch(NamedTuple):
    shards: np.ndarray[Any, np.dtype[np.int64]]  # (num_shards,) in the order of this epoch
    window_starts: np.ndarray[Any, np.dtype[np.int64]]  # (num_windows,) first offset in the epoch


class _Window(NamedTuple):
    shards: np.ndarray[Any, np.dtype[np.int64]]  # (window samples,)
    samples: np.ndarray[Any, np.dtype[np.int64]]  # (window samples,)


class Order:
    """The order of the samples of a run; picklable, the same in every process.

    Args:
        shard_sizes: Samples per shard, in the order of the manifest's split.
        manifest_sha256: Names the data set.
        seed: The run's seed.
        window_shards: K, how many shards are mixed at a time; more mixes better and keeps more files open.
        shuffle: False keeps the manifest's order, for validation.

    Raises:
        DataError: There are no samples.
        ValueError: window_shards is below 1.
    """

    def __init__(
        self, *, shard_sizes: Sequence[int], manifest_sha256: str, seed: int, window_shards: int, shuffle: bool = True
    ) -> None:
        if window_shards < 1:
            raise ValueError(f"window_shards is {window_shards}; at least 1 is needed")
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self._sizes.sum())
        if self.num_samples < 1:
            raise DataError(f"the manifest {manifest_sha256} holds no samples in this split; nothing can be ordered")
        self._manifest_sha256 = manifest_sha256
        self._seed = seed
        self._window_shards = window_shards
        self._shuffle = shuffle
        self._stream = f"order/{ORDER_VERSION}/{manifest_sha256}"
        self._epochs: Lru[int, _Epoch] = Lru(_CACHED_EPOCHS)
        self._windows: Lru[tuple[int, int], _Window] = Lru(_CACHED_WINDOWS)

    def __len__(self) -> int:
        return self.num_samples

    def sample_at(self, position: int) -> Place:
        """The sample at a global position, counted from 0 over all epochs.

        Raises:
            IndexError: position is negative.
        """
        if position < 0:
            raise IndexError(f"position {position}: the order starts at 0")
        epoch, number = self.window_at(position)
        plan = self._epochs.get(epoch, lambda: self._plan_epoch(epoch))
        window = self._windows.get((epoch, number), lambda: self._plan_window(plan, epoch, number))
        place = position - epoch * self.num_samples - int(plan.window_starts[number])
        return Place(epoch, int(window.shards[place]), int(window.samples[place]))

    def window_at(self, position: int) -> tuple[int, int]:
        """Epoch and number of the window that a position is in."""
        epoch, offset = divmod(position, self.num_samples)
        plan = self._epochs.get(epoch, lambda: self._plan_epoch(epoch))
        return epoch, int(plan.window_starts.searchsorted(offset, side="right")) - 1

    def shards_ahead(self, position: int) -> list[int]:
        """The shards of a position's window and of the one after it, in the order in which they are needed."""
        epoch, number = self.window_at(position)
        plan = self._epochs.get(epoch, lambda: self._plan_epoch(epoch))
        first = number * self._window_shards
        ahead = plan.shards[first : first + 2 * self._window_shards]
        if number + 1 >= len(plan.window_starts):
            following = self._epochs.get(epoch + 1, lambda: self._plan_epoch(epoch + 1))
            ahead = np.concatenate([ahead, following.shards[: self._window_shards]])
        return list(dict.fromkeys(ahead.tolist()))

    def positions_of(self, places: Iterable[tuple[int, int]], end: int) -> dict[tuple[int, int], list[int]]:
        """The inverse of `sample_at`: every position below `end` at which a sample stands.

        Args:
            places: (shard, sample) of each wanted sample.
            end: The position after the last one that counts.

        Returns:
            Ascending positions by (shard, sample).
        """
        by_shard: dict[int, list[int]] = {}
        for shard, sample in places:
            by_shard.setdefault(shard, []).append(sample)
        found = {(shard, sample): [] for shard, samples in by_shard.items() for sample in samples}
        for epoch in range(-(-end // self.num_samples)):
            plan = self._epochs.get(epoch, lambda epoch=epoch: self._plan_epoch(epoch))
            turn = np.argsort(plan.shards)  # (num_shards,) when each shard has its turn
            for shard in sorted(by_shard, key=lambda shard: turn[shard]):
                number = int(turn[shard]) // self._window_shards
                at = (plan, epoch, number)
                window = self._windows.get((epoch, number), lambda at=at: self._plan_window(*at))
                first = epoch * self.num_samples + int(plan.window_starts[number])
                mine = np.flatnonzero(window.shards == shard)
                where = mine[np.argsort(window.samples[mine])]  # (shard samples,) by sample
                for sample in by_shard[shard]:
                    found[shard, sample].append(first + int(where[sample]))
        return {place: [position for position in positions if position < end] for place, positions in found.items()}

    def _plan_epoch(self, epoch: int) -> _Epoch:
        shards = np.arange(len(self._sizes), dtype=np.int64)
        if self._shuffle:
            shards = permutation(self._seed, f"{self._stream}/shards", epoch, n=len(self._sizes))
        ends = self._sizes[shards].cumsum()
        starts = np.concatenate([[0], ends])[: len(shards) : self._window_shards]
        return _Epoch(shards, starts)

    def _plan_window(self, plan: _Epoch, epoch: int, number: int) -> _Window:
        chosen = plan.shards[number * self._window_shards : (number + 1) * self._window_shards]
        sizes = self._sizes[chosen]
        shards = np.repeat(chosen, sizes)
        samples = np.arange(sizes.sum(), dtype=np.int64) - np.repeat(sizes.cumsum() - sizes, sizes)
        if not self._shuffle:
            return _Window(shards, samples)
        order = permutation(self._seed, f"{self._stream}/samples", epoch, number, n=len(samples))
        return _Window(shards[order], samples[order])

    def state(self, samples_seen: int) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run can tell that its order is still this one."""
        return {
            "manifest_sha256": self._manifest_sha256,
            "seed": self._seed,
            "window_shards": self._window_shards,
            "shuffle": self._shuffle,
            "order_version": ORDER_VERSION,
            "epoch": samples_seen // self.num_samples,
            "samples_seen": samples_seen,
        }

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The samples that were seen, if the checkpoint's order is this one.

        Raises:
            DataError: Names each fact that differs: going on would repeat some samples and skip others.
        """
        seen = int(state["samples_seen"])
        mine = self.state(seen)
        lines = [
            f"  {name}: the checkpoint has {state.get(name)!r}, this run {mine[name]!r}"
            for name in mine
            if state.get(name) != mine[name]
        ]
        if lines:
            raise DataError(
                "\n".join(["the checkpoint was made with another order of samples:", *lines])
                + "\nResume with the same manifest, seed, data.window_shards and version, or start a new run."
            )
        return seen


class _BucketEpoch(NamedTuple):
    buckets: np.ndarray[Any, np.dtype[np.int64]]  # (num_batches,) the bucket of every batch, in order
    numbers: np.ndarray[Any, np.dtype[np.int64]]  # (num_batches,) which batch of its bucket it is, over all epochs


class _Batch(NamedTuple):
    bucket: int
    first: int  # position of its first sample in the bucket's own order
    windows: tuple[tuple[int, int], ...]  # of every bucket's order, where its next batch begins


class BucketedOrder:
    """The order of samples of several sizes: every global batch is of one bucket, so all ranks see one shape a step.

    Each bucket has an `Order` of its own that runs on over its epochs, and gives its samples in whole batches: by the
    end of epoch e a bucket of N samples has given floor((e + 1) * N / B) of them. What is left, fewer than B samples,
    begins its first batch of the next epoch: nothing is dropped, and every sample comes once in each of its bucket's
    epochs. The batches of an epoch are permuted over the buckets. All of it is a function of the position alone.

    Args:
        shard_sizes: Samples per shard, in the order of the manifest's split.
        shard_buckets: Bucket of every shard.
        batch_size: B, the global batch; part of the order, unlike in `Order`.
        manifest_sha256: Names the data set.
        seed: The run's seed.
        window_shards: K, how many shards of one bucket are mixed at a time.

    Raises:
        DataError: There are no samples.
        ValueError: window_shards or batch_size is below 1.
    """

    def __init__(
        self,
        *,
        shard_sizes: Sequence[int],
        shard_buckets: Sequence[str | None],
        batch_size: int,
        manifest_sha256: str,
        seed: int,
        window_shards: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
        self.num_samples = sum(shard_sizes)
        if self.num_samples < 1:
            raise DataError(f"the manifest {manifest_sha256} holds no samples in this split; nothing can be ordered")
        self._batch_size = batch_size
        self._seed = seed
        self._stream = f"order/{ORDER_VERSION}/{manifest_sha256}/buckets"
        names = sorted({str(name) for name, size in zip(shard_buckets, shard_sizes, strict=True) if size})
        self._shards = [[place for place, bucket in enumerate(shard_buckets) if str(bucket) == name] for name in names]
        self._orders = [
            Order(
                shard_sizes=[shard_sizes[place] for place in places],
                manifest_sha256=f"{manifest_sha256}/{name}",
                seed=seed,
                window_shards=window_shards,
            )
            for name, places in zip(names, self._shards, strict=True)
        ]
        self._epochs: Lru[int, _BucketEpoch] = Lru(_CACHED_EPOCHS)
        self._batches: Lru[int, _Batch] = Lru(_CACHED_BATCHES)

    def __len__(self) -> int:
        return self.num_samples

    def sample_at(self, position: int) -> Place:
        """The sample at a global position, counted from 0 over all epochs; its epoch is that of its bucket.

        Raises:
            IndexError: position is negative.
        """
        batch, local = self._locate(position)
        place = self._orders[batch.bucket].sample_at(local)
        return Place(place.epoch, self._shards[batch.bucket][place.shard], place.sample)

    def window_at(self, position: int) -> tuple[object, ...]:
        """Names the windows that all buckets are in; it changes when one of them goes on to its next one."""
        batch, local = self._locate(position)
        return (*batch.windows, batch.bucket, self._orders[batch.bucket].window_at(local))

    def shards_ahead(self, position: int) -> list[int]:
        """The shards of every bucket's window and of the one after it, those of the position's own bucket first."""
        batch, local = self._locate(position)
        ahead = [self._shards[batch.bucket][shard] for shard in self._orders[batch.bucket].shards_ahead(local)]
        given = self._given(position // self._batch_size)
        for bucket, order in enumerate(self._orders):
            if bucket != batch.bucket:
                shards = order.shards_ahead(given[bucket] * self._batch_size)
                ahead += [self._shards[bucket][shard] for shard in shards]
        return ahead

    def positions_of(self, places: Iterable[tuple[int, int]], end: int) -> dict[tuple[int, int], list[int]]:
        """As `Order.positions_of`."""
        found: dict[tuple[int, int], list[int]] = {place: [] for place in places}
        for bucket, (order, shards) in enumerate(zip(self._orders, self._shards, strict=True)):
            own = {shard: number for number, shard in enumerate(shards)}
            wanted = {(own[shard], sample): (shard, sample) for shard, sample in found if shard in own}
            batches = self._batches_of(bucket, -(-end // self._batch_size))  # (given,) their places among all batches
            for place, local in order.positions_of(wanted, len(batches) * self._batch_size).items():
                rows = [divmod(position, self._batch_size) for position in local]
                positions = [int(batches[batch]) * self._batch_size + row for batch, row in rows]
                found[wanted[place]] = [position for position in positions if position < end]
        return found

    def _batches_of(self, bucket: int, end: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Numbers below `end` of the batches that are of one bucket, in order."""
        parts = [np.empty(0, np.int64)]
        first = epoch = 0
        while first < end:
            plan = self._epochs.get(epoch, lambda epoch=epoch: self._plan_epoch(epoch))
            parts.append(first + np.flatnonzero(plan.buckets[: end - first] == bucket))
            first, epoch = first + len(plan.buckets), epoch + 1
        return np.concatenate(parts)

    def _locate(self, position: int) -> tuple[_Batch, int]:
        """The batch that a position is in, and the position in its bucket's own order."""
        if position < 0:
            raise IndexError(f"position {position}: the order starts at 0")
        number, offset = divmod(position, self._batch_size)
        batch = self._batches.get(number, lambda: self._plan_batch(number))
        return batch, batch.first + offset

    def _plan_batch(self, number: int) -> _Batch:
        epoch = self._epoch_of(number)
        plan = self._epochs.get(epoch, lambda: self._plan_epoch(epoch))
        place = number - sum(self._batches_before(epoch))
        given = self._given(number)
        windows = tuple(
            order.window_at(count * self._batch_size) for order, count in zip(self._orders, given, strict=True)
        )
        return _Batch(int(plan.buckets[place]), int(plan.numbers[place]) * self._batch_size, windows)

    def _given(self, number: int) -> list[int]:
        """Batches that every bucket has given before the batch of this number."""
        epoch = self._epoch_of(number)
        plan = self._epochs.get(epoch, lambda: self._plan_epoch(epoch))
        before = self._batches_before(epoch)
        counts = np.bincount(plan.buckets[: number - sum(before)], minlength=len(before))
        return [earlier + int(count) for earlier, count in zip(before, counts, strict=True)]

    def _batches_before(self, epoch: int) -> list[int]:
        """Batches that every bucket has given by the start of an epoch."""
        return [epoch * order.num_samples // self._batch_size for order in self._orders]

    def _epoch_of(self, number: int) -> int:
        """The epoch that a batch belongs to: the first one by whose end enough batches were given."""
        epoch = number * self._batch_size // self.num_samples
        while sum(self._batches_before(epoch + 1)) <= number:
            epoch += 1
        return epoch

    def _plan_epoch(self, epoch: int) -> _BucketEpoch:
        before, after = self._batches_before(epoch), self._batches_before(epoch + 1)
        counts = np.subtract(after, before)
        batches = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        numbers = np.concatenate(
            [np.arange(start, end, dtype=np.int64) for start, end in zip(before, after, strict=True)]
        )
        mixed = batches[permutation(self._seed, self._stream, epoch, n=len(batches))]
        in_order = np.empty_like(numbers)
        in_order[np.argsort(mixed, kind="stable")] = numbers  # each bucket's batches keep their own order
        return _BucketEpoch(mixed, in_order)


def order_of(
    manifest: Manifest,
    split: str,
    *,
    seed: int,
    window_shards: int,
    shuffle: bool = True,
    batch_size: int | None = None,
) -> Order | BucketedOrder:
    """The order of a split of a manifest.

    Args:
        batch_size: The global batch; needed where samples of several buckets are shuffled.

    Raises:
        ValueError: Several buckets and no batch_size.
    """
    shards = manifest.split(split)
    sizes = [shard.num_samples for shard in shards]
    if not shuffle or len(manifest.buckets(split)) == 1:
        return Order(
            shard_sizes=sizes,
            manifest_sha256=manifest.sha256,
            seed=seed,
            window_shards=window_shards,
            shuffle=shuffle,
        )
    if batch_size is None:
        raise ValueError(f"split {split!r} has several buckets: their order needs the batch_size")
    return BucketedOrder(
        shard_sizes=sizes,
        shard_buckets=[shard.bucket for shard in shards],
        batch_size=batch_size,
        manifest_sha256=manifest.sha256,
        seed=seed,
        window_shards=window_shards,
    )


def rank_slice(
    *, step: int, batch_size: int, world_size: int, rank: int, grad_accum_steps: int, micro_step: int
) -> range:
    """The global positions of one micro-batch of one rank: a contiguous part of the step's global batch.

    Args:
        step: Optimiser steps taken before this one, from 0.
        batch_size: Global: micro-batch x accumulation x ranks.

    Raises:
        ValueError: batch_size does not divide into ranks and micro-batches, or rank or micro_step is outside.
    """
    parts = world_size * grad_accum_steps
    if parts < 1 or batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} does not divide into {world_size} ranks x {grad_accum_steps} accumulation steps"
        )
    if not (0 <= rank < world_size and 0 <= micro_step < grad_accum_steps and step >= 0):
        raise ValueError(
            f"step {step}, rank {rank}, micro_step {micro_step}: outside of "
            f"{world_size} ranks x {grad_accum_steps} accumulation steps"
        )
    size = batch_size // parts
    first = step * batch_size + (rank * grad_accum_steps + micro_step) * size
    return range(first, first + size)
