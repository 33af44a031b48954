"""Work ahead of the loop: a thread that brings the next shards while the present ones are read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from sdtrain.errors import SdtrainError


class Prefetcher:
    """Fetches items one after the other in a thread of its own, newest wishes first.

    What fails here is left to the reader, who needs it and says so.

    Args:
        fetch: Called with one wanted item at a time.
    """

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch = fetch
        self._wanted: deque[int] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="prefetch-shards")
        self._thread.start()

    def want(self, items: Sequence[int]) -> None:
        """Fetch these, in this order, instead of what was wanted before."""
        with self._changed:
            self._wanted = deque(items)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the item that is being fetched."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted)
                if self._closed:
                    return
                item = self._wanted.popleft()
            with suppress(SdtrainError):
                self._fetch(item)
