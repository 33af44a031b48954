"""Shards of others: the same shards as a download would have made, hostile tars refused, every sample accounted for."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from data_pipeline import cli
from data_pipeline.build import stages_for
from data_pipeline.cluster import Executor, InlineExecutor, RayExecutor
from data_pipeline.ledger import sha256_file
from data_pipeline.resize import Resizer
from data_pipeline.runner import Runner
from data_pipeline.stages.identity import identity
from sdtrain.config.curation import ContentDedupConfig
from sdtrain.config.ingestion import (
    DownloadConfig,
    FilterConfig,
    IngestionConfig,
    LaionSource,
    RunnerConfig,
    ShardsSource,
    ValidationSplitConfig,
)
from sdtrain.data.manifest import Manifest
from sdtrain.data.shard import ShardReader
from sdtrain.errors import DataError, ExitCode

SIZE = 32
OPEN = FilterConfig(
    min_aesthetic=None,
    min_similarity=None,
    min_width=None,
    min_height=None,
    min_aspect_ratio=None,
    max_aspect_ratio=None,
    min_caption_chars=None,
    max_pwatermark=None,
    nsfw=None,
)


@pytest.fixture(autouse=True)
def _unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker prepares its process for good; here that is the tests' own process."""
    monkeypatch.setattr("data_pipeline.stages.adopt.limit_memory", lambda extra_bytes: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**30))


def picture(seed: int, size: tuple[int, int] = (48, 40), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """As webdataset's own tool writes it: `__key__` and bytes by field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        writer = TarWriter(file, encoder=False)
        for sample in samples:
            writer.write(dict(sample))
        writer.close()


def sample(number: int, **changes: Any) -> dict[str, Any]:
    """A sample as img2dataset leaves it."""
    facts = {
        "caption": f"picture number {number}",
        "url": f"http://host/{number}.jpg",
        "key": f"{number:09d}",
        "status": "success",
        "error_message": None,
        "width": 48,
        "height": 40,
        "original_width": 480,
        "original_height": 400,
        "similarity": 0.25 + number / 100,
        "punsafe": 0.01,
        "sha256": "0" * 64,
        **changes,
    }
    fields = {"jpg": picture(number), "txt": facts["caption"].encode(), "json": json.dumps(facts, indent=4).encode()}
    return {"__key__": f"{number:09d}", **fields}


def page(out: Path, shards: Path | str, **sections: Any) -> IngestionConfig:
    settings = {
        "filter": OPEN,
        "validation": ValidationSplitConfig(num_samples=3),
        "download": DownloadConfig(image_size=SIZE, samples_per_shard=5),
    }
    return IngestionConfig(
        schema_version=1,
        kind="ingestion",
        output=out,
        source=ShardsSource(type="shards", shards=str(shards)),
        **(settings | sections),
    )


def run(config: IngestionConfig, executor: Executor | None = None) -> None:
    Runner(output=config.output, executor=executor or InlineExecutor(), max_attempts=1).run(stages_for(config))


def samples_of(folder: Path) -> dict[str, dict[str, Any]]:
    """All samples of a folder of shards by their key, with their fields."""
    found = {}
    for path in sorted(folder.glob("0*.tar")):
        with ShardReader(path) as shard:
            for number, key in enumerate(shard.keys):
                fields = {name: shard.read(number, name) for name in shard.fields}
                found[key] = fields | {"json": shard.decode(number, "json"), "shard": path.name}
    return found


def test_samples_get_the_keys_split_parts_and_pixels_of_a_download(tmp_path: Path) -> None:
    samples = [sample(number) for number in range(14)]
    write_tar(tmp_path / "given/00000.tar", samples[:9])
    write_tar(tmp_path / "given/00001.tar", samples[9:] + samples[2:3])  # one URL twice
    run(page(tmp_path / "out", tmp_path / "given"))
    found = samples_of(tmp_path / "out/04-download")
    assert set(found) == {identity(f"http://host/{number}.jpg", "", "url").hex() for number in range(14)}
    resizer = Resizer(mode="center_crop", shapes=((SIZE, SIZE),), only_if_bigger=True, jpeg_quality=95)
    for number in range(14):
        fields = found[identity(f"http://host/{number}.jpg", "", "url").hex()]
        facts = fields["json"]
        assert fields["jpg"] == resizer(samples[number]["jpg"]).jpeg
        assert fields["txt"].decode() == facts["caption"] == f"picture number {number}"
        assert facts["original_size"] == [48, 40] and facts["size"] == [SIZE, SIZE]
        assert facts["scores"]["similarity"] == 0.25 + number / 100
        assert facts["sha256"] != "0" * 64  # what a stranger's json claims is not taken over
        assert facts["adopted"] == {"shard": f"0000{int(number >= 9)}.tar", "key": f"{number:09d}"}
    splits = [fields["json"]["split"] for fields in found.values()]
    assert splits == ["train"] * 11 + ["validation"] * 3
    manifest = Manifest.load(tmp_path / "out/manifest.json")
    assert [(entry.split, entry.num_samples) for entry in manifest.shards] == [
        ("train", 5),
        ("train", 5),
        ("train", 1),
        ("validation", 3),
    ]
    assert json.loads((tmp_path / "out/03-dedup-pick/duplicates.json").read_text())["duplicates"] == 1


def bad_samples() -> list[dict[str, Any]]:
    """One of each kind that cannot be taken, with its reason as key."""
    still, deep, frames = picture(1), io.BytesIO(), io.BytesIO()
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(deep, "PNG")
    images = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    images[0].save(frames, "WEBP", save_all=True, append_images=images[1:])
    return [
        {"__key__": "no_picture", "txt": b"x"},
        {"__key__": "bad_text", "jpg": still, "txt": b"\xff\xfe"},
        {"__key__": "bad_json", "jpg": still, "json": b"[1, 2]"},
        {"__key__": "not_an_image", "jpg": b"<html>"},
        {"__key__": "too_large", "jpg": still + bytes(70_000)},
        {"__key__": "animated", "webp": frames.getvalue()},
        {"__key__": "bit_depth", "png": deep.getvalue()},
        {"__key__": "too_many_pixels", "jpg": picture(2, (300, 300))},
        {"__key__": "too_small", "jpg": picture(3, (31, 50))},
        {"__key__": "undecodable", "png": picture(4, kind="PNG")[:700]},
        {"__key__": "refused:blocked_url", "jpg": picture(5), "json": b'{"url": "http://never"}'},
    ]


def test_every_sample_that_is_not_taken_is_counted_by_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"__key__": "plain", "JPG": picture(9)}, {"__key__": "gray", "png": picture(8, kind="PNG", mode="L")}]
    write_tar(tmp_path / "given/a.tar", bad_samples() + good)
    write_tar(tmp_path / "given/b.tar", [sample(number) for number in range(4)])
    write_tar(tmp_path / "given/c.tar", [])
    (tmp_path / "never.txt").write_text("http://never\n")
    download = DownloadConfig(
        image_size=SIZE, max_bytes=65_536, max_pixels=50_000, blocked_urls=(tmp_path / "never.txt",)
    )
    run(page(tmp_path / "out", tmp_path / "given", download=download, validation=ValidationSplitConfig(num_samples=0)))
    first = json.loads((tmp_path / "out/01-metadata/summary.json").read_text())
    second = json.loads((tmp_path / "out/04-download/summary.json").read_text())
    reasons = first["rejected"] | second["reasons"]
    assert reasons.pop("success") == 6 == second["stored"]
    assert reasons == {row["__key__"]: 1 for row in bad_samples()}
    assert first["samples"] == 17 == sum(reasons.values()) + 6
    listed = pq.read_table(tmp_path / "out/04-download/00000.failed.parquet").to_pylist()
    assert {row["reason"] for row in listed} == set(second["reasons"]) - {"success"}
    shown = capsys.readouterr().out
    assert "metadata: 12 samples in 3 shards, 1 bad_json, 1 bad_text" in shown and "undecodable" in shown
    found = samples_of(tmp_path / "out/04-download")
    (plain,) = (fields for fields in found.values() if fields["json"]["adopted"]["key"] == "plain")
    assert plain["json"]["url"].startswith("sha256:") and plain["txt"] == b""


def hostile(kind: str) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        names = {"traversal": "../../outside.jpg", "absolute": "/etc/outside.jpg", "twice": "000000001.jpg"}
        member = tarfile.TarInfo(names.get(kind, "000000009.jpg"))
        kinds = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
        member.type = kinds.get(kind, tarfile.REGTYPE)
        member.linkname = "/etc/passwd" if kind in ("symlink", "hardlink") else ""
        body = picture(1) if member.type == tarfile.REGTYPE else b""
        member.size = len(body)
        tar.addfile(member, io.BytesIO(body))

    return add


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("traversal", r"member '\.\./\.\./outside\.jpg' has an absolute name or '\.\.' in it"),
        ("absolute", r"member '/etc/outside\.jpg' has an absolute name or '\.\.' in it"),
        ("symlink", r"member '000000009\.jpg' is no regular file"),
        ("hardlink", r"member '000000009\.jpg' is no regular file"),
        ("device", r"member '000000009\.jpg' is no regular file"),
        ("twice", r"member '000000001\.jpg' is there twice"),
    ],
)
def test_a_hostile_tar_is_refused_by_name_and_nothing_else_is_lost(tmp_path: Path, kind: str, message: str) -> None:
    write_tar(tmp_path / "given/0.tar", [sample(0)])
    write_tar(tmp_path / "given/1.tar", [sample(1)])
    with tarfile.open(tmp_path / "given/1.tar", "a") as tar:
        hostile(kind)(tar)
    write_tar(tmp_path / "given/2.tar", [sample(2)])
    before = {path: sha256_file(path) for path in (tmp_path / "given").iterdir()}
    config = page(tmp_path / "out", tmp_path / "given")
    advice = r"; take this tar out of source\.shards, or write it anew with webdataset"
    with pytest.raises(DataError, match=r"(?s)stage metadata: 1 of 3 units failed.*1\.tar: " + message + ".*" + advice):
        run(config)
    (dead,) = json.loads((tmp_path / "out/dead_letter.json").read_text())
    assert dead["inputs"] == [str(tmp_path / "given/1.tar")]
    assert {path: sha256_file(path) for path in (tmp_path / "given").iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "out/01-metadata").glob("0*.parquet")) == [
        "00000.parquet",
        "00002.parquet",
    ]
    assert not (tmp_path / "outside.jpg").exists()
    (tmp_path / "given/1.tar").unlink()
    run(page(tmp_path / "out", tmp_path / "given", validation=ValidationSplitConfig(num_samples=0)))
    assert len(samples_of(tmp_path / "out/04-download")) == 2


def test_the_command_ends_with_one_message_and_the_code_for_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "given/1.tar", [sample(1)])
    with tarfile.open(tmp_path / "given/1.tar", "a") as tar:
        hostile("traversal")(tar)
    text = f"schema_version: 1\nkind: ingestion\noutput: {tmp_path}/out\n"
    (tmp_path / "page.yaml").write_text(f"{text}source: {{type: shards, shards: {tmp_path}/given}}\n")
    monkeypatch.setattr("data_pipeline.build.executor_for", lambda page: _Inline())
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(tmp_path / "page.yaml")])
    assert ended.value.code == ExitCode.DATA
    told = capsys.readouterr().err
    assert "sdtrain-data: stage metadata: 1 of 1 units failed" in told and "Traceback" not in told


class _Inline(InlineExecutor):
    def __enter__(self) -> _Inline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nothing was started."""


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda given: None, r"source\.shards: .*given: no tar there; give a folder of \*\.tar, a glob such as"),
        (lambda given: given.mkdir(), r"source\.shards: .*given: no tar there"),
        (
            lambda given: write_tar(given / "0.tar", [{"__key__": "a", "txt": b"x"}]),
            r"1 tars without a sample that",
        ),
        (lambda given: write_bytes(given / "0.tar", b"no tar at all" * 99), r"0\.tar: not a readable tar.*; take this"),
        (lambda given: cut(given / "0.tar"), r"0\.tar: .*; take this tar out of source\.shards"),
    ],
)
def test_folders_that_give_nothing_are_errors(tmp_path: Path, prepare: Callable[[Path], None], message: str) -> None:
    prepare(tmp_path / "given")
    with pytest.raises(DataError, match=message):
        run(page(tmp_path / "out", tmp_path / "given"))


def write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(data)


def cut(path: Path) -> None:
    write_tar(path, [sample(0), sample(1)])
    path.write_bytes(path.read_bytes()[:3000])


def test_the_filter_sees_what_the_json_says_and_names_what_is_missing(tmp_path: Path) -> None:
    write_tar(tmp_path / "given/0.tar", [sample(number, similarity=number / 10) for number in range(6)])
    rules = OPEN.model_copy(update={"min_similarity": 0.28, "min_width": SIZE})
    run(page(tmp_path / "out", tmp_path / "given", filter=rules, validation=ValidationSplitConfig(num_samples=0)))
    funnel = json.loads((tmp_path / "out/02-filter/funnel.json").read_text())
    assert {rule["rule"]: rule["rejected"] for rule in funnel["rules"]}["similarity"] == 3
    rules = OPEN.model_copy(update={"min_aesthetic": 5.0})
    with pytest.raises(DataError, match=r"(?s)0\.tar: .*aesthetic.*columns present: url, caption, width, height"):
        run(page(tmp_path / "out", tmp_path / "given", filter=rules))


def test_a_tar_that_changed_costs_its_own_parts_and_is_never_mixed(tmp_path: Path) -> None:
    for index in range(3):
        write_tar(tmp_path / f"given/{index}.tar", [sample(5 * index + number) for number in range(5)])
    config = page(tmp_path / "out", tmp_path / "given", validation=ValidationSplitConfig(num_samples=0))
    run(config)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/04-download").glob("0*.tar")}
    write_tar(tmp_path / "given/1.tar", [sample(5 + number) | {"jpg": picture(90 + number)} for number in range(5)])
    with pytest.raises(DataError, match=r"the picture of http://host/5\.jpg has changed since it was listed; run"):
        run_stage_alone(config, "adopt")
    run(config)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/04-download").glob("0*.tar")}
    assert [name for name in before if before[name] != after[name]] == ["00001.tar"]
    os.truncate(tmp_path / "given/2.tar", 2000)
    with pytest.raises(DataError, match=r"2\.tar: \d+ of \d+ bytes at \d+; the tar was cut off, run again"):
        run_stage_alone(config, "adopt", 2)
    (tmp_path / "given/2.tar").rename(tmp_path / "elsewhere.tar")
    with pytest.raises(DataError, match=r"2\.tar: cannot be opened \(No such file or directory\); shards must stay"):
        run_stage_alone(config, "adopt", 2)


def run_stage_alone(config: IngestionConfig, name: str, unit: int = 1) -> None:
    """A unit's work without the runner, which would look at the stages before."""
    (stage,) = (stage for stage in stages_for(config) if stage.name == name)
    (config.output / "scratch").mkdir(exist_ok=True)
    stage.worker()(stage.units()[unit], config.output / "scratch")


def test_shards_behind_a_url_are_copied_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [sample(number) for number in range(4)])
    files = fsspec.filesystem("memory")
    files.pipe("/adopt-test/0.tar", (tmp_path / "0.tar").read_bytes())
    config = page(tmp_path / "out", "memory://adopt-test", validation=ValidationSplitConfig(num_samples=1))
    run(config)
    card = json.loads((tmp_path / "out/01-metadata/00000.json").read_text())
    assert card["source"].startswith("memory://") and (tmp_path / "out/01-metadata/00000.tar").exists()
    files.rm("/adopt-test", recursive=True)
    with pytest.raises(DataError, match=r"source\.shards: memory://adopt-test: no tar there|not there"):
        run(config)
    assert len(samples_of(tmp_path / "out/04-download")) == 4


@pytest.mark.long
def test_any_number_of_workers_gives_the_same_shards_and_manifest(tmp_path: Path) -> None:
    for index in range(3):
        write_tar(tmp_path / f"given/{index}.tar", [sample(7 * index + number) for number in range(7)])
    digests = []
    for name, executor in (("inline", nullcontext(InlineExecutor())), ("ray", RayExecutor(workers=2))):
        out = tmp_path / name
        with executor as workers:
            run(page(out, tmp_path / "given", content_dedup=ContentDedupConfig()), workers)
        paths = [*(out / "04-select").glob("0*"), *(out / "04-content-dedup").glob("0*"), out / "manifest.json"]
        digests.append({str(path.relative_to(out)): sha256_file(path) for path in paths})
    assert digests[0] == digests[1] and len(digests[0]) > 15


# ------------------------------------------------------------------- beside img2dataset and the download, on loopback


def in_process_of_its_own(scenario: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, scenario, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.heavy
def test_a_picture_beyond_the_memory_limit_costs_one_sample(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (7500, 7500), "red").save(stream, "PNG")
    write_tar(tmp_path / "given/0.tar", [sample(0), sample(1) | {"jpg": stream.getvalue()}, sample(2)])
    in_process_of_its_own("bomb", tmp_path)
    summary = json.loads((tmp_path / "out/04-download/summary.json").read_text())
    assert summary["reasons"] == {"success": 2, "out_of_memory": 1}


def bomb(folder: Path) -> None:
    """Adopt with 64 MiB to spare; the picture needs 169 MB."""
    runner = RunnerConfig(memory_per_worker_bytes=64 << 20)
    run(page(folder / "out", folder / "given", runner=runner, validation=ValidationSplitConfig(num_samples=0)))


@pytest.mark.long
def test_what_img2dataset_fetched_becomes_what_the_download_would_have_made(tmp_path: Path) -> None:
    in_process_of_its_own("fetch_with_both", tmp_path)
    downloaded, adopted = samples_of(tmp_path / "download/04-download"), samples_of(tmp_path / "adopt/04-download")
    assert list(downloaded) == list(adopted) and len(adopted) == 11
    for key, fields in downloaded.items():
        other = adopted[key]
        assert {name: fields[name] for name in ("jpg", "txt", "shard")} == {
            name: other[name] for name in ("jpg", "txt", "shard")
        }
        same = ("url", "url_sha256", "sha256", "md5", "original_size", "crop", "size", "split", "caption", "scores")
        assert {name: fields["json"][name] for name in same} == {name: other["json"][name] for name in same}


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(picture(int(self.path.strip("/").removesuffix(".jpg"))))

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


def fetch_with_both(folder: Path) -> None:
    """Our download, and img2dataset's own run followed by adoption, of the same table."""
    import img2dataset

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    names = range(11)
    table = pa.table(
        {
            "URL": [f"http://127.0.0.1:{port}/{name}.jpg" for name in names],
            "TEXT": [f"picture {name}" for name in names],
            "similarity": [0.3 + index / 100 for index in range(len(names))],
        }
    )
    (folder / "metadata").mkdir()
    pq.write_table(table, folder / "metadata/0.parquet")
    img2dataset.download(
        url_list=str(folder / "metadata/0.parquet"),
        input_format="parquet",
        url_col="URL",
        caption_col="TEXT",
        save_additional_columns=["similarity"],
        output_format="webdataset",
        output_folder=str(folder / "theirs"),
        disable_all_reencoding=True,
        processes_count=1,
        thread_count=4,
        number_sample_per_shard=100,
    )
    download = DownloadConfig(
        contact="nobody@example.org", image_size=SIZE, samples_per_shard=5, allow_loopback=True, allowed_ports=(port,)
    )
    ours = page(folder / "download", "none", download=download)
    run(ours.model_copy(update={"source": LaionSource(type="laion", metadata=str(folder / "metadata"))}))
    run(page(folder / "adopt", folder / "theirs", download=download))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
