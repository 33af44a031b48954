"""The digits world over HTTP, on loopback only: renders pictures on request, and is gone, slow or wrong where asked."""

from __future__ import annotations

import re
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_pipeline.sources.digits import COLOURS, SLOW_SECONDS, Picture, World, render, scans, to_jpeg
from sdtrain.errors import ConfigError

LOOPBACK = "127.0.0.1"
_NAMES = "|".join(COLOURS)
_PATH = re.compile(rf"/(?:(gone|page|small|slow)/)?digit/(\d{{4}})-({_NAMES})-({_NAMES})\.jpg")
_PAGE = b"<!doctype html><title>moved</title><p>This picture has found a new home.</p>\n"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    @property
    def _world_server(self) -> DigitsServer:
        assert isinstance(self.server, DigitsServer)
        return self.server

    def do_GET(self) -> None:
        """Answer one request."""
        if self.path == "/ready":
            self._answer(b"ready\n", "text/plain")
            return
        match = _PATH.fullmatch(self.path)
        if match is None or match[1] == "gone" or int(match[2]) >= len(scans()[1]):
            self._answer(b"not found\n", "text/plain", HTTPStatus.NOT_FOUND)
        elif match[1] == "page":
            self._answer(_PAGE, "text/html")
        else:
            self._picture(match[1], Picture(int(match[2]), match[3], match[4]))

    def _picture(self, kind: str | None, picture: Picture) -> None:
        size = self._world_server.image_size // (2 if kind == "small" else 1)
        if kind == "slow":
            time.sleep(self._world_server.slow_seconds)
        self._answer(to_jpeg(render(picture, size)), "image/jpeg")

    def _answer(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # a client that gave up, which slow pictures are there for
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet: thousands of requests."""


class DigitsServer(ThreadingHTTPServer):
    """Serves one world; as a context manager it serves in a background thread.

    Args:
        world: The world to serve.
        port: Port on 127.0.0.1.
        slow_seconds: How long a slow link waits.

    Raises:
        ConfigError: The port is taken.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, world: World, port: int, slow_seconds: float = SLOW_SECONDS):
        self.image_size = world.image_size
        self.slow_seconds = slow_seconds
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ConfigError(f"--port {port}: cannot listen on {LOOPBACK}:{port}: {error.strerror}") from None

    def __enter__(self) -> DigitsServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self.server_close()


def serve(folder: Path, port: int) -> None:
    """Serve a world until interrupted.

    Raises:
        DataError: The folder holds no world.
        ConfigError: The world's URLs name another port, or the port is taken.
    """
    world = World.load(folder)
    if world.port != port:
        raise ConfigError(f"--port {port}: the URLs of {folder} name port {world.port}; serve it there or make it anew")
    server = DigitsServer(world, port)
    try:
        server.serve_forever()
    finally:
        server.server_close()
