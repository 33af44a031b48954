"""The download stage: hostile rows are counted and none is stored, the same part gives the same bytes.

Whatever fetches runs as a process of its own in a network namespace that holds nothing but `lo`: this file run as a
script with the name of a scenario.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from data_pipeline.cluster import InlineExecutor, RayExecutor
from data_pipeline.engine import Collector, reason_of
from data_pipeline.runner import Runner
from data_pipeline.stage import Unit
from data_pipeline.stages.download import (
    DownloadStage,
    ShardFailedError,
    _refuse_total_loss,
    download_part,
    read_part,
)
from data_pipeline.transport_policy import RefusedError, TransportPolicy
from sdtrain.config.ingestion import DownloadConfig
from sdtrain.data.shard import ShardReader
from sdtrain.errors import ConfigError, DataError

CONTACT = "https://example.org/crawl"
SIDE = 32


def image(name: str, size: tuple[int, int], image_format: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    random = np.random.default_rng(zlib.crc32(name.encode()))
    pixels = random.integers(0, 255, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(stream, image_format)
    return stream.getvalue()


def png(width: int, height: int, bit_depth: int, color_type: int, data: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """A real PNG of 400 megapixels in a few dozen kilobytes."""
    return png(20_000, 20_000, 1, 0, zlib.compress(bytes(20_000 * 2_501), 9))


class Site(BaseHTTPRequestHandler):
    """Images by name, and what goes wrong with them."""

    requests: ClassVar[Counter[str]] = Counter()
    bomb: ClassVar[bytes] = b""
    is_open: ClassVar[bool] = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        kind, _, name = self.path.strip("/").partition("/")
        self.requests[self.path] += 1
        with suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, f"page_{kind}")(name)
        self.close_connection = True

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def page_image(self, name: str) -> None:
        time.sleep(0.02 * (zlib.crc32(name.encode()) % 5))  # arrive out of order
        width, height, image_format = name.split("-")[1:4]
        self.answer(image(name, (int(width), int(height)), image_format))

    def page_gone(self, name: str) -> None:
        self.answer(b"", 410)

    def page_html(self, name: str) -> None:
        self.answer(b"<html>not found</html>" * 100, Content_Type="image/jpeg")

    def page_away(self, name: str) -> None:
        self.answer(b"", 302, Location=name)

    def page_endless(self, name: str) -> None:
        self.answer(b"\xff\xd8\xff\xe0")
        end = time.monotonic() + 20
        while time.monotonic() < end:
            self.wfile.write(bytes(50_000))

    def page_slow(self, name: str) -> None:
        self.answer(b"\xff\xd8\xff\xe0")
        end = time.monotonic() + 20
        while time.monotonic() < end:
            self.wfile.write(b"x")
            time.sleep(0.1)

    def page_gzip(self, name: str) -> None:
        self.answer(zlib.compress(bytes(10_000_000)), Content_Encoding="gzip")

    def page_bomb(self, name: str) -> None:
        self.answer(self.bomb)

    def page_broken(self, name: str) -> None:
        self.answer(png(64, 64, 8, 2, b"no zlib stream"))

    def page_noai(self, name: str) -> None:
        self.answer(image(name, (64, 64)), X_Robots_Tag="noai")

    def page_busy(self, name: str) -> None:
        if self.requests[self.path] < 3:
            self.answer(b"", 503, Retry_After="0")
        else:
            self.answer(image(name, (64, 64)))

    def page_later(self, name: str) -> None:
        """Busy until it is told otherwise."""
        if Site.is_open:
            self.page_image(name)
        else:
            self.answer(b"", 500)

    def page_down(self, name: str) -> None:
        self.answer(b"", 503, Retry_After="86400")


def serve() -> int:
    site = ThreadingHTTPServer(("0.0.0.0", 0), Site)
    site.daemon_threads = True
    threading.Thread(target=site.serve_forever, daemon=True).start()
    return site.server_address[1]


def write_part(folder: Path, index: int, urls: list[str], split: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = range(len(urls))
    columns = {
        "url": urls,
        "caption": [f"caption {row} of part {index}" for row in rows],
        "width": [64] * len(urls),
        "height": [64] * len(urls),
        "aesthetic_v2": [6.5 + row / 8 for row in rows],
        "punsafe": [float("nan")] * len(urls),
        "source_hash": list(rows),
        "nsfw": ["UNLIKELY"] * len(urls),
        "key": [f"{index:04x}{row:028x}" for row in rows],
        "split": [split] * len(urls),
    }
    path = folder / f"{index:05d}.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def settings(port: int, **changes: Any) -> DownloadConfig:
    return DownloadConfig(
        **{
            "contact": CONTACT,
            "image_size": SIDE,
            "samples_per_shard": 100,
            "processes": 2,
            "threads": 8,
            "timeout_seconds": 3.0,
            "total_timeout_seconds": 3.0,
            "max_bytes": 1_000_000,
            "max_pixels": 1_000_000,
            "allowed_ports": (port,),
            "allow_loopback": True,
            **changes,
        }
    )


def run(output: Path, stage: DownloadStage, executor: Any) -> None:
    Runner(output=output, executor=executor, max_attempts=1, console=Console(file=io.StringIO())).run([stage])


# ------------------------------------------------------------------------------------- scenarios, in the namespace


def scenario_hostile(folder: Path) -> None:
    """One part with a good row of every kind and a bad row of every kind."""
    port = serve()
    Site.bomb = bomb()
    here = f"http://127.0.0.1:{port}"
    rows = [
        (f"{here}/image/a-64-48-JPEG", "success"),
        (f"{here}/image/b-32-50-PNG", "success"),  # the shorter side fits exactly: cropped all the same
        (f"{here}/image/c-90-40-WEBP", "success"),
        (f"{here}/busy/d", "success"),
        (f"{here}/away//image/e-64-64-JPEG", "success"),
        (f"{here}/image/f-31-64-JPEG", "too_small"),
        (f"{here}/gone/1", "http_410"),
        (f"{here}/html/1", "not_an_image"),
        (f"{here}/endless/1", "too_large"),
        (f"{here}/slow/1", "deadline"),
        (f"{here}/gzip/1", "refused:content_encoding"),
        (f"{here}/bomb/1", "too_many_pixels"),
        (f"{here}/broken/1", "undecodable"),
        (f"{here}/noai/1", "refused:robots_tag"),
        (f"http://127.0.0.2:{port}/down/1", "http_503"),
        (f"{here}/away/file:///etc/passwd", "refused:scheme"),
        (f"{here}/away/http://169.254.169.254:{port}/latest", "refused:link_local"),
        (f"{here}/away/http://10.0.0.1:{port}/", "refused:private_address"),
        ("file:///etc/passwd", "refused:scheme"),
        ("no scheme at all", "refused:scheme"),
        (f"http://10.0.0.1:{port}/", "refused:private_address"),
        (f"http://[::ffff:192.168.0.1]:{port}/", "refused:private_address"),
        ("http://127.0.0.1:22/", "refused:port"),
        ("http://[::1", "refused:url"),
    ]
    write_part(folder / "parts", 0, [url for url, _ in rows])
    stage = DownloadStage(folder / "parts", folder / "one", settings(port), memory_limit_bytes=2_000_000_000)
    run(folder, stage, InlineExecutor())
    stats = json.loads((folder / "one" / "00000.stats.json").read_text())
    assert stats["reasons"] == dict(sorted(Counter(reason for _, reason in rows).items())), stats
    assert (stats["rows"], stats["stored"], stats["split"]) == (len(rows), 5, "train")
    check_samples(folder / "one" / "00000.tar", rows)
    assert sorted(path.name for path in (folder / "one").glob("00000*")) == [
        "00000.failed.parquet",
        "00000.stats.json",
        "00000.tar",
        "00000.tar.index.json",
    ]


def check_samples(shard: Path, rows: list[tuple[str, str]]) -> None:
    with ShardReader(shard) as reader:
        assert reader.keys == [f"{0:04x}{row:028x}" for row in range(5)]
        for sample in range(5):
            pixels, facts = reader.decode(sample, "jpg"), reader.decode(sample, "json")
            assert pixels.shape == (3, SIDE, SIDE)
            assert facts["url"] == rows[sample][0]
            assert reader.decode(sample, "txt") == facts["caption"] == f"caption {sample} of part 0"
        facts = reader.decode(0, "json")
    assert facts["sha256"] == hashlib.sha256(image("a-64-48-JPEG", (64, 48))).hexdigest()
    assert facts["url_sha256"] == hashlib.sha256(rows[0][0].encode()).hexdigest()
    assert (facts["original_size"], facts["crop"], facts["size"]) == ([64, 48], [8, 0, 56, 48], [SIDE, SIDE])
    assert (facts["scores"], facts["source"]) == ({"aesthetic_v2": 6.5}, {"nsfw": "UNLIKELY", "source_hash": 0})
    assert facts["split"] == "train"


def scenario_workers(folder: Path) -> None:
    """Two Ray workers and this process write the same bytes; a second run has nothing to do; the summary adds up."""
    port = serve()
    for index in range(3):
        urls = [f"http://127.0.0.1:{port}/image/{index}.{row}-64-{40 + row}-JPEG" for row in range(12)]
        urls.append(f"http://127.0.0.1:{port}/gone/{index}")
        write_part(folder / "parts", index, urls, "validation" if index == 2 else "train")
    inline = DownloadStage(folder / "parts", folder / "inline", settings(port))
    run(folder, inline, InlineExecutor())
    ray_stage = DownloadStage(folder / "parts", folder / "ray", settings(port), memory_limit_bytes=2_000_000_000)
    with RayExecutor(workers=2) as executor:
        run(folder, ray_stage, executor)
        asked = Site.requests.total()
        run(folder, ray_stage, executor)
    assert asked == 2 * 3 * 13 == Site.requests.total()
    for name in [f"{index:05d}.tar{suffix}" for index in range(3) for suffix in ("", ".index.json")]:
        assert (folder / "inline" / name).read_bytes() == (folder / "ray" / name).read_bytes(), name
    assert json.loads((folder / "ray" / "summary.json").read_text()) == {
        "shards": 3,
        "empty_shards": [],
        "rows": 39,
        "stored": 36,
        "success_rate": 0.9231,
        "reasons": {"success": 36, "http_410": 3},
    }


def scenario_bomb(folder: Path) -> None:
    """A bomb that passes the header check meets the memory limit, and its neighbours arrive."""
    port = serve()
    Site.bomb = bomb()
    here = f"http://127.0.0.1:{port}"
    write_part(folder / "parts", 0, [f"{here}/image/a-64-64-JPEG", f"{here}/bomb/1", f"{here}/image/b-64-64-JPEG"])
    roomy = settings(port, max_pixels=500_000_000)
    stage = DownloadStage(folder / "parts", folder / "one", roomy, memory_limit_bytes=300_000_000)
    run(folder, stage, InlineExecutor())
    stats = json.loads((folder / "one" / "00000.stats.json").read_text())
    assert stats["reasons"] == {"out_of_memory": 1, "success": 2}, stats


def scenario_rounds(folder: Path) -> None:
    """A further round asks only for what may have come back, and makes the shard of a run that met no trouble."""
    port = serve()
    here = f"http://127.0.0.1:{port}"
    urls = [
        f"{here}/later/a-64-48-JPEG",
        f"{here}/image/b-64-48-JPEG",
        f"{here}/gone/c",
        f"{here}/later/d-40-64-PNG",
        f"{here}/image/e-64-64-JPEG",
        f"{here}/image/f-31-64-JPEG",
    ]
    write_part(folder / "parts", 0, urls)
    write_part(folder / "parts", 1, [f"{here}/image/g-64-48-JPEG", f"{here}/gone/h"])

    def bring(name: str, **changes: Any) -> Counter[str]:
        before = Counter(Site.requests)
        run(
            folder,
            DownloadStage(folder / "parts", folder / name, settings(port, retries=0, **changes)),
            InlineExecutor(),
        )
        return Site.requests - before

    def stats(name: str) -> dict[str, int]:
        return json.loads((folder / name / "00000.stats.json").read_text())["reasons"]

    assert bring("one").total() == 8
    assert stats("one") == {"http_410": 1, "http_500": 2, "success": 2, "too_small": 1}
    failed = pq.read_table(folder / "one" / "00000.failed.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in failed] == [
        (0, "http_500"),
        (2, "http_410"),
        (3, "http_500"),
        (5, "too_small"),
    ]
    assert (failed[1]["key"], failed[1]["url"]) == (f"{0:04x}{2:028x}", urls[2])
    assert bring("one").total() == 0
    first = (folder / "one" / "00000.tar").read_bytes()
    later = {"/later/a-64-48-JPEG": 1, "/later/d-40-64-PNG": 1}
    assert bring("one", retry_round=1) == later  # still busy: asked once, the samples stay
    assert (folder / "one" / "00000.tar").read_bytes() == first
    assert bring("one", retry_round=1).total() == 0 == bring("one").total()
    Site.is_open = True
    assert bring("one", retry_round=1).total() == 0
    assert bring("one", retry_round=2) == later
    assert stats("one") == {"http_410": 1, "success": 4, "too_small": 1}
    assert bring("one", retry_round=3).total() == 0  # nothing is left that may come back
    assert bring("two").total() == 8
    for name in ("00000.tar", "00000.tar.index.json", "00000.failed.parquet", "00000.stats.json", "00001.tar"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes(), name
    (folder / "two" / "00000.tar").write_bytes(b"damaged")
    assert bring("two", retry_round=1).total() == 6  # made anew, and only that


def scenario_digests(folder: Path) -> None:
    """Digests are recorded always, and enforced where the table names them; blocked files are not kept."""
    port = serve()
    names = [f"{letter}-64-48-JPEG" for letter in "abcdef"]
    bodies = [image(name, (64, 48)) for name in names]
    path = write_part(folder / "parts", 0, [f"http://127.0.0.1:{port}/image/{name}" for name in names])
    md5 = [hashlib.md5(body).hexdigest() for body in bodies]
    sha256 = [hashlib.sha256(body).hexdigest() for body in bodies]
    table = pq.read_table(path)
    table = table.append_column("md5", pa.array([md5[0].upper(), "0" * 32, None, md5[3], None, None]))
    table = table.append_column("sha256", pa.array([None, None, sha256[2], "0" * 64, None, None]))
    pq.write_table(table, path)
    (folder / "bytes.txt").write_text(f"{md5[4]}\n")
    (folder / "urls.txt").write_text(f"http://127.0.0.1:{port}/image/{names[5]}\n")
    lists = {"blocked_bytes": (folder / "bytes.txt",), "blocked_urls": (folder / "urls.txt",)}
    run(folder, DownloadStage(folder / "parts", folder / "one", settings(port, **lists)), InlineExecutor())
    failed = pq.read_table(folder / "one" / "00000.failed.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in failed] == [
        (1, "refused:digest"),
        (3, "refused:digest"),
        (4, "refused:blocked_bytes"),
        (5, "refused:blocked_url"),
    ]
    assert Site.requests[f"/image/{names[5]}"] == 0
    with ShardReader(folder / "one" / "00000.tar") as reader:
        facts = [reader.decode(sample, "json") for sample in range(len(reader))]
    assert [(each["md5"], each["sha256"]) for each in facts] == [(md5[0], sha256[0]), (md5[2], sha256[2])]
    assert "md5" not in facts[0]["source"] and "sha256" not in facts[1]["source"]


def scenario_buckets(folder: Path) -> None:
    """Each picture gets the shape nearest to its own, and the sample says which."""
    port = serve()
    sizes = [(64, 64), (128, 64), (64, 110), (70, 60), (30, 90)]
    write_part(folder / "parts", 0, [f"http://127.0.0.1:{port}/image/a-{w}-{h}-JPEG" for w, h in sizes])
    stage = DownloadStage(folder / "parts", folder / "one", settings(port, resize_mode="buckets"))
    assert stage.config_facts()["bucket_shapes"] == [[24, 40], [32, 32], [40, 24]]
    run(folder, stage, InlineExecutor())
    with ShardReader(folder / "one" / "00000.tar") as reader:
        facts = [reader.decode(sample, "json") for sample in range(len(reader))]
        shapes = [reader.decode(sample, "jpg").shape for sample in range(len(reader))]
    assert [each["size"] for each in facts] == [[32, 32], [40, 24], [24, 40], [32, 32], [24, 40]]
    assert [(each["width"], each["height"]) for each in facts] == [tuple(each["size"]) for each in facts]
    assert shapes == [(3, each["height"], each["width"]) for each in facts]
    assert [each["original_size"] for each in facts] == [list(size) for size in sizes]
    assert facts[1]["crop"] == [10, 0, 117, 64]


def scenario_settings(folder: Path) -> None:
    """Three in one process, which spares two imports of img2dataset."""
    for part in (scenario_rounds, scenario_digests, scenario_buckets):
        part(folder / part.__name__)


def scenario_lost(folder: Path) -> None:
    """All rows fail: for good reasons an empty shard, for passing ones a failure."""
    port = serve()
    gone = write_part(folder / "parts", 0, [f"http://127.0.0.1:{port}/gone/1", "file:///etc/passwd"])
    down = write_part(folder / "parts", 1, [f"http://127.0.0.1:{port}/gone/1", f"http://127.0.0.2:{port}/down/1"])
    work = DownloadStage(folder / "parts", folder / "one", settings(port)).worker()
    for name in ("0", "1"):
        (folder / name).mkdir()
    stats = work(Unit(0, (gone,)), folder / "0")
    assert stats == {"rows": 2, "stored": 0, "split": "train", "reasons": {"http_410": 1, "refused:scheme": 1}}
    with ShardReader(folder / "0" / "00000.tar") as reader:
        assert len(reader) == 0
    with pytest.raises(ShardFailedError, match=r"not one of 2 images arrived: \{'http_410': 1, 'http_503': 1\}"):
        work(Unit(1, (down,)), folder / "1")
    assert list((folder / "1").iterdir()) == []


def lone_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14s", b"lo", 0x1 | 0x40, b""))  # SIOCSIFFLAGS: up, running
    assert [name for _, name in socket.if_nameindex()] == ["lo"]


def in_namespace(scenario: str, folder: Path) -> None:
    cut_off = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*cut_off, "true"], capture_output=True).returncode != 0:
        pytest.fail("needs root or user namespaces (`unshare --net`), to cut the test off from every network")
    command = [*cut_off, sys.executable, __file__, scenario, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("scenario", ["hostile", "workers", "bomb", "lost", "settings"])
def test_scenario(scenario: str, tmp_path: Path) -> None:
    in_namespace(scenario, tmp_path)


# --------------------------------------------------------------------------------------------- without any network


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (None, "success"),
        ("refused:link_local 169.254.169.254 of host a", "refused:link_local"),
        ("http_404 Not Found", "http_404"),
        ("http_404x", "internal_error"),
        ("too_large", "too_large"),
        ("unknown url type: 'a'", "refused:scheme"),
        ("Invalid IPv6 URL", "refused:url"),
        ("too_small 20x31; stored are (32, 32)", "too_small"),
        ("Unable to allocate 1. GiB for an array", "out_of_memory"),
        ("", "out_of_memory"),
        ("a surprise", "internal_error"),
    ],
)
def test_messages_become_reasons(message: str | None, reason: str) -> None:
    assert reason_of(message) == reason


def test_only_permanent_reasons_make_an_empty_shard() -> None:
    part = Path("00007.parquet")
    _refuse_total_loss({"http_404": 5, "refused:scheme": 1, "too_small": 1, "unknown_host": 2}, part)
    _refuse_total_loss({"success": 1, "timeout": 99}, part)
    _refuse_total_loss({}, part)
    for reason in ("timeout", "http_503", "connect_failed", "dns_failed", "internal_error"):
        with pytest.raises(ShardFailedError, match=r"00007.parquet: not one of 3 images arrived"):
            _refuse_total_loss({"http_404": 2, reason: 1}, part)


def test_parts_must_have_their_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a"], "TEXT": ["b"]}), tmp_path / "00000.parquet")
    with pytest.raises(
        DataError, match=r"columns \['key', 'caption', 'split'\] are missing, there are \['url', 'TEXT'\]"
    ):
        read_part(tmp_path / "00000.parquet", 10)


def unused() -> Collector:
    def resizer(body: memoryview) -> Any:
        raise AssertionError("nothing was fetched")

    return Collector(resizer)


def test_a_part_larger_than_a_shard_is_refused(tmp_path: Path) -> None:
    path = write_part(tmp_path, 0, ["http://a.example/"] * 3)
    with pytest.raises(DataError, match=r"3 rows, download.samples_per_shard allows 2; run the stages before again"):
        download_part(Unit(0, (path,)), tmp_path, collector=unused(), settings=settings(80, samples_per_shard=2))


def test_a_part_belongs_to_one_split(tmp_path: Path) -> None:
    columns = {"key": ["a", "b"], "url": ["a", "b"], "caption": ["a", "b"], "split": ["train", "validation"]}
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
    with pytest.raises(DataError, match=r"holds splits \['train', 'validation'\]; a shard belongs to exactly one"):
        read_part(tmp_path / "00000.parquet", 10)


def test_the_contact_is_asked_for_before_anything_runs(tmp_path: Path) -> None:
    write_part(tmp_path / "parts", 0, ["http://a.example/"])
    stage = DownloadStage(tmp_path / "parts", tmp_path / "out", DownloadConfig())
    with pytest.raises(ConfigError, match=r"download.contact is ''; give a URL or mail address"):
        stage.units()


def test_patience_is_no_reason_to_fetch_again(tmp_path: Path) -> None:
    def facts(**changes: Any) -> Any:
        return DownloadStage(tmp_path, tmp_path, settings(80, **changes)).config_facts()

    assert facts(threads=3, processes=9, timeout_seconds=2.0, retries=0) == facts()
    assert facts(connections_per_host=1, host_gap_seconds=2.0, blocked_urls=(tmp_path / "a",), retry_round=4) == facts()
    assert facts(jpeg_quality=90) != facts()
    assert "bucket_shapes" not in facts()
    shapes = [facts(resize_mode="buckets", bucket_shapes=shapes) for shapes in (None, ((32, 64),))]
    assert shapes[0]["bucket_shapes"] != shapes[1]["bucket_shapes"] == [[32, 64]]
    assert facts()["engine"].startswith("img2dataset 1.47")


def test_each_process_gets_its_share_of_a_host(tmp_path: Path) -> None:
    def policy(**changes: Any) -> TransportPolicy:
        return DownloadStage(tmp_path, tmp_path, settings(80, **changes)).policy

    assert policy(processes=4, connections_per_host=10).connections_per_host == 2
    assert policy(processes=16, connections_per_host=10).connections_per_host == 1
    assert policy(processes=4, host_gap_seconds=0.5).host_gap_seconds == 2.0
    assert policy(honored_robots_tags=("NoAI",)).robots_rules == {"noai"}
    assert policy().robots_rules == {"noai", "noimageai"}


def test_a_block_list_is_looked_at_before_anything_runs(tmp_path: Path) -> None:
    write_part(tmp_path / "parts", 0, ["http://a.example/"])
    stage = DownloadStage(tmp_path / "parts", tmp_path / "out", settings(80, blocked_urls=(tmp_path / "gone.txt",)))
    with pytest.raises(DataError, match=r"download.blocked_urls: .*gone.txt: cannot be read as text"):
        stage.units()


def test_a_collector_counts_what_its_resizer_refuses() -> None:
    def resizer(body: memoryview) -> Any:
        raise RefusedError("too_small", "1x1")

    collector = Collector(resizer)
    assert collector.resize(io.BytesIO(b"x")) == (None, None, None, None, None, "too_small 1x1")
    collector.write(None, "0000000000003", None, {"error_message": "too_small 1x1"})
    collector.write(None, "0000000000004", None, {"error_message": "a surprise"})
    assert collector.failed == {3: "too_small", 4: "internal_error"}
    assert collector.unexpected == {"a surprise"}


if __name__ == "__main__":
    lone_loopback()
    globals()[f"scenario_{sys.argv[1]}"](Path(sys.argv[2]))
