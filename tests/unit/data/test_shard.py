"""Shards: the webdataset library reads what we write, and nothing foreign gets past the scan."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sdtrain.data import shard as shard_module
from sdtrain.data.shard import (
    ABSENT,
    ChecksumError,
    ShardReader,
    ShardUnavailableError,
    ShardWriter,
    build_index,
    index_path,
    read_index,
    scan_tar,
    survey_tar,
)
from sdtrain.errors import DataError


def moments(number: int) -> np.ndarray:
    return np.full((8, 4, 4), number, dtype=np.float16)


def write_shard(path: Path, count: int = 5) -> Path:
    with ShardWriter(path) as writer:
        for number in range(count):
            caption = f"caption {number} ü"
            fields = {"txt": caption, "moments.npy": moments(number), "json": {"n": number, "a": [caption]}}
            writer.write(f"{number:05d}", fields)
    return path


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w", format: int = tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=format) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name: str, data: bytes = b"x", **facts: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for fact, value in facts.items():
        setattr(info, fact, value)
    return info, data


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the library's own
def test_the_webdataset_library_reads_our_shards(tmp_path: Path):
    import webdataset

    path = write_shard(tmp_path / "00000.tar")
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:05d}" for number in range(5)]
    assert samples[3]["txt"].decode() == "caption 3 ü"
    assert json.loads(samples[3]["json"]) == {"n": 3, "a": ["caption 3 ü"]}
    np.testing.assert_array_equal(np.load(io.BytesIO(samples[3]["moments.npy"]), allow_pickle=False), moments(3))


def test_our_reader_reads_them_by_offset(tmp_path: Path):
    path = write_shard(tmp_path / "00000.tar")
    with ShardReader(path) as reader:
        assert reader.keys == [f"{number:05d}" for number in range(5)]
        assert reader.fields == ["json", "moments.npy", "txt"]
        assert len(reader) == 5
        for number in (4, 0, 2):
            np.testing.assert_array_equal(reader.decode(number, "moments.npy"), moments(number))
            assert reader.decode(number, "txt") == f"caption {number} ü"
            assert reader.decode(number, "json")["n"] == number


def test_our_reader_reads_tars_of_the_webdataset_library(tmp_path: Path):
    from webdataset.writer import TarWriter

    path = tmp_path / "foreign.tar"
    writer = TarWriter(str(path))
    writer.write({"__key__": "a/b", "txt": "one", "left.right.npy": np.arange(3)})
    writer.write({"__key__": "a/c", "txt": "two"})
    writer.close()
    build_index(path)
    with ShardReader(path) as reader:
        assert reader.keys == ["a/b", "a/c"]
        assert reader.decode(0, "left.right.npy").tolist() == [0, 1, 2]
        assert reader.index.fields["left.right.npy"].size[1] == ABSENT
        with pytest.raises(DataError, match=r"foreign.tar: sample 'a/c' has no field 'left.right.npy'; it has \['left"):
            reader.read(1, "left.right.npy")


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = write_shard(tmp_path / "a.tar")
    monkeypatch.setattr("time.time", lambda: 1e9)
    second = write_shard(tmp_path / "deeper" / "b.tar")
    assert first.read_bytes() == second.read_bytes()
    assert index_path(first).read_bytes() == index_path(second).read_bytes()
    golden = hashlib.sha256(first.read_bytes()).hexdigest()
    assert golden == read_index(first).sha256
    assert golden == "becea324b42ece4fa8ed2665a01402b11834329e5162448fc4bac86d0806ba73"


def test_a_rebuilt_index_is_the_written_one(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar")
    written = index_path(path).read_bytes()
    index_path(path).unlink()
    build_index(path)
    assert index_path(path).read_bytes() == written


def test_a_failed_writer_leaves_no_trace(tmp_path: Path):
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("a", {"txt": "x"})
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_leaves_no_trace_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("a", {"txt": "x"})
        monkeypatch.setattr(os, "fsync", full)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_appears_only_with_its_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def crash(*_: object) -> None:
        assert not (tmp_path / "a.tar").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_module, "write_atomically", crash)
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("a", {"txt": "x"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "a.b", "/a", "a//b", "../a", "a b", "a/", "ü", "a\n"])
def test_keys_that_tar_or_webdataset_would_misread_are_refused(tmp_path: Path, key: str):
    with ShardWriter(tmp_path / "a.tar") as writer, pytest.raises(DataError, match=r"is not allowed; use letters, dig"):
        writer.write(key, {"txt": "x"})


@pytest.mark.parametrize("field", ["", "_meta", "../x", "a..b", ".npy", "x" * 100])
def test_field_names_are_checked(tmp_path: Path, field: str):
    with ShardWriter(tmp_path / "a.tar") as writer, pytest.raises(DataError, match=r"field .* of key 'k' is not allow"):
        writer.write("k", {field: b"x"})


def test_keys_are_unique_and_fields_uniform(tmp_path: Path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("k", {"txt": "x"})
        with pytest.raises(DataError, match=r"a.tar: key 'k' is written twice"):
            writer.write("k", {"txt": "y"})
        with pytest.raises(DataError, match=r"a.tar: key 'l' has fields \['json'\], the samples before it \['txt'\]"):
            writer.write("l", {"json": 1})
    assert read_index(tmp_path / "a.tar").keys == ["k"]


def test_an_empty_shard_is_a_shard(tmp_path: Path):
    with ShardWriter(tmp_path / "a.tar"):
        pass
    with ShardReader(tmp_path / "a.tar") as reader:
        assert len(reader) == 0


# ---- foreign tars


@pytest.mark.parametrize(
    ("hostile", "text"),
    [
        (
            member("b.txt", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            r"'b.txt' is no regular file .*; no links, no holes",
        ),
        (member("b.txt", b"", type=tarfile.LNKTYPE, linkname="a.txt"), r"'b.txt' is no regular file \(type b'1'\)"),
        (member("b.txt", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}), r"'b.txt' is no regular file"),
        (member("b.txt", b"", type=tarfile.FIFOTYPE), r"'b.txt' is no regular file"),
        (member("b.txt", b"", type=tarfile.CHRTYPE), r"'b.txt' is no regular file"),
        (member("folder", b"x" * 9, type=tarfile.DIRTYPE), r"'folder' is no regular file"),
        (member("../folder", b"", type=tarfile.DIRTYPE), r"'../folder' has an absolute name or '..' in it"),
        (member("/etc/b.txt"), r"'/etc/b.txt' has an absolute name or '..' in it"),
        (member("a/../../b.txt"), r"'a/../../b.txt' has an absolute name or '..' in it"),
        (member("../b.txt"), r"has an absolute name or '..' in it"),
        (member("a.txt"), r"member 'a.txt' is there twice"),
        (member("plain"), r"member 'plain' has no key and field; names look like 'key.field'"),
        (member(".txt"), r"member '.txt' has no key and field"),
        (member("b\x1b[2J.txt"), r"has no key and field"),
    ],
)
def test_hostile_members_are_refused(tmp_path: Path, hostile: tuple[tarfile.TarInfo, bytes], text: str):
    path = write_tar(tmp_path / "foreign.tar", member("a.txt"), hostile)
    with pytest.raises(DataError, match=r"foreign.tar: .*" + text):
        build_index(path)
    assert not index_path(path).exists()


def test_folders_are_passed_over_and_counted_and_stay_in_the_keys(tmp_path: Path):
    folders = [member(name, b"", type=tarfile.DIRTYPE) for name in ("./", "dir.v2/")]
    files = [member("dir.v2/a.txt"), member("dir.v2/a.seg.png"), member("b.txt")]
    index, num_folders = survey_tar(write_tar(tmp_path / "foreign.tar", folders[0], *files[:2], folders[1], files[2]))
    assert num_folders == 2 and index.keys == ["dir.v2/a", "b"] and sorted(index.fields) == ["seg.png", "txt"]
    plain = write_tar(tmp_path / "plain.tar", *files)
    assert survey_tar(plain) == (build_index(plain), 0)


def test_a_sample_in_two_places_is_refused(tmp_path: Path):
    path = write_tar(tmp_path / "f.tar", member("a.txt"), member("b.txt"), member("a.json"))
    with pytest.raises(DataError, match=r"sample 'a' stands in two places; its fields must be neighbours"):
        scan_tar(path)


def test_compressed_and_broken_tars_are_refused(tmp_path: Path):
    packed = write_tar(tmp_path / "f.tar", member("a.txt"), mode="w:gz")
    with pytest.raises(DataError, match=r"f.tar: not a readable tar: "):
        scan_tar(packed)
    with pytest.raises(DataError, match=r"none.tar: cannot read the shard: .*No such file"):
        scan_tar(tmp_path / "none.tar")


def test_cut_off_tars_are_refused_at_every_place(tmp_path: Path):
    whole = write_tar(tmp_path / "f.tar", member("a.txt", b"a" * 700), member("b.txt", b"b" * 700)).read_bytes()
    kept = tmp_path / "cut.tar"
    for length in range(0, 3072 + 1024, 128):
        kept.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut.tar: .*(not a readable tar|no end-of-archive mark|is cut off)"):
            scan_tar(kept)
    kept.write_bytes(whole[: 3072 + 1024])
    assert scan_tar(kept).keys == ["a", "b"]


def test_a_damaged_header_is_no_silent_end(tmp_path: Path):
    path = write_tar(tmp_path / "f.tar", member("a.txt"), member("b.txt"), member("c.txt"))
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1  # the second header's name; its checksum no longer fits
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"no end-of-archive mark at byte 1024; the tar is damaged or cut off"):
        scan_tar(path)


def test_negative_sizes_are_refused(tmp_path: Path):
    path = write_tar(tmp_path / "f.tar", member("a.txt"), member("b.txt"))
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 136] = b"\xff" * 11 + b"\x00"  # base-256: minus 256 bytes
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"f.tar: (member 'b.txt' claims -256 bytes at 1536; damaged header|not a read)"
    ):
        scan_tar(path)


def test_fields_beyond_the_cap_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_tar(tmp_path / "f.tar", member("a.txt", b"x" * 100))
    monkeypatch.setattr(shard_module, "MAX_FIELD_BYTES", 99)
    with pytest.raises(DataError, match=r"f.tar: a field of 100 bytes at 512; at most 99 are read"):
        scan_tar(path)


# ---- damage


def edit_index(path: Path, edit: object) -> None:
    page = json.loads(index_path(path).read_bytes())
    edit(page)
    index_path(path).write_text(json.dumps(page))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda page: page.pop("keys"), "TypeError"),
        (lambda page: page.update(extra=1), "TypeError"),
        (lambda page: page.update(version=2), "version 2 found, 1 is read"),
        (lambda page: page["keys"].pop(), "field 'json' does not have 4 entries"),
        (lambda page: page["fields"]["txt"]["crc32"].pop(), "field 'txt' does not have 5 entries"),
        (lambda page: page["fields"]["txt"]["offset"].__setitem__(0, -5), "'txt' lies outside the tar: .* bytes at -5"),
        (lambda page: page["fields"]["txt"]["size"].__setitem__(0, 10**9), "'txt' lies outside the tar: 1000000000 b"),
        (lambda page: page["fields"]["txt"]["size"].__setitem__(0, -2), "'txt' lies outside the tar: -2 bytes"),
        (lambda page: page["fields"]["txt"]["size"].__setitem__(0, "9"), "TypeError"),
        (lambda page: page.update(fields=[]), "AttributeError"),
    ],
)
def test_damaged_indexes_are_refused_by_name(tmp_path: Path, edit: object, text: str):
    path = write_shard(tmp_path / "a.tar")
    edit_index(path, edit)
    with pytest.raises(
        DataError, match=rf"a.tar.index.json: not a valid shard index .*{text}.*; write it again with b"
    ):
        ShardReader(path)


def test_an_index_that_is_not_json_or_missing_is_refused(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar")
    index_path(path).write_bytes(b"\x00\xff")
    with pytest.raises(DataError, match=r"a.tar.index.json: not a valid shard index"):
        ShardReader(path)
    index_path(path).unlink()
    with pytest.raises(DataError, match=r"a.tar.index.json: cannot read the shard index: No such file.*build_index"):
        ShardReader(path)


def test_another_index_than_the_manifests_is_refused(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar")
    right = hashlib.sha256(index_path(path).read_bytes()).hexdigest()
    ShardReader(path, index_sha256=right).close()
    edit_index(path, lambda page: page["keys"].__setitem__(0, "other"))
    with pytest.raises(DataError, match=rf"a.tar.index.json: sha256 [0-9a-f]+ found, the manifest says {right}"):
        ShardReader(path, index_sha256=right)


def test_missing_and_cut_off_tars_are_refused(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar")
    size = path.stat().st_size
    os.truncate(path, size - 512)
    with pytest.raises(DataError, match=rf"a.tar: {size - 512} bytes found, its index says {size}; the tar is cut off"):
        ShardReader(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a.tar: cannot open the shard: No such file or directory"):
        ShardReader(path)


def test_a_tar_that_shrinks_under_the_reader_is_noticed(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar")
    with ShardReader(path) as reader:
        os.truncate(path, reader.index.fields["txt"].offset[4] + 3)
        with pytest.raises(DataError, match=r"a.tar: 3 of 12 bytes found at \d+; the tar is cut off"):
            reader.read(4, "txt")
        assert reader.decode(3, "txt") == "caption 3 ü"


def test_a_read_error_names_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_shard(tmp_path / "a.tar")

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with ShardReader(path) as reader:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(DataError, match=r"a.tar: cannot read 12 bytes at \d+: \[Errno 5\] Input/output error"):
            reader.read(0, "txt")


def test_reads_in_pieces_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: whole(handle, min(size, 100), offset))
    with ShardReader(write_shard(tmp_path / "a.tar")) as reader:
        np.testing.assert_array_equal(reader.decode(2, "moments.npy"), moments(2))


def test_one_flipped_bit_costs_one_sample(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar")
    with ShardReader(path) as reader:
        columns = reader.index.fields["moments.npy"]
        data = bytearray(path.read_bytes())
        data[columns.offset[2] + columns.size[2] - 1] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a.tar: field 'moments.npy' of sample '00002' fails its checksum"):
            reader.decode(2, "moments.npy")
        np.testing.assert_array_equal(reader.decode(1, "moments.npy"), moments(1))


def test_a_field_that_cannot_be_decoded_is_named(tmp_path: Path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("k", {"jpg": b"no image"})
    with (
        ShardReader(tmp_path / "a.tar") as reader,
        pytest.raises(DataError, match=r"a.tar: field 'jpg' of sample 'k': image starts with b'no image'; only JPEG"),
    ):
        reader.decode(0, "jpg")


def test_an_open_shard_that_is_removed_or_cut_off_is_noticed(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar")
    with ShardReader(path) as reader:
        reader.check()
        os.truncate(path, 100)
        with pytest.raises(ShardUnavailableError, match=r"a.tar: 100 bytes found, its index says \d+; the tar is cut"):
            reader.check()
    path = write_shard(tmp_path / "b.tar")
    with ShardReader(path) as reader:
        path.unlink()
        with pytest.raises(ShardUnavailableError, match=r"b.tar: the shard was removed or replaced while it was open"):
            reader.check()
        assert reader.decode(3, "txt") == "caption 3 ü"
        os.close(reader._handle)
        with pytest.raises(ShardUnavailableError, match=r"b.tar: the open shard is lost: Bad file descriptor"):
            reader.check()
        reader._handle = os.open(tmp_path, os.O_RDONLY)


def test_only_what_may_come_back_is_called_unavailable(tmp_path: Path):
    assert issubclass(ShardUnavailableError, DataError)
    path = write_shard(tmp_path / "a.tar")
    with ShardReader(path) as reader:
        data = bytearray(path.read_bytes())
        data[reader.index.fields["txt"].offset[0]] ^= 1
        path.write_bytes(data)
        with pytest.raises(ChecksumError, match=r"a.tar: field 'txt' of sample '00000' fails its checksum"):
            reader.read(0, "txt")
        assert not issubclass(ChecksumError, ShardUnavailableError)
