"""Progress: plain lines where there is no terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from data_pipeline import progress as progress_module
from data_pipeline.progress import StageProgress


def plain() -> tuple[io.StringIO, Console]:
    screen = io.StringIO()
    return screen, Console(file=screen, width=120)


def test_lines_count_what_was_done_before_but_not_for_the_rate(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    screen, console = plain()
    with StageProgress(console, "filter", total=10, done=4) as progress:
        clock[0] += 4.0
        progress.advance()
        progress.advance(failed=True)
        assert progress.line() == "filter: 6/10, 1 failed, 0.5 units/s, 8 s left"
        assert screen.getvalue() == ""
        clock[0] += 10.0
        progress.advance()
    lines = screen.getvalue().splitlines()
    assert lines == [
        "filter: 7/10, 1 failed, 0.21 units/s, 14 s left",
        "filter: 2 units in 14.0 s (0.21 units/s), 1 failed",
    ]


def test_a_stage_that_raises_prints_no_summary():
    screen, console = plain()
    try:
        with StageProgress(console, "filter", total=1):
            raise ValueError
    except ValueError:
        pass
    assert screen.getvalue() == ""


def test_a_terminal_gets_a_bar():
    screen = io.StringIO()
    with StageProgress(Console(file=screen, width=120, force_terminal=True), "filter", total=2) as progress:
        progress.advance()
        progress._bar.refresh()
    assert re.search(r"filter.*1/2", screen.getvalue())
