"""A small bounded cache that survives pickling and can close what it drops."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Lru(Generic[Key, Value]):
    """The most recently used values, at most `capacity` of them.

    Args:
        capacity: How many values are kept, at least 1.
        on_drop: Called with every value that leaves the cache, for example to close a file.
    """

    def __init__(self, capacity: int, on_drop: Callable[[Value], None] | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"cache capacity {capacity}: at least 1 is needed")
        self._capacity = capacity
        self._on_drop = on_drop
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The cached value, or a new one from `make`; what `make` raises is not cached."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        while len(self._values) > self._capacity:
            self._drop(self._values.popitem(last=False)[1])
        return value

    def __contains__(self, key: Key) -> bool:
        """Whether a value is cached; does not count as a use."""
        return key in self._values

    def discard(self, key: Key) -> None:
        """Drop one value, if it is cached."""
        if key in self._values:
            self._drop(self._values.pop(key))

    def clear(self) -> None:
        """Drop everything."""
        while self._values:
            self._drop(self._values.popitem(last=False)[1])

    def _drop(self, value: Value) -> None:
        if self._on_drop is not None:
            self._on_drop(value)
