"""Digests that follow file changes, and commits whose last row counts."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from data_pipeline import ledger as ledger_module
from data_pipeline.ledger import Commit, DigestCache, Ledger, sha256_file, sha256_json

COMMIT = Commit("00000", {"a": "1"}, {"x": 1}, "1", {"00000.txt": "2"}, {"rows": 3}, 0.5)


def test_digests_are_those_of_hashlib(tmp_path):
    path = tmp_path / "big"
    content = os.urandom((1 << 20) + 17)
    path.write_bytes(content)
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()
    assert sha256_json({"b": 1, "a": "é"}) == hashlib.sha256('{"a":"é","b":1}'.encode()).hexdigest()


def test_an_unchanged_file_is_read_once_even_across_processes(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("one")
    first = DigestCache(tmp_path / "digests.jsonl").sha256(path)
    cache = DigestCache(tmp_path / "digests.jsonl")
    monkeypatch.setattr(ledger_module, "sha256_file", lambda path: "read again")
    assert cache.sha256(path) == first
    path.write_text("three")
    assert cache.sha256(path) == "read again"


def test_a_file_is_known_by_whatever_way_to_its_folder(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "folder/file").write_text("one")
    cache = DigestCache(tmp_path / "digests.jsonl")
    first = cache.sha256(tmp_path / "folder/file")
    monkeypatch.setattr(ledger_module, "sha256_file", lambda path: "read again")
    monkeypatch.chdir(tmp_path / "folder")
    assert {cache.sha256(path) for path in (tmp_path / "link/file", Path("file"), Path("../folder/file"))} == {first}


def test_a_same_size_change_is_seen_by_its_time(tmp_path):
    path, cache = tmp_path / "file", DigestCache(tmp_path / "digests.jsonl")
    path.write_text("one")
    before = cache.sha256(path)
    path.write_text("two")
    os.utime(path, ns=(1, 1))
    assert cache.sha256(path) != before


def test_the_last_row_of_a_unit_counts(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(COMMIT)
    ledger.add(replace(COMMIT, version="2"))
    ledger.add(replace(COMMIT, unit="00001"))
    ledger.remove("00001")
    read = Ledger(tmp_path)
    assert read.commits() == {"00000": replace(COMMIT, version="2")}
    assert read.get("00001") is None


def test_commits_come_in_the_order_of_their_numbers_beyond_five_digits(tmp_path):
    ledger = Ledger(tmp_path)
    for unit in ("100000", "99999", "00001"):
        ledger.add(replace(COMMIT, unit=unit))
    assert list(Ledger(tmp_path).commits()) == ["00001", "99999", "100000"]


def test_rows_of_another_layout_are_left_out(tmp_path):
    (tmp_path / "ledger.jsonl").write_text('{"unit": "00000", "sha": "x"}\n[1]\n{"torn": \n')
    assert Ledger(tmp_path).commits() == {}
