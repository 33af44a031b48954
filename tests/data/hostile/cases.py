"""What the web does to a crawler, and what must come of it."""

from __future__ import annotations

import functools
import gzip
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.data.hostile import pictures
from tests.data.hostile.namespace import PUBLIC, PUBLIC_IPV6
from tests.data.hostile.pictures import Pixels, jpeg, png, quadrants
from tests.data.hostile.server import Exchange, Script

STORED = "success"
SECRET = Path("/tmp/hostile-suite-secret.jpg")
"""A picture of this machine that no URL may open."""

MAX_BYTES = 1_000_000
MAX_PIXELS = 16_000_000


@dataclass(frozen=True)
class Case:
    """One row of metadata, and the server behind it.

    Attributes:
        name: Also the path that is asked for.
        url: What stands in the table.
        must: `success`, or the reason that it is refused with.
        script: What the public server plays; None where it must not be asked.
        pixels: What is stored, give or take a JPEG.
        md5: The table's column, where it says something.
        sha256: The table's column, where it says something.
    """

    name: str
    url: str
    must: str
    script: Script | None = None
    pixels: Callable[[], Pixels] = quadrants
    md5: str | None = None
    sha256: str | None = None


CASES: list[Case] = []
PREPARED: list[Callable[[], bytes]] = []
"""Bodies that are made before the first request: some take a second."""


def sent(name: str, host: str, must: str, scheme: str = "http") -> None:
    """A URL whose host must not be asked."""
    CASES.append(Case(name, f"{scheme}://{host}/{name}", must))


def served(
    name: str,
    must: str,
    script: Script,
    *,
    host: str | None = None,
    pixels: Callable[[], Pixels] = quadrants,
    md5: str | None = None,
    sha256: str | None = None,
) -> None:
    """A public server, under a name of its own, that plays a script."""
    host = host or f"{name.replace('_', '-')}.public.test"
    CASES.append(Case(name, f"http://{host}/{name}", must, script, pixels, md5, sha256))


def image(
    name: str,
    must: str,
    make: Callable[[], bytes],
    *,
    pixels: Callable[[], Pixels] = quadrants,
    md5: str | None = None,
    sha256: str | None = None,
) -> None:
    """A body that a public server sends as `image/jpeg`, whatever it is."""
    body = functools.cache(make)
    PREPARED.append(body)

    def script(wire: Exchange) -> None:
        wire.reply(body(), headers={"Content-Type": "image/jpeg"})

    served(name, must, script, pixels=pixels, md5=md5, sha256=sha256)


def redirect(name: str, must: str, location: str, status: str = "302 Found") -> None:
    """A public server that leads elsewhere; what is asked for there has the same name."""
    target = location.replace("NAME", name)
    served(name, must, lambda wire: wire.reply(status=status, headers={"Location": target}))


def good(wire: Exchange) -> None:
    wire.reply(jpeg())


# ------------------------------------------------------------------------------------------------------ addresses

LOOPBACK, PRIVATE, LINK_LOCAL = "refused:loopback", "refused:private_address", "refused:link_local"

sent("loopback", "127.0.0.1", LOOPBACK)
sent("loopback_elsewhere", "127.8.9.10", LOOPBACK)
sent("loopback_decimal", "2130706433", LOOPBACK)
sent("loopback_octal", "0177.0.0.01", LOOPBACK)
sent("loopback_hex_parts", "0x7f.0x0.0x0.0x1", LOOPBACK)
sent("loopback_hex", "0x7f000001", LOOPBACK)
sent("loopback_short", "127.1", LOOPBACK)
sent("loopback_trailing_dot", "127.0.0.1.", "unknown_host")
sent("loopback_ipv6", "[::1]", LOOPBACK)
sent("loopback_mapped", "[::ffff:127.0.0.1]", LOOPBACK)
sent("loopback_mapped_hex", "[::ffff:7f00:1]", LOOPBACK)
sent("loopback_by_name", "localhost", LOOPBACK)
sent("loopback_by_name_and_dot", "localhost.", "unknown_host")  # as the name server says, not /etc/hosts
sent("loopback_circled_digits", "①②⑦.⓪.⓪.①", LOOPBACK)
sent("loopback_ideographic_dots", "127。0。0。1", LOOPBACK)
sent("loopback_quoted", "127%2e0%2e0%2e1", "refused:url")
sent("unspecified", "0.0.0.0", PRIVATE)
sent("unspecified_short", "0", PRIVATE)
sent("unspecified_ipv6", "[::]", PRIVATE)
sent("private_10", "10.0.0.1", PRIVATE)
sent("private_10_decimal", "167772161", PRIVATE)
sent("private_10_octal", "012.0.0.1", PRIVATE)
sent("private_10_mapped", "[::ffff:10.0.0.1]", PRIVATE)
sent("private_172", "172.16.5.4", PRIVATE)
sent("private_192", "192.168.1.1", PRIVATE)
sent("carrier_grade_nat", "100.64.0.1", PRIVATE)
sent("metadata_alibaba", "100.100.100.200", PRIVATE)
sent("metadata_aws", "169.254.169.254", LINK_LOCAL)
sent("metadata_aws_hex", "0xa9fea9fe", LINK_LOCAL)
sent("metadata_aws_ipv6", "[fd00:ec2::254]", PRIVATE)
sent("metadata_azure", "168.63.129.16", PRIVATE)
sent("metadata_oracle", "192.0.0.192", PRIVATE)
sent("benchmarking", "198.18.0.1", PRIVATE)
sent("documentation", "203.0.113.1", PRIVATE)
sent("relay_6to4", "192.88.99.1", PRIVATE)
sent("multicast", "224.0.0.1", PRIVATE)
sent("reserved", "240.0.0.1", PRIVATE)
sent("broadcast", "255.255.255.255", PRIVATE)
sent("link_local_ipv6", "[fe80::1]", LINK_LOCAL)
sent("link_local_ipv6_scoped", "[fe80::1%25lo]", "refused:url")
sent("site_local_ipv6", "[fec0::1]", PRIVATE)
sent("multicast_ipv6", "[ff02::1]", PRIVATE)
sent("compatible_ipv6", "[::10.0.0.1]", PRIVATE)
sent("nat64", "[64:ff9b::10.0.0.1]", PRIVATE)
sent("nat64_local_use", "[64:ff9b:1::10.0.0.1]", PRIVATE)
sent("tunnel_6to4", "[2002:a00:1::1]", PRIVATE)
sent("tunnel_teredo", "[2001:0:808:808::f5ff:fffe]", PRIVATE)
sent("tunnel_isatap", "[2606:2800:220:1:0:5efe:10.0.0.1]", PRIVATE)
sent("documentation_ipv6", "[2001:db8::1]", PRIVATE)
sent("user_hides_host", f"{PUBLIC}@127.0.0.1", "refused:credentials")
sent("user_and_port_hide_host", f"{PUBLIC}:80@10.0.0.1", "refused:credentials")
sent("backslash_hides_host", f"127.0.0.1\\@{PUBLIC}", "refused:credentials")
CASES.append(Case("fragment_hides_host", f"http://127.0.0.1/fragment_hides_host#@{PUBLIC}/", LOOPBACK))
CASES.append(Case("question_hides_host", f"http://127.0.0.1/question_hides_host?@{PUBLIC}/", LOOPBACK))
sent("line_break_in_host", "127.0.\n0.1", LOOPBACK)
sent("host_with_space", "127.0.0.1 .public.test", "refused:url")
served("public_address", STORED, good, host=PUBLIC)
served("public_address_decimal", STORED, good, host=str(0x5DB8D822))
served("public_address_ipv6", STORED, good, host=f"[{PUBLIC_IPV6}]")

# ------------------------------------------------------------------------------------------------------------ DNS

served("dns_public", STORED, good)
sent("dns_private", "private.test", PRIVATE)
sent("dns_loopback", "loopback.test", LOOPBACK)
sent("dns_alias_of_metadata", "metadata.test", LINK_LOCAL)
sent("dns_carrier_grade_nat", "carrier.test", PRIVATE)
sent("dns_one_of_two_private", "mixed.test", PRIVATE)
sent("dns_one_of_two_families_private", "mixed-families.test", PRIVATE)
sent("dns_last_of_many_private", "many.test", PRIVATE)
sent("dns_mapped", "mapped.test", LOOPBACK)
sent("dns_nat64", "translated.test", PRIVATE)
sent("dns_unspecified", "unspecified.test", PRIVATE)
sent("dns_unknown", "nobody.test", "unknown_host")
sent("dns_no_address", "no-address.test", "unknown_host")
sent("dns_broken", "broken.test", "dns_failed")
sent("dns_silent", "silent.test", "dns_failed")
served("dns_rebinding", STORED, good, host="rebinding.test")  # the second answer would be 127.0.0.1: never asked for
served(
    "dns_rebinding_between_attempts",
    PRIVATE,
    lambda wire: wire.reply(status="503 Busy", headers={"Retry-After": "0"}),
    host="rebinding-retry.test",
)
served(
    "dns_rebinding_between_redirects",
    LINK_LOCAL,
    lambda wire: wire.reply(status="302 Found", headers={"Location": "/dns_rebinding_between_redirects/again"}),
    host="rebinding-redirect.test",
)

# ------------------------------------------------------------------------------------------------------ redirects


def once_round(wire: Exchange) -> None:
    """To itself the first time, then the picture."""
    if wire.request == 1:
        wire.reply(status="308 Permanent Redirect", headers={"Location": "/redirect_relative/there"})
    else:
        good(wire)


def endless_redirect(wire: Exchange) -> None:
    """A body that nobody should read."""
    wire.send(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/redirect_with_endless_body\r\n\r\n")
    wire.drip(bytes(10_000))


served("redirect_relative", STORED, once_round)
redirect("redirect_to_loopback", LOOPBACK, "http://127.0.0.1/NAME")
redirect("redirect_to_private", PRIVATE, "http://10.0.0.1/NAME", "307 Temporary Redirect")
redirect("redirect_to_metadata", LINK_LOCAL, "http://169.254.169.254/NAME", "301 Moved")
redirect("redirect_to_decimal", LOOPBACK, "http://2130706433/NAME")
redirect("redirect_to_mapped", PRIVATE, "http://[::ffff:10.0.0.1]/NAME")
redirect("redirect_to_private_name", PRIVATE, "http://private.test/NAME")
redirect("redirect_without_scheme", PRIVATE, "//10.0.0.1/NAME")
redirect("redirect_to_file", "refused:scheme", "file:///etc/passwd")
redirect("redirect_to_ftp", "refused:scheme", f"ftp://{PUBLIC}/NAME")
redirect("redirect_to_data", "refused:scheme", "data:image/png;base64,AAAA")
redirect("redirect_to_port", "refused:port", f"http://{PUBLIC}:22/NAME")
redirect("redirect_to_credentials", "refused:credentials", f"http://a:b@{PUBLIC}/NAME")
redirect("redirect_loop", "refused:redirects", "/NAME")
redirect("redirect_nowhere", "refused:redirects", "")
redirect("redirect_to_blocked", "refused:blocked_url", "http://blocked.public.test/blocked")
redirect("redirect_splits_headers", "unknown_host", "http://nobody.test/\rX-Evil: 1")
served("redirect_with_endless_body", LOOPBACK, endless_redirect)
image("redirect_in_html", "not_an_image", lambda: b"<meta http-equiv=refresh content='0;url=http://10.0.0.1/'>")

# ---------------------------------------------------------------------------------------------- schemes and ports

for scheme in ("ftp", "gopher", "ldap", "dict", "jar"):
    sent(f"scheme_{scheme}", "10.0.0.1", "refused:scheme", scheme)
CASES.append(Case("scheme_file", SECRET.as_uri(), "refused:scheme"))
CASES.append(Case("scheme_file_upper_case", SECRET.as_uri().replace("file", "FILE"), "refused:scheme"))
CASES.append(Case("scheme_data", "data:image/png;base64,AAAA", "refused:scheme"))
CASES.append(Case("scheme_javascript", "javascript:alert(1)", "refused:scheme"))
CASES.append(Case("scheme_missing", f"{PUBLIC}/scheme_missing", "refused:scheme"))
CASES.append(Case("url_empty", "", "refused:scheme"))
CASES.append(Case("url_without_host", "http:///url_without_host", "refused:url"))
CASES.append(Case("url_broken_ipv6", "http://[::1", "refused:url"))
sent("port_ssh", f"{PUBLIC}:22", "refused:port")
sent("port_redis", f"{PUBLIC}:6379", "refused:port")
sent("port_proxy", f"{PUBLIC}:8080", "refused:port")
sent("port_zero", f"{PUBLIC}:0", "refused:port")
sent("port_too_large", f"{PUBLIC}:65616", "refused:url")
CASES.append(Case("tls_self_signed", "https://self-signed.public.test/tls_self_signed", "refused:certificate", good))

# --------------------------------------------------------------------------------------------------------- bodies


def unbounded(head: bytes, piece: bytes, pause_seconds: float = 0.0) -> Script:
    """A beginning, and then the same bytes for ever."""

    def script(wire: Exchange) -> None:
        wire.send(head)
        wire.drip(piece, pause_seconds)

    return script


def sends(data: bytes) -> Script:
    return lambda wire: wire.send(data)


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ONE_CHUNK = f"{len(jpeg()):x}\r\n".encode() + jpeg() + b"\r\n"

served("body_endless", "too_large", unbounded(OK + b"\r\n" + jpeg(), bytes(10_000)))
served("body_endless_chunks", "too_large", unbounded(CHUNKED + ONE_CHUNK, b"2710\r\n" + bytes(10_000) + b"\r\n"))
served("body_chunk_extensions", "too_large", unbounded(CHUNKED + ONE_CHUNK, b"1;" + b"x" * 60_000 + b"\r\n\xff\r\n"))
served("body_slow_drip", "deadline", unbounded(OK + b"\r\n\xff\xd8\xff", b"\xe0", 0.2))
served("body_silent", "timeout", lambda wire: (wire.send(OK + b"\r\n\xff\xd8"), wire.wait())[-1])
served("body_announced_huge", "too_large", lambda wire: wire.reply(jpeg(), length=10**15))
served("body_shorter_than_announced", "truncated", lambda wire: wire.reply(jpeg(), length=len(jpeg()) + 10))
served("body_longer_than_announced", STORED, lambda wire: wire.reply(jpeg() + b"more", length=len(jpeg())))
served("body_negative_length", STORED, lambda wire: wire.reply(jpeg(), length=-5))
served("body_empty", "not_an_image", lambda wire: wire.reply(b""))
served("body_reset", "connect_failed", lambda wire: (wire.send(OK + b"\r\n" + jpeg()[:99]), wire.reset())[-1])
served("chunks", STORED, sends(CHUNKED + ONE_CHUNK + b"0\r\n\r\n"))
served("chunk_garbage", "truncated", sends(CHUNKED + b"zz\r\n" + jpeg()))
served("chunk_huge", "truncated", sends(CHUNKED + b"ffffffffffffffff\r\n" + jpeg()))
served("chunk_negative", "bad_response", sends(CHUNKED + b"-5\r\n" + jpeg()))
served("headers_endless", "bad_response", unbounded(OK, b"X: " + b"y" * 1000 + b"\r\n"))
served("header_line_endless", "bad_response", unbounded(OK + b"X: ", b"y" * 1000))
served("header_drip", "deadline", unbounded(OK, b"X: y\r\n", 0.2))
served("continues_endless", "too_large", unbounded(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000))
served("no_answer", "timeout", lambda wire: wire.wait())
served("closed_at_once", "bad_response", lambda wire: None)
served("not_http", "bad_response", sends(b"SSH-2.0-OpenSSH_9.9\r\n" * 9))
served("http_0_9", "bad_response", sends(jpeg()))
served("status_404", "http_404", lambda wire: wire.reply(jpeg(), "404 Not Found"))
served("status_204", "http_204", lambda wire: wire.reply(status="204 No Content"))
served("status_206", "http_206", lambda wire: wire.reply(jpeg(), "206 Partial Content"))
served("status_500", "http_500", lambda wire: wire.reply(jpeg(), "500 Oops"))
served("status_429_for_a_day", "http_429", lambda wire: wire.reply(status="429", headers={"Retry-After": "86400"}))
served("status_negative", "bad_response", sends(b"HTTP/1.1 -200 OK\r\n\r\n" + jpeg()))

# ------------------------------------------------------------------------------------------------------ encodings

ENCODING = "refused:content_encoding"


def coded(name: str, coding: str, make: Callable[[], bytes], must: str = ENCODING) -> None:
    body = functools.cache(make)
    PREPARED.append(body)
    served(name, must, lambda wire: wire.reply(body(), headers={"Content-Encoding": coding}))


coded("gzip_bomb", "gzip", pictures.gzip_bomb)
coded("gzip_nested", "gzip, gzip", lambda: gzip.compress(pictures.gzip_bomb()))
coded("gzip_old_name", "x-gzip", lambda: gzip.compress(jpeg()))
coded("deflate_bomb", "deflate", pictures.zeros)
coded("brotli_bomb", "br", lambda: bytes.fromhex("cffffffb1f00f8ff") * 1000)
coded("zstd_bomb", "zstd", lambda: bytes.fromhex("28b52ffd") + bytes(1000))
coded("encoding_unknown", "x-new", jpeg)
coded("encoding_identity", "identity", jpeg, STORED)
served("transfer_gzip", "not_an_image", sends(OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + ONE_CHUNK))

# --------------------------------------------------------------------------------------------------------- images

NOT_AN_IMAGE = "not_an_image"

image("jpeg_plain", STORED, jpeg)
image("jpeg_progressive", STORED, lambda: jpeg(progressive=True))
image("jpeg_grey", STORED, lambda: jpeg("L"), pixels=pictures.grey)
image("jpeg_cmyk", STORED, lambda: jpeg("CMYK"))
image("jpeg_truncated", "undecodable", lambda: jpeg()[: len(jpeg()) * 2 // 3])
image("jpeg_header_only", NOT_AN_IMAGE, lambda: jpeg()[:20])
image("jpeg_bomb", "too_many_pixels", pictures.jpeg_bomb)
image("jpeg_scan_bomb", "too_many_scans", pictures.scan_bomb)
image("jpeg_zero_height", NOT_AN_IMAGE, lambda: jpeg().replace(b"\x08\x00\x40\x00\x40", b"\x08\x00\x00\x00\x40", 1))
image("jpeg_twelve_bit", "bit_depth", lambda: jpeg().replace(b"\x08\x00\x40\x00\x40", b"\x0c\x00\x40\x00\x40", 1))
image("jpeg_lossless_frame", "undecodable", lambda: jpeg().replace(b"\xff\xc0", b"\xff\xc3", 1))
image("jpeg_exif_turned_right", STORED, lambda: pictures.turned(6))
image("jpeg_exif_turned_left", STORED, lambda: pictures.turned(8))
image("jpeg_exif_upside_down", STORED, lambda: pictures.turned(3))
image("jpeg_exif_senseless", STORED, lambda: pictures.turned(99))
image("jpeg_exif_garbage", STORED, lambda: pictures.with_jpeg_segment(jpeg(), 0xE1, b"Exif\0\0II*\0" + b"\xff" * 999))
image("jpeg_exif_huge", STORED, pictures.huge_exif)
image("jpeg_icc_garbage", STORED, lambda: jpeg(icc_profile=b"\xff" * 5000))
image("jpeg_and_zip", STORED, lambda: jpeg() + b"PK\x03\x04" + bytes(1000) + b"PK\x05\x06" + bytes(18))
image("jpeg_with_script", STORED, lambda: jpeg(comment=b"<script>alert(1)</script><?php system('id') ?>"))
image("jpeg_twice", STORED, lambda: jpeg() + jpeg("L"))
image("html_as_jpeg", NOT_AN_IMAGE, lambda: b"<html>" * 1000)
image("html_behind_jpeg_magic", NOT_AN_IMAGE, lambda: b"\xff\xd8\xff\xe0" + b"<html>" * 1000)
image("svg", NOT_AN_IMAGE, lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://10.0.0.1/svg'/></svg>")
image("pdf_and_jpeg", NOT_AN_IMAGE, lambda: b"%PDF-1.7\n" + jpeg())
image("png_plain", STORED, png)
image("png_palette", STORED, pictures.palette)
image("png_transparent", STORED, pictures.transparent, pixels=pictures.upper_half_on_white)
image("png_bomb", "too_many_pixels", pictures.png_bomb)
image("png_as_large_as_allowed", STORED, pictures.large_png, pixels=pictures.black)
image("png_data_bomb", STORED, pictures.png_data_bomb)
image(
    "png_text_bomb",
    STORED,
    lambda: pictures.with_png_chunk(png(), b"zTXt", b"a\0\0" + pictures.zeros()),
)
image(
    "png_icc_bomb",
    STORED,
    lambda: pictures.with_png_chunk(png(), b"iCCP", b"a\0\0" + pictures.zeros()),
)
image("png_claims_too_much", "too_many_pixels", lambda: pictures.png_of(2**31 - 1, 2**31 - 1, 8, 2, b"x"))
image("png_zero_size", NOT_AN_IMAGE, lambda: pictures.png_of(0, 64, 8, 2, b"x"))
image("png_truncated", "undecodable", lambda: png()[: len(png()) // 2])
image("png_without_data", "undecodable", lambda: pictures.png_of(64, 64, 8, 2, b""))
image("png_sixteen_bit", "bit_depth", pictures.sixteen_bit)
image("png_animated", "animated", lambda: pictures.animated("PNG"))
image("webp_plain", STORED, lambda: pictures.encoded(pictures.picture(), "WEBP", quality=95))
image("webp_truncated", "undecodable", lambda: pictures.encoded(pictures.picture(), "WEBP", lossless=True)[:-40])
image("webp_bomb", "too_many_pixels", pictures.webp_bomb)
image("webp_animated", "animated", lambda: pictures.animated("WEBP"))
image("gif_plain", NOT_AN_IMAGE, lambda: pictures.encoded(pictures.picture("P"), "GIF"))
image("gif_bomb", NOT_AN_IMAGE, pictures.gif_bomb)
image("gif_animated", NOT_AN_IMAGE, lambda: pictures.animated("GIF"))
image("gif_and_script", NOT_AN_IMAGE, lambda: b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)")
image("bmp", NOT_AN_IMAGE, lambda: pictures.encoded(pictures.picture(), "BMP"))
image("tiff", NOT_AN_IMAGE, lambda: pictures.encoded(pictures.picture(), "TIFF"))
image("too_small", "too_small", lambda: pictures.encoded(pictures.picture().resize((63, 80))))

# ------------------------------------------------------------------------------------------- manners and poisoning

BLOCKED_PICTURE = pictures.encoded(pictures.picture(), "JPEG", comment=b"on the list")


def tagged(name: str, value: str, must: str = "refused:robots_tag") -> None:
    served(name, must, lambda wire: wire.reply(jpeg(), headers={"X-Robots-Tag": value}))


tagged("robots_noai", "noai")
tagged("robots_noimageai_among_others", "noindex, NoImageAI")
tagged("robots_noai_for_us", "sdtrain: noai")
tagged("robots_noai_for_others", "otherbot: noai", STORED)
CASES.append(Case("blocked", "http://blocked.public.test/blocked", "refused:blocked_url", good))
image("blocked_bytes", "refused:blocked_bytes", lambda: BLOCKED_PICTURE)
image("digest_sha256_right", STORED, jpeg, sha256=hashlib.sha256(jpeg()).hexdigest())
image("digest_md5_right", STORED, jpeg, md5=hashlib.md5(jpeg()).hexdigest())
image("digest_sha256_wrong", "refused:digest", jpeg, sha256="0" * 64)
image("digest_md5_wrong", "refused:digest", jpeg, md5="0" * 32)

BLOCKED_URLS = ("http://blocked.public.test/blocked",)
BLOCKED_BYTES = (hashlib.sha256(BLOCKED_PICTURE).hexdigest(),)
SCRIPTS = {case.name: case.script for case in CASES if case.script is not None}
assert len({case.name for case in CASES}) == len(CASES)
