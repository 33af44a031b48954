"""`sdtrain-data takedown`: what is masked, what stays as it was, and who is said to have seen it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data_pipeline import cli
from data_pipeline.stages.manifest import ManifestStage
from data_pipeline.takedown import MAX_LINE_BYTES, canonical, take_down_again
from sdtrain.data.dataset import ShardDataset
from sdtrain.data.manifest import Manifest, describe_shard, verify, write_manifest
from sdtrain.data.plan import order_of
from sdtrain.data.shard import ShardReader, ShardWriter
from sdtrain.data.takedown import read_takedown
from sdtrain.errors import DataError
from sdtrain.records import DrawSpec

PER_SHARD = 4
SHARDS = (("train", 3), ("validation", 1))


def sha256(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def url(number: int) -> str:
    return f"https://example.org/{number}.jpg?a=1#b"


def key(number: int) -> str:
    return f"key-{number}"


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (number * 10, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures with facts in `images.json` and latents of the same keys without any in `manifest.json`."""
    folder = tmp_path / "data"
    listed: dict[str, list[Any]] = {"images.json": [], "manifest.json": []}
    number = index = 0
    for split, shards in SHARDS:
        for _ in range(shards):
            pictures, latents = (folder / name / f"{index:05d}.tar" for name in ("images", "latents"))
            with ShardWriter(pictures) as writer, ShardWriter(latents) as encoded:
                for _ in range(PER_SHARD):
                    facts = {"url": url(number), "url_sha256": sha256(url(number)), "sha256": sha256(f"body {number}")}
                    fields = {"jpg": jpeg(number), "txt": f"picture {number}", "json": facts | {"split": split}}
                    writer.write(key(number), fields)
                    encoded.write(key(number), {"moments.npy": np.full((8, 4, 4), number + 1, np.float16)})
                    number += 1
            for name, path in (("images.json", pictures), ("manifest.json", latents)):
                listed[name].append(describe_shard(path, split=split, folder=folder))
            index += 1
    for name, entries in listed.items():
        write_manifest(folder / name, entries, fingerprint={})
    return folder


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def write_list(folder: Path, *lines: str) -> Path:
    path = folder / "list.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def report_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert call("takedown", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def bytes_of(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((".", "takedown")))
    return {str(path.relative_to(folder)): sha256(path.read_bytes()) for path in files}


def samples_of(manifest: Path, positions: Sequence[int]) -> list[Any]:
    loaded = Manifest.load(manifest)
    order = order_of(loaded, "train", seed=3, window_shards=2)
    draws = DrawSpec(normals={"noise": (4, 4, 4)}, uniforms=("timestep",))
    dataset = ShardDataset(
        manifest=loaded, split="train", fields={"moments": "moments.npy"}, order=order, seed=3, draws=draws
    )
    try:
        return [dataset[position] for position in positions]
    finally:
        dataset.close()


def test_every_way_of_asking_masks_the_sample_in_every_manifest(data: Path, tmp_path: Path, capsys) -> None:
    before, digests = bytes_of(data), [Manifest.load(data / name).sha256 for name in ("images.json", "manifest.json")]
    lines = (url(0), sha256(url(1)).upper(), sha256("body 2"), key(3), url(14), "https://example.org/else")
    path = write_list(tmp_path, "# a remark", "", *lines)
    report = report_of(capsys, path, "--manifest", data / "manifest.json", "--reason", "a letter")
    masked = {key(number) for number in (0, 1, 2, 3, 14)}
    assert set(report["samples"]) == masked and report["samples"][key(1)] == [sha256(url(1)).upper()]
    assert report["unmatched"] == ["https://example.org/else"]
    counts = [(Path(one["path"]).name, one["samples"], one["new"]) for one in report["manifests"]]
    assert counts == [("images.json", 5, 5), ("manifest.json", 5, 5)]
    assert bytes_of(data) == before
    assert digests == [Manifest.load(data / name).sha256 for name in ("images.json", "manifest.json")]
    verify(Manifest.load(data / "manifest.json"), deep=True)
    (entry,) = read_takedown(data / "manifest.json").entries
    assert set(entry.keys) == masked and entry.reason == "a letter" and entry.list_sha256 == sha256(path.read_bytes())
    assert entry.manifests["images.json"] == {"sha256": digests[0], "masked": 5}
    assert "example.org" not in (data / "takedown.json").read_text(), "URLs are kept as digests"


def test_the_order_and_all_other_samples_stay_and_masked_bytes_are_not_even_read(
    data: Path, tmp_path: Path, capsys
) -> None:
    positions = range(3 * SHARDS[0][1] * PER_SHARD)
    whole = samples_of(data / "manifest.json", positions)
    report_of(capsys, write_list(tmp_path, key(5), key(6)), "--root", data)
    with ShardReader(data / "latents" / "00001.tar") as reader:
        columns, place = reader.index.fields["moments.npy"], reader.keys.index(key(5))
        with open(reader.path, "r+b") as file:
            file.seek(columns.offset[place] + columns.size[place] - 1)
            file.write(b"\xff")  # whoever reads it meets a checksum error
    for before, after in zip(whole, samples_of(data / "manifest.json", positions), strict=True):
        is_masked = after.key in {key(5), key(6)}
        assert (after.key, after.error) == (before.key, None)
        assert after.weight == (0.0 if is_masked else 1.0)
        assert after.fields["moments"].any() != is_masked
        np.testing.assert_array_equal(before.normals["noise"], after.normals["noise"])
        assert before.uniforms == after.uniforms
        if not is_masked:
            np.testing.assert_array_equal(before.fields["moments"], after.fields["moments"])


def test_again_changes_nothing_and_more_adds_an_entry(data: Path, tmp_path: Path, capsys) -> None:
    path = write_list(tmp_path, url(0), "https://example.org/else")
    report_of(capsys, path, "--root", data)
    first = (data / "takedown.json").read_bytes()
    again = report_of(capsys, path, "--root", tmp_path)
    assert [one["new"] for one in again["manifests"]] == [0, 0] and set(again["samples"]) == {key(0)}
    assert (data / "takedown.json").read_bytes() == first
    report_of(capsys, write_list(tmp_path, url(0), url(1)), "--root", data)
    found = read_takedown(data / "manifest.json")
    assert len(found.entries) == 2 and found.keys == {key(0), key(1)}
    assert found.as_of(found.digests[0]).keys == {key(0)} and found.as_of(None).keys == frozenset()


def test_a_dry_run_says_it_all_and_writes_nothing(data: Path, tmp_path: Path, capsys) -> None:
    path = write_list(tmp_path, url(0), "https://example.org/else")
    names = sorted(data.rglob("*"))
    assert call("takedown", path, "--root", tmp_path, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert f"masked: {key(0)}, asked for by {url(0)}\n" in printed
    assert "fits no sample: https://example.org/else\n" in printed
    assert printed.endswith("dry run: nothing was written\n")
    assert sorted(data.rglob("*")) == names
    assert call("takedown", path, "--root", tmp_path) == 0
    assert "a training that runs now honours the list from its next start\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"PAR1\x00\x15\x04" + bytes(64), r"line 1 is no request: b'PAR1\\x00\\x15"),
        (b"\x1f\x8b\x08\x00" + b"\xff" * 64, r"line 1 is no request: b'\\x1f\\x8b"),
        (b"https://example.org/a\nhttps://example.org/b,reason one\n", r"line 2 is no request: .* holds spaces"),
        (b"k" * (MAX_LINE_BYTES + 1), r"line 1 is longer than 8192 bytes \(it starts with b'kkkk"),
        (b"ok\n" + b"x" * 50_000_000, r"line 2 is longer than 8192 bytes"),
        (b"# nothing\n\n", r"the take-down list holds no request; it is UTF-8 text with one URL, sha256"),
    ],
)
def test_hostile_lists_are_one_clear_line(data: Path, tmp_path: Path, capsys, content: bytes, text: str) -> None:
    path = tmp_path / "list.bin"
    path.write_bytes(content)
    assert call("takedown", path, "--root", data) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"sdtrain-data: {path}: ") and "Traceback" not in error and len(error) < 500
    assert re.search(text, error), error
    assert not (data / "takedown.json").exists()


def test_a_list_of_gigabytes_is_refused_before_it_is_read(data: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "list.txt"
    path.touch()
    os.truncate(path, 2**30 + 1)
    assert call("takedown", path, "--root", data) == 3
    assert f"{path}: more than {2**30} bytes; cut the list into several" in capsys.readouterr().err


def test_a_byte_order_mark_and_carriage_returns_do_no_harm(data: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf" + f"{url(0)}\r\n{key(1)}\r\n".encode())
    assert set(report_of(capsys, path, "--root", data)["samples"]) == {key(0), key(1)}


def test_wrong_places_are_named(data: Path, tmp_path: Path, capsys) -> None:
    path = write_list(tmp_path, key(0))
    for arguments, code, text in (
        ((), 2, "takedown: give --manifest FILE or --root FOLDER"),
        (("--root", tmp_path / "none"), 3, f"{tmp_path / 'none'}: no such folder"),
        (("--root", data / "images"), 3, f"{data / 'images'}: holds no manifest of a data set"),
        (("--manifest", path), 3, f"{path}: the manifest is not JSON"),
        (
            ("--manifest", "s3://bucket/manifest.json"),
            2,
            "manifests on object storage cannot be searched; run this where",
        ),
    ):
        assert call("takedown", path, *arguments) == code
        assert text in capsys.readouterr().err
    assert call("takedown", tmp_path / "none.txt", "--root", data) == 3
    assert "none.txt: the take-down list cannot be read: No such file or directory" in capsys.readouterr().err


def test_folders_that_cannot_be_used_are_named(data: Path, tmp_path: Path, capsys) -> None:
    path = write_list(tmp_path, key(0))
    (data / ".takedown.json.lock").mkdir()
    assert call("takedown", path, "--root", data) == 8
    assert f"{data / 'takedown.json'}: the take-down list cannot be written: Is a directory" in capsys.readouterr().err
    (data / "dangling.json").symlink_to(data / "none")
    assert call("takedown", path, "--root", data) == 3
    assert f"{data / 'dangling.json'}: cannot be looked at: No such file or directory" in capsys.readouterr().err


def test_what_cannot_be_looked_into_is_listed_and_the_rest_is_masked(data: Path, tmp_path: Path, capsys) -> None:
    (data / "images" / "00002.tar").unlink()
    assert call("takedown", write_list(tmp_path, url(0), url(9)), "--root", data) == 3
    printed = capsys.readouterr()
    assert "not everything could be looked into; what was found is masked" in printed.err
    assert "00002.tar: cannot open the shard: No such file or directory" in printed.err
    assert f"fits no sample: {url(9)}" in printed.out
    assert read_takedown(data / "manifest.json").keys == {key(0)}


@pytest.mark.parametrize("change", ["key", "order", "entry", "text"])
def test_a_list_that_was_edited_is_refused(data: Path, tmp_path: Path, capsys, change: str) -> None:
    for number in range(3):
        report_of(capsys, write_list(tmp_path, key(number)), "--root", data)
    path = data / "takedown.json"
    page = json.loads(path.read_text())
    match change:
        case "key":
            page["entries"][0]["keys"] = []
        case "order":
            page["entries"][:2] = page["entries"][1::-1]
        case "entry":
            del page["entries"][1]
        case "text":
            page["version"] = 2
    path.write_text(json.dumps(page))
    assert call("takedown", write_list(tmp_path, key(5)), "--root", data) == 3
    error = capsys.readouterr().err
    assert f"{path}: not a take-down list of `sdtrain-data takedown`" in error and "put back the file" in error


def test_a_new_manifest_is_searched_for_what_was_asked_before(data: Path, tmp_path: Path, capsys) -> None:
    report_of(capsys, write_list(tmp_path, url(0), "https://example.org/new"), "--root", data)
    facts = {"url": "https://example.org/new", "split": "train"}
    with ShardWriter(data / "images" / "00004.tar") as writer:
        writer.write("other-key", {"jpg": jpeg(1), "txt": "x", "json": facts})
    (data / "images.json").unlink()
    stage = ManifestStage("images", data / "images", data / "05-images", data / "images.json", ())
    (unit,) = stage.units()
    (data / "05-images").mkdir()
    stats = stage.worker()(unit, data / "05-images")
    said = stage.report([stats])
    assert said.endswith("; 2 of its samples were taken down before and are masked")
    assert Manifest.load(data / "images.json").takedown.keys == {key(0), "other-key"}
    assert "taken down before" not in stage.report([stats]), "once is enough"


def test_a_new_manifest_that_cannot_be_searched_is_an_error(data: Path, tmp_path: Path, capsys) -> None:
    report_of(capsys, write_list(tmp_path, url(0)), "--root", data)
    manifest = Manifest.load(data / "images.json")
    (data / "images.json").unlink()
    write_manifest(data / "images.json", manifest.shards[:2], fingerprint={"built": "anew"})
    (data / "images" / "00001.tar").unlink()
    with pytest.raises(
        DataError, match=r"images.json: 1 shards or samples could not be searched .* such as .*00001.tar"
    ):
        take_down_again(data / "images.json", Console(quiet=True))


def test_repeated_keys_are_counted_wherever_they_stand(data: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(data, tmp_path / "copy")
    report = report_of(capsys, write_list(tmp_path, key(1)), "--root", tmp_path)
    assert [one["samples"] for one in report["manifests"]] == [1, 1, 1, 1]
    assert read_takedown(tmp_path / "copy" / "images.json").keys == {key(1)}
    assert canonical("HTTPS://x") != canonical("https://x")


def test_runs_that_cannot_be_asked_are_said_so(data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "run").mkdir()
    assert call("takedown", write_list(tmp_path, key(1)), "--root", data, "--run", tmp_path / "run") == 3
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run'}: holds no ledger.jsonl and config.yaml of a run" in error
