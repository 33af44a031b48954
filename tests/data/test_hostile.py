"""The hostile server suite: what the web does to a crawler, in a network that no packet can leave.

Each case of `tests.data.hostile.cases` is a row of one part, which the download stage works through as it ships:
img2dataset's reader and downloader, the installed opener, the resizer, the shard. Beside the public server that plays
the cases, services listen on every private address and count who comes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.data.hostile import namespace
from tests.data.hostile.cases import CASES, Case
from tests.data.hostile.suite import MEMORY_LIMIT_BYTES, MODULE, Verdict


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of all cases, side by side."""
    ended = namespace.run(MODULE, str(tmp_path_factory.mktemp("hostile")), timeout_seconds=120)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return json.loads(ended.stdout)


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, report: dict[str, Any]) -> None:
    verdict = Verdict(**next(row for row in report["verdicts"] if row["name"] == case.name))
    assert verdict.is_right, verdict


@pytest.mark.heavy
def test_no_forbidden_service_was_reached(report: dict[str, Any]) -> None:
    assert report["forbidden"] == {}
    assert [row["reached"] for row in report["verdicts"] if row["reached"]] == []


@pytest.mark.heavy
def test_memory_stays_under_its_bound(report: dict[str, Any]) -> None:
    held, peak = report["held_bytes"], report["peak_bytes"]
    bound = held + MEMORY_LIMIT_BYTES
    print(
        f"peak memory {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB, of which {held / 1e6:.0f} MB before any picture"
    )
    assert peak < bound


def test_there_are_cases_of_every_kind() -> None:
    kinds = {case.name.partition("_")[0] for case in CASES}
    wanted = {
        "loopback",
        "private",
        "metadata",
        "nat64",
        "tunnel",
        "dns",
        "redirect",
        "scheme",
        "port",
        "body",
        "chunk",
    }
    assert wanted | {"headers", "gzip", "brotli", "zstd", "jpeg", "png", "webp", "gif", "svg"} <= kinds
    assert len(CASES) >= 40


def test_without_a_namespace_the_suite_fails_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(
        RuntimeError, match=r"is not permitted here \(unshare: .*Operation not permitted\); run as root"
    ):
        namespace.run(MODULE, str(tmp_path), timeout_seconds=10)


def test_nothing_is_started_outside_a_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="start this through"):
        namespace.enter(tmp_path)
    monkeypatch.setenv(namespace.SELF_MADE, "1")
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    with pytest.raises(AssertionError, match="not in a network namespace of its own"):
        namespace.enter(tmp_path)
