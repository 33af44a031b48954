"""A web site on loopback, parts of metadata that name its pictures, and a network to ask for them in."""

from __future__ import annotations

import fcntl
import io
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

from data_pipeline.runner import Runner
from data_pipeline.stages.download import DownloadStage
from sdtrain.config.ingestion import DownloadConfig

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


def lone_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14s", b"lo", 0x1 | 0x40, b""))  # SIOCSIFFLAGS: up, running
    assert [name for _, name in socket.if_nameindex()] == ["lo"]


def in_namespace(script: str, scenario: str, folder: Path, limit_seconds: float = 240) -> None:
    """Run a scenario of a test file as a program of its own."""
    cut_off = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*cut_off, "true"], capture_output=True).returncode != 0:
        pytest.fail("needs root or user namespaces (`unshare --net`), to cut the test off from every network")
    command = [*cut_off, sys.executable, script, scenario, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit_seconds)
    assert ended.returncode == 0, ended.stdout + ended.stderr
