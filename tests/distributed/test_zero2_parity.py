"""ZeRO-2 equals plain AdamW: a permanent gate, because past DeepSpeed versions have computed wrong gradients."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import torchrun

Line = dict[str, Any]
ERRORS = ("loss", "norm", "gradient", "worst_gradient", "parameters", "ema")


def train(form: str, folder: Path, *, timeout: float) -> dict[str, list[Line]]:
    """Train every row of a form on two ranks, and print the table."""
    report = folder / "report.json"
    done = torchrun(2, "-m", "tests.distributed.zero2_worker", str(report), form, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[Line]] = json.loads(report.read_text())
    show([*found["rows"], *found["half"]])
    return found


def show(lines: Sequence[Line]) -> None:
    print(f"\n{'trainable':14}prec  reduce  steps acc clip  decay    bucket   overlap ckpt   oom   compiled", end=" ")
    print(*(f"{name:>14}" for name in ERRORS))
    for line in lines:
        print(
            f"{line['trainable']:14}{line['precision']:5} {line['reduce_precision']:7} {line['steps']:5} "
            f"{line['accumulation']:3} {line['clip']!s:5} {line['weight_decay_on']:8} {line['bucket']:<8} "
            f"{line['overlap']!s:7} {line['checkpointing']:6} {line['oom_skip']!s:5} {line['compiled']!s:8}",
            *(f"{line[name]:14.1e}" for name in ERRORS),
        )


def assert_equal_to_plain_adamw(lines: Sequence[Line], *, within: float) -> None:
    for line in lines:
        assert line["moved"] > 5e-3, "the reference must have learnt something, else the comparison is empty"
        assert (line["clipped_steps"] > 0) == (line["clip"] is not None), "clipping must have been exercised"
        assert line["skipped_steps"] == 0
        assert {name: line[name] for name in ERRORS if not line[name] < within} == {}, line


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Line]]:
    return train("short", tmp_path_factory.mktemp("short"), timeout=240)


@pytest.mark.heavy
def test_two_ranks_of_zero2_train_as_one_plain_adamw(short: dict[str, list[Line]]) -> None:
    assert {line["trainable"] for line in short["rows"]} == {"denoiser", "autoencoder", "discriminator"}
    assert_equal_to_plain_adamw(short["rows"], within=1e-5)


@pytest.mark.heavy
def test_half_precision_follows_fp32_and_sums_in_fp32(short: dict[str, list[Line]]) -> None:
    """Over micro-steps and ranks: only then is the first gradient the exact sum of what all of them found."""
    during, after, working, half = short["half"]
    for line in (during, half):
        assert (line["steps"], line["accumulation"]) == (20, 4)
        assert line["loss"] < 1e-2
        assert 0 < line["first_gradient"] < 2e-2, "it is really half precision"
    assert during["sum"] < 1e-6 and after["sum"] < 1e-6 and half["sum"] < 1e-6
    assert working["sum"] > 1e-4, "else the comparison would not notice another precision"


@pytest.mark.heavy
def test_an_fp16_overflow_of_one_rank_is_no_step_on_any(short: dict[str, list[Line]]) -> None:
    (half,) = (line for line in short["half"] if line["precision"] == "fp16")
    first, second = half["overflows"]
    assert first == second == [
        {"applied": False, "applied_steps": 0, "scale": 1.0, "moved": False},
        {"applied": False, "applied_steps": 0, "scale": 0.5, "moved": False},
        {"applied": True, "applied_steps": 1, "scale": 0.5, "moved": True},
    ]  # fmt: skip


@pytest.mark.long
def test_every_combination_trains_as_one_plain_adamw(tmp_path: Path) -> None:
    assert_equal_to_plain_adamw(train("long", tmp_path, timeout=1800)["rows"], within=1e-5)


@pytest.mark.long
def test_compiled_blocks_train_as_one_plain_adamw(tmp_path: Path) -> None:
    lines = train("compiled", tmp_path, timeout=1800)["rows"]
    assert all(line["compiled"] for line in lines)
    assert_equal_to_plain_adamw(lines, within=1e-4)
