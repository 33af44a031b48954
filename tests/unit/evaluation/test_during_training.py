"""Validation and sample grids between training steps, on a tiny real task without DeepSpeed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain import build, distributed
from sdtrain.config.load import load_training
from sdtrain.config.run import TrainingConfig
from sdtrain.data.manifest import Manifest
from sdtrain.evaluation import during_training
from sdtrain.evaluation.during_training import sample, validate
from sdtrain.run_dir import RunDir
from sdtrain.tasks.autoencoding import AutoencodingTask
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask
from tests.support import make_latent_manifest, tiny_page
from tests.takedowns import take_down

NUM, BINS = 12, 4
PROMPTS = ["a red square", "a blue circle", "two green lines"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_latent_manifest(folder / "data", train=16, validation=16)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> TrainingConfig:
    path = tiny_page(
        tmp_path,
        folder / "data" / "manifest.json",
        autoencoder={"preset": None, "arch": ARCH},
        validation={"every_steps": 2, "num_samples": NUM, "batch_size": 5, "timestep_bins": BINS},
        samples={"every_steps": 2, "prompts": PROMPTS, "num_steps": 2, "guidance_scale": 2.0, "seed": 5},
    )
    return load_training(path)


ARCH = {"latent_channels": 4, "channels": [8, 8], "layers_per_block": 1, "attention_in_middle": False, "norm_groups": 4}


@pytest.fixture
def manifest(config: TrainingConfig) -> Manifest:
    return Manifest.load(config.data.manifest)


@pytest.fixture
def task(config: TrainingConfig, manifest: Manifest) -> LatentDiffusionTask:
    torch.manual_seed(0)
    task = build.build_task(config, manifest)
    assert isinstance(task, LatentDiffusionTask)
    for parameter in task.denoiser.parameters():  # a zero-initialised output would draw what it is not told
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return task


def every_sample(config: TrainingConfig, manifest: Manifest, task: LatentDiffusionTask) -> dict[str, torch.Tensor]:
    """Figures of each validation sample alone, in order."""
    from sdtrain.data.loader import collate

    dataset = build.build_dataset(config, manifest, task.draws, split="validation")
    rows = [task.validate(collate([dataset[position]])) for position in range(NUM)]
    dataset.close()
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def test_validation_is_the_mean_over_the_first_samples(
    config: TrainingConfig, manifest: Manifest, task: LatentDiffusionTask
) -> None:
    means = validate(config, task, manifest)
    alone = every_sample(config, manifest, task)
    assert means["validation/loss"] == pytest.approx(float(alone["loss"].mean()), rel=1e-5)
    assert means["validation/mse"] == pytest.approx(float(alone["mse"].mean()), rel=1e-5)
    width = 1000 // BINS
    assert [int((alone["timesteps"] // width == index).sum()) for index in range(BINS)] == [NUM // BINS] * BINS
    for index in range(BINS):
        inside = alone["loss"][alone["timesteps"] // width == index]
        assert means[f"validation/loss_bin_{index:02d}"] == pytest.approx(float(inside.mean()), rel=1e-5)
    assert len(means) == 2 + BINS


def test_two_validations_differ_by_the_weights_alone(
    config: TrainingConfig, manifest: Manifest, task: LatentDiffusionTask
) -> None:
    first = validate(config, task, manifest)
    torch.rand(13)
    assert validate(config, task, manifest) == first
    assert task.denoiser.training, "the mode is given back"
    with torch.no_grad():
        next(task.denoiser.parameters()).add_(0.1)
    assert validate(config, task, manifest) != first


def on_ranks(monkeypatch: pytest.MonkeyPatch, world_size: int, run: Any) -> list[Any]:
    """Run once per rank, the last time with what all ranks gathered; returns the last answers of every rank."""
    gathered: list[Any] = []
    answers: list[Any] = []
    for collect in (True, False):
        for rank in range(world_size):
            monkeypatch.setattr(distributed, "ranks", lambda rank=rank: distributed.Ranks(rank, world_size, rank))

            def gather(item: Any, collect: bool = collect) -> list[Any]:
                if collect:
                    gathered.append(item)
                    return [item]
                return gathered

            monkeypatch.setattr(distributed, "gather_objects", gather)
            try:
                answer = run()
            except KeyError:  # a rank's share of the pictures is no whole grid
                assert collect
                answer = None
            if not collect:
                answers.append(answer)
    return answers


@pytest.mark.parametrize("world_size", [2, 13])
def test_ranks_share_the_samples_and_agree(
    world_size: int,
    config: TrainingConfig,
    manifest: Manifest,
    task: LatentDiffusionTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 13 ranks one of them, rank 0, has no sample at all."""
    alone = validate(config, task, manifest)
    answers = on_ranks(monkeypatch, world_size, lambda: validate(config, task, manifest))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0].keys() == alone.keys()
    assert all(answers[0][name] == pytest.approx(alone[name], rel=1e-5) for name in alone)


def test_more_samples_than_there_are_means_all(
    config: TrainingConfig, manifest: Manifest, task: LatentDiffusionTask
) -> None:
    assert config.validation is not None
    settings = config.validation.model_copy(update={"num_samples": 10_000})
    means = validate(config.model_copy(update={"validation": settings}), task, manifest)
    assert means["validation/loss"] > 0


def test_unreadable_validation_samples_do_not_count(
    config: TrainingConfig, manifest: Manifest, task: LatentDiffusionTask, tmp_path: Path
) -> None:
    whole = every_sample(config, manifest, task)
    take_down(manifest.path, "000010000")
    try:
        means = validate(config, task, Manifest.load(manifest.path))
    finally:
        (manifest.folder / "takedown.json").unlink()
    assert means["validation/loss"] == pytest.approx(float(whole["loss"][1:].mean()), rel=1e-5)


def test_a_grid_of_the_page_s_prompts(config: TrainingConfig, task: LatentDiffusionTask) -> None:
    (path,) = sample(config, task, step=7)
    assert path == config.resolved_run_dir / "samples" / "step-00000007.png"
    with Image.open(path) as grid:
        assert grid.width >= 3 * 16 and grid.height >= 16
    before = path.read_bytes()
    torch.rand(13)
    assert sample(config, task, step=7) == [path]
    assert path.read_bytes() == before, "fixed seeds: two grids differ by the weights alone"


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """The pictures of every grid that is made."""
    seen: list[np.ndarray] = []
    real = during_training.make_grid

    def make_grid(pictures: np.ndarray, **settings: Any) -> Any:
        seen.append(pictures)
        return real(pictures, **settings)

    monkeypatch.setattr(during_training, "make_grid", make_grid)
    yield seen


def test_ranks_share_the_prompts_and_rank_0_draws_the_grid(
    config: TrainingConfig, task: LatentDiffusionTask, monkeypatch: pytest.MonkeyPatch, grids: list[np.ndarray]
) -> None:
    sample(config, task, step=1)
    answers = on_ranks(monkeypatch, 2, lambda: sample(config, task, step=2))
    assert [[path.name for path in paths] for paths in answers] == [["step-00000002.png"], []]
    alone, together = grids
    assert alone.shape == (3, 16, 16, 3)
    assert np.abs(alone.astype(int) - together.astype(int)).max() <= 1  # batches of another size round otherwise
    assert len({picture.tobytes() for picture in alone}) == 3


def test_no_grid_where_none_is_asked_for_or_can_be_drawn(
    config: TrainingConfig, task: LatentDiffusionTask, tmp_path: Path
) -> None:
    assert sample(config.model_copy(update={"samples": None}), task, step=1) == []
    coder = AutoencodingTask(autoencoder=task.autoencoder, latent_shape=(4, 8, 8), reconstruction="mse", kl_weight=0.0)
    assert sample(config, coder, step=1) == []
    assert not (config.resolved_run_dir / "samples").exists()


def test_an_unconditional_run_draws_its_null_condition(
    config: TrainingConfig, task: LatentDiffusionTask, grids: list[np.ndarray]
) -> None:
    from sdtrain.config.conditioner import NoConditionerConfig

    sample(config.model_copy(update={"conditioner": NoConditionerConfig(type="none")}), task, step=1)
    assert len({picture.tobytes() for picture in grids[0]}) == 3  # by seed


@pytest.mark.parametrize("world_size", [1, 2, 3, 13])
def test_all_ranks_pause_equally_often(
    world_size: int,
    config: TrainingConfig,
    manifest: Manifest,
    task: LatentDiffusionTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pause is where ranks agree: with 13 ranks one has no sample and ten have no prompt, and all of them come."""
    pauses: dict[str, Counter[int]] = {"validation": Counter(), "samples": Counter()}

    def pause(event: str) -> None:
        pauses[event][distributed.ranks().rank] += 1

    on_ranks(monkeypatch, world_size, lambda: validate(config, task, manifest, lambda: pause("validation")))
    on_ranks(monkeypatch, world_size, lambda: sample(config, task, 2, lambda: pause("samples")))
    longest = math.ceil(math.ceil(NUM / world_size) / 5)
    everyone = range(world_size)
    assert pauses["validation"] == dict.fromkeys(everyone, 2 * longest), "a rank runs twice here"
    assert pauses["samples"] == dict.fromkeys(everyone, 2 * 2)


def test_a_pause_may_leave_early(config: TrainingConfig, manifest: Manifest, task: LatentDiffusionTask) -> None:
    class Told(Exception):
        pass

    left = 2

    def pause() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Told

    with pytest.raises(Told):
        validate(config, task, manifest, pause)
    left = 1
    with pytest.raises(Told):
        sample(config, task, 2, pause)
    assert not RunDir(config.resolved_run_dir).samples.exists()
    assert task.denoiser.training, "the mode is given back"
