"""Web servers on every address of the namespace: one that plays the cases, and services that nobody may reach."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.data.hostile.namespace import PUBLIC, PUBLIC_IPV6
from tests.data.hostile.pictures import jpeg
from tests.data.hostile.resolver import Resolver

OPEN_PORTS = (80, 443)
FORBIDDEN_PORTS = (22, 6379, 8080)
LOG = "forbidden.jsonl"
_PATIENCE_SECONDS = 8.0


class Exchange:
    """One request and the wire to whoever sent it."""

    def __init__(self, sock: socket.socket, request: int):
        self.sock = sock
        self.request = request

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reply(
        self, body: bytes = b"", status: str = "200 OK", length: int | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        """An answer with `Content-Length`, be it a wrong one."""
        fields = {"Content-Length": str(len(body) if length is None else length), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.send(f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body)

    def drip(self, piece: bytes, pause_seconds: float = 0.0) -> None:
        """The same bytes again and again, longer than anybody should wait."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < end:
            self.send(piece)
            time.sleep(pause_seconds)

    def wait(self) -> None:
        """Say nothing."""
        time.sleep(_PATIENCE_SECONDS)

    def reset(self) -> None:
        """End the connection with RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


Script = Callable[[Exchange], None]


class Server:
    """Listens on all addresses at once; what was asked of the forbidden ones goes to a file.

    Args:
        scripts: What is played, by the first part of the path.
        log: JSON lines with case, address and port of every connection to a forbidden address or port.
        certificate: PEM file for port 443.
    """

    def __init__(self, scripts: Mapping[str, Script], log: Path, certificate: Path):
        self._scripts = scripts
        self._log = log
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate)
        self._requests: dict[str, int] = {}
        self._lock = threading.Lock()
        for port in (*OPEN_PORTS, *FORBIDDEN_PORTS):
            for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
                with suppress(OSError):  # a kernel without IPv6
                    self._listen(family, address, port)

    def _listen(self, family: socket.AddressFamily, address: str, port: int) -> None:
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((address, port))
        listening.listen(256)
        threading.Thread(target=self._accept, args=(listening,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            sock, _ = listening.accept()
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        address, port = sock.getsockname()[:2]
        is_forbidden = address not in (PUBLIC, PUBLIC_IPV6) or port not in OPEN_PORTS
        with suppress(OSError), sock:
            sock.settimeout(_PATIENCE_SECONDS)
            if is_forbidden:
                self._remember(_case_of(sock), address, port)
                Exchange(sock, 0).reply(jpeg())  # what a thief would hope for
                return
            if port == 443:
                sock = self._tls.wrap_socket(sock, server_side=True)
            case = _case_of(sock)
            if case in self._scripts:
                self._scripts[case](Exchange(sock, self._count(case)))

    def _count(self, case: str) -> int:
        with self._lock:
            self._requests[case] = self._requests.get(case, 0) + 1
            return self._requests[case]

    def _remember(self, case: str, address: str, port: int) -> None:
        with self._lock, open(self._log, "a") as file:
            file.write(json.dumps({"case": case, "address": address, "port": port}) + "\n")


def _case_of(sock: socket.socket) -> str:
    """The first part of the path of a request, read up to the end of its headers; empty where none comes."""
    head = b""
    with suppress(OSError):
        while b"\r\n\r\n" not in head and (part := sock.recv(4096)):
            head += part
    words = head.split(b" ")
    return words[1].decode("latin-1").strip("/").split("/")[0].split("?")[0] if len(words) > 1 else ""


def make_certificate(folder: Path) -> Path:
    """A certificate that nobody trusts, with its key."""
    path = folder / "self-signed.pem"
    subject = ["-subj", "/CN=self-signed.public.test", "-addext", "subjectAltName=DNS:self-signed.public.test"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path)]
    certificate = subprocess.run(
        ["openssl", "req", "-x509", "-days", "2", *key, *subject], check=True, capture_output=True
    ).stdout
    with open(path, "ab") as file:
        file.write(certificate)
    return path


class Servers:
    """Name server and web servers in a process of their own, which ends with this one.

    Args:
        scripts: What is played, by the first part of the path.
        bodies: What is made before the first request.
        folder: Where the log and the certificate go.
    """

    def __init__(self, scripts: Mapping[str, Script], bodies: Sequence[Callable[[], bytes]], folder: Path):
        self._ready, write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _end_with_parent()
            for make in bodies:
                make()
            Resolver()
            Server(scripts, folder / LOG, make_certificate(folder))
            os.write(write_end, b"!")
            threading.Event().wait()
        os.close(write_end)

    def wait(self) -> None:
        """Until they are ready."""
        assert os.read(self._ready, 1) == b"!", "the servers did not start"

    def stop(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
