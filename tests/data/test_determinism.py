"""The whole way from metadata to manifest with one, two and four workers: the same files, the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.data.ground import Grounds, in_fresh_process


@pytest.mark.long
def test_one_two_and_four_workers_give_the_same_bytes(tmp_path: Path) -> None:
    in_fresh_process("tests.data.test_determinism", tmp_path, limit_seconds=1200)


def main(folder: Path) -> None:
    ended = {}
    with Grounds(folder).served() as grounds:
        for workers in (1, 2, 4):
            run = grounds.run()
            assert run.finish(f"runner.workers={workers}", f"download.threads={2 * workers}") == 0, run.tail()
            ended[workers] = run.end()
    files = {workers: shards_and_manifests(one.digests) for workers, one in ended.items()}
    assert {"manifest.json", "images.json", "07-encode/00000.tar", "02-filter/funnel.json"} <= files[1].keys()
    assert files[2] == files[1] and files[4] == files[1]
    assert ended[2].committed == ended[1].committed and ended[4].committed == ended[1].committed


def shards_and_manifests(digests: dict[str, str]) -> dict[str, str]:
    """All files but the data card, which repeats the page and so the number of workers."""
    return {name: digest for name, digest in digests.items() if not name.startswith("data_card.")}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
