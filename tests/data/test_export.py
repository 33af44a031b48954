"""`sdtrain-data export`: what the `datasets` library finds in the folder, and what never appears."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data_pipeline import cli
from data_pipeline import export as module
from data_pipeline.export import export, source_of
from sdtrain.data.manifest import Manifest, describe_shard, write_manifest
from sdtrain.data.shard import ShardWriter
from tests.takedowns import take_down

SHARDS = (("train", 5), ("train", 5), ("train", 4), ("validation", 3))
SIZE = (24, 16)


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", SIZE, (number * 10, 0, 255 - number * 10)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def facts_of(number: int, split: str) -> dict[str, Any]:
    scores = {"aesthetic": number / 2} | ({"similarity": 0.25} if number % 2 else {})
    return {"url": f"https://x.org/{number}", "split": split, "scores": scores, "caption": f"picture {number}"}


def moments_of(number: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    return np.full((8, 2, 3), number + 0.5, np.float16)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    images, latents, number = [], [], 0
    for index, (split, count) in enumerate(SHARDS):
        pictures, encoded = folder / "images" / f"{index:05d}.tar", folder / "latents" / f"{index:05d}.tar"
        with ShardWriter(pictures) as one, ShardWriter(encoded) as other:
            for _ in range(count):
                facts = facts_of(number, split)
                one.write(f"k{number}", {"jpg": jpeg(number), "txt": f"picture {number} ☃", "json": facts})
                tokens = np.arange(number, number + 7, dtype=np.uint16)
                encoded_fields = {
                    "moments.npy": moments_of(number),
                    "tokens.npy": tokens,
                    "txt": f"trained on {number}",
                }
                other.write(f"k{number}", encoded_fields | {"json": facts})
                number += 1
        images.append(describe_shard(pictures, split=split, folder=folder))
        latents.append(describe_shard(encoded, split=split, folder=folder))
    write_manifest(folder / "images.json", images, fingerprint={})
    write_manifest(folder / "manifest.json", latents, fingerprint={})
    return folder


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def loaded(folder: Path) -> Any:
    import datasets

    return datasets.load_from_disk(str(folder))


def test_the_library_opens_every_split_with_pictures_captions_and_facts(data: Path, tmp_path: Path, capsys) -> None:
    assert call("export", data / "images.json", "--format", "hf", "--out", tmp_path / "out") == 0
    said = f"export: wrote {tmp_path / 'out'}: 14 train, 3 validation samples (hf, 0 taken down)\n"
    assert capsys.readouterr().out == said
    found = loaded(tmp_path / "out")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 14, "validation": 3}
    assert found["train"]["key"][:] == [f"k{number}" for number in range(14)]
    row = found["train"][7]
    assert row["caption"] == "picture 7 ☃" and (row["width"], row["height"]) == SIZE == row["image"].size
    assert row["url_sha256"] == hashlib.sha256(b"https://x.org/7").hexdigest()
    assert row["scores"] == {"aesthetic": 3.5, "similarity": 0.25}
    assert found["train"][8]["scores"] == {"aesthetic": 4.0, "similarity": None}
    assert sorted(found["train"].column_names) == sorted(
        ["key", "image", "caption", "url_sha256", "width", "height", "scores"]
    )


def test_pictures_are_stored_as_they_are_and_decoded_when_looked_at(data: Path, tmp_path: Path) -> None:
    import datasets

    export(source_of(data / "images.json", ()), tmp_path / "out", Console(quiet=True))
    split = loaded(tmp_path / "out")["validation"]
    undecoded = split.cast_column("image", datasets.Image(decode=False))
    assert [row["image"]["bytes"] for row in undecoded] == [jpeg(number) for number in (14, 15, 16)]


def test_tokens_and_moments_come_from_the_latent_shards(data: Path, tmp_path: Path) -> None:
    assert call("export", data / "images.json", "--out", tmp_path / "out", "--with", "tokens", "--with", "moments") == 0
    rows = loaded(tmp_path / "out")["train"].with_format("numpy")
    for number in (0, 6, 13):
        assert rows[number]["tokens"].tolist() == list(range(number, number + 7))
        np.testing.assert_array_equal(rows[number]["moments"], moments_of(number))


def test_a_page_gives_the_captions_that_training_sees(data: Path, tmp_path: Path) -> None:
    page = tmp_path / "data.yaml"
    page.write_text(f"schema_version: 1\nkind: ingestion\noutput: {data}\nsource: {{type: digits}}\n")
    assert call("export", page, "--out", tmp_path / "out") == 0
    assert loaded(tmp_path / "out")["train"]["caption"][:2] == ["trained on 0", "trained on 1"]
    assert call("export", data / "images.json", "--out", tmp_path / "images") == 0
    assert loaded(tmp_path / "images")["train"]["caption"][:2] == ["picture 0 ☃", "picture 1 ☃"]


def test_what_was_taken_down_is_not_in_it(data: Path, tmp_path: Path, capsys) -> None:
    take_down(data / "images.json", "k3", "k15")
    assert call("export", data / "images.json", "--out", tmp_path / "out", "--with", "tokens") == 0
    assert "13 train, 2 validation samples (hf, 2 taken down)" in capsys.readouterr().out
    found = loaded(tmp_path / "out")
    assert set(found["train"]["key"]) | set(found["validation"]["key"]) == {f"k{n}" for n in range(17)} - {"k3", "k15"}
    assert all(jpeg(3) not in path.read_bytes() for path in (tmp_path / "out").rglob("*.arrow"))


def test_the_same_data_gives_the_same_bytes_in_files_of_whole_shards(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Manifest.load(data / "images.json").shards[0]
    monkeypatch.setattr(module, "FILE_BYTES", int(first.size_bytes * 2.5))
    for name in ("a", "b"):
        export(source_of(data / "images.json", ()), tmp_path / name, Console(quiet=True))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert [str(path) for path in files if path.suffix == ".arrow"] == [
        "train/data-00000.arrow",
        "train/data-00001.arrow",
        "validation/data-00000.arrow",
    ]
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
    assert loaded(tmp_path / "a")["train"]["key"][:] == [f"k{number}" for number in range(14)]


def test_a_folder_that_is_there_is_refused_and_a_failed_export_leaves_nothing(
    data: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "there").mkdir()
    assert call("export", data / "images.json", "--out", tmp_path / "there") == 2
    assert f"--out {tmp_path / 'there'}: is there already; give a folder that is not" in capsys.readouterr().err
    with open(data / "images" / "00003.tar", "r+b") as file:
        file.seek(600)
        file.write(b"\xff" * 64)
    before = sorted(tmp_path.iterdir())
    assert call("export", data / "images.json", "--out", tmp_path / "out") == 3
    error = capsys.readouterr().err
    assert "00003.tar: field 'jpg' of sample 'k14' fails its checksum" in error and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_picture_that_is_none_is_named(tmp_path: Path, capsys) -> None:
    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.write("k", {"jpg": b"<html>", "txt": "x"})
    shard = describe_shard(tmp_path / "0.tar", split="train", folder=tmp_path)
    write_manifest(tmp_path / "images.json", [shard], fingerprint={}, field_shapes={})
    assert call("export", tmp_path / "images.json", "--out", tmp_path / "out") == 3
    error = capsys.readouterr().err
    assert "sample 'k': its picture cannot be read (UnidentifiedImageError); make the shard whole, or take the" in error


def test_what_a_killed_export_left_is_swept_and_a_second_one_waits_its_turn(data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / ".out.part" / "train").mkdir(parents=True)
    (tmp_path / ".out.part" / "train" / "rest.arrow").write_bytes(b"half")
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / ".out.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "1\n"
        assert call("export", data / "images.json", "--out", tmp_path / "out") == 2
        assert f"--out {tmp_path / 'out'}: another export writes there now" in capsys.readouterr().err
        other.communicate("\n")
    assert call("export", data / "images.json", "--out", tmp_path / "out") == 0
    assert not list(tmp_path.glob(".out*")) and not list((tmp_path / "out").rglob("rest.arrow"))


def test_a_place_that_cannot_be_written_is_said_so(data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("x")
    assert call("export", data / "images.json", "--out", tmp_path / "file" / "out") == 8
    assert "cannot be written: " in capsys.readouterr().err


def test_wrong_wishes_are_named(data: Path, tmp_path: Path, capsys) -> None:
    for arguments, code, text in (
        ((data / "manifest.json",), 3, "holds no picture (jpg or jpeg or png or webp), it holds json, moments.npy"),
        ((data / "images.json", "--with", "masks"), 2, "--with masks: is no column; known are tokens, moments"),
        ((tmp_path / "none.json",), 3, "none.json: cannot read the manifest"),
        ((tmp_path / "none.yaml",), 2, "none.yaml"),
    ):
        assert call("export", *arguments, "--out", tmp_path / "out") == code
        assert text in capsys.readouterr().err
    (data / "manifest.json").unlink()
    folder = Manifest.load(data / "images.json").folder
    shards = [
        describe_shard(folder / "latents" / f"{n:05d}.tar", split=s, folder=folder) for n, (s, _) in enumerate(SHARDS)
    ]
    write_manifest(data / "manifest.json", shards[1:], fingerprint={})
    assert call("export", data / "images.json", "--out", tmp_path / "out", "--with", "tokens") == 3
    assert "lists 0 shards '00000.tar' in split 'train'" in capsys.readouterr().err


def test_latents_that_do_not_fit_are_named(data: Path, tmp_path: Path, capsys) -> None:
    (data / "latents" / "00000.tar").unlink()
    with ShardWriter(data / "latents" / "00000.tar") as writer:
        writer.write(
            "other", {"moments.npy": moments_of(0), "tokens.npy": np.zeros(7, np.uint16), "txt": "", "json": {}}
        )
    (data / "manifest.json").unlink()
    entries = [
        describe_shard(data / "latents" / f"{n:05d}.tar", split=s, folder=data, bucket="a" if n else "b")
        for n, (s, _) in enumerate(SHARDS)
    ]
    write_manifest(data / "manifest.json", entries, fingerprint={})
    assert call("export", data / "images.json", "--out", tmp_path / "out", "--with", "tokens") == 3
    assert "00000.tar: holds no sample 'k0' of" in capsys.readouterr().err
    shapes = {"a": {"moments.npy": (8, 2, 3)}, "b": {"moments.npy": (8, 3, 2)}}
    (data / "manifest.json").unlink()
    write_manifest(
        data / "manifest.json", entries, fingerprint={}, field_shapes={"tokens.npy": (7,)}, bucket_shapes=shapes
    )
    assert call("export", data / "images.json", "--out", tmp_path / "out", "--with", "moments") == 3
    error = capsys.readouterr().err
    assert "no one shape of 'moments.npy', it has tokens.npy; it has several sizes of it (a, b)" in error


def test_a_missing_library_is_named(data: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['datasets'] = None; from data_pipeline import cli; cli.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "export", str(data / "images.json"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--format hf needs the package datasets; pip install 'sdtrain[huggingface]'" in done.stderr
