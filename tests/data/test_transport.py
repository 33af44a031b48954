"""The hardened transport against a hostile server, in a network namespace that holds nothing but `lo`."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import gzip
import hashlib
import io
import os
import socket
import ssl
import struct
import subprocess
import threading
import time
import traceback
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from data_pipeline.transport import HardenedOpener
from data_pipeline.transport_policy import RefusedError, TransportPolicy

CONTACT = "https://example.org/crawl"


def encoded(image_format: str, size: tuple[int, int] = (30, 20), **options: Any) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, image_format, **options)
    return stream.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int, bit_depth: int = 8) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, 2, 0, 0, 0))


JPEG = encoded("JPEG")


def refusal(action: Callable[[], Any]) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        action()
    return caught.value


def enter_namespace() -> None:
    """Leave every network but a fresh loopback; needs root or user namespaces."""
    new_user, new_net = 0x10000000, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_net) != 0 and libc.unshare(new_user | new_net) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        up = 0x1 | 0x40
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14s", b"lo", up, b""))  # SIOCSIFFLAGS: no `ip` program needed


def can_enter_namespace() -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            enter_namespace()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def in_namespace(test: Callable[..., None]) -> Callable[..., None]:
    """Run the body of a test in a child process whose only network is loopback."""

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if not can_enter_namespace():
            pytest.fail("needs root or user namespaces (`unshare --net`), to cut the test off from every network")
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            report = b""
            try:
                enter_namespace()
                test(*args, **kwargs)
            except BaseException:
                report = traceback.format_exc().encode()
            os.write(write_end, report)
            os._exit(1 if report else 0)
        os.close(write_end)
        with open(read_end, "rb") as file:
            report = file.read()
        status = os.waitpid(pid, 0)[1]
        assert status == 0, report.decode() or f"the child ended with status {status}"

    return run


class Hostile(BaseHTTPRequestHandler):
    """What the web does to a crawler, by path."""

    requests: ClassVar[Counter[str]] = Counter()
    seen: ClassVar[list[dict[str, str]]] = []
    paths: ClassVar[list[str]] = []
    lock = threading.Lock()
    in_flight = 0
    most_in_flight = 0

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.split("?")[0].strip("/").split("/")[0]
        with self.lock:
            self.requests[name] += 1
            self.seen.append(dict(self.headers.items()))
            self.paths.append(self.path)
        with suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, f"page_{name}")()
        self.close_connection = True

    def answer(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def page_ok(self) -> None:
        self.answer(JPEG, Content_Type="text/plain")

    def page_missing(self) -> None:
        self.answer(b"no", 404)

    def page_html(self) -> None:
        self.answer(b"<html>" * 100_000, Content_Type="image/jpeg")

    def page_away(self) -> None:
        """Redirect to what stands after the question mark; the body would never end."""
        self.send_response(302)
        self.send_header("Location", self.path.split("?", 1)[1])
        self.end_headers()
        self.drip(b"x" * 1000, 0.0)

    def page_raw(self) -> None:
        self.wfile.write("HTTP/1.0 302 Found\r\nLocation: /ok/bücher .jpg\r\n\r\n".encode())

    def page_loop(self) -> None:
        self.answer(b"", 301, Location="/loop")

    def page_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(JPEG)
        self.drip(b"x" * 10_000, 0.0)

    def page_announced(self) -> None:
        self.answer(JPEG, length=10**12)

    def page_chunks(self) -> None:
        """Chunked, and every further chunk is one byte behind an extension that is not image data."""
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(f"{len(JPEG):x}\r\n".encode() + JPEG + b"\r\n")
        self.drip(b"1;" + b"x" * 60_000 + b"\r\n\xff\r\n", 0.0)

    def page_slow(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.drip(b"\xff\xd8\xff\xe0", 0.05)

    def page_headers(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        self.drip(b"X: y\r\n", 0.05)

    def page_silent(self) -> None:
        time.sleep(5)

    def page_gzip(self) -> None:
        self.answer(gzip.compress(JPEG + bytes(50_000_000)), Content_Encoding="gzip")

    def page_bomb(self) -> None:
        self.answer(png_header(20_000, 20_000) + png_chunk(b"IDAT", b"x"))

    def page_noai(self) -> None:
        self.answer(JPEG, X_Robots_Tag="noindex, noai")

    def page_busy(self) -> None:
        if self.requests["busy"] < 3:
            self.answer(b"", 503, Retry_After="1")
        else:
            self.page_ok()

    def page_closed(self) -> None:
        self.answer(b"", 503, Retry_After="86400")

    def page_half(self) -> None:
        self.answer(JPEG, length=len(JPEG) + 10)

    def page_garbage(self) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def page_count(self) -> None:
        with self.lock:
            type(self).in_flight += 1
            type(self).most_in_flight = max(self.most_in_flight, self.in_flight)
        time.sleep(0.05)
        with self.lock:
            type(self).in_flight -= 1
        self.page_ok()

    def drip(self, piece: bytes, pause: float) -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(pause)


@contextmanager
def server(tls: ssl.SSLContext | None = None):
    listening = ThreadingHTTPServer(("0.0.0.0", 0), Hostile)  # in a namespace of its own
    listening.daemon_threads = True
    listening.block_on_close = False
    if tls is not None:
        listening.socket = tls.wrap_socket(listening.socket, server_side=True)
    threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield listening.server_address[1]
    finally:
        listening.shutdown()
        listening.server_close()


def opener_for(port: int, **changes: Any) -> tuple[HardenedOpener, list[float]]:
    pauses: list[float] = []
    settings: dict[str, Any] = {
        "contact": CONTACT,
        "allow_loopback": True,
        "allowed_ports": (port,),
        "max_bytes": 1_000_000,
        "timeout_seconds": 3.0,
        "total_timeout_seconds": 10.0,
        "retries": 0,
    }
    return HardenedOpener(TransportPolicy(**(settings | changes)), sleep=pauses.append), pauses


def reason_of(path: str, **changes: Any) -> str:
    with server() as port:
        opener, _ = opener_for(port, **changes)
        return refusal(lambda: opener.open(f"http://127.0.0.1:{port}{path}")).reason


@in_namespace
def test_the_namespace_holds_nothing_but_loopback() -> None:
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, pytest.raises(OSError, match="unreachable"):
        sock.sendto(b"x", ("192.0.2.1", 9))


@in_namespace
def test_an_image_arrives_with_honest_headers_and_without_the_environment_s_proxy() -> None:
    os.environ["http_proxy"] = os.environ["ALL_PROXY"] = "http://127.0.0.1:1"
    with server() as port:
        opener, _ = opener_for(port)
        urllib.request.install_opener(opener)  # type: ignore[arg-type]
        request = urllib.request.Request(f"http://127.0.0.1:{port}/ok", headers={"User-Agent": "Mozilla/5.0"})
        with urllib.request.urlopen(request, timeout=10) as response:
            assert response.headers["Content-Type"] == "text/plain"
            assert response.read() == JPEG
        sent = Hostile.seen[-1]
        assert sent["User-Agent"] == f"sdtrain/0.1 (training data download; +{CONTACT})"
        assert (sent["Accept-Encoding"], sent["Host"]) == ("identity", f"127.0.0.1:{port}")
        with pytest.raises(RefusedError, match="refused:scheme 'file'"):
            urllib.request.urlopen("file:///etc/hostname")


@in_namespace
def test_loopback_is_refused_unless_allowed() -> None:
    assert reason_of("/ok", allow_loopback=False) == "refused:loopback"
    assert Hostile.requests["ok"] == 0


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("file:///etc/passwd", "refused:scheme"),
        ("http://10.0.0.1:{port}/ok", "refused:private_address"),
        ("http://169.254.169.254:{port}/latest/meta-data", "refused:link_local"),
        ("http://[::ffff:10.0.0.1]:{port}/", "refused:private_address"),
        ("http://2130706434:{port}/", "refused:loopback"),  # 127.0.0.2 as one number
        ("http://127.0.0.1:22/", "refused:port"),
        ("ftp://127.0.0.1/x", "refused:scheme"),
        ("/missing", "http_404"),
    ],
)
@in_namespace
def test_redirects_are_checked_like_first_urls_and_their_bodies_left_unread(target: str, reason: str) -> None:
    with server() as port:
        opener, _ = opener_for(port, allow_loopback=True)
        if reason == "refused:loopback":  # the redirecting server itself stands on loopback: name it as allowed once
            answers = iter([["127.0.0.1"], ["::ffff:127.0.0.2"]])
            opener._resolve = lambda host, port: next(answers)
            judge = iter([True, False])
            opener.policy = _Switching(opener.policy, judge)  # type: ignore[assignment]
        url = f"http://127.0.0.1:{port}/away?" + target.format(port=port)
        began = time.monotonic()
        assert refusal(lambda: opener.open(url)).reason == reason
        assert time.monotonic() - began < 5  # the redirect's body drips for 20 s


class _Switching:
    """A policy that allows loopback for the first host and not for the second."""

    def __init__(self, policy: TransportPolicy, answers: Any):
        self._policy, self._answers = policy, answers

    @property
    def allow_loopback(self) -> bool:
        return next(self._answers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


@in_namespace
def test_redirects_end() -> None:
    assert reason_of("/loop", max_redirects=3) == "refused:redirects"
    assert Hostile.requests["loop"] == 4


@pytest.mark.parametrize(
    ("path", "changes", "reason"),
    [
        ("/endless", {}, "too_large"),
        ("/announced", {}, "too_large"),
        ("/chunks", {}, "too_large"),
        ("/slow", {"rate_grace_seconds": 0.3}, "too_slow"),
        ("/slow", {"total_timeout_seconds": 0.5}, "deadline"),
        ("/headers", {"total_timeout_seconds": 0.5}, "deadline"),
        ("/silent", {"timeout_seconds": 0.3}, "timeout"),
        ("/gzip", {}, "refused:content_encoding"),
        ("/html", {}, "not_an_image"),
        ("/bomb", {}, "too_many_pixels"),
        ("/noai", {}, "refused:robots_tag"),
        ("/half", {}, "truncated"),
        ("/garbage", {}, "bad_response"),
        ("/missing", {}, "http_404"),
        ("/ok", {"blocked_bytes": frozenset({hashlib.sha256(JPEG).hexdigest()})}, "refused:blocked_bytes"),
    ],
)
@in_namespace
def test_hostile_answers_are_refused_with_their_reason(path: str, changes: dict[str, Any], reason: str) -> None:
    began = time.monotonic()
    assert reason_of(path, **changes) == reason
    assert time.monotonic() - began < 5  # refused while it drips, not after the server's 20 s


@in_namespace
def test_nothing_listening_is_a_failed_connection() -> None:
    with server() as port:
        pass
    opener, _ = opener_for(port)
    assert refusal(lambda: opener.open(f"http://127.0.0.1:{port}/")).reason == "connect_failed"


@in_namespace
def test_trouble_that_passes_is_tried_again_when_the_server_says() -> None:
    with server() as port:
        opener, pauses = opener_for(port, retries=2)
        assert opener.open(f"http://127.0.0.1:{port}/busy").read() == JPEG
    assert Hostile.requests["busy"] == 3
    assert pauses == pytest.approx([1.0, 1.0], abs=0.5)


@in_namespace
def test_without_a_wish_the_pauses_double_and_refusals_are_not_tried_again() -> None:
    with server() as port:
        opener, pauses = opener_for(port, retries=2)
        assert refusal(lambda: opener.open(f"http://127.0.0.1:{port}/half")).reason == "truncated"
        assert refusal(lambda: opener.open(f"http://127.0.0.1:{port}/missing")).reason == "http_404"
    assert (Hostile.requests["half"], Hostile.requests["missing"]) == (3, 1)
    assert pauses == [0.5, 1.0]


@in_namespace
def test_a_host_s_wish_holds_for_all_of_its_pictures() -> None:
    with server() as port:
        opener, pauses = opener_for(port)
        assert refusal(lambda: opener.open(f"http://127.0.0.1:{port}/closed")).reason == "http_503"
        error = refusal(lambda: opener.open(f"http://127.0.0.1:{port}/ok"))
        assert str(error) == "retry_after 127.0.0.1 asked for no request in the next 3600 s"
        assert opener.open(f"http://127.0.0.2:{port}/ok").read() == JPEG
    assert (Hostile.requests["closed"], Hostile.requests["ok"], pauses) == (1, 1, [])


@in_namespace
def test_a_redirect_in_raw_bytes_is_quoted_as_it_came() -> None:
    with server() as port:
        opener, _ = opener_for(port)
        assert opener.open(f"http://127.0.0.1:{port}/raw").read() == JPEG
    assert Hostile.paths[-1] == "/ok/b%C3%BCcher%20.jpg"


@in_namespace
def test_a_wish_beyond_patience_ends_the_attempts() -> None:
    with server() as port:
        opener, pauses = opener_for(port, retries=2)
        assert refusal(lambda: opener.open(f"http://127.0.0.1:{port}/closed")).reason == "http_503"
    assert (Hostile.requests["closed"], pauses) == (1, [])


@in_namespace
def test_a_host_gets_no_more_requests_at_once_than_allowed() -> None:
    with server() as port:
        opener, _ = opener_for(port, connections_per_host=2)
        threads = [threading.Thread(target=opener.open, args=(f"http://127.0.0.1:{port}/count",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (Hostile.requests["count"], Hostile.most_in_flight) == (8, 2)


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    certificate_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    files = ["-keyout", str(key_file), "-out", str(certificate_file)]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files],
        check=True,
        capture_output=True,
    )
    return certificate_file, key_file


@in_namespace
def test_tls_asks_for_the_url_s_host_on_the_checked_address(tmp_path: Path) -> None:
    certificate_file, key_file = certificate(tmp_path, "images.example")
    names: list[str] = []
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate_file, key_file)
    serving.sni_callback = lambda sock, name, context: names.append(name)
    trusting = ssl.create_default_context(cafile=str(certificate_file))
    with server(serving) as port:
        policy = opener_for(port)[0].policy
        known = HardenedOpener(policy, resolve=lambda host, port: ["127.0.0.1"], tls=trusting)
        assert known.open(f"https://images.example:{port}/ok").read() == JPEG
        wrong = refusal(lambda: known.open(f"https://other.example:{port}/ok"))
        unknown = HardenedOpener(policy, resolve=lambda host, port: ["127.0.0.1"])
        untrusted = refusal(lambda: unknown.open(f"https://images.example:{port}/ok"))
    assert names == ["images.example", "other.example", "images.example"]
    assert wrong.reason == untrusted.reason == "refused:certificate"
    assert Hostile.seen[-1]["Host"] == f"images.example:{port}"


def test_the_standard_opener_would_have_opened_files(tmp_path: Path) -> None:
    """The seam that is closed here is really there."""
    (tmp_path / "secret").write_text("x")
    with urllib.request.build_opener().open((tmp_path / "secret").as_uri()) as response:
        assert response.read() == b"x"
