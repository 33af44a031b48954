"""A network of nothing but `lo`, with every address of the suite on it and a resolver of its own.

`isolated(...)` makes the command line that starts a program in new network and mount namespaces; the program calls
`enter(...)` first. No packet can leave, whatever the program under test does, and every address that it must not reach
is really there, so that reaching it would be seen.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PUBLIC = "93.184.216.34"
PUBLIC_IPV6 = "2606:2800:220:1::1"
SELF_MADE = "NAMESPACE_OF_THE_HOSTILE_SUITE"

IPV4 = (  # on `lo` a prefix makes the whole network local, as 127.0.0.1/8 does
    f"{PUBLIC}/32",
    "10.0.0.1/8",
    "172.16.0.1/12",
    "192.168.1.1/16",
    "169.254.169.254/16",
    "100.64.0.1/10",
    "168.63.129.16/32",
    "192.0.0.192/24",
    "192.88.99.1/24",
    "198.18.0.1/15",
    "203.0.113.1/24",
    "240.0.0.1/32",
)
IPV6 = (
    PUBLIC_IPV6,
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "64:ff9b::a00:1",
    "64:ff9b:1::a00:1",
    "2002:a00:1::1",
    "2001:0:808:808::f5ff:fffe",
    "2606:2800:220:1:0:5efe:a00:1",
    "2001:db8::1",
    "::10.0.0.1",
)

_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFFLAGS = 0x8916, 0x891C, 0x8914
_UP_AND_RUNNING = 0x1 | 0x40


def isolated(*arguments: str) -> list[str]:
    """The command that runs Python with `arguments` in namespaces of its own.

    Raises:
        RuntimeError: The machine does not permit that; the suite never runs without it.
    """
    flags = ["--net", "--mount"] if os.geteuid() == 0 else ["--map-root-user", "--net", "--mount"]
    tried = subprocess.run(["unshare", *flags, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        raise RuntimeError(
            f"the hostile suite runs in a network namespace only, and `unshare {' '.join(flags)}` is not permitted "
            f"here ({tried.stderr.strip()}); run as root, or allow user namespaces"
        )
    return ["unshare", *flags, sys.executable, "-W", "ignore", *arguments]


def environment() -> dict[str, str]:
    """Variables of such a program."""
    return {**os.environ, SELF_MADE: "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}


def enter(folder: Path) -> None:
    """Bring `lo` up with all addresses, and let the system's resolver ask 127.0.0.1.

    Args:
        folder: Where the files lie that stand in for those of /etc.
    """
    assert os.environ.get(SELF_MADE) == "1", "start this through tests.data.hostile.namespace.isolated"
    assert [name for _, name in socket.if_nameindex()] == ["lo"], "not in a network namespace of its own"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        _set(sock, _SIOCSIFFLAGS, "lo", struct.pack("H14x", _UP_AND_RUNNING))
        for number, text in enumerate(IPV4):
            interface = ipaddress.IPv4Interface(text)
            _set(sock, _SIOCSIFADDR, f"lo:{number}", _sockaddr(interface.ip))
            _set(sock, _SIOCSIFNETMASK, f"lo:{number}", _sockaddr(interface.netmask))
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        for text in IPV6:  # a kernel without IPv6 has nothing to reach there
            request = ipaddress.IPv6Address(text).packed + struct.pack("=Ii", 128, socket.if_nametoindex("lo"))
            fcntl.ioctl(sock, _SIOCSIFADDR, request)
    _stand_in(folder, "resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    _stand_in(folder, "hosts", "127.0.0.1 localhost\n::1 localhost\n")
    _stand_in(folder, "nsswitch.conf", "hosts: files dns\n")
    for daemon in (Path("/var/run/nscd"), Path("/run/systemd/resolve")):  # sockets that answer from outside
        if daemon.is_dir():
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(daemon)], check=True)


def _set(sock: socket.socket, request: int, name: str, value: bytes) -> None:
    fcntl.ioctl(sock, request, struct.pack("16s", name.encode()) + value)


def _sockaddr(address: ipaddress.IPv4Address) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, address.packed)


def _stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    subprocess.run(["mount", "--bind", str(folder / name), f"/etc/{name}"], check=True)


def run(module: str, *arguments: str, timeout_seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a module of the suite in its namespaces."""
    command: Sequence[str] = isolated("-m", module, *arguments)
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=timeout_seconds)
