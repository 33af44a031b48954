"""`sdtrain-launch` inside a test's process, and what golden batch scripts are held against."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher import cli

GOLDEN = Path(__file__).parent / "golden"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of one call."""
    monkeypatch.setattr(sys, "argv", ["sdtrain-launch", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)
