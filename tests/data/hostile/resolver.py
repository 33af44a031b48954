"""A name server on loopback whose answers depend on the name, and on how often it was asked for."""

from __future__ import annotations

import ipaddress
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass

from tests.data.hostile.namespace import PUBLIC

A, CNAME, AAAA = 1, 5, 28
_NOERROR, _SERVFAIL, _NXDOMAIN = 0, 2, 3


@dataclass(frozen=True)
class Answer:
    """What one look-up brings.

    Attributes:
        addresses: IPv4 and IPv6 addresses.
        alias: A canonical name that the addresses belong to.
        code: The response code.
        is_silent: Nothing is sent at all.
    """

    addresses: tuple[str, ...] = ()
    alias: str | None = None
    code: int = _NOERROR
    is_silent: bool = False


ZONE: dict[str, tuple[Answer, ...]] = {  # the last answer of a name is repeated
    "private.test": (Answer(("10.0.0.1",)),),
    "loopback.test": (Answer(("127.0.0.1",)),),
    "metadata.test": (Answer(("169.254.169.254",), alias="instance-data.test"),),
    "carrier.test": (Answer(("100.64.0.1",)),),
    "mixed.test": (Answer((PUBLIC, "10.0.0.1")),),
    "mixed-families.test": (Answer((PUBLIC, "fd00:ec2::254")),),
    "many.test": (Answer((*[f"93.184.216.{host}" for host in range(34, 54)], "192.168.1.1")),),
    "mapped.test": (Answer(("::ffff:127.0.0.1",)),),
    "translated.test": (Answer(("64:ff9b::a00:1",)),),
    "unspecified.test": (Answer(("0.0.0.0",)),),
    "rebinding.test": (Answer((PUBLIC,)), Answer(("127.0.0.1",))),
    "rebinding-retry.test": (Answer((PUBLIC,)), Answer(("10.0.0.1",))),
    "rebinding-redirect.test": (Answer((PUBLIC,)), Answer(("169.254.169.254",))),
    "no-address.test": (Answer(),),
    "broken.test": (Answer(code=_SERVFAIL),),
    "silent.test": (Answer(is_silent=True),),
}
_WILDCARD = ".public.test"


class Resolver:
    """Answers on UDP port 53 of 127.0.0.1 from a thread."""

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(4096)
            reply = self._reply(query)
            if reply is not None:
                self._socket.sendto(reply, client)

    def _reply(self, query: bytes) -> bytes | None:
        name, end = _name_at(query, 12)
        (kind,) = struct.unpack_from(">H", query, end)
        answer = self._answer(name, kind)
        if answer.is_silent:
            return None
        records = _records(answer, kind)
        head = query[:2] + struct.pack(">HHHHH", 0x8180 | answer.code, 1, len(records), 0, 0)
        return head + query[12 : end + 4] + b"".join(records)

    def _answer(self, name: str, kind: int) -> Answer:
        if name in ZONE:
            answers = ZONE[name]
            self._asked[name] += kind == A
            return answers[min(max(self._asked[name], 1), len(answers)) - 1]
        if name.endswith(_WILDCARD):
            return Answer((PUBLIC,))
        return Answer(code=_NXDOMAIN)


def _name_at(message: bytes, at: int) -> tuple[str, int]:
    """The name that is asked for, lower case, and where its type begins."""
    labels = []
    while message[at]:
        labels.append(message[at + 1 : at + 1 + message[at]].decode("ascii", "replace").lower())
        at += 1 + message[at]
    return ".".join(labels), at + 1


def _records(answer: Answer, kind: int) -> list[bytes]:
    owner, records = b"\xc0\x0c", []
    if answer.alias is not None:
        target = b"".join(bytes([len(label)]) + label.encode() for label in answer.alias.split(".")) + b"\0"
        records.append(_record(owner, CNAME, target))
        owner = target
    for text in answer.addresses:
        address = ipaddress.ip_address(text)
        if kind == (A if address.version == 4 else AAAA):
            records.append(_record(owner, kind, address.packed))
    return records


def _record(owner: bytes, kind: int, data: bytes) -> bytes:
    return owner + struct.pack(">HHIH", kind, 1, 0, len(data)) + data
