"""Units and their files by number: more of them than five digits can name."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.stage import Unit, numbered_files, one_to_one, unit_name
from sdtrain.errors import DataError

COUNT = 100_001


def test_a_hundred_thousand_and_one_shards_keep_their_order(tmp_path: Path) -> None:
    names = [Unit(index, ()).name for index in range(COUNT)]
    assert (names[0], names[99_999], names[100_000]) == ("00000", "99999", "100000") and len(set(names)) == COUNT
    for name in names:
        (tmp_path / f"{name}.tar").touch()
    files = numbered_files(tmp_path, ".tar")
    assert [path.name for path in files] == [f"{name}.tar" for name in names]
    units = one_to_one(tmp_path, ".tar")
    assert [unit.index for unit in units] == list(range(COUNT))
    assert [unit.inputs for unit in units[-2:]] == [(path,) for path in files[-2:]]


def test_only_whole_numbers_before_the_suffix_count(tmp_path: Path) -> None:
    for name in ("00002.tar", "00001.tar", "00001.tar.index.json", "x1.tar", ".tar", "00003.tar.tmp", unit_name(10**6)):
        (tmp_path / name).touch()
    assert [path.name for path in numbered_files(tmp_path, ".tar")] == ["00001.tar", "00002.tar"]
    assert [path.name for path in numbered_files(tmp_path, ".tar.index.json")] == ["00001.tar.index.json"]
    assert numbered_files(tmp_path / "missing", ".tar") == []
    with pytest.raises(DataError, match=r"missing holds no numbered \.tar file; run the stage that writes it first"):
        one_to_one(tmp_path / "missing", ".tar")
