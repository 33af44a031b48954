"""ZeRO-2 equals plain AdamW: a permanent gate, because past DeepSpeed versions have computed wrong gradients.

On a CPU `overlap_comm` is the other way through DeepSpeed's code (two buffers in turn) without a second stream: wrong
book-keeping shows here, races between streams on GPUs alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks
from tests.support import torchrun

Line = dict[str, Any]
WORKER = "tests.distributed.zero2_worker"
ERRORS = ("loss", "norm", "gradient", "parameters", "ema")
SINGLE = 5.0
"""How much further a single tensor's gradient may be off than all together: the smallest are 1e-4 of the whole."""


def read(report: Path) -> dict[str, list[Line]]:
    """What all rows came to; prints the table."""
    found: dict[str, list[Line]] = json.loads(report.read_text())
    show([*found["rows"], *found["half"]])
    return found


def train_cold(form: str, folder: Path) -> list[Line]:
    """Train every row of a form under torchrun, as a run does."""
    report = folder / "report.json"
    done = torchrun(2, "-m", WORKER, str(report), form, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return read(report)["rows"]


def show(lines: Sequence[Line]) -> None:
    print(f"\n{'trainable':14}prec  reduce  steps acc clip  decay    bucket   overlap ckpt   oom   compiled ", end=" ")
    print(*(f"{name:>11}" for name in (*ERRORS, "one tensor")))
    for line in lines:
        print(
            f"{line['trainable']:14}{line['precision']:5} {line['reduce_precision']:7} {line['steps']:5} "
            f"{line['accumulation']:3} {line['clip']!s:5} {line['weight_decay_on']:8} {line['bucket']:<8} "
            f"{line['overlap']!s:7} {line['checkpointing']:6} {line['oom_skip']!s:5} {line['compiled']:9}",
            *(f"{line[name]:11.1e}" for name in (*ERRORS, "worst_gradient")),
        )


def assert_equal_to_plain_adamw(lines: Sequence[Line], *, within: float) -> None:
    for line in lines:
        assert line["moved"] > (1e-2 if line["steps"] == 20 else 3e-3), (
            "the reference must have learnt something, else the comparison is empty"
        )
        assert (line["clipped_steps"] > 0) == (line["clip"] is not None), "clipping must have been exercised"
        assert line["skipped_steps"] == 0
        assert {name: line[name] for name in ERRORS if not line[name] < within} == {}, line
        assert line["worst_gradient"] < SINGLE * within, line


@pytest.fixture(scope="module")
def short(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Line]]:
    report = tmp_path_factory.mktemp("parity") / "report.json"
    done = ranks.run(2, "-m", WORKER, report, "short")
    assert done.codes == [0, 0], done.said()
    return read(report)


@pytest.mark.heavy
def test_two_ranks_of_zero2_train_as_one_plain_adamw(short: dict[str, list[Line]]) -> None:
    assert {line["trainable"] for line in short["rows"]} == {"denoiser", "autoencoder", "discriminator"}
    assert_equal_to_plain_adamw(short["rows"], within=1e-5)


@pytest.mark.heavy
def test_half_precision_follows_fp32_and_sums_in_fp32(short: dict[str, list[Line]]) -> None:
    """Over micro-steps and ranks: only then is the first gradient the exact sum of what all of them found."""

    def sums(reduce_precision: str) -> list[float]:
        return [line["sum"] for line in short["half"] if line["reduce_precision"] == reduce_precision]

    assert max(sums("fp32")) < 1e-6
    assert min(sums("working")) > 1e-4, "else the comparison would not notice another precision"
    twenty = [line for line in short["half"] if line["steps"] == 20]
    assert [line["precision"] for line in twenty] == ["bf16", "fp16"]
    for line in twenty:
        assert line["loss"] < 1e-2
        assert 1e-4 < line["first_gradient"] < 5e-2, "it is really half precision"


@pytest.mark.heavy
def test_an_fp16_overflow_of_one_rank_is_no_step_on_any(short: dict[str, list[Line]]) -> None:
    ((first, second),) = (line["overflows"] for line in short["half"] if "overflows" in line)
    assert first == second == [
        {"applied": False, "applied_steps": 0, "scale": 1.0, "moved": False},
        {"applied": False, "applied_steps": 0, "scale": 0.5, "moved": False},
        {"applied": True, "applied_steps": 1, "scale": 0.5, "moved": True},
    ]  # fmt: skip


@pytest.mark.long
def test_every_combination_trains_as_one_plain_adamw(tmp_path: Path) -> None:
    assert_equal_to_plain_adamw(train_cold("long", tmp_path), within=1e-5)


@pytest.mark.long
def test_compiled_blocks_train_as_one_plain_adamw(tmp_path: Path) -> None:
    lines = train_cold("compiled", tmp_path)
    assert {line["compiled"] for line in lines} == {"inductor"}
    assert_equal_to_plain_adamw(lines, within=1e-4)
