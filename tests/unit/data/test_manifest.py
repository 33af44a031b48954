"""The manifest names a data set by its content, never changes, and refuses what does not fit."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdtrain.data.manifest import (
    Manifest,
    check_fingerprint,
    describe_shard,
    read_fields,
    verify,
    write_manifest,
)
from sdtrain.data.shard import ShardWriter, index_path
from sdtrain.errors import DataError
from tests.takedowns import take_down

FINGERPRINT = {"autoencoder": {"sha256": "abc", "scaling_factor": 0.18215}, "tokenizer": {"pad_id": 49407}}


def write_shard(path: Path, first: int, count: int) -> Path:
    with ShardWriter(path) as writer:
        for number in range(first, first + count):
            fields = {"txt": f"caption {number}", "moments.npy": np.full((8, 2, 2), number, dtype=np.float16)}
            writer.write(f"{number:05d}", fields)
    return path


def make(folder: Path) -> Manifest:
    sizes = {"b": ("train", 10, 2), "a": ("train", 0, 3), "v": ("validation", 20, 4)}
    entries = [
        describe_shard(write_shard(folder / split / f"{name}.tar", first, count), split=split, folder=folder)
        for name, (split, first, count) in sizes.items()
    ]
    return write_manifest(folder / "manifest.json", entries, fingerprint=FINGERPRINT)


def test_a_manifest_comes_back(tmp_path: Path):
    written = make(tmp_path)
    loaded = Manifest.load(tmp_path / "manifest.json")
    assert loaded == written
    assert loaded.sha256 == written.sha256
    assert [shard.path for shard in loaded.split("train")] == ["train/a.tar", "train/b.tar"]
    assert (loaded.num_samples("train"), loaded.num_samples("validation")) == (5, 4)
    assert loaded.split("train")[0].fields == ("moments.npy", "txt")
    assert loaded.field_shapes == {"moments.npy": (8, 2, 2)}
    assert loaded.fingerprint == FINGERPRINT


def test_the_digest_is_of_the_content_alone(tmp_path: Path):
    written = make(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = Manifest.load(tmp_path / "there" / "manifest.json")
    assert moved.sha256 == written.sha256
    verify(moved, deep=True)
    turned = write_manifest(
        tmp_path / "turned.json",
        written.shards[::-1],
        fingerprint=dict(reversed(FINGERPRINT.items())),
        field_shapes=written.field_shapes,
    )
    assert turned.sha256 == written.sha256
    for other in (
        replace(written, shards=written.shards[1:]),
        replace(written, fingerprint={}),
        replace(written, field_shapes={}),
    ):
        assert other.sha256 != written.sha256


def test_a_manifest_is_written_once(tmp_path: Path):
    first = make(tmp_path)
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    again = write_manifest(tmp_path / "manifest.json", first.shards, fingerprint=FINGERPRINT)
    assert again.sha256 == first.sha256
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"manifest.json: another manifest stands here, and manifests never change"):
        write_manifest(tmp_path / "manifest.json", first.shards[1:], fingerprint=FINGERPRINT)


def test_an_edited_manifest_is_refused(tmp_path: Path):
    make(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("0.18215", "0.13025"))
    with pytest.raises(DataError, match=r"manifest.json: content has sha256 \w+, the file says \w+; manifests are nev"):
        Manifest.load(path)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda page: page.update(version=9), "version 9 found, 1 is read"),
        (lambda page: page.pop("sha256"), "KeyError: 'sha256'"),
        (lambda page: page["shards"][0].pop("split"), "TypeError"),
        (lambda page: page["shards"][0].update(path="../x.tar"), "shard path '../x.tar' leaves the manifest's folder"),
        (lambda page: page["shards"][0].update(path="/x.tar"), "shard path '/x.tar' leaves the manifest's folder"),
        (lambda page: page["shards"].append(page["shards"][0]), "shard 'train/a.tar' is listed twice"),
        (lambda page: page["shards"][0].update(num_samples=-1), "shard 'train/a.tar' has -1 samples"),
    ],
)
def test_manifests_that_do_not_hold_together_are_refused(tmp_path: Path, edit: object, text: str):
    make(tmp_path)
    path = tmp_path / "manifest.json"
    page = json.loads(path.read_bytes())
    edit(page)
    path.write_text(json.dumps(page))
    with pytest.raises(DataError, match=rf"manifest.json: not a valid manifest .*{text}"):
        Manifest.load(path)


def test_missing_and_torn_manifests_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"none.json: cannot read the manifest: No such file.*check data.manifest"):
        Manifest.load(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"version": 1')
    with pytest.raises(DataError, match=r"torn.json: the manifest is not JSON: "):
        Manifest.load(tmp_path / "torn.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match=r"list.json: not a valid manifest \(Type\w*Error"):
        Manifest.load(tmp_path / "list.json")


def test_unknown_splits_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"manifest.json: no split 'test'; it has \['train', 'validation'\]"):
        make(tmp_path).split("test")


def test_shards_outside_the_folder_or_listed_twice_are_refused(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar", 0, 1)
    with pytest.raises(DataError, match=r"a.tar: the shard must lie below the manifest's folder .*inner"):
        describe_shard(path, split="train", folder=tmp_path / "inner")
    entry = describe_shard(path, split="train", folder=tmp_path)
    with pytest.raises(DataError, match=r"m.json: shard 'a.tar' is listed twice"):
        write_manifest(tmp_path / "m.json", [entry, entry], fingerprint={})


def test_a_fingerprint_that_fits_passes(tmp_path: Path):
    manifest = make(tmp_path)
    check_fingerprint(manifest, {})
    check_fingerprint(manifest, {"tokenizer": {"pad_id": 49407}})
    check_fingerprint(manifest, FINGERPRINT)


def test_every_differing_fact_is_named(tmp_path: Path):
    expected = {"autoencoder": {"sha256": "xyz", "scaling_factor": 0.18215}, "tokenizer": {"max_length": 77}}
    with pytest.raises(DataError) as caught:
        check_fingerprint(make(tmp_path), expected)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("manifest.json: the shards were made with other parts than this recipe's:")
    assert lines[1:-1] == [
        "  autoencoder.sha256: found 'abc', expected 'xyz'",
        "  tokenizer.max_length: found 'absent', expected 77",
    ]
    assert lines[-1].startswith("Make the shards again with the recipe's parts, or point data.manifest at shards")


def test_tuples_in_a_fingerprint_are_lists(tmp_path: Path):
    manifest = write_manifest(tmp_path / "m.json", [], fingerprint={"size": (512, 512)}, field_shapes={})
    check_fingerprint(Manifest.load(tmp_path / "m.json"), {"size": (512, 512)})
    check_fingerprint(manifest, {"size": [512, 512]})


def test_verify_lists_every_problem(tmp_path: Path):
    manifest = make(tmp_path)
    verify(manifest)
    verify(manifest, deep=True)
    (tmp_path / "train" / "a.tar").unlink()
    index_path(tmp_path / "train" / "b.tar").unlink()
    os.truncate(tmp_path / "validation" / "v.tar", 100)
    with pytest.raises(DataError) as caught:
        verify(manifest)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("manifest.json: 3 of 3 shards are missing or damaged:")
    assert lines[1].endswith("train/a.tar: No such file or directory")
    assert lines[2].endswith("train/b.tar.index.json: No such file or directory")
    assert "validation/v.tar: 100 bytes found, expected " in lines[3]


def test_only_a_deep_look_sees_a_flipped_bit(tmp_path: Path):
    manifest = make(tmp_path)
    path = tmp_path / "train" / "a.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    sidecar = index_path(tmp_path / "train" / "b.tar")
    sidecar.write_bytes(sidecar.read_bytes() + b" ")
    verify(manifest)
    with pytest.raises(DataError, match=r"2 of 3(?s:.*)a.tar: sha256 \w+ found, expected (?s:.*)b.tar.index.json: sha"):
        verify(manifest, deep=True)


def test_a_shard_of_another_length_is_refused(tmp_path: Path):
    manifest = make(tmp_path)
    wrong = replace(manifest.split("train")[0], num_samples=4)
    with pytest.raises(DataError, match=r"a.tar: 3 samples found, .*manifest.json says 4"):
        manifest.open_shard(wrong)


def test_offline_passes_see_every_sample_in_order(tmp_path: Path):
    records = list(read_fields(make(tmp_path), "train", ["moments.npy", "txt"]))
    assert [record.key for record in records] == ["00000", "00001", "00002", "00010", "00011"]
    assert [record.fields["moments.npy"][0, 0, 0] for record in records] == [0, 1, 2, 10, 11]
    assert records[3].fields["txt"] == "caption 10"


def test_offline_passes_stop_at_damage(tmp_path: Path):
    manifest = make(tmp_path)
    (tmp_path / "train" / "b.tar").unlink()
    with pytest.raises(DataError, match=r"b.tar: cannot open the shard"):
        list(read_fields(manifest, "train", ["txt"]))


def test_the_takedown_list_is_read_once_and_honoured_by_offline_passes(tmp_path: Path):
    manifest = make(tmp_path)
    assert manifest.takedown.keys == frozenset()
    whole = [record.key for record in read_fields(manifest, "train", ["txt"])]
    take_down(manifest.path, whole[1])
    assert manifest.takedown.keys == frozenset()
    manifest = Manifest.load(manifest.path)
    assert manifest.takedown.keys == {whole[1]}
    assert [record.key for record in read_fields(manifest, "train", ["txt"])] == [whole[0], *whole[2:]]
