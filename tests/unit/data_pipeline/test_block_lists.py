"""Block lists as text files."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.block_lists import read_blocked_bytes, read_blocked_urls
from data_pipeline.transport_policy import url_sha256
from sdtrain.errors import DataError

URL = "http://images.example/1.jpg"


def test_urls_stand_as_they_are_or_by_their_digest(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text(f"{URL}\n\n  http://b.example/ \n")
    second.write_text("AB" * 32 + "\n")
    found = read_blocked_urls([first, second])
    assert found == {url_sha256(URL), url_sha256("http://b.example/"), "ab" * 32}


def test_bytes_stand_by_sha256_or_md5(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("AB" * 32 + "\n" + "cd" * 16 + "\n")
    assert read_blocked_bytes([tmp_path / "list.txt"]) == {"ab" * 32, "cd" * 16}


def test_a_line_that_is_no_digest_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("ab" * 32 + f"\n\n{URL}\n")
    with pytest.raises(DataError) as caught:
        read_blocked_bytes([tmp_path / "list.txt"])
    assert str(caught.value) == (
        f"download.blocked_bytes: {tmp_path / 'list.txt'}, line 3: '{URL}' is neither a sha256 (64 hexadecimal digits) "
        "nor an md5 (32); correct or remove the line"
    )


def test_a_list_that_cannot_be_read_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"download.blocked_urls: .*gone.txt: cannot be read as text \(.*No such file"):
        read_blocked_urls([tmp_path / "gone.txt"])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(
        DataError, match=r"download.blocked_bytes: .*binary: cannot be read as text .*; give a text file"
    ):
        read_blocked_bytes([tmp_path / "binary"])


def test_no_list_blocks_nothing() -> None:
    assert read_blocked_urls([]) == read_blocked_bytes([]) == frozenset()
