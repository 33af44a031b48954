"""Decoded samples that stay in memory, for data sets that fit there."""

from __future__ import annotations

from typing import Any

import numpy as np

Fields = dict[str, np.ndarray[Any, np.dtype[Any]]]

_OVERHEAD_BYTES = 512  # of Python's objects around one sample's arrays


class RamCache:
    """Keeps samples as they are read until its bytes are used up; one that is in it never leaves.

    An epoch reads every sample once, so whoever replaces throws away what comes sooner than what it keeps: with room
    for a part p of the data, p of all reads are answered from here, and with the least recently used one leaving it
    would be less.

    Attributes:
        used_bytes: Of all samples in it, with what Python needs around them.
        hits: Reads that were answered.
        misses: Reads that were not.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._samples: dict[tuple[int, int, bool], tuple[str, Fields]] = {}
        self.used_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, shard: int, sample: int, is_flipped: bool) -> tuple[str, Fields] | None:
        """Key and fields of a sample, or None; the mirrored picture is another sample."""
        found = self._samples.get((shard, sample, is_flipped))
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def put(self, shard: int, sample: int, is_flipped: bool, key: str, fields: Fields) -> None:
        """Keep a sample, if there is room; its arrays must not be changed afterwards."""
        size = sum(array.nbytes for array in fields.values()) + _OVERHEAD_BYTES
        if self.used_bytes + size <= self._capacity_bytes:
            self._samples[shard, sample, is_flipped] = (key, dict(fields))
            self.used_bytes += size
