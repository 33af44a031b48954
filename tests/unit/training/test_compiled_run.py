"""A run whose blocks are compiled is the run it would be without, and compiles each bucket of samples once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.checkpoints.manifest import Checkpoint
from sdtrain.run_dir import RunDir
from sdtrain.training.metrics import read_metrics
from tests.engines import one_rank, sdtrain
from tests.faults.test_buckets import BUCKETS, write_data
from tests.support import CAPTIONS, tiny_page

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # torch's own
]

STEPS = 10
KINDS = 8
"""Of blocks in the tiny UNet."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("world")
    write_data(folder)
    with one_rank():
        yield folder


@pytest.fixture(autouse=True)
def _quick_compiler() -> Iterator[None]:
    """All of torch's compiler but the generation of code, which takes minutes; so results are the same to the bit."""
    before = torch.compiler.get_default_backend()
    torch.compiler.reset()
    torch.compiler.set_default_backend("eager")
    yield
    torch.compiler.set_default_backend(before)
    torch.compiler.reset()


def make_page(folder: Path, world: Path, **trainer: Any) -> Path:
    folder.mkdir()
    return tiny_page(
        folder,
        world / "manifest.json",
        trainer={"max_steps": STEPS, "gradient_checkpointing": "blocks", **trainer},
        optimizer={"lr_schedule": "constant"},
        checkpoint={"every_steps": STEPS // 2},
        validation={"every_steps": 5, "num_samples": 6, "batch_size": 4, "timestep_bins": 3},
        samples={"every_steps": 5, "prompts": [CAPTIONS[0]], "num_steps": 2, "seed": 1},
    )


def test_a_compiled_run_over_buckets(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eager, compiled = RunDir(tmp_path / "eager" / "run"), RunDir(tmp_path / "compiled" / "run")
    assert sdtrain("train", make_page(tmp_path / "eager", world)) == 0
    capsys.readouterr()
    page = make_page(tmp_path / "compiled", world, compile=True)
    assert sdtrain("train", page, f"trainer.max_steps={STEPS - 2}") == 0
    said = capsys.readouterr().err
    rows = [row for row in read_metrics(compiled.metrics) if "train/loss" in row]

    # Each bucket compiles once, in the first step that trains on it; validation and pictures compile nothing.
    graphs = [row["compile/graphs"] for row in rows]
    assert sorted(set(graphs)) == [KINDS * number for number in range(1, len(BUCKETS) + 1)]
    assert [row["compile/recompiles"] for row in rows] == [0] * len(rows)
    assert [row["compile/graph_breaks"] for row in rows] == [0] * len(rows)
    assert rows[0]["compile/first_step_seconds"] == rows[-1]["compile/first_step_seconds"] > 0
    assert said.count("first step: ") == 1
    assert "compiled again" not in said

    # A checkpoint of a compiled run goes on without being compiled, as the run that never was.
    assert sdtrain("train", page, "trainer.compile=false") == 0
    losses = [
        {row["step"]: row["train/loss"] for row in read_metrics(run.metrics) if "train/loss" in row}
        for run in (eager, compiled)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    saved = [Checkpoint.open(run.checkpoints / f"step-{STEPS:08d}") for run in (eager, compiled)]
    digests = [checkpoint.files["denoiser.rank00000.safetensors"]["sha256"] for checkpoint in saved]
    assert digests[0] == digests[1]
    assert saved[0].manifest["layouts"] == saved[1].manifest["layouts"], "names among them"
    validated = [
        {row["step"]: row["validation/loss"] for row in read_metrics(run.metrics) if "validation/loss" in row}
        for run in (eager, compiled)
    ]
    assert validated[0] == {step: validated[1][step] for step in (5, STEPS)}
    assert all(map(math.isfinite, validated[0].values()))
