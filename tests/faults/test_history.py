"""A run that is stopped and resumed three times has one history: in its weights, in `metrics.jsonl` and in W&B."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sdtrain.checkpoints.manifest import Checkpoint
from sdtrain.checkpoints.recut import KINDS, assemble
from sdtrain.errors import ExitCode
from sdtrain.run_dir import RunDir, read_json_lines
from sdtrain.training.lr_schedule import learning_rate_at
from sdtrain.training.metrics import read_metrics
from sdtrain.training.wandb_files import history, records
from tests.ranks import Ranks, Start
from tests.support import make_latent_manifest, tiny_page

BATCH_SIZE = 4
TOLERANCE = 1e-4
STEPS = 2000
LOG_EVERY = 10
SAVE_EVERY = 40  # a step that is saved is reported too
LIMIT_SECONDS = 240.0

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def make_page(folder: Path, manifest: Path, *, wandb: str) -> Path:
    """A network so small that a step is mostly the trainer's own work; every checkpoint is kept."""
    folder.mkdir()
    path = tiny_page(
        folder,
        manifest,
        data={"batch_size": BATCH_SIZE, "micro_batch_size": 2},
        trainer={"max_steps": STEPS, "log_every_steps": LOG_EVERY, "timeout_seconds": LIMIT_SECONDS},
        checkpoint={"every_steps": SAVE_EVERY, "keep_every_steps": SAVE_EVERY},
        tracking={"mode": wandb},
    )
    page = json.loads(path.read_text().partition("\n")[2])
    page["task"]["condition_dropout"] = 0.0
    page["conditioner"] = {"type": "none"}
    page["denoiser"]["arch"] |= {"channels": [8], "down_blocks": ["plain"], "norm_groups": 4}
    page["denoiser"]["arch"] |= {"mid_block": "self", "context_dim": None}
    path.write_text(json.dumps(page))
    return path


def steps_reached(run: RunDir) -> int:
    """Of the newest attempt that has reported."""
    rows = [row for row in read_json_lines(run.metrics) if "train/loss" in row]
    return rows[-1]["step"] if rows else 0


def interrupt(start: Start, run: RunDir, *, at: int, rank: int, number: signal.Signals) -> None:
    """Send one rank a signal once `at` steps are reported, and wait until both have left."""
    end = time.monotonic() + LIMIT_SECONDS
    while steps_reached(run) < at:
        assert not start.is_over(0.05), start.said()
        assert time.monotonic() < end, start.said()
    os.kill(start.pids[rank], number)
    start.wait(LIMIT_SECONDS)


def ends(run: RunDir) -> dict[str, tuple[int, str]]:
    """Code and reason of every attempt, as the ledger has them."""
    return {row["attempt"]: (row["code"], row["reason"]) for row in run.ledger_rows() if row["event"] == "end"}


def state(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(run.checkpoints / f"step-{step:08d}")
    return {f"{kind}/{name}": one for kind in KINDS for name, one in assemble(checkpoint, "denoiser", kind).items()}


def reports(run: RunDir) -> list[dict[str, Any]]:
    """The surviving reports of the loop; what a save took is reported beside them."""
    return [row for row in read_metrics(run.metrics) if "train/loss" in row]


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that hold files of a folder open or were started with its name."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if any(str(folder) in name for name in (*words, *(file.path for file in process.open_files()))):
                found.append(" ".join(words))
        except psutil.Error:
            continue
    return found


def test_a_run_that_is_stopped_three_times_has_one_history(tmp_path: Path, ranks: Ranks) -> None:
    manifest = make_latent_manifest(tmp_path / "data", train=40, validation=8, size=4)
    whole_page = make_page(tmp_path / "whole", manifest, wandb="disabled")
    page = make_page(tmp_path / "torn", manifest, wandb="offline")
    whole, run = RunDir(tmp_path / "whole" / "run"), RunDir(tmp_path / "torn" / "run")
    assert ranks.run(2, "-m", "sdtrain", "train", whole_page, timeout=LIMIT_SECONDS).codes == [0, 0]

    begun = time.monotonic()
    third = STEPS // 3
    first = ranks.start(2, "-m", "sdtrain", "train", page)
    interrupt(first, run, at=third, rank=1, number=signal.SIGUSR1)
    assert first.codes == [ExitCode.REQUEUE] * 2, first.said()
    second = ranks.start(2, "-m", "sdtrain", "train", page)
    interrupt(second, run, at=2 * third, rank=0, number=signal.SIGKILL)
    assert second.codes == [-signal.SIGKILL, ExitCode.HANG], second.said()
    last = ranks.run(1, "-m", "sdtrain", "train", page, timeout=LIMIT_SECONDS)
    assert last.codes == [0], last.said()
    print(f"{STEPS} steps in three attempts: {time.monotonic() - begun:.0f} s")

    check_attempts(run)
    check_metrics(run)
    check_weights(run, whole)
    check_wandb(run)
    audit = ranks.run(1, "-m", "sdtrain", "inspect", run.path, "--audit")
    assert audit.codes == [0], audit.said()
    said = " ".join(audit.said().split())
    assert f"samples 0 to {STEPS * BATCH_SIZE - 1} were trained on exactly once" in said
    print(said[said.index("goodput") : said.index(" order ")])
    assert processes_of(tmp_path / "torn") == []


def check_attempts(run: RunDir) -> None:
    starts = [row for row in run.ledger_rows() if row["event"] == "start"]
    assert [row["world_size"] for row in starts] == [2, 2, 1]
    told = [ends(run)[row["attempt"]] for row in starts]
    assert [code for code, _ in told] == [ExitCode.REQUEUE, ExitCode.HANG, ExitCode.DONE]
    stopped, killed, done = (reason for _, reason in told)
    assert stopped == f"SIGUSR1: saved at step {starts[1]['step']}, start again to go on"
    assert killed.startswith("rank 0 on ")
    assert "without a word: killed (kill -9, out of memory) or crashed in native code" in killed
    assert done == "complete"
    assert starts[0]["step"] == 0 < starts[1]["step"] < starts[2]["step"]
    assert json.loads(run.exit_file.read_text())["attempt"] == starts[2]["attempt"]


def check_metrics(run: RunDir) -> None:
    """Every step is in one report; and what goes on over steps goes on over attempts."""
    rows = reports(run)
    stopped_at = [row["step"] for row in run.ledger_rows() if row["event"] == "start"][1]
    steps = [row["step"] for row in rows]
    assert steps == sorted({*range(LOG_EVERY, STEPS + 1, LOG_EVERY), stopped_at})
    assert [row["train/steps_covered"] for row in rows] == [b - a for a, b in itertools.pairwise([0, *steps])]
    assert [row["train/samples_seen"] for row in rows] == [step * BATCH_SIZE for step in steps]
    assert [row["train/skipped_steps"] for row in rows] == [0] * len(rows)
    for row in rows:
        rate = learning_rate_at(
            row["step"] - 1,
            lr_schedule="cosine",
            peak=1e-3,
            warmup_steps=2,
            warmup_start=1e-6,
            final_fraction=0.01,
            total_steps=STEPS,
        )
        assert row["train/learning_rate"] == rate
        assert row["train/ema_decay"] == pytest.approx(min(0.99, (1 + row["step"]) / (10 + row["step"])))
        assert 0 < row["train/goodput"] <= 1
    written = [row["step"] for row in read_json_lines(run.metrics) if "train/loss" in row]
    assert len(written) > len(steps), "the killed attempt reported steps that were trained again"


def check_weights(run: RunDir, whole: RunDir) -> None:
    """The same bits as long as the number of ranks is the same, and near them after."""
    resumed_at = [row["step"] for row in run.ledger_rows() if row["event"] == "start"][2]
    expected, found = state(whole, resumed_at), state(run, resumed_at)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    theirs = {row["step"]: row["train/loss"] for row in reports(whole)}
    mine = {row["step"]: row["train/loss"] for row in reports(run) if row["step"] in theirs}
    assert mine.keys() == theirs.keys()
    far = {step for step in theirs if abs(mine[step] - theirs[step]) > TOLERANCE * abs(theirs[step])}
    stopped_at = [row["step"] for row in run.ledger_rows() if row["event"] == "start"][1]
    torn = stopped_at + LOG_EVERY - stopped_at % LOG_EVERY  # one report there, two here
    assert far <= {torn}
    expected, found = state(whole, STEPS), state(run, STEPS)
    error = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).norm()
    assert error <= TOLERANCE * torch.cat([one.flatten() for one in expected.values()]).norm()


def check_wandb(run: RunDir) -> None:
    """One run id in all of W&B's files, and every step once in all of them together."""
    files = sorted(run.path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 3
    ids = {record.run.run_id for file in files for record in records(file) if record.WhichOneof("record_type") == "run"}
    assert ids == {run.wandb_id.read_text().strip()}
    rows = [row for file in files for row in history(file)]
    steps = [row["_step"] for row in rows]
    assert len(set(steps)) == len(steps)
    assert [row["train/step"] for row in rows] == steps
    logged = {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert logged == pytest.approx({row["step"]: row["train/loss"] for row in reports(run)}, rel=TOLERANCE)
