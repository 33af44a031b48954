"""What the transport allows and refuses, by pure functions and a fake resolver: nothing here opens a connection."""

from __future__ import annotations

import hashlib
import io
import pickle
import socket
import struct
import threading
import zlib
from collections.abc import Callable
from email.message import Message
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.image_header import read_header, sniff
from data_pipeline.transport import HardenedOpener
from data_pipeline.transport_policy import (
    Reason,
    RefusedError,
    TransportPolicy,
    address_reason,
    check_image,
    forbids,
    is_permanent,
    parse_target,
    retry_after_seconds,
    url_sha256,
)
from sdtrain.errors import ConfigError

CONTACT = "https://example.org/crawl"
POLICY = TransportPolicy(contact=CONTACT)


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


# ---------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("93.184.216.34", None),
        ("2606:2800:220:1::1", None),
        ("127.0.0.1", Reason.LOOPBACK),
        ("127.8.9.10", Reason.LOOPBACK),
        ("::1", Reason.LOOPBACK),
        ("::ffff:127.0.0.1", Reason.LOOPBACK),
        ("0.0.0.0", Reason.PRIVATE_ADDRESS),
        ("::", Reason.PRIVATE_ADDRESS),
        ("10.1.2.3", Reason.PRIVATE_ADDRESS),
        ("172.16.0.1", Reason.PRIVATE_ADDRESS),
        ("192.168.1.1", Reason.PRIVATE_ADDRESS),
        ("100.100.100.200", Reason.PRIVATE_ADDRESS),
        ("168.63.129.16", Reason.PRIVATE_ADDRESS),
        ("192.0.0.192", Reason.PRIVATE_ADDRESS),
        ("192.88.99.1", Reason.PRIVATE_ADDRESS),
        ("224.0.0.1", Reason.PRIVATE_ADDRESS),
        ("240.0.0.1", Reason.PRIVATE_ADDRESS),
        ("255.255.255.255", Reason.PRIVATE_ADDRESS),
        ("169.254.169.254", Reason.LINK_LOCAL),
        ("fe80::1%eth0", Reason.LINK_LOCAL),
        ("::ffff:169.254.169.254", Reason.LINK_LOCAL),
        ("::ffff:8.8.8.8", None),
        ("fd00:ec2::254", Reason.PRIVATE_ADDRESS),
        ("fec0::1", Reason.PRIVATE_ADDRESS),
        ("ff0e::1", Reason.PRIVATE_ADDRESS),
        ("::8.8.8.8", Reason.PRIVATE_ADDRESS),
        ("3fff::1", Reason.PRIVATE_ADDRESS),
        ("2001:db8::1", Reason.PRIVATE_ADDRESS),
        ("2002:a01:203::1", Reason.PRIVATE_ADDRESS),  # 6to4 of 10.1.2.3
        ("2002:7f00:1::1", Reason.PRIVATE_ADDRESS),  # 6to4 of 127.0.0.1
        ("2002:a9fe:a9fe::1", Reason.LINK_LOCAL),  # 6to4 of 169.254.169.254
        ("2002:808:808::1", None),  # 6to4 of 8.8.8.8
        ("64:ff9b::a01:203", Reason.PRIVATE_ADDRESS),  # NAT64 of 10.1.2.3
        ("64:ff9b::808:808", None),  # NAT64 of 8.8.8.8
        ("64:ff9b:1::808:808", Reason.PRIVATE_ADDRESS),  # local-use NAT64
        ("2001:0:808:808::f5f5:f5f5", Reason.PRIVATE_ADDRESS),  # Teredo, client 10.10.10.10
        ("2606:2800:220:1:0:5efe:a01:203", Reason.PRIVATE_ADDRESS),  # ISATAP of 10.1.2.3
        ("2606:2800:220:1:200:5efe:a9fe:a9fe", Reason.LINK_LOCAL),  # ISATAP of 169.254.169.254
        ("2606:2800:220:1:0:5efe:808:808", None),  # ISATAP of 8.8.8.8
    ],
)
def test_addresses_are_judged_by_what_they_reach(address: str, reason: Reason | None) -> None:
    assert address_reason(address, allow_loopback=False) == reason


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_opened_by_the_key_alone(address: str) -> None:
    assert address_reason(address, allow_loopback=True) is None


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "2002:7f00:1::1", "64:ff9b::7f00:1", "fe80::1"])
def test_the_loopback_key_opens_nothing_else(address: str) -> None:
    assert address_reason(address, allow_loopback=True) is not None


def never_connect(address: str, port: int, timeout_seconds: float) -> socket.socket:
    raise AssertionError(f"connected to {address}:{port}")


@pytest.mark.parametrize(
    ("addresses", "reason"),
    [
        (["10.0.0.1"], "refused:private_address"),
        (["169.254.169.254"], "refused:link_local"),
        (["127.0.0.1"], "refused:loopback"),
        (["93.184.216.34", "10.0.0.1"], "refused:private_address"),
        (["93.184.216.34", "::ffff:127.0.0.1"], "refused:loopback"),
        ([], "unknown_host"),
    ],
)
def test_one_bad_address_refuses_the_host_before_any_connection(addresses: list[str], reason: str) -> None:
    opener = HardenedOpener(POLICY, resolve=lambda host, port: addresses, connect=never_connect)
    error = refusal(lambda: opener.open("http://images.example/1.jpg"))
    assert error.reason == reason
    assert "images.example" in str(error)


def test_the_connection_goes_to_the_checked_address_without_a_second_look_up() -> None:
    lookups: list[str] = []
    connected: list[tuple[str, int]] = []

    def resolve(host: str, port: int) -> list[str]:
        lookups.append(host)  # a rebinding name server: the second answer would be private
        return ["93.184.216.34"] if len(lookups) == 1 else ["10.0.0.1"]

    def connect(address: str, port: int, timeout_seconds: float) -> socket.socket:
        connected.append((address, port))
        raise ConnectionRefusedError("refused here, in the test")

    opener = HardenedOpener(TransportPolicy(contact=CONTACT, retries=0), resolve=resolve, connect=connect)
    error = refusal(lambda: opener.open("https://images.example/1.jpg"))
    assert error.reason == "connect_failed"
    assert (lookups, connected) == (["images.example"], [("93.184.216.34", 443)])


@pytest.mark.parametrize(("errno", "reason"), [(socket.EAI_NONAME, "unknown_host"), (socket.EAI_AGAIN, "dns_failed")])
def test_look_up_failures_tell_unknown_hosts_from_trouble(errno: int, reason: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror(errno, "as the system says")

    opener = HardenedOpener(POLICY, resolve=resolve, connect=never_connect, sleep=lambda seconds: None)
    assert refusal(lambda: opener.open("http://images.example/")).reason == reason


def test_a_look_up_that_hangs_ends_with_the_timeout() -> None:
    done = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        done.wait(20)
        return []

    opener = HardenedOpener(TransportPolicy(contact=CONTACT, retries=0, timeout_seconds=0.05), resolve=resolve)
    try:
        error = refusal(lambda: opener.open("http://images.example/"))
    finally:
        done.set()
    assert str(error) == "dns_failed no answer for images.example in time"


# --------------------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "refused:scheme"),
        ("ftp://images.example/1.jpg", "refused:scheme"),
        ("data:image/png;base64,AAAA", "refused:scheme"),
        ("gopher://images.example/", "refused:scheme"),
        ("images.example/1.jpg", "refused:scheme"),
        ("http:///1.jpg", "refused:url"),
        ("http://[::1/1.jpg", "refused:url"),
        ("http://a b/1.jpg", "refused:url"),
        ("http://images.example\\.evil/1.jpg", "refused:url"),
        ("http://127%2e0%2e0%2e1/", "refused:url"),
        ("http://[fe80::1%25eth0]/", "refused:url"),
        ("http://.example/", "refused:url"),
        ("http://images.example:99999/", "refused:url"),
        ("http://" + "a" * 70 + ".example/", "refused:url"),
        ("http://user:secret@images.example/", "refused:credentials"),
        ("http://images.example:22/", "refused:port"),
        ("https://images.example:8443/", "refused:port"),
    ],
)
def test_urls_are_refused_before_any_look_up(url: str, reason: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError(f"looked up {host}")

    opener = HardenedOpener(POLICY, resolve=resolve, connect=never_connect)
    assert refusal(lambda: opener.open(url)).reason == reason


def test_a_target_is_quoted_and_named() -> None:
    target = parse_target("https://Bücher.example/ä b.jpg?q=a|b&x=%20#part", POLICY)
    assert (target.host, target.port, target.is_tls) == ("xn--bcher-kva.example", 443, True)
    assert target.path == "/%C3%A4%20b.jpg?q=a|b&x=%20"
    assert target.host_header == "xn--bcher-kva.example"


def test_the_host_header_names_an_unusual_port_and_brackets_ipv6() -> None:
    policy = TransportPolicy(contact=CONTACT, allowed_ports=(8080,))
    assert parse_target("http://[2606::1]:8080/", policy).host_header == "[2606::1]:8080"


def test_line_breaks_cannot_smuggle_a_second_header() -> None:
    target = parse_target("http://images.example/a\r\nX-Evil: 1", POLICY)
    assert "\r" not in target.path and "\n" not in target.path


def test_blocked_urls_are_not_opened() -> None:
    url = "http://images.example/1.jpg"
    policy = TransportPolicy(contact=CONTACT, blocked_urls=frozenset({hashlib.sha256(url.encode()).hexdigest()}))
    opener = HardenedOpener(policy, resolve=lambda host, port: ["93.184.216.34"], connect=never_connect)
    assert str(refusal(lambda: opener.open(url))) == "refused:blocked_url the URL is on the block list"


def test_blocked_urls_are_not_opened_after_a_redirect_either() -> None:
    policy = TransportPolicy(contact=CONTACT, blocked_urls=frozenset({url_sha256("http://b.example/2.jpg")}))
    assert refusal(lambda: parse_target("http://b.example/2.jpg", policy)).reason == "refused:blocked_url"
    assert parse_target("http://b.example/3.jpg", policy).host == "b.example"


def test_addresses_in_their_usual_notation_are_not_looked_up() -> None:
    assert [parse_target(f"http://{host}/", POLICY).is_address for host in ("93.184.216.34", "[2606::1]")] == [True] * 2
    assert not any(parse_target(f"http://{host}/", POLICY).is_address for host in ("0x7f.1", "2130706433", "a.example"))


def test_a_request_with_a_body_is_refused() -> None:
    error = refusal(lambda: HardenedOpener(POLICY, connect=never_connect).open("http://a.example/", data=b"x"))
    assert str(error) == "refused:url a request with a body for 'http://a.example/'; only GET is done here"


@pytest.mark.parametrize("contact", ["", "  ", "a\r\nX-Evil: 1", "bücher"])
def test_a_contact_is_required(contact: str) -> None:
    with pytest.raises(ConfigError, match="give a URL or mail address"):
        TransportPolicy(contact=contact)


# ---------------------------------------------------------------------------------------------- headers, images


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["noai"], "noai"),
        (["noindex, NoImageAI"], "noimageai"),
        (["noindex"], None),
        (["sdtrain: noai"], "noai"),
        (["otherbot: noai"], None),
        (["otherbot: noai", "noimageai"], "noimageai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["noindex, max-snippet: 5, noai"], "noai"),
        ([], None),
    ],
)
def test_robots_rules_for_everyone_or_for_us_are_honoured(values: list[str], found: str | None) -> None:
    headers = Message()
    for value in values:
        headers["X-Robots-Tag"] = value
    assert forbids(headers, POLICY.robots_rules) == found


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        (None, None),
    ],
)
def test_retry_after_is_read_as_number_or_date(value: str | None, seconds: float | None) -> None:
    headers = Message()
    if value is not None:
        headers["Retry-After"] = value
    assert retry_after_seconds(headers, now=10.0) == seconds


@pytest.mark.parametrize(
    ("image_format", "options", "name"),
    [
        ("JPEG", {}, "jpeg"),
        ("JPEG", {"progressive": True}, "jpeg"),
        ("PNG", {}, "png"),
        ("WEBP", {}, "webp"),
        ("WEBP", {"lossless": True}, "webp"),
        ("WEBP", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0"}, "webp"),
    ],
)
def test_headers_are_read_as_pillow_reads_them(image_format: str, options: dict[str, Any], name: str) -> None:
    header = read_header(encoded(image_format, (37, 21), **options))
    assert (header.format, header.width, header.height, header.animated) == (name, 37, 21, False)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_animations_are_seen_in_the_header(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, image_format, save_all=True, append_images=frames[1:])
    assert refusal(lambda: check_image(stream.getvalue(), 10**6)).reason == "animated"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"GIF89a" + bytes(20), "not_an_image begins with b'GIF89a"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "neither JPEG nor PNG nor WebP"),
        (b"", "neither JPEG nor PNG nor WebP"),
        (JPEG[:8], "the jpeg header is cut off"),
        (b"\xff\xd8\xff\xda\x00\x08", "no frame before its first scan"),
        (b"\xff\xd8\xff\xe0\x00\x04\x00\x00zz", "where a marker belongs"),
        (png_header(1, 1)[:20], "the png header is cut off"),
        (png_header(0, 5), "the png header says 0x5 pixels"),
        (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IEND", b""), "does not begin with IHDR"),
        (b"RIFF\0\0\0\0WEBPICCP", "the webp container begins with chunk b'ICCP'"),
    ],
)
def test_what_is_no_image_is_refused(body: bytes, message: str) -> None:
    error = refusal(lambda: check_image(body, 10**6))
    assert error.reason == "not_an_image"
    assert message in str(error)


def test_bombs_are_refused_by_their_header() -> None:
    error = refusal(lambda: check_image(png_header(20_000, 20_000), 64_000_000))
    assert str(error) == "too_many_pixels 20000x20000; allowed are 64000000 pixels"


def test_jpegs_of_very_many_scans_are_refused() -> None:
    body = encoded("JPEG", progressive=True)
    scan, end = body.rindex(b"\xff\xda"), body.rindex(b"\xff\xd9")
    check_image(body[:end] + body[scan:end] * 80 + body[end:], 10**6)
    error = refusal(lambda: check_image(body[:end] + body[scan:end] * 100 + body[end:], 10**6))
    assert str(error) == "too_many_scans 110 in a jpeg; allowed are 100"


def test_sixteen_bit_images_are_refused() -> None:
    error = refusal(lambda: check_image(png_header(8, 8, bit_depth=16), 100))
    assert str(error) == "bit_depth 16 bits a channel in a png; allowed are 8"


def test_sniffing_needs_the_whole_signature() -> None:
    assert sniff(b"\x89PNG") is None
    assert sniff(b"RIFF\0\0\0\0WAVE") is None


def test_reasons_are_permanent_or_pass() -> None:
    permanent = ["http_204", "http_206", "http_304", "too_small", "undecodable", "refused:digest", "too_many_scans"]
    permanent += ["refused:private_address", "http_404", "http_410", "too_large", "not_an_image", "unknown_host"]
    passing = ["http_503", "http_429", "http_408", "timeout", "deadline", "too_slow", "dns_failed", "connect_failed"]
    assert all(is_permanent(reason) for reason in permanent)
    assert not any(
        is_permanent(reason)
        for reason in [*passing, "truncated", "http_500", "http_520", "retry_after", "internal_error"]
    )


def test_a_refusal_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(RefusedError("http_503", "busy", 3.0)))
    assert (copy.reason, copy.detail, copy.retry_after_seconds) == ("http_503", "busy", 3.0)


def test_retries_end_where_the_pause_would_pass_the_deadline() -> None:
    def connect(address: str, port: int, timeout_seconds: float) -> socket.socket:
        raise ConnectionResetError("reset here, in the test")

    pauses: list[float] = []
    policy = TransportPolicy(contact=CONTACT, retries=5, total_timeout_seconds=1.9)
    opener = HardenedOpener(policy, resolve=lambda host, port: ["93.184.216.34"], connect=connect, sleep=pauses.append)
    assert refusal(lambda: opener.open("http://images.example/")).reason == "connect_failed"
    assert pauses == [0.5, 1.0]
