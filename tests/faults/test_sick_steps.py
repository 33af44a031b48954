"""Sick steps: thrown away on all ranks, without a trace; too many of them lead back, and then to the end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.evaluation.lineage import trace
from sdtrain.records import Batch, LossOutput
from sdtrain.run_dir import RunDir
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask
from sdtrain.training.metrics import read_metrics
from tests.engines import one_rank, sdtrain
from tests.ranks import Ranks
from tests.support import make_latent_manifest, tiny_page

WORKER = str(Path(__file__).with_name("sick_worker.py"))
BATCH = 8


@pytest.mark.heavy
def test_what_befalls_one_rank_is_settled_by_both(tmp_path: Path, ranks: Ranks) -> None:
    tiny_page(tmp_path, make_latent_manifest(tmp_path, train=40, validation=8))
    done = ranks.run(2, WORKER, tmp_path, timeout=50)  # less than the ranks' own timeout: nobody waits for it
    rows = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank, row in enumerate(rows):
        lost = "OutOfMemoryError: out of memory in a {}" if rank == 1 else ""
        expected = {
            "False": [
                [1, "loss not finite", None],
                [2, "out of memory", lost.format("forward")],
                [4, "out of memory", lost.format("forward")],
                [5, "loss not finite", None],
            ],
            "True": [
                [1, "out of memory", lost.format("backward")],
                [2, "out of memory", lost.format("forward")],
                [4, "out of memory", lost.format("forward")],
                [5, "out of memory", lost.format("backward")],
            ],
        }
        for precision, oom_skip in itertools.product(("fp32", "bf16"), expected):
            healthy, sick = row[f"{precision} {oom_skip}"]
            assert healthy["applied"] == sick["applied"] == 4
            assert healthy["state"] == sick["state"], (rank, precision, oom_skip)
            assert sick["sick"] == expected[oom_skip]
    reason = "DataError: field 'tokens' is missing"
    assert [row["failed"] for row in rows] == [f"PeerLostError: rank 1 failed and ends the run: {reason}", reason]
    word = RunDir(tmp_path / "run").read_exit()
    assert word is not None, done.said()
    assert (word.code, word.rank, word.step, word.reason) == (3, 1, 2, reason), "the first cause, not its consequence"


# The way back, in one process -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("world")
    make_latent_manifest(folder, train=40, validation=8)
    with one_rank():
        yield folder


@pytest.fixture
def page(world: Path, tmp_path: Path) -> Path:
    return tiny_page(
        tmp_path,
        world / "manifest.json",
        trainer={"max_steps": 8},
        health={"max_skipped_in_a_row": 2},
        data={"micro_batch_size": 4},
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


Sickness = Callable[[int, int], bool]
"""(step, position) -> whether this sample's loss is NaN."""


@pytest.fixture
def infect(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sickness], list[tuple[int, int]]]:
    """Let losses be NaN; returns what will have been seen, as (step, first position)."""
    real = LatentDiffusionTask.loss

    def install(is_sick: Sickness) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []

        def loss(self: LatentDiffusionTask, name: str, batch: Batch, step: int) -> LossOutput:
            output = real(self, name, batch, step)
            seen.append((step, int(batch.positions[0])))
            sick = torch.tensor([is_sick(step, int(position)) for position in batch.positions])
            return replace(output, losses=output.losses.masked_fill(sick, float("nan")))

        monkeypatch.setattr(LatentDiffusionTask, "loss", loss)
        return seen

    return install


def rollbacks(run: RunDir) -> list[dict[str, Any]]:
    return [row for row in run.ledger_rows() if row["event"] == "rollback"]


@pytest.mark.engine
def test_a_permanent_nan_leads_back_once_and_then_to_the_end(
    page: Path, run: RunDir, infect: Callable[[Sickness], list[tuple[int, int]]]
) -> None:
    seen = infect(lambda step, position: step >= 5 and position % BATCH == 6)
    assert sdtrain("train", page, "health.max_rollbacks=1") == 5
    word = run.read_exit()
    assert word is not None
    record = run.sick / "step-00000006-2.json"
    assert word.reason == (
        "DivergedError: denoiser: 2 updates in a row were thrown away (2 x loss not finite), the last one in step 6, "
        f"and 1 rollbacks did not help. What went into it: {record}. Lower optimizer.learning_rate, lengthen "
        "optimizer.warmup_steps or look at these samples, then resume from an older checkpoint; where memory is short, "
        "lower data.micro_batch_size. health.max_rollbacks counts over all starts of the run."
    )
    assert sorted(path.name for path in run.sick.iterdir()) == [
        "step-00000005-2.json",
        "step-00000005.json",
        "step-00000006-2.json",
        "step-00000006.json",
    ]
    told = json.loads(record.read_text())
    assert (told["step"], told["trainable"], told["cause"]) == (6, "denoiser", "loss not finite")
    assert (told["attempt"], told["applied_steps"], told["ranks_at_fault"]) == (word.attempt, 5, [0])
    assert (told["loss"], told["loss_limit"], told["gradient_norm"]) == ("nan", "inf", "inf")
    assert len(told["loss_history"]) == 5, "four from before the checkpoint, one since"
    (rank,) = told["ranks"]
    first = (6 + 3) * BATCH  # three steps' worth of samples were left out
    assert [micro["positions"] for micro in rank["micro_steps"]] == [
        list(range(first, first + 4)),
        list(range(first + 4, first + 8)),
    ]
    assert rank["micro_steps"][1]["losses"][2] == "nan"
    assert all(isinstance(loss, float) for loss in rank["micro_steps"][0]["losses"])
    assert all(0 <= timestep < 1000 for timestep in rank["micro_steps"][0]["timesteps"])
    assert len(rank["micro_steps"][0]["keys"]) == 4
    assert [step for step, _ in seen[::2]] == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert sdtrain("train", page, "health.max_rollbacks=1") == 5
    assert len(rollbacks(run)) == 1, "who starts again has gone back already"


@pytest.mark.engine
def test_samples_that_make_it_sick_are_left_out_and_every_other_one_is_seen_once(
    page: Path, run: RunDir, infect: Callable[[Sickness], list[tuple[int, int]]]
) -> None:
    seen = infect(lambda step, position: 5 * BATCH <= position < 8 * BATCH)
    assert sdtrain("train", page) == 0
    assert seen[::2] == [
        *[(step, step * BATCH) for step in (0, 1, 2, 3, 4, 5, 6)],  # 5 and 6 are thrown away: back to step 4
        *[(step, (step + 3) * BATCH) for step in (4, 5, 6, 7)],  # the last sick one is thrown away as well
    ]
    (back,) = rollbacks(run)
    assert (back["checkpoint"], back["position"], back["left_out"]) == ("step-00000004", 32, [[32, 56]])
    assert back["reason"] == "denoiser: 2 updates in a row were thrown away (2 x loss not finite)"
    lineage = trace(run.ledger_rows())
    assert lineage.problems == ()
    assert lineage.verdict.startswith("samples 0 to 87 were trained on exactly once, but for 24 that were left out")
    metrics = read_metrics(run.metrics)
    assert [row["step"] for row in metrics] == list(range(1, 9))
    assert [row.get("train/skipped/loss_not_finite", 0) for row in metrics] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert [row.get("train/rollbacks", 0) for row in metrics] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all("train/loss" not in row or row["train/loss"] == row["train/loss"] for row in metrics)


@pytest.mark.engine
def test_younger_checkpoints_are_set_aside_and_the_next_start_leaves_out_the_same(
    page: Path, run: RunDir, infect: Callable[[Sickness], list[tuple[int, int]]]
) -> None:
    """Steps 3, 5 and 6 are sick; step 6 is saved in between. It goes back to step 2 and dies before it saves again."""

    def sick_then_dead(step: int, position: int) -> bool:
        if position >= 10 * BATCH:
            raise ZeroDivisionError("dead")
        return step in (3, 5, 6) and position < 7 * BATCH

    infect(sick_then_dead)
    limits = ("health.max_skipped_in_window=3", "health.max_skipped_in_a_row=9", "checkpoint.keep_last=5")
    assert sdtrain("train", page, *limits) == 1
    (back,) = rollbacks(run)
    assert (back["checkpoint"], back["left_out"]) == ("step-00000002", [[16, 56]])
    assert back["reason"] == "denoiser: 3 updates within 1000 steps were thrown away (3 x loss not finite)"
    names = sorted(path.name.partition(".")[0] for path in run.checkpoints.glob("step-*.rolled-back-*"))
    assert names == ["step-00000004", "step-00000006"]
    assert (run.checkpoints / "LATEST").read_text().strip() in ("step-00000002", "step-00000004")
    seen = infect(lambda step, position: False)
    assert sdtrain("train", page, *limits) == 0
    first_step = seen[0][0]
    assert first_step in (2, 4), "whether step 4 was saved again before it died"
    assert seen[::2] == [(step, (step + 5) * BATCH) for step in range(first_step, 8)]
    assert trace(run.ledger_rows()).problems == ()
