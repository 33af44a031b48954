from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from sdtrain.training.progress import Progress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def show(progress: Progress, step: int) -> None:
    progress.update(
        step=step,
        loss=0.12345,
        learning_rate=1e-4,
        images_per_second=512.34,
        data_wait_share=0.012,
        memory_gib=38.04,
        eta_seconds=4000,
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (9.4, "9s"),
        (59.6, "1m 00s"),
        (250, "4m 10s"),
        (7500, "2h 05m"),
        (86400 * 3 + 4 * 3600 + 59, "3d 04h"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_durations_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_file_gets_a_plain_line_now_and_then_and_the_last_one() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(total_steps=100, every_seconds=15, console=Console(file=out, width=40), clock=clock)
    for step in (10, 20, 30, 40):
        show(progress, step)
        progress.advance(step + 5)
        clock.now += 8
    show(progress, 100)
    progress.say("saved [step-00000100]")
    progress.close()
    figures = "loss 0.1235 | lr 1.00e-04 | 512.3 images/s | data wait 1% | mem 38.0 GiB | ETA 1h 06m"
    assert out.getvalue().splitlines() == [
        f"step 10/100 | {figures}",
        f"step 30/100 | {figures}",
        f"step 100/100 | {figures}",
        "saved [step-00000100]",
    ]


def test_a_terminal_gets_one_live_line_with_news_above_it() -> None:
    out = io.StringIO()
    progress = Progress(
        total_steps=100, start_step=40, console=Console(file=out, width=160, force_terminal=True, color_system=None)
    )
    show(progress, 60)
    progress.say("saved step-00000060")
    progress.advance(61)
    progress.close()
    progress.close()
    text = out.getvalue()
    assert "saved step-00000060\n" in text
    last = text.split("\r")[-1]
    assert " 61/100 " in last
    assert "loss 0.1235  lr 1.00e-04  512.3 images/s  data wait 1%  mem 38.0 GiB  ETA 1h 06m" in last
