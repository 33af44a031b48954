"""What checks found: a record, a table for people, and which nodes are to blame."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed"]

WIDTH = 120
_CHECK, _STATUS = 16, 9
SHOWN = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's result.

    Attributes:
        check: Its name.
        status: A warning lets a job go on, a failure does not.
        found: What was looked at, and what is there.
        advice: What to do about it; empty where nothing is to be done.
        of_node: Whether it is the machine's own fault, however its neighbours fare. A page that names no manifest fails
            everywhere and is no node's fault; a broken GPU is, even in a job of one node.
        hosts: Where it was found; empty for what all nodes found together.
    """

    check: str
    status: Status
    found: str
    advice: str = ""
    of_node: bool = False
    hosts: tuple[str, ...] = ()


def merge(by_host: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """One list for all nodes: what is well once per check, what is not once per thing found, with its hosts.

    Args:
        by_host: Findings of every host, in the order of its checks.
    """
    kept: dict[tuple[str, str, str], Finding] = {}
    hosts: dict[tuple[str, str, str], list[str]] = {}
    for host, findings in by_host.items():
        for one in findings:
            key = (one.check, one.status, "" if one.status == "ok" else one.found)
            kept.setdefault(key, one)
            if host not in (places := hosts.setdefault(key, [])):
                places.append(host)
    order = list(dict.fromkeys(key[0] for key in kept))
    keys = sorted(kept, key=lambda key: order.index(key[0]))
    return [
        Finding(one.check, one.status, one.found, one.advice, one.of_node, tuple(hosts[key]))
        for key in keys
        for one in (kept[key],)
    ]


def failing_hosts(findings: Iterable[Finding], hosts: Iterable[str]) -> dict[str, list[str]]:
    """Host -> what failed there, for the hosts that a job would do better without.

    A failure counts against a host where it is of the machine itself, or where another host passes the same check.

    Args:
        findings: Of all nodes, merged.
        hosts: All nodes.
    """
    everywhere = set(hosts)
    failed: dict[str, list[str]] = {}
    bad = [one for one in findings if one.status == "failed"]
    for one in bad:
        where = {host for other in bad if other.check == one.check for host in other.hosts}
        for host in one.hosts if one.of_node or where != everywhere else ():
            failed.setdefault(host, []).append(f"{one.check}: {one.found}")
    return failed


def table(findings: Sequence[Finding], num_hosts: int = 1) -> str:
    """The findings for a terminal: check, status, what was found and, below it, what to do.

    Args:
        findings: Of one node or of all.
        num_hosts: Of how many; beyond one a row says where it was found.
    """
    lines = [f"{'check':<{_CHECK}}{'status':<{_STATUS}}found"]
    for one in findings:
        where = _where(one, num_hosts)
        first = f"{one.check:<{_CHECK}}{one.status if one.status != 'failed' else 'FAILED':<{_STATUS}}"
        lines += _wrapped(first, f"{where}{one.found}")
        if one.advice:
            lines += _wrapped(" " * len(first), f"-> {one.advice}")
    return "\n".join(lines)


def _where(one: Finding, num_hosts: int) -> str:
    if num_hosts == 1 or not one.hosts:
        return ""
    if len(one.hosts) == num_hosts:
        return f"all {num_hosts} nodes, as {one.hosts[0]}: "
    return f"{named(one.hosts)}: "


def named(hosts: Sequence[str]) -> str:
    """Hosts by name, or the first of many and how many more there are."""
    more = f" and {len(hosts) - SHOWN} more" if len(hosts) > SHOWN else ""
    return ", ".join(hosts[:SHOWN]) + more


def _wrapped(first: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
