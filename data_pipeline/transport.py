"""The hardened URL opener that img2dataset runs on.

img2dataset opens URLs through `urllib.request.urlopen`, which honours the opener installed in its process. As shipped
it opens `file://`, follows redirects to 127.0.0.1, reads bodies without limit and knows no total deadline; all of that
is decided here instead. `HardenedOpener.open` returns the whole body of a JPEG, PNG or WebP, or raises `RefusedError`
with a short reason that can be counted.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import socket
import ssl
import string
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from typing import Any, cast

from data_pipeline.hosts import Hosts
from data_pipeline.image_header import SNIFF_BYTES, sniff
from data_pipeline.transport_policy import (
    RETRIED,
    Reason,
    RefusedError,
    Target,
    TransportPolicy,
    address_reason,
    check_image,
    forbids,
    parse_target,
    retry_after_seconds,
)

_CHUNK_BYTES = 1 << 16
_HEADER_BYTES = 1 << 18
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Fetched(io.BytesIO):
    """A whole body with the answer's headers; what img2dataset reads.

    Attributes:
        url: The address that answered, after redirects.
        headers: Headers of that answer.
    """

    def __init__(self, body: bytes, url: str, headers: Message):
        super().__init__(body)
        self.url = url
        self.headers = headers


def resolve(host: str, port: int) -> list[str]:
    """Every A and AAAA address of a host, in the system's order of preference."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def body_digests(body: bytes | memoryview) -> dict[str, str]:
    """`md5` and `sha256` of a body, hexadecimal: what tables and block lists may name it by."""
    return {
        "md5": hashlib.md5(body, usedforsecurity=False).hexdigest(),
        "sha256": hashlib.sha256(body).hexdigest(),
    }


def _redirected(url: str, location: str) -> str:
    """Where a redirect leads; http.client reads headers as Latin-1, so bytes beyond ASCII are quoted as they came."""
    return urllib.parse.urljoin(url, urllib.parse.quote(location, safe=string.punctuation, encoding="latin-1"))


def connect(address: str, port: int, timeout_seconds: float) -> socket.socket:
    """Connect to a numeric address; no name is looked up here."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_seconds)
        sock.connect((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


@dataclass
class _Deadline:
    """End of the work on one URL, on the monotonic clock; the clock starts when the first host has a free slot."""

    total_seconds: float
    silence_seconds: float
    _end: float | None = None

    def start(self) -> None:
        """Start the clock; later calls change nothing."""
        if self._end is None:
            self._end = time.monotonic() + self.total_seconds

    def left(self) -> float:
        """Seconds until the end."""
        return self.total_seconds if self._end is None else self._end - time.monotonic()

    def timeout(self) -> float:
        """Longest wait for the next socket operation.

        Raises:
            RefusedError: Nothing is left.
        """
        left = self.left()
        if left <= 0:
            raise RefusedError(Reason.DEADLINE, f"not done after {self.total_seconds:g} s")
        return min(left, self.silence_seconds)

    def expired(self) -> RefusedError:
        """What a timed-out socket operation means: silence, or the end."""
        if self.left() <= 0:
            return RefusedError(Reason.DEADLINE, f"not done after {self.total_seconds:g} s")
        return RefusedError(Reason.TIMEOUT, f"silent for {self.silence_seconds:g} s")


class _Wire(io.RawIOBase):
    """Bytes of a socket, every read (headers, chunks, trailers) bounded by deadline, minimum rate and byte cap."""

    def __init__(self, sock: socket.socket, deadline: _Deadline, policy: TransportPolicy):
        self._sock, self._deadline, self._policy = sock, deadline, policy
        self._began = time.monotonic()
        self._received = 0

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client.HTTPResponse` asks a socket for."""
        assert mode == "rb"
        return io.BufferedReader(self, _CHUNK_BYTES)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """One `recv`.

        Raises:
            RefusedError: With reason deadline, timeout, too_slow or too_large.
        """
        self._sock.settimeout(self._deadline.timeout())
        try:
            count = self._sock.recv_into(buffer)
        except TimeoutError as error:
            raise self._deadline.expired() from error
        self._received += count
        if self._received > self._policy.max_bytes + _HEADER_BYTES:
            raise RefusedError(Reason.TOO_LARGE, f"more than {self._policy.max_bytes} bytes")
        self._check_rate()
        return count

    def _check_rate(self) -> None:
        seconds = time.monotonic() - self._began
        slowest = self._policy.min_bytes_per_second
        if seconds > self._policy.rate_grace_seconds and self._received < slowest * seconds:
            raise RefusedError(
                Reason.TOO_SLOW, f"{self._received} bytes in {seconds:.0f} s; required are {slowest:g}/s"
            )


class HardenedOpener:
    """An opener for `urllib.request.install_opener` that fetches images by `TransportPolicy` and nothing else.

    No handler of urllib takes part: there is no file, ftp or data scheme, no proxy from the environment, no cookie, no
    password. Safe to use from many threads.

    Args:
        policy: What is allowed.
        resolve: Host and port -> numeric addresses.
        connect: Numeric address, port and timeout -> connected socket; only ever given addresses that were checked.
        sleep: Waits before a retry, and for a host's own wishes.
        tls: Context for https; the system's certificates by default.
    """

    def __init__(
        self,
        policy: TransportPolicy,
        *,
        resolve: Callable[[str, int], Sequence[str]] = resolve,
        connect: Callable[[str, int, float], socket.socket] = connect,
        sleep: Callable[[float], None] = time.sleep,
        tls: ssl.SSLContext | None = None,
    ):
        self.policy = policy
        self._resolve, self._connect, self._sleep = resolve, connect, sleep
        self._tls = tls or ssl.create_default_context()
        self._hosts = Hosts(policy.connections_per_host, policy.host_gap_seconds, sleep)
        self._lookups = ThreadPoolExecutor(max_workers=64, thread_name_prefix="dns")  # getaddrinfo takes no timeout

    def open(self, fullurl: str | urllib.request.Request, data: object = None, timeout: object = None) -> Fetched:
        """Fetch one image, with retries. Headers of a `Request` and `timeout` give way to the policy's.

        Raises:
            RefusedError: With the reason that is counted.
        """
        url = fullurl if isinstance(fullurl, str) else fullurl.full_url
        if data is not None:
            raise RefusedError(Reason.URL, f"a request with a body for {url[:200]!r}; only GET is done here")
        deadline = _Deadline(self.policy.total_timeout_seconds, self.policy.timeout_seconds)
        attempt = 0
        while True:
            try:
                return self._attempt(url, deadline)
            except RefusedError as error:
                pause = self._pause_seconds(error, attempt)
                if pause is None or pause >= deadline.left():
                    raise
                waits_for_host = error.retry_after_seconds is not None
            if not waits_for_host:
                self._sleep(pause)
            attempt += 1

    def _pause_seconds(self, error: RefusedError, attempt: int) -> float | None:
        """Seconds until the next attempt; None where there is none. A host's own wish is waited for by `Hosts`."""
        if attempt >= self.policy.retries or error.reason not in RETRIED:
            return None
        pause = 0.5 * 2**attempt if error.retry_after_seconds is None else error.retry_after_seconds
        return pause if pause <= self.policy.max_retry_after_seconds else None

    def _attempt(self, url: str, deadline: _Deadline) -> Fetched:
        """Follow redirects to a body."""
        for _ in range(self.policy.max_redirects + 1):
            target = parse_target(url, self.policy)
            with self._hosts.visit(target.host, min(self.policy.max_retry_after_seconds, deadline.left())):
                deadline.start()
                answer = self._exchange(target, deadline)
            if isinstance(answer, Fetched):
                return answer
            url = answer
        raise RefusedError(Reason.REDIRECTS, f"more than {self.policy.max_redirects}, the last to {url[:200]!r}")

    def _exchange(self, target: Target, deadline: _Deadline) -> Fetched | str:
        """One request: a body, or the URL that it redirects to."""
        sock = self._open_socket(target, deadline)
        try:
            response = self._request(target, sock, deadline)
            if response.status in _REDIRECTS:  # the body of a redirect is nobody's concern: not read
                return _redirected(target.url, response.headers.get("Location", ""))
            self._check_headers(target, response)
            body = self._read_body(response)
        except TimeoutError as error:
            raise deadline.expired() from error
        except http.client.IncompleteRead as error:
            raise RefusedError(Reason.TRUNCATED, f"from {target.host}: {error}") from error
        except (http.client.HTTPException, ValueError) as error:
            raise RefusedError(Reason.BAD_RESPONSE, f"from {target.host}: {error!r}"[:300]) from error
        except OSError as error:
            raise RefusedError(Reason.CONNECT_FAILED, f"{target.host}: {error}") from error
        finally:
            sock.close()
        if self.policy.blocked_bytes and self.policy.blocked_bytes.intersection(body_digests(body).values()):
            raise RefusedError(Reason.BLOCKED_BYTES, "the image is on the block list")
        check_image(body, self.policy.max_pixels)
        return Fetched(body, target.url, response.headers)

    def _open_socket(self, target: Target, deadline: _Deadline) -> socket.socket:
        """Resolve, check every address, connect to one of the checked ones."""
        addresses = self._addresses(target, deadline)
        for address in addresses:
            reason = address_reason(address, allow_loopback=self.policy.allow_loopback)
            if reason is not None:
                raise RefusedError(reason, f"{address} of host {target.host}")
        failure: OSError | None = None
        for address in addresses:
            try:
                sock = self._connect(address, target.port, deadline.timeout())
                return self._secure(sock, target, deadline) if target.is_tls else sock
            except ssl.SSLCertVerificationError as error:
                raise RefusedError(Reason.CERTIFICATE, f"{target.host}: {error.verify_message}") from error
            except OSError as error:
                failure = error
        if isinstance(failure, TimeoutError):
            raise deadline.expired() from failure
        raise RefusedError(Reason.CONNECT_FAILED, f"{target.host}: {failure}") from failure

    def _addresses(self, target: Target, deadline: _Deadline) -> Sequence[str]:
        if target.is_address:  # nothing to look up; forms like 0x7f.1 are left to the system
            return (target.host,)
        lookup = self._lookups.submit(self._resolve, target.host, target.port)
        try:
            addresses = lookup.result(deadline.timeout())
        except TimeoutError as error:
            raise RefusedError(Reason.DNS_FAILED, f"no answer for {target.host} in time") from error
        except socket.gaierror as error:
            unknown = error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None))
            reason = Reason.UNKNOWN_HOST if unknown else Reason.DNS_FAILED
            raise RefusedError(reason, f"{target.host}: {error.strerror}") from error
        if not addresses:
            raise RefusedError(Reason.UNKNOWN_HOST, f"{target.host} has no address")
        return addresses

    def _secure(self, sock: socket.socket, target: Target, deadline: _Deadline) -> ssl.SSLSocket:
        """TLS with the URL's host as server name, whatever address the socket is connected to."""
        try:
            sock.settimeout(deadline.timeout())
            return self._tls.wrap_socket(sock, server_hostname=target.host)
        except BaseException:
            sock.close()
            raise

    def _request(self, target: Target, sock: socket.socket, deadline: _Deadline) -> http.client.HTTPResponse:
        """Send the request, read status line and headers."""
        sock.settimeout(deadline.timeout())
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = sock
        connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", target.host_header)
        connection.putheader("User-Agent", self.policy.user_agent)
        connection.putheader("Accept", "image/jpeg,image/png,image/webp;q=0.9,image/*;q=0.5")
        connection.putheader("Accept-Encoding", "identity")
        connection.putheader("Connection", "close")
        connection.endheaders()
        wire = _Wire(sock, deadline, self.policy)
        response = http.client.HTTPResponse(cast(socket.socket, wire), method="GET")
        response.begin()
        return response

    def _check_headers(self, target: Target, response: http.client.HTTPResponse) -> None:
        """Refuse by status and headers, before the body is read."""
        if response.status != 200:
            reason = f"http_{response.status}"
            wish = retry_after_seconds(response.headers, time.time()) if reason in RETRIED else None
            if wish is not None:
                self._hosts.close(target.host, wish)
            raise RefusedError(reason, response.reason[:100], wish)
        rule = forbids(response.headers, self.policy.robots_rules)
        if rule is not None:
            raise RefusedError(Reason.ROBOTS_TAG, f"X-Robots-Tag says {rule}")
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in ("", "identity"):  # never asked for; expanding it is how a small body becomes a large one
            raise RefusedError(Reason.CONTENT_ENCODING, f"{encoding[:50]!r}; asked for was identity")
        if response.length is not None and response.length > self.policy.max_bytes:
            raise RefusedError(Reason.TOO_LARGE, f"{response.length} bytes; allowed are {self.policy.max_bytes}")

    def _read_body(self, response: http.client.HTTPResponse) -> bytes:
        """Stream the body; what is no image by its first bytes is not read further."""
        announced, body = response.length, bytearray(response.read(SNIFF_BYTES))
        if len(body) == SNIFF_BYTES and sniff(bytes(body)) is None:
            raise RefusedError(Reason.NOT_AN_IMAGE, f"begins with {bytes(body[:8])!r}")
        while chunk := response.read(_CHUNK_BYTES):
            body += chunk
            if len(body) > self.policy.max_bytes:
                raise RefusedError(Reason.TOO_LARGE, f"more than {self.policy.max_bytes} bytes")
        if announced is not None and len(body) < announced:
            raise RefusedError(Reason.TRUNCATED, f"{len(body)} of {announced} bytes")
        return bytes(body)
