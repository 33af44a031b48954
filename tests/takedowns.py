"""Entries of take-down lists, for tests of what honours them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdtrain.data.takedown import Entry, Takedown, append_entry


def entry(*keys: str, **changes: Any) -> Entry:
    facts: dict[str, Any] = {
        "date": "2026-11-21T12:00:00Z",
        "reason": "asked for by mail",
        "list_name": "list.txt",
        "list_sha256": "0" * 64,
        "requests": keys,
        "keys": keys,
        "manifests": {"manifest.json": {"sha256": "1" * 64, "masked": len(keys)}},
    }
    return Entry(**facts | changes)


def take_down(manifest: Path | str, *keys: str, **changes: Any) -> Takedown:
    """Mask keys beside a manifest, as `sdtrain-data takedown` does."""
    return append_entry(Path(manifest), entry(*keys, **changes))
