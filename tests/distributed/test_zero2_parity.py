"""ZeRO-2 equals plain AdamW: a permanent gate, because past DeepSpeed versions have computed wrong gradients."""

import json
from pathlib import Path

import pytest

from tests.support import torchrun

WORKER = str(Path(__file__).with_name("zero2_worker.py"))


@pytest.mark.heavy
def test_two_ranks_of_zero2_train_as_one_plain_adamw(tmp_path: Path) -> None:
    done = torchrun(2, WORKER, str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["accumulation"] for row in rows] == [1, 4]
    for row in rows:
        print(row)
        assert row["moved"] > 1e-2, "the reference must have learnt something, else the comparison is empty"
        assert row["clipped_steps"] > 0, "clipping must have been exercised"
        assert row["loss"] < 1e-5
        assert row["norm"] < 1e-5
        assert row["parameters"] < 1e-5
