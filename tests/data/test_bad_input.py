"""Bad input through the real commands: one clear message, a typed exit code, no traceback, and nothing lost."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline import build, cli
from data_pipeline.cluster import InlineExecutor
from data_pipeline.sources.digits import make_world
from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.autoencoders.load import autoencoder_facts, save_autoencoder
from sdtrain.data.manifest import Manifest, describe_shard, write_manifest
from sdtrain.data.shard import ShardWriter
from tests.engines import one_rank, sdtrain
from tests.support import make_latent_manifest, tiny_page
from tests.takedowns import take_down

pytestmark = pytest.mark.engine

LAION = """schema_version: 1
kind: ingestion
output: {output}
source: {{type: laion, metadata: {metadata}}}
filter: {{min_width: 64, min_height: 64}}
validation: {{num_samples: 20}}
download: {{image_size: 64, samples_per_shard: 100, contact: someone@example.org}}
"""

SHARDS = """schema_version: 1
kind: ingestion
output: {output}
source: {{type: shards, shards: {shards}}}
filter: {{min_aesthetic: null, min_similarity: null, min_width: 32, min_height: 32, max_pwatermark: null, nsfw: null}}
validation: {{num_samples: 2}}
download: {{image_size: 32, samples_per_shard: 100}}
"""

Failing = Callable[..., str]


class Inline(InlineExecutor):
    """In this process, where the command line asks for Ray."""

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "executor_for", lambda config: Inline())


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str]) -> Failing:
    """Run a command that must fail; its one message."""

    def run(
        *arguments: object, code: int = 3, command: Callable[..., int] = call, program: str = "sdtrain-data"
    ) -> str:
        capsys.readouterr()
        assert command(*arguments) == code
        said = capsys.readouterr().err
        messages = [line for line in said.splitlines() if line.startswith(f"{program}: ")]
        assert len(messages) == 1 and "Traceback" not in said, said
        return said[said.index(messages[0]) :].removeprefix(f"{program}: ")

    return run


def committed(output: Path) -> dict[str, str]:
    """Digests of every file that a stage has committed, by name; what the ledgers say of them."""
    rows = {}
    for ledger in output.glob("*/ledger.jsonl"):
        for row in map(json.loads, ledger.read_text().splitlines()):
            rows |= {f"{ledger.parent.name}/{name}": digest for name, digest in row.get("files", {}).items()}
    return rows


@contextmanager
def nothing_lost(output: Path) -> Iterator[None]:
    """Every file that was committed before is there afterwards, in the ledger and on the disk, bit by bit."""
    before = committed(output)
    assert before
    beside = {
        path: path.read_bytes()
        for path in output.glob("*.json")
        if path.name not in ("dead_letter.json", "progress.json")
    }
    yield
    assert before.items() <= committed(output).items()
    for name, digest in before.items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == digest, name
    assert {path: path.read_bytes() for path in beside} == beside


@pytest.fixture
def laion(tmp_path: Path) -> Path:
    """A page over three good tables, worked on up to the parts."""
    metadata = make_world(tmp_path / "metadata-world", seed=0, rows=400, image_size=64, port=8123)
    path = tmp_path / "data.yaml"
    path.write_text(LAION.format(output=tmp_path / "out", metadata=metadata))
    assert call("run", path, "--until", "dedup") == 0
    return path


def table_of(laion: Path, name: str = "part-00000.parquet") -> Path:
    return laion.parent / "metadata-world" / "metadata" / name


# Metadata -------------------------------------------------------------------------------------------------------------


def test_a_table_without_a_needed_column(laion: Path, tmp_path: Path, failing: Failing) -> None:
    new = table_of(laion, "part-00003.parquet")
    pq.write_table(pq.read_table(table_of(laion)).drop_columns(["pwatermark"]), new)
    with nothing_lost(tmp_path / "out"):
        said = failing("run", laion, "--until", "dedup")
    assert said.startswith("stage filter: 1 of 4 units failed\n  00003: ")
    assert f"{new}: filter.max_pwatermark needs a column pwatermark; columns present: URL, TEXT" in said
    assert (
        f"all are listed in {tmp_path / 'out' / 'dead_letter.json'}; running again tries only what is missing" in said
    )
    new.unlink()
    assert call("run", laion, "--until", "dedup") == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("types", "part-00003.parquet: column WIDTH has type string, but width must be a whole number; convert the"),
        (
            "family",
            "part-00003.parquet: filter.min_aesthetic needs a column AESTHETIC_SCORE; columns present: url, text, ",
        ),
        ("other", "part-00003.parquet: no url column; columns present: sentence, label; name it with source.columns"),
    ],
)
def test_mixed_schemas_in_one_folder(laion: Path, tmp_path: Path, failing: Failing, change: str, text: str) -> None:
    table, new = pq.read_table(table_of(laion)), table_of(laion, "part-00003.parquet")
    match change:
        case "types":
            place = table.column_names.index("WIDTH")
            table = table.set_column(place, "WIDTH", table["WIDTH"].cast(pa.string()))
        case "family":
            table = table.rename_columns(
                [name.lower().replace("aesthetic_score", "quality") for name in table.column_names]
            )
        case "other":
            table = pa.table({"sentence": ["nothing of LAION's"], "label": [1]})
    pq.write_table(table, new)
    with nothing_lost(tmp_path / "out"):
        said = failing("run", laion, "--until", "dedup")
    assert text in said, said
    assert "1 of 4 units failed" in said


@pytest.mark.parametrize("damage", ["middle", "cut", "empty", "text"])
def test_a_corrupt_table(laion: Path, tmp_path: Path, failing: Failing, damage: str) -> None:
    whole, new = table_of(laion).read_bytes(), table_of(laion, "part-00003.parquet")
    middle = len(whole) // 2
    broken = {
        "middle": whole[:400] + bytes(400) + whole[800:],
        "cut": whole[:middle],
        "empty": b"",
        "text": b"URL,TEXT\nhttp://x,y\n",
    }
    new.write_bytes(broken[damage])
    with nothing_lost(tmp_path / "out"):
        said = failing("run", laion, "--until", "dedup")
    assert "1 of 4 units failed" in said
    expected = "damaged inside, in row group 0 of 1" if damage == "middle" else "not a readable parquet file"
    assert f"{new}: {expected}" in said, said
    new.write_bytes(whole)
    assert call("run", laion, "--until", "dedup") == 0, "made whole, the run goes on"


# Shards ---------------------------------------------------------------------------------------------------------------


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def write_tar(path: Path, first: int, evil: tarfile.TarInfo | None = None) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + 6):
            for ending, data in (
                ("jpg", jpeg(number)),
                ("txt", f"a caption of at least twenty letters {number}".encode()),
            ):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        if evil is not None:
            tar.addfile(evil, io.BytesIO(bytes(evil.size)))


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize(
    ("member", "text"),
    [
        (tarfile.TarInfo("../../evil.jpg"), "member '../../evil.jpg' has an absolute name or '..' in it"),
        (tarfile.TarInfo("/etc/evil.jpg"), "member '/etc/evil.jpg' has an absolute name or '..' in it"),
        (link("000099.jpg", "/etc/passwd"), "member '000099.jpg' is no regular file"),
    ],
)
def test_a_tar_with_a_traversal_name(tmp_path: Path, failing: Failing, member: tarfile.TarInfo, text: str) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "00000.tar", 0)
    page = tmp_path / "data.yaml"
    page.write_text(SHARDS.format(output=tmp_path / "out", shards=tmp_path / "tars"))
    assert call("run", page, "--until", "dedup") == 0
    evil = tmp_path / "tars" / "00001.tar"
    write_tar(evil, 6, member)
    files = sorted(path for path in tmp_path.rglob("*") if "out" not in path.parts)
    with nothing_lost(tmp_path / "out"):
        said = failing("run", page, "--until", "dedup")
    assert f"  00001: {evil}: {text}" in said, said
    assert "take this tar out of source.shards, or write it anew with webdataset" in said
    assert sorted(path for path in tmp_path.rglob("*") if "out" not in path.parts) == files, "nothing was extracted"
    assert not any(path.name == "evil.jpg" for path in tmp_path.rglob("*"))


def test_a_tar_that_is_cut_off(tmp_path: Path, failing: Failing) -> None:
    (tmp_path / "tars").mkdir()
    for index in range(2):
        write_tar(tmp_path / "tars" / f"{index:05d}.tar", 6 * index)
    page = tmp_path / "data.yaml"
    page.write_text(SHARDS.format(output=tmp_path / "out", shards=tmp_path / "tars"))
    assert call("run", page, "--until", "dedup") == 0
    new = tmp_path / "tars" / "00002.tar"
    write_tar(new, 12)
    os.truncate(new, new.stat().st_size // 2)
    with nothing_lost(tmp_path / "out"):
        said = failing("run", page, "--until", "dedup")
    assert f"  00002: {new}: " in said and "1 of 3 units failed" in said


# Manifests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished data set of pictures."""
    folder = tmp_path_factory.mktemp("digits")
    path = folder / "data.yaml"
    path.write_text(
        f"schema_version: 1\nkind: ingestion\noutput: {folder / 'out'}\nsource: {{type: digits, num_images: 30}}\n"
        "validation: {num_samples: 10}\ndownload: {image_size: 32, samples_per_shard: 10}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "executor_for", lambda config: Inline())
        assert call("run", path) == 0
    return path


@contextmanager
def edited(path: Path, old: str, new: str) -> Iterator[None]:
    """A file with one text in place of another, for a while."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    try:
        yield
    finally:
        path.write_text(text)


def test_a_manifest_edited_by_hand(digits: Path, tmp_path: Path, failing: Failing) -> None:
    out = digits.parent / "out"
    manifest, requests = out / "manifest.json", tmp_path / "list.txt"
    requests.write_text("key\n")
    edits = (
        ('"num_samples": 10', '"num_samples": 9', f"{manifest}: content has sha256 "),
        (
            '"04-download/00000.tar"',
            '"../../etc/00000.tar"',
            "shard path '../../etc/00000.tar' leaves the manifest's folder",
        ),
        ('"version": 1', '"version": 7', "version 7 found, 1 is read"),
        ('"shards": [', '"shards": {', f"{manifest}: the manifest is not JSON"),
    )
    commands = (
        ("run", digits),
        ("card", digits),
        ("takedown", requests, "--manifest", manifest),
        ("takedown", requests, "--root", out),
        ("export", digits, "--out", tmp_path / "hf"),
    )
    for old, new, text in edits:
        with edited(manifest, old, new), nothing_lost(out):
            for command in commands:
                said = failing(*command)
                assert str(manifest) in said and text in said, (command, said)
    assert not (tmp_path / "hf").exists() and not (out / "takedown.json").exists()
    assert call("run", digits) == 0, "put back, it is as it was"


def test_a_manifest_or_take_down_list_edited_by_hand_is_refused_by_a_training(tmp_path: Path, failing: Failing) -> None:
    manifest = make_latent_manifest(tmp_path / "data", train=16, validation=16)
    page = tiny_page(tmp_path, manifest)
    with one_rank():
        with edited(manifest, '"num_samples": 16', '"num_samples": 15'):
            said = failing("train", page, command=sdtrain, program="sdtrain")
        assert f"{manifest}: content has sha256 " in said and "manifests are never edited, write a new one" in said
        take_down(manifest, "000000003")
        with edited(manifest.with_name("takedown.json"), "000000003", "000000004"):
            said = failing("train", page, command=sdtrain, program="sdtrain")
        assert f"{manifest.with_name('takedown.json')}: not a take-down list of `sdtrain-data takedown`" in said
    assert not (tmp_path / "run").exists()


# Fingerprints ---------------------------------------------------------------------------------------------------------


def tiny_autoencoder(folder: Path, **changes: object) -> Path:
    settings = {"latent_channels": 4, "channels": [32, 32], "layers_per_block": 1, "attention_in_middle": False}
    save_autoencoder(AutoencoderKL(**{**settings, "scaling_factor": 1.0, **changes}), folder)
    return folder


def test_latents_of_another_autoencoder_are_refused_by_a_training(tmp_path: Path, failing: Failing) -> None:
    mine, other = (tiny_autoencoder(tmp_path / name) for name in ("mine", "other"))  # other random weights
    path = make_latent_manifest(tmp_path / "data", train=16, validation=16)
    plain = Manifest.load(path)
    path.unlink()
    facts = {"autoencoder": autoencoder_facts(str(other)) | {"precision": "fp32"}}
    write_manifest(path, plain.shards, fingerprint={**plain.fingerprint, **facts})
    page = tiny_page(tmp_path, path, autoencoder={"preset": None, "weights": str(mine)})
    before = {file: file.read_bytes() for file in (tmp_path / "data").iterdir()}
    with one_rank():
        said = failing("train", page, command=sdtrain, program="sdtrain")
    assert said.startswith(f"{path}: the shards were made with other parts than this recipe's:\n  autoencoder.")
    assert f"expected '{autoencoder_facts(str(mine))['weights_sha256']}'" in said, said
    assert "Make the shards again with the recipe's parts, or point data.manifest at shards that fit." in said
    assert {file: file.read_bytes() for file in (tmp_path / "data").iterdir()} == before
    assert not (tmp_path / "run").exists()


def test_shards_of_another_stage_are_refused(tmp_path: Path, failing: Failing) -> None:
    """Pictures where a training wants latents."""
    with ShardWriter(tmp_path / "data" / "0.tar") as writer:
        writer.write("a", {"jpg": jpeg(0), "txt": "x"})
    path = tmp_path / "data" / "manifest.json"
    entry = describe_shard(tmp_path / "data" / "0.tar", split="train", folder=tmp_path / "data")
    write_manifest(path, [entry], fingerprint=Manifest.load(make_latent_manifest(tmp_path / "x")).fingerprint)
    with one_rank():
        said = failing("train", tiny_page(tmp_path, path), command=sdtrain, program="sdtrain")
    assert f"{path}: holds no 'moments' (moments.npy), which this task trains on; it holds jpg" in said
