"""Whole runs in half precision: what works in which precision, and an fp16 run that goes on is the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdtrain import build
from sdtrain.run_dir import RunDir
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask
from sdtrain.training.metrics import read_metrics
from tests.engines import fp16_on_cpu, one_rank, sdtrain
from tests.support import make_latent_manifest, tiny_page

pytestmark = pytest.mark.engine

STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("world")
    make_latent_manifest(folder, train=40, validation=8)
    with one_rank(), fp16_on_cpu():
        yield folder


@pytest.fixture
def page(world: Path, tmp_path: Path) -> Path:
    return tiny_page(tmp_path, world / "manifest.json", trainer={"max_steps": STEPS}, optimizer={"warmup_steps": 0})


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """In which precision the networks of a run were when their loss was asked for."""
    seen: dict[str, set[torch.dtype]] = {}
    real = LatentDiffusionTask.loss

    def loss(self: LatentDiffusionTask, *arguments: Any) -> Any:
        modules: dict[str, nn.Module] = dict(self.frozen)
        modules |= {name: trainable.module for name, trainable in self.trainables.items()}
        seen.update({name: {one.dtype for one in module.parameters()} for name, module in modules.items()})
        return real(self, *arguments)

    monkeypatch.setattr(LatentDiffusionTask, "loss", loss)
    return seen


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_all_but_the_autoencoder_works_in_the_precision_of_the_page(
    page: Path, working: dict[str, set[torch.dtype]], precision: str, dtype: torch.dtype
) -> None:
    settings = (f"trainer.precision={precision}", "conditioner.trainable=false", f"trainer.max_steps={STEPS - 2}")
    assert sdtrain("train", page, *settings) == 0
    assert working == {"denoiser": {dtype}, "conditioner": {dtype}, "autoencoder": {torch.float32}}


def test_a_trainable_that_asks_for_fp32_gets_it_whatever_the_page_says(
    page: Path, working: dict[str, set[torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As autoencoders do; here the denoiser, whose run is then that of an fp32 page."""
    real = build.build_task

    def build_task(*arguments: Any) -> Any:
        task: Any = real(*arguments)
        task.trainables = {name: replace(one, precision="fp32") for name, one in task.trainables.items()}
        return task

    monkeypatch.setattr(build, "build_task", build_task)
    assert sdtrain("train", page, "trainer.precision=bf16", f"trainer.max_steps={STEPS - 2}") == 0
    assert working["denoiser"] == {torch.float32}


def test_an_fp16_run_goes_on_with_its_loss_scale(page: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    last = run.checkpoints / f"step-{STEPS:08d}"

    def state() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        manifest = json.loads((last / "MANIFEST.json").read_text())
        return load_file(last / "denoiser.rank00000.safetensors"), manifest["scalers"]["denoiser"]

    assert sdtrain("train", page, "trainer.precision=fp16") == 0
    tensors, scaler = state()
    assert scaler["cur_iter"] >= STEPS and scaler["cur_scale"] <= 2.0**16
    scales = [row["train/loss_scale"] for row in read_metrics(run.metrics)]
    assert len(scales) == STEPS and max(scales) <= 2.0**16
    shutil.rmtree(last)
    shutil.rmtree(run.weights)
    assert sdtrain("train", page, "trainer.precision=fp16") == 0
    again, same = state()
    assert same == scaler
    assert {one.dtype for one in again.values()} == {torch.float32}
    assert [name for name in tensors if not torch.equal(tensors[name], again[name])] == []
