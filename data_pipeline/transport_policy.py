"""What may be fetched: URLs, addresses, headers, costs, and the reasons that are counted where something may not.

Pure functions of their arguments; `transport` does the talking.
"""

from __future__ import annotations

import email.utils
import hashlib
import ipaddress
import re
import urllib.parse
from dataclasses import dataclass
from email.message import Message
from enum import StrEnum

from data_pipeline.image_header import count_scans, read_header
from sdtrain.errors import ConfigError, DataError

USER_AGENT_TOKEN = "sdtrain"
MAX_SCANS = 100
"""Of a progressive JPEG; encoders write about ten, and each costs a pass over all of its pixels."""

_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.ASCII)
_PATH_SAFE = "%/:=&?~+!$,;'@()*[]|"
_VALUED_ROBOTS_RULES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)  # upper half of an interface identifier whose lower half is an IPv4 address
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NEVER = (  # beyond what `is_global` knows in every supported Python
    ipaddress.IPv4Network("168.63.129.16/32"),  # Azure's metadata service, on a public address
    ipaddress.IPv4Network("192.0.0.0/24"),  # protocol assignments; Oracle's metadata service lies there
    ipaddress.IPv4Network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.IPv6Network("3fff::/20"),  # documentation
)


class Reason(StrEnum):
    """Why an image was not taken. Status codes beside 200 are counted as `http_<status>`."""

    URL = "refused:url"
    SCHEME = "refused:scheme"
    PORT = "refused:port"
    CREDENTIALS = "refused:credentials"
    LOOPBACK = "refused:loopback"
    LINK_LOCAL = "refused:link_local"
    PRIVATE_ADDRESS = "refused:private_address"
    REDIRECTS = "refused:redirects"
    CERTIFICATE = "refused:certificate"
    CONTENT_ENCODING = "refused:content_encoding"
    ROBOTS_TAG = "refused:robots_tag"
    BLOCKED_URL = "refused:blocked_url"
    BLOCKED_BYTES = "refused:blocked_bytes"
    DIGEST = "refused:digest"
    TOO_LARGE = "too_large"
    NOT_AN_IMAGE = "not_an_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    ANIMATED = "animated"
    BIT_DEPTH = "bit_depth"
    TOO_MANY_SCANS = "too_many_scans"
    TOO_SMALL = "too_small"
    UNDECODABLE = "undecodable"
    OUT_OF_MEMORY = "out_of_memory"
    UNKNOWN_HOST = "unknown_host"
    DNS_FAILED = "dns_failed"
    CONNECT_FAILED = "connect_failed"
    BAD_RESPONSE = "bad_response"
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"
    TOO_SLOW = "too_slow"
    DEADLINE = "deadline"
    RETRY_AFTER = "retry_after"


RETRIED = frozenset(
    {Reason.DNS_FAILED, Reason.CONNECT_FAILED, Reason.BAD_RESPONSE, Reason.TRUNCATED, Reason.TIMEOUT}
    | {f"http_{status}" for status in _RETRIED_STATUS}
)
_PERMANENT = frozenset(Reason) - RETRIED - {Reason.TOO_SLOW, Reason.DEADLINE, Reason.RETRY_AFTER}


def is_permanent(reason: str) -> bool:
    """Whether asking again tomorrow would bring the same answer.

    So it is with refusals, with pictures that are not what they should be, and with every status but 5xx and the few
    4xx that mean "later"; not with network trouble.
    """
    if reason.startswith("http_"):
        return reason not in RETRIED and not reason.startswith("http_5")
    return reason in _PERMANENT


class RefusedError(DataError):
    """One URL that was not taken.

    Attributes:
        reason: A `Reason` or `http_<status>`; what is counted.
        detail: What was found and what is allowed.
        retry_after_seconds: The server's wish, where it sent one.
    """

    def __init__(self, reason: str, detail: str = "", retry_after_seconds: float | None = None):
        super().__init__(reason, detail, retry_after_seconds)
        self.reason = str(reason)
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return f"{self.reason} {self.detail}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportPolicy:
    """What may be fetched and at which cost.

    Attributes:
        contact: URL or mail address in the user agent, so that a site's owner can reach whoever runs this.
        allowed_ports: Destination ports.
        allow_loopback: Whether 127.0.0.0/8 and ::1 may be reached; for tests and the demo.
        max_redirects: Redirects that are followed, each checked like a first URL.
        max_bytes: Largest body.
        max_pixels: Largest width x height by the image's header.
        timeout_seconds: Longest silence while connecting, sending or receiving.
        total_timeout_seconds: Longest time for one URL, redirects and retries included.
        min_bytes_per_second: Slowest mean rate, judged from `rate_grace_seconds` after the request on.
        rate_grace_seconds: See above.
        retries: Attempts beyond the first, for trouble that may pass.
        max_retry_after_seconds: Longest `Retry-After` that is waited for.
        connections_per_host: Requests in flight to one host from this process.
        host_gap_seconds: Least time between the starts of two requests to one host from this process.
        robots_rules: `X-Robots-Tag` rules that are honoured, lower case.
        blocked_urls: sha256 of URLs (UTF-8) that are never opened, be it after a redirect.
        blocked_bytes: sha256 or md5 of bodies that are never kept.
    """

    contact: str
    allowed_ports: tuple[int, ...] = (80, 443)
    allow_loopback: bool = False
    max_redirects: int = 3
    max_bytes: int = 32 << 20
    max_pixels: int = 64_000_000
    timeout_seconds: float = 10.0
    total_timeout_seconds: float = 60.0
    min_bytes_per_second: float = 1024.0
    rate_grace_seconds: float = 5.0
    retries: int = 2
    max_retry_after_seconds: float = 30.0
    connections_per_host: int = 8
    host_gap_seconds: float = 0.0
    robots_rules: frozenset[str] = frozenset({"noai", "noimageai"})
    blocked_urls: frozenset[str] = frozenset()
    blocked_bytes: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.contact.strip() or not self.contact.isprintable() or not self.contact.isascii():
            raise ConfigError(
                f"download.contact is {self.contact!r}; give a URL or mail address (printable ASCII) that site owners "
                "can reach you at, it is sent with every request"
            )

    @property
    def user_agent(self) -> str:
        """The honest `User-Agent` header."""
        return f"{USER_AGENT_TOKEN}/0.1 (training data download; +{self.contact})"


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that passed the checks that need no network.

    Attributes:
        url: As it was given.
        is_tls: Whether the scheme is https.
        host: Lower case, in ASCII, without brackets.
        port: The URL's, or the scheme's.
        path: With the query, quoted.
        is_address: Whether the host is an IP address in its usual notation, which no name server is asked for.
    """

    url: str
    is_tls: bool
    host: str
    port: int
    path: str
    is_address: bool = False

    @property
    def host_header(self) -> str:
        """`Host` of the request; the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


def parse_target(url: str, policy: TransportPolicy) -> Target:
    """Check block list, scheme, host, credentials and port of a URL, and quote what HTTP cannot carry.

    Raises:
        RefusedError: With reason blocked_url, url, scheme, credentials or port.
    """
    if policy.blocked_urls and url_sha256(url) in policy.blocked_urls:
        raise RefusedError(Reason.BLOCKED_URL, "the URL is on the block list")
    try:
        parts = urllib.parse.urlsplit(url.strip())
        named_port, host = parts.port, (parts.hostname or "")
        host = host if ":" in host else host.encode("idna").decode("ascii").lower()
    except (ValueError, UnicodeError) as error:
        raise RefusedError(Reason.URL, f"{url[:200]!r}: {error}") from error
    if parts.scheme not in ("http", "https"):
        raise RefusedError(Reason.SCHEME, f"{parts.scheme!r} in {url[:200]!r}; allowed are http and https")
    if parts.username is None and not _is_host(host):
        raise RefusedError(Reason.URL, f"{url[:200]!r} names no valid host")
    if parts.username is not None or parts.password is not None:
        raise RefusedError(Reason.CREDENTIALS, f"user name or password in a URL of host {host}")
    is_tls = parts.scheme == "https"
    port = named_port if named_port is not None else (443 if is_tls else 80)
    if port not in policy.allowed_ports:
        raise RefusedError(Reason.PORT, f"{port} of {host}; allowed are {list(policy.allowed_ports)}")
    query = f"?{parts.query}" if parts.query else ""
    path = urllib.parse.quote((parts.path or "/") + query, safe=_PATH_SAFE)
    return Target(url, is_tls, host, port, path, _is_address(host))


def _is_host(host: str) -> bool:
    """Whether a name can stand in the DNS, or is an IPv6 address; IPv4 addresses look like names."""
    if ":" not in host:
        return _HOST.fullmatch(host) is not None
    try:
        return ipaddress.IPv6Address(host).scope_id is None
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def url_sha256(url: str) -> str:
    """What block lists and samples call a URL."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def address_reason(address: str, *, allow_loopback: bool) -> Reason | None:
    """Why an IP address may not be connected to; None where it may.

    An address that carries an IPv4 address inside (mapped, 6to4, NAT64, Teredo, ISATAP) is judged by both.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    if parsed.is_loopback:
        return None if allow_loopback else Reason.LOOPBACK
    for judged in (parsed, *_carried(parsed)):
        if judged.is_link_local:
            return Reason.LINK_LOCAL
        if not _is_global(judged):
            return Reason.PRIVATE_ADDRESS
    return None


def _carried(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> tuple[ipaddress.IPv4Address, ...]:
    """IPv4 addresses that a tunnel or translator would send the packets to."""
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    if address in _NAT64:
        return (ipaddress.IPv4Address(int(address) & 0xFFFFFFFF),)
    if address.sixtofour is not None:
        return (address.sixtofour,)
    if int(address) >> 32 & 0xFFFFFFFF in _ISATAP:
        return (ipaddress.IPv4Address(int(address) & 0xFFFFFFFF),)
    return address.teredo or ()


def _is_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if any(address in network for network in _NEVER):
        return False
    if isinstance(address, ipaddress.IPv6Address):
        return address in _NAT64 or (address in _GLOBAL_UNICAST and address.is_global)
    return address.is_global and not (address.is_multicast or address.is_reserved)


def check_image(body: bytes, max_pixels: int) -> None:
    """Refuse what is no single-frame, 8-bit JPEG, PNG or WebP of bearable size, without decoding it.

    Raises:
        RefusedError: With reason not_an_image, animated, bit_depth, too_many_pixels or too_many_scans.
    """
    try:
        header = read_header(body)
    except ValueError as error:
        raise RefusedError(Reason.NOT_AN_IMAGE, str(error)) from error
    if header.pixels > max_pixels:
        raise RefusedError(Reason.TOO_MANY_PIXELS, f"{header.width}x{header.height}; allowed are {max_pixels} pixels")
    if header.animated:
        raise RefusedError(Reason.ANIMATED, f"an animated {header.format}; allowed is one frame")
    if header.bit_depth > 8:
        raise RefusedError(Reason.BIT_DEPTH, f"{header.bit_depth} bits a channel in a {header.format}; allowed are 8")
    scans = count_scans(body) if header.format == "jpeg" else 1
    if scans > MAX_SCANS:
        raise RefusedError(Reason.TOO_MANY_SCANS, f"{scans} in a jpeg; allowed are {MAX_SCANS}")


def forbids(headers: Message, rules: frozenset[str]) -> str | None:
    """The first of `rules` that an `X-Robots-Tag` states for everyone or for us."""
    for value in headers.get_all("X-Robots-Tag", []):
        agent, colon, rest = value.partition(":")
        names_agent = colon and "," not in agent and agent.strip().lower() not in _VALUED_ROBOTS_RULES
        if names_agent and agent.strip().lower() != USER_AGENT_TOKEN:
            continue
        for rule in (rest if names_agent else value).split(","):
            if rule.strip().lower() in rules:
                return rule.strip().lower()
    return None


def retry_after_seconds(headers: Message, now: float) -> float | None:
    """`Retry-After` (a number or a date) in seconds from `now` (Unix time); None where absent or senseless."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdecimal() and value.isascii():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (TypeError, ValueError, OverflowError):
        return None
