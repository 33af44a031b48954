"""What a thrown-away step leaves in the run folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sdtrain import distributed
from sdtrain.records import Batch, LossOutput
from sdtrain.training.engine import StepResult
from sdtrain.training.forensics import Evidence, SickStep, write_record
from sdtrain.training.health import Cause, Health, HealthSettings


def sick_step(losses: list[float], *, limit: float = 2.0, lost: str | None = None, ends: bool = True) -> SickStep:
    count = len(losses)
    batch = Batch(
        keys=tuple(f"k{item}" for item in range(count)),
        positions=torch.arange(80, 80 + count),
        fields={},
        normals={},
        uniforms={},
        weights=torch.ones(count),
    )
    metrics = {"timesteps": torch.arange(count).float() + 500, "mse": torch.ones(count)}
    evidence = Evidence(limit=limit)
    graph = torch.tensor(losses, requires_grad=True) * 1.0
    evidence.add("denoiser", batch, LossOutput(losses=graph, weights=batch.weights, metrics=metrics))
    evidence.lost = lost
    if ends:
        evidence.loss.verdict(limit)
    assert not evidence.micro_steps[0].losses.requires_grad, "evidence keeps no graph alive"
    result = StepResult(applied=False, gradient_norm=math.inf, learning_rate=1e-4, ema_decay=None)
    health = Health(HealthSettings())
    health.applied(0.25)
    return SickStep(7, "denoiser", 6, evidence, result, health)


@pytest.mark.parametrize(
    ("losses", "lost", "ends", "cause"),
    [
        ([1.0, 2.0], None, True, Cause.GRADIENTS),
        ([1.0, 4.0], None, True, Cause.SPIKE),
        ([1.0, math.nan], None, True, Cause.LOSS),
        ([1.0, -math.inf], None, True, Cause.LOSS),
        ([1.0, math.nan], "MemoryError: 3 GiB", True, Cause.OUT_OF_MEMORY),
        ([1.0, 2.0], "", False, Cause.OUT_OF_MEMORY),
    ],
)
def test_the_cause(losses: list[float], lost: str | None, ends: bool, cause: Cause) -> None:
    assert sick_step(losses, lost=lost, ends=ends).evidence.cause is cause


def test_a_record_is_strict_json_with_everything_in_it(tmp_path: Path) -> None:
    path = write_record(tmp_path / "sick", "an-attempt", sick_step([1.0, math.nan]))
    assert path == tmp_path / "sick" / "step-00000007.json"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    told = json.loads(path.read_text(), parse_constant=refuse)
    assert told.pop("time") > 0
    assert told == {
        "step": 7,
        "attempt": "an-attempt",
        "trainable": "denoiser",
        "cause": "loss not finite",
        "ranks_at_fault": [0],
        "loss": "nan",
        "loss_limit": 2.0,
        "loss_history": [0.25],
        "gradient_norm": "inf",
        "learning_rate": 1e-4,
        "applied_steps": 6,
        "ranks": [
            {
                "rank": 0,
                "error": "",
                "micro_steps": [
                    {
                        "keys": ["k0", "k1"],
                        "positions": [80, 81],
                        "weights": [1.0, 1.0],
                        "losses": [1.0, "nan"],
                        "timesteps": [500.0, 501.0],
                    }
                ],
            }
        ],
    }


def test_a_second_record_of_a_step_does_not_overwrite_the_first(tmp_path: Path) -> None:
    names = [write_record(tmp_path, "a", sick_step([1.0])).name for _ in range(3)]
    assert names == ["step-00000007.json", "step-00000007-2.json", "step-00000007-3.json"]


def test_the_ranks_at_fault_are_those_with_an_error_or_a_loss_that_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        sick_step(losses, lost=lost).evidence.described() | {"rank": rank}
        for rank, (losses, lost) in enumerate([([1.0], ""), ([1.0], "MemoryError: "), ([math.inf], "")])
    ]
    monkeypatch.setattr(distributed, "gather_objects", lambda item: parts)
    path = write_record(tmp_path, "a", sick_step([1.0], lost=""))
    told = json.loads(path.read_text())
    assert told["ranks_at_fault"] == [1, 2]
    assert len(told["ranks"]) == 3
