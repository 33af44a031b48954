"""A web server on loopback that hands out pictures from memory, for `benchmarks.download`.

`/<number>.jpg` is a picture; `/state` is the time of the first picture since it was last asked, and how many.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

HOSTS = [f"127.0.0.{number}" for number in range(1, 33)]
"""Pictures come from many hosts."""

_THREADS_PER_HOST = 2


class State:
    """When the first picture was asked for, and how many were."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first, self._count = 0.0, 0

    def count(self) -> None:
        with self._lock:
            self._first = self._first or time.time()
            self._count += 1

    def take(self) -> bytes:
        """The state, which begins anew."""
        with self._lock:
            text = f"{self._first!r} {self._count}"
            self._first, self._count = 0.0, 0
        return text.encode()


def serve(listening: socket.socket, bodies: list[bytes], state: State) -> None:
    """Answer one request after another."""
    while True:
        sock, _ = listening.accept()
        with sock:
            words = sock.recv(8192).split(b" ", 2)
            if len(words) < 2:
                continue
            name = words[1].rsplit(b"/", 1)[1]
            if name == b"state":
                body = state.take()
            else:
                state.count()
                body = bodies[int(name.partition(b".")[0]) % len(bodies)]
            head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            sock.sendall(head % len(body) + body)


def main() -> None:
    """Load a folder's pictures, print the port, serve until killed."""
    folder = Path(sys.argv[1])
    bodies = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    state, port = State(), 0
    for host in HOSTS:
        listening = socket.create_server((host, port), backlog=256)
        port = listening.getsockname()[1]
        for _ in range(_THREADS_PER_HOST):
            threading.Thread(target=serve, args=(listening, bodies, state), daemon=True).start()
    print(port, flush=True)
    sys.stdin.read()  # ends with whoever started it


if __name__ == "__main__":
    main()
