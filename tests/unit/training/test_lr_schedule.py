"""Rates at the corners of every schedule, and the published recipe."""

import pytest

from sdtrain.training.lr_schedule import learning_rate_at

PUBLISHED = {"peak": 1e-4, "warmup_steps": 500, "warmup_start": 1e-6, "final_fraction": 0.01, "total_steps": 10_000}


@pytest.mark.parametrize(
    ("applied", "expected"),
    [
        (0, 1e-6),
        (250, 1e-6 + 0.5 * 99e-6),
        (500, 1e-4),
        (5250, 1e-4 * (0.01 + 0.99 * 0.5)),
        (10_000, 1e-6),
        (99_999, 1e-6),
    ],
)
def test_published_recipe_warms_up_and_falls_on_a_cosine(applied: int, expected: float) -> None:
    assert learning_rate_at(applied, lr_schedule="cosine", **PUBLISHED) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("applied", "expected"), [(500, 1e-4), (5250, 1e-4 * 0.505), (10_000, 1e-6)])
def test_linear_falls_on_a_line(applied: int, expected: float) -> None:
    assert learning_rate_at(applied, lr_schedule="linear", **PUBLISHED) == pytest.approx(expected, rel=1e-9)


def test_constant_stays_at_its_peak() -> None:
    assert learning_rate_at(9_999, lr_schedule="constant", **PUBLISHED) == 1e-4


def test_without_warm_up_the_first_rate_is_the_peak() -> None:
    settings = {**PUBLISHED, "warmup_steps": 0}
    assert learning_rate_at(0, lr_schedule="cosine", **settings) == 1e-4
