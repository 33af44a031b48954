"""The data set of a run: global position -> sample, without any state that training depends on."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from sdtrain.data.lru import Lru
from sdtrain.data.manifest import FLIPPED, Manifest
from sdtrain.data.plan import BucketedOrder, Order
from sdtrain.data.prefetch import Prefetcher
from sdtrain.data.ram_cache import RamCache
from sdtrain.data.randomness import normals, uniforms
from sdtrain.data.shard import ChecksumError, ShardReader, ShardUnavailableError
from sdtrain.errors import DataError
from sdtrain.records import DrawSpec, Tombstone

FIELD_TYPES: Mapping[str, type[np.generic]] = {
    "moments": np.float16,
    "tokens": np.int64,
    "pixels": np.uint8,
    "attributes": np.int8,
}
"""What a field of a batch is made of, by its name in the batch."""

FLIP_DRAW = "flip"
"""Random stream that says which of the two a sample is read from."""

MAX_OPEN_SHARDS = 64
READ_RETRIES = 6

_HALF_EXPONENT = 0x7C00  # all ones: infinite or NaN
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 10.0


def retry_waits(retries: int) -> list[float]:
    """Seconds before each new look at a shard that is away: 0.1, 0.2, 0.4 ... and never more than 10.

    The same in every process: nobody queues at a file server that is back, because reads are spread anyway.
    """
    return [min(_FIRST_WAIT_SECONDS * 2.0**attempt, _LONGEST_WAIT_SECONDS) for attempt in range(retries)]


@dataclass(slots=True)
class Sample:
    """One sample: what was read and what was drawn for its position.

    Attributes:
        key: Sample key; for an unreadable shard its path and the place in it.
        position: Global position in the order of the run.
        fields: Name in the batch -> array; zeros for a tombstone.
        normals: Name -> float32 standard normal draw.
        uniforms: Name -> draw in [0, 1).
        is_flipped: Whether the fields of the mirrored picture are read, where the shards hold them.
        weight: 1, or 0 for a tombstone.
        error: Why the sample is a tombstone; None for a sample that was read or was taken down.
    """

    key: str
    position: int
    fields: dict[str, np.ndarray[Any, np.dtype[Any]]]
    normals: dict[str, np.ndarray[Any, np.dtype[np.float32]]]
    uniforms: dict[str, float]
    is_flipped: bool = False
    weight: float = 1.0
    error: Tombstone | None = None


@dataclass(slots=True)
class _Process:
    """What belongs to one process alone: a forked worker opens files and starts threads of its own.

    Attributes:
        pid: Of the process that made it.
        readers: Open shards.
        memory: Samples that are kept, where they are.
        away: Shards that were waited for in vain.
        window: The window of the order that was read last.
        prefetcher: Brings the shards of the next window; None until it is needed.
    """

    pid: int
    readers: Lru[int, ShardReader]
    memory: RamCache
    away: set[int] = field(default_factory=set)
    window: object = None
    prefetcher: Prefetcher | None = None


class ShardDataset(Dataset[Sample]):
    """Reads the sample at a global position and draws what its task asked for.

    Everything is a pure function of the position: any number of ranks and workers sees the same samples with the same
    draws. Shards are opened when first read, in the process that reads them. A shard that is away (a blinking file
    server, a stale handle, a copy that is not complete yet) is opened anew and waited for, for a bounded time; once
    that was in vain it is only looked at, one time a sample, until it is back. A sample that cannot be read becomes a
    tombstone (zeros, weight 0) and never moves another one; keys on the take-down list become tombstones as well, but
    are no errors. Shards of object storage are read from the node's cache, a window ahead of what is needed. Where the
    split's shards hold a field of the mirrored pictures too, every other sample by its own draw is read from that one.

    Args:
        manifest: The manifest; its take-down list is read once, here.
        split: Split of the manifest.
        fields: Name in the batch (`moments`, `tokens`, `pixels`, `attributes`) -> name in the shards
            (`moments.npy`, `tokens.npy`, `jpg`, `attributes.npy`).
        order: The order of this split, see `plan.order_of`.
        seed: Seed of the draws.
        draws: What is drawn per sample, in the sample's own size; each draw's name is its random stream.
        max_open_shards: Files that one process keeps open; at least the order's window, or windows thrash.
        read_retries: Looks at a shard that is away before its sample is given up, see `retry_waits`.
        ram_cache_bytes: Decoded samples that each process keeps in memory.

    Raises:
        DataError: The split lacks a field or its shape, only some of its shards hold mirrored pictures, or the order is
            of another number of samples.
        ValueError: An unknown name in `fields`, or two draws of one name.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        split: str,
        fields: Mapping[str, str],
        order: Order | BucketedOrder,
        seed: int,
        draws: DrawSpec,
        max_open_shards: int = MAX_OPEN_SHARDS,
        read_retries: int = READ_RETRIES,
        ram_cache_bytes: int = 0,
    ) -> None:
        self.manifest = manifest
        self.split = split
        self.order = order
        self._shards = self.manifest.split(split)
        self._fields = dict(fields)
        self._shapes = {
            bucket: _field_shapes(manifest, split, bucket, self._fields) for bucket in manifest.buckets(split)
        }
        self._flipped = _flipped_fields(manifest, split, self._fields)
        self._seed = seed
        self._draws = draws
        self._draw_shapes = {bucket: draws.shapes_for(shapes) for bucket, shapes in self._shapes.items()}
        self._taken_down = manifest.takedown.keys
        self._max_open_shards = max_open_shards
        self._waits = retry_waits(read_retries)
        self._ram_cache_bytes = ram_cache_bytes
        self._process: _Process | None = None
        _check_draws(draws, [FLIP_DRAW] if self._flipped else [])
        if self.manifest.num_samples(split) != order.num_samples:
            raise DataError(
                f"{manifest.path}: split {split!r} has {self.manifest.num_samples(split)} samples, "
                f"the order was made for {order.num_samples}; make it with plan.order_of"
            )

    def __len__(self) -> int:
        """Samples of one epoch; positions run on beyond it."""
        return self.order.num_samples

    def __getitem__(self, position: int) -> Sample:
        place = self.order.sample_at(position)
        shapes = self._draw_shapes[self._shards[place.shard].bucket]
        sample = Sample(
            key="",
            position=position,
            fields={},
            normals={name: normals(self._seed, name, position, shape) for name, shape in shapes.items()},
            uniforms={name: float(uniforms(self._seed, name, position)[0]) for name in self._draws.uniforms},
            is_flipped=bool(self._flipped) and float(uniforms(self._seed, FLIP_DRAW, position)[0]) < 0.5,
        )
        self._look_ahead(position)
        try:
            self._read_patiently(sample, place.shard, place.sample)
        except DataError as error:
            sample.error = Tombstone(sample.key, self._shards[place.shard].path, str(error))
            self._bury(sample, place.shard)
        return sample

    def bucket_at(self, position: int) -> str | None:
        """The bucket of the sample at a global position: samples of one bucket stack."""
        return self._shards[self.order.sample_at(position).shard].bucket

    def _look_ahead(self, position: int) -> None:
        """At the first sample of a window, ask for the shards of this window and of the next one."""
        if self.manifest.cache is None:
            return
        mine, window = self._mine(), self.order.window_at(position)
        if mine.window == window:
            return
        mine.window = window
        if mine.prefetcher is None:
            manifest, shards = self.manifest, self._shards
            mine.prefetcher = Prefetcher(lambda shard: manifest.prefetch(shards[shard]))
        mine.prefetcher.want(self.order.shards_ahead(position))

    def _read_patiently(self, sample: Sample, shard: int, place: int) -> None:
        """Read, with more than one look at a shard that is away.

        A shard is opened anew for every look after the first, so what is found depends on the files alone and not on
        what this process met before; only how long it waits does.
        """
        mine = self._mine()
        again = [0.0] if shard in mine.readers else []  # a handle may be stale where the file is well
        waits = [] if shard in mine.away else self._waits
        for wait in (*again, *waits, None):
            try:
                self._read(sample, shard, place)
                mine.away.discard(shard)
                return
            except ShardUnavailableError:
                mine.readers.discard(shard)
                if wait is None:
                    mine.away.add(shard)
                    raise
                time.sleep(wait)

    def _read(self, sample: Sample, shard: int, place: int) -> None:
        mine = self._mine()
        kept = mine.memory.get(shard, place, sample.is_flipped)
        if kept is not None:
            sample.key, sample.fields = kept[0], dict(kept[1])
            return
        sample.key = f"{self._shards[shard].path}#{place}"
        reader = mine.readers.get(shard, lambda: self.manifest.open_shard(self._shards[shard]))
        reader.check()
        sample.key = reader.keys[place]
        if sample.key in self._taken_down:
            self._bury(sample, shard)
            return
        for name, stored in (self._fields | self._flipped if sample.is_flipped else self._fields).items():
            sample.fields[name] = self._decode(reader, shard, place, name, stored)
        mine.memory.put(shard, place, sample.is_flipped, sample.key, sample.fields)

    def _decode(
        self, reader: ShardReader, shard: int, place: int, name: str, stored: str
    ) -> np.ndarray[Any, np.dtype[Any]]:
        try:
            value = reader.decode(place, stored)
        except ChecksumError as error:
            if self.manifest.drop_copy(self._shards[shard]):
                raise ShardUnavailableError(f"{error}; this node's copy of it was dropped") from error
            raise
        expected = self._shapes[self._shards[shard].bucket][name]
        if not isinstance(value, np.ndarray) or value.shape != expected:
            found = getattr(value, "shape", type(value).__name__)
            raise DataError(f"{reader.path}: field {stored!r} is {found}, the manifest says {expected}")
        try:
            return _as_field(value, FIELD_TYPES[name])
        except ValueError as error:
            raise DataError(f"{reader.path}: field {stored!r} {error}") from error

    def _bury(self, sample: Sample, shard: int) -> None:
        shapes = self._shapes[self._shards[shard].bucket]
        sample.fields = {name: np.zeros(shape, FIELD_TYPES[name]) for name, shape in shapes.items()}
        sample.weight = 0.0

    def _mine(self) -> _Process:
        if self._process is None or self._process.pid != os.getpid():
            readers: Lru[int, ShardReader] = Lru(self._max_open_shards, on_drop=ShardReader.close)
            self._process = _Process(os.getpid(), readers, RamCache(self._ram_cache_bytes))
        return self._process

    def close(self) -> None:
        """Close the files that this process opened, and end its thread."""
        if self._process is not None and self._process.pid == os.getpid():
            if self._process.prefetcher is not None:
                self._process.prefetcher.close()
            self._process.readers.clear()
        self._process = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": None}


def _as_field(value: np.ndarray[Any, np.dtype[Any]], wanted: type[np.generic]) -> np.ndarray[Any, np.dtype[np.generic]]:
    """The array in the type of its field.

    Raises:
        ValueError: Another kind of numbers, or numbers that are not finite: one would make the whole step's loss NaN.
    """
    cast = value if value.dtype == wanted else _cast(value, wanted)
    if np.issubdtype(wanted, np.floating) and not _is_finite(cast):
        raise ValueError(f"holds {int((~np.isfinite(cast)).sum())} of {cast.size} values that are not finite")
    return cast


def _cast(value: np.ndarray[Any, np.dtype[Any]], wanted: type[np.generic]) -> np.ndarray[Any, np.dtype[np.generic]]:
    if not np.can_cast(value.dtype, wanted, casting="same_kind"):
        raise ValueError(f"holds {value.dtype}, {np.dtype(wanted)} is needed")
    with np.errstate(over="ignore"):  # a number beyond float16 is infinite then, and refused by whoever asked
        return value.astype(wanted)


def _is_finite(values: np.ndarray[Any, np.dtype[Any]]) -> bool:
    """Whether no number is infinite or NaN; of halves by their exponents, ten times as quick as `numpy.isfinite`."""
    if values.dtype != np.float16 or not values.size:
        return bool(np.isfinite(values).all())
    return int((values.view(np.uint16) & _HALF_EXPONENT).max()) < _HALF_EXPONENT


def _field_shapes(
    manifest: Manifest, split: str, bucket: str | None, fields: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    unknown = sorted(set(fields) - set(FIELD_TYPES))
    if unknown:
        raise ValueError(f"batch fields {unknown} are unknown; known are {sorted(FIELD_TYPES)}")
    known, shapes = manifest.shapes_in(bucket), {}
    for name, stored in fields.items():
        _check_present(manifest, split, bucket, stored)
        if stored not in known:
            of_bucket = "" if bucket is None else f" of bucket {bucket!r}"
            raise DataError(
                f"{manifest.path}: no shape of field {stored!r}{of_bucket} in field_shapes, which has "
                f"{sorted(known)}; samples without one shape cannot be stacked"
            )
        shapes[name] = known[stored]
    return shapes


def _check_present(manifest: Manifest, split: str, bucket: str | None, stored: str) -> None:
    for shard in manifest.split(split):
        if shard.bucket == bucket and shard.num_samples and stored not in shard.fields:
            raise DataError(f"{manifest.path}: shard {shard.path} has no field {stored!r}; it has {list(shard.fields)}")


def _flipped_fields(manifest: Manifest, split: str, fields: Mapping[str, str]) -> dict[str, str]:
    """Name in the batch -> stored field of the mirrored picture, for those that the split's shards hold."""
    pairs = {name: FLIPPED[stored] for name, stored in fields.items() if stored in FLIPPED}
    held = {name for shard in manifest.split(split) for name in shard.fields if shard.num_samples}
    flipped = {name: stored for name, stored in pairs.items() if stored in held}
    for stored in flipped.values():
        for bucket in manifest.buckets(split):
            _check_present(manifest, split, bucket, stored)
    return flipped


def _check_draws(draws: DrawSpec, own: list[str]) -> None:
    names = [*draws.normals, *draws.uniforms, *own]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"draws {twice} are named twice; equal names would be equal random numbers")
