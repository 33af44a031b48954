"""A Hugging Face hub on loopback: the few answers that listing and reading a repository need."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from typing import Any


class Hub(ThreadingHTTPServer):
    """Serves repositories from memory until it is left.

    Args:
        repositories: `ORG/NAME` -> path in the repository -> content.
        gated: Repositories whose files are refused without a token.
        lying: Repositories whose listed digests are not those of their files.
    """

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]], gated: set[str], lying: set[str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.gated, self.lying = repositories, gated, lying
        self.requests: Counter[str] = Counter()
        self.fail_next = 0

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        self._thread = Thread(target=self.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        parts = PurePosixPath(path).parts
        self.server.requests[path] += 1
        if parts[1:3] in (("api", "datasets"), ("api", "models")):
            self._api("/".join(parts[3:5]), parts[5:])
        elif parts[1] == "datasets":
            self._file("/".join(parts[2:4]), "/".join(parts[6:]))
        elif parts[3:4] == ("resolve",):
            self._file("/".join(parts[1:3]), "/".join(parts[5:]))
        else:
            self._send(404, b"{}")

    def _api(self, name: str, rest: tuple[str, ...]) -> None:
        files = self.server.repositories.get(name)
        if files is None or (rest[:1] == ("revision",) and rest[1] != "main"):
            code = "RepoNotFound" if files is None else "RevisionNotFound"
            self._send(404, b"{}", {"X-Error-Code": code})
        elif rest[:1] == ("tree",):
            self._json(self._tree(name, files, "/".join(rest[2:]), "recursive=true" in self.path.lower()))
        else:
            self._json({"id": name, "sha": "0" * 40, "siblings": [], "tags": [], "downloads": 0, "likes": 0})

    def _tree(self, name: str, files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
        rows, folders = [], set()
        for path, content in files.items():
            inside = path.removeprefix(f"{folder}/") if folder else path
            if folder and inside == path:
                continue
            if "/" in inside:
                folders.add(path[: len(path) - len(inside)] + inside.partition("/")[0])
            if "/" not in inside or recursive:
                digest = hashlib.sha256(content + b"!" * (name in self.server.lying)).hexdigest()
                lfs = {"oid": digest, "size": len(content), "pointerSize": 130}
                rows.append({"type": "file", "path": path, "size": len(content), "oid": digest[:40], "lfs": lfs})
        return [*rows, *({"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders))]

    def _file(self, name: str, path: str) -> None:
        content = self.server.repositories.get(name, {}).get(path)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif name in self.server.gated and self.headers.get("Authorization") is None:
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "accept the terms first"})
        else:
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            chunk = content[int(first) : int(last) + 1 if last else None]
            digest = hashlib.sha256(content).hexdigest()
            headers = {"Content-Range": f"bytes {first}-{int(first) + len(chunk) - 1}/{len(content)}"}
            self._send(206, chunk, headers | {"ETag": f'"{digest}"', "X-Repo-Commit": "0" * 40})

    def _json(self, page: Any) -> None:
        self._send(200, json.dumps(page).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
