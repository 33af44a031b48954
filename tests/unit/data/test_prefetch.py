"""Work ahead of the loop: newest wishes first, failures left to the reader, and an end."""

from __future__ import annotations

import threading

from sdtrain.data.prefetch import Prefetcher
from sdtrain.errors import StorageError


def test_items_are_fetched_in_order_and_failures_are_left_to_the_reader() -> None:
    fetched: list[int] = []
    done = threading.Event()

    def fetch(item: int) -> None:
        fetched.append(item)
        if item == 2:
            raise StorageError("no room")
        if item == 3:
            done.set()

    prefetcher = Prefetcher(fetch)
    prefetcher.want([1, 2, 3])
    assert done.wait(5)
    prefetcher.close()
    assert fetched == [1, 2, 3]


def test_new_wishes_replace_old_ones_and_closing_waits_for_one_item() -> None:
    fetched: list[int] = []
    entered, leave = threading.Event(), threading.Event()

    def fetch(item: int) -> None:
        entered.set()
        assert leave.wait(5)
        fetched.append(item)

    prefetcher = Prefetcher(fetch)
    prefetcher.want([1, 2, 3])
    assert entered.wait(5)
    prefetcher.want([7, 8])
    threading.Timer(0.1, leave.set).start()
    prefetcher.close()
    assert fetched == [1]
    assert not prefetcher._thread.is_alive()
