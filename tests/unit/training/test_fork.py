"""Runs that begin with another run's checkpoint: what is taken over, what begins anew, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.checkpoints.manifest import Checkpoint, content_digest, list_checkpoints
from sdtrain.checkpoints.recut import KINDS, assemble
from sdtrain.run_dir import RunDir
from sdtrain.training.metrics import read_metrics
from tests.engines import one_rank, sdtrain
from tests.support import make_latent_manifest, tiny_page

pytestmark = pytest.mark.engine

STILL = 1e-12
"""A learning rate at which a float32 weight does not move."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, and a parent run of 4 steps."""
    folder = tmp_path_factory.mktemp("world")
    make_latent_manifest(folder, train=40, validation=8)
    with one_rank():
        (folder / "parent").mkdir()
        assert sdtrain("train", tiny_page(folder / "parent", folder / "manifest.json", trainer={"max_steps": 4})) == 0
        yield folder


@pytest.fixture
def parent(world: Path) -> Checkpoint:
    return list_checkpoints(world / "parent" / "run" / "checkpoints")[0]


def child(
    folder: Path,
    world: Path,
    load: str,
    *,
    steps: int = 1,
    rate: float = STILL,
    manifest: str = "manifest.json",
    **more: Any,
) -> Path:
    optimizer = {"learning_rate": rate, "warmup_steps": 0, "lr_schedule": "constant"} | more.pop("optimizer", {})
    init_from = {"checkpoint": str(world / "parent" / "run"), "load": load}
    sections = {"optimizer": optimizer, "init_from": init_from, "trainer": {"max_steps": steps}, **more}
    page = tiny_page(folder, world / manifest, **sections)
    settings = json.loads(page.read_text().partition("\n")[2])
    page.write_text(json.dumps(settings | {"seed": 8}))  # other fresh weights than the parent's
    return page


def newest(folder: Path) -> Checkpoint:
    return list_checkpoints(folder / "run" / "checkpoints")[0]


def state(checkpoint: Checkpoint, kind: str) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in assemble(checkpoint, "denoiser", kind).values()])


@pytest.mark.parametrize(("load", "kind"), [("weights", "master"), ("ema", "ema")])
def test_weights_are_taken_over_and_all_else_begins_anew(
    load: str, kind: str, world: Path, parent: Checkpoint, tmp_path: Path
) -> None:
    assert not torch.equal(state(parent, "master"), state(parent, "ema"))
    assert sdtrain("train", child(tmp_path, world, load)) == 0
    mine = newest(tmp_path)
    for held in ("master", "ema"):
        assert torch.allclose(state(mine, held), state(parent, kind), rtol=0, atol=1e-7)
    assert mine.manifest["applied_steps"] == {"denoiser": 1}
    assert mine.manifest["inherited_steps"] == {"denoiser": 0}
    assert (mine.step, mine.manifest["samples_seen"], mine.manifest["parent"]) == (1, 8, None)


def test_everything_is_taken_over_and_the_schedule_is_the_new_page_s(
    world: Path, parent: Checkpoint, tmp_path: Path
) -> None:
    optimizer = {"warmup_steps": 2, "warmup_start_lr": 1e-13, "lr_schedule": "constant"}
    every = {"every_steps": 1, "keep_every_steps": 1}
    page = child(tmp_path, world, "all", steps=4, checkpoint=every, optimizer=optimizer)
    assert sdtrain("train", page) == 0
    first = Checkpoint.open(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert torch.allclose(state(first, "master"), state(parent, "master"), rtol=0, atol=1e-7)
    decay = (1 + 5) / (10 + 5)
    expected = decay * state(parent, "ema") + (1 - decay) * state(first, "master")
    assert torch.allclose(state(first, "ema"), expected, rtol=0, atol=1e-6), (
        "the average goes on, with its fifth update"
    )
    change = state(first, "exp_avg") - 0.9 * state(parent, "exp_avg")
    assert change.abs().max() > 0
    assert torch.all(state(first, "exp_avg_sq") >= 0.999 * state(parent, "exp_avg_sq") - 1e-12)
    assert (first.manifest["applied_steps"], first.manifest["inherited_steps"]) == ({"denoiser": 5}, {"denoiser": 4})
    rates = [row["train/learning_rate"] for row in read_metrics(RunDir(tmp_path / "run").metrics)]
    assert rates == pytest.approx([1e-13, 5.5e-13, 1e-12, 1e-12]), "it counts this run's own steps"


def test_a_fork_says_where_it_comes_from_and_resumes_as_itself(
    world: Path, parent: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, run = child(tmp_path, world, "all", steps=2), RunDir(tmp_path / "run")
    assert sdtrain("train", page) == 0
    assert f"starts with all of {parent.path}, step 0" in capsys.readouterr().out
    said = {
        "checkpoint": str(parent.path.resolve()),
        "run": parent.manifest["attempt"],
        "step": 4,
        "load": "all",
        "manifest_sha256": content_digest(parent.manifest),
    }
    start = next(row for row in run.ledger_rows() if row["event"] == "start")
    assert (start["forked_from"], start["resumed_from"], start["step"]) == (said, None, 0)
    assert newest(tmp_path).manifest["forked_from"] == said
    assert newest(tmp_path).manifest["run"] == start["attempt"] != said["run"]
    assert sdtrain("train", page, "trainer.max_steps=3") == 0
    again = [row for row in run.ledger_rows() if row["event"] == "start"][1]
    assert ("forked_from" in again, again["resumed_from"]) == (False, "step-00000002")
    third = newest(tmp_path)
    assert (third.step, third.manifest["forked_from"], third.manifest["run"]) == (3, said, start["attempt"])
    assert (third.manifest["applied_steps"], third.manifest["inherited_steps"]) == ({"denoiser": 7}, {"denoiser": 4})


def test_a_fork_resumes_with_the_same_bits(world: Path, tmp_path: Path) -> None:
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    assert sdtrain("train", child(tmp_path / "whole", world, "all", steps=4, rate=1e-3)) == 0
    halves = child(tmp_path / "halves", world, "all", steps=4, rate=1e-3)
    assert sdtrain("train", halves, "trainer.max_steps=2") == 0
    assert sdtrain("train", halves) == 0
    for kind in KINDS:
        assert torch.equal(state(newest(tmp_path / "whole"), kind), state(newest(tmp_path / "halves"), kind)), kind


def test_a_fork_may_see_larger_latents(world: Path, tmp_path: Path) -> None:
    """From 256 to 512 pixels: the network has no size of its own."""
    make_latent_manifest(world / "large", train=16, validation=8, size=16)
    assert sdtrain("train", child(tmp_path, world, "ema", manifest="large/manifest.json")) == 0


def reason(folder: Path) -> str:
    left = RunDir(folder / "run").read_exit()
    assert left is not None
    assert left.code == 4
    return left.reason


def test_other_shapes_are_named(world: Path, parent: Checkpoint, tmp_path: Path) -> None:
    arch = json.loads((world / "parent" / "train.yaml").read_text().partition("\n")[2])["denoiser"]["arch"]
    page = child(tmp_path, world, "weights", denoiser={"arch": arch | {"channels": [16, 48]}})
    assert sdtrain("train", page) == 4
    said = reason(tmp_path)
    assert said.startswith(f"CheckpointError: {parent.path}: ")
    assert "tensors of denoiser do not fit this run (checkpoint -> page):\n  " in said
    assert "(32,) -> (48,)\n" in said
    assert said.count("\n  ") == 9
    assert said.endswith(
        "more\nGive this page the network of that run (see its config.yaml), or set init_from to null."
    )


def test_other_groups_are_refused_for_the_optimiser_s_state_alone(
    world: Path, parent: Checkpoint, tmp_path: Path
) -> None:
    page = child(tmp_path, world, "all", optimizer={"weight_decay_on": "matrices"})
    assert sdtrain("train", page) == 4
    assert reason(tmp_path) == (
        f"CheckpointError: {parent.path}: the optimiser's groups of denoiser are others than this run's, and "
        "init_from.load is 'all'. Set optimizer.weight_decay_on as that run had it, or init_from.load to 'weights' or "
        "'ema'."
    )
    assert sdtrain("train", page, "init_from.load=weights") == 0
    mine, theirs = assemble(newest(tmp_path), "denoiser", "master"), assemble(parent, "denoiser", "master")
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], rtol=0, atol=1e-7) for name in mine)


def test_averages_that_were_never_kept_are_refused(world: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    page = tiny_page(plain, world / "manifest.json", trainer={"max_steps": 3})
    settings = json.loads(page.read_text().partition("\n")[2])
    page.write_text(json.dumps(settings | {"ema": None}))
    assert sdtrain("train", page) == 0
    source = newest(plain).path
    assert sdtrain("train", child(tmp_path, world, "ema"), f"init_from.checkpoint={source}") == 4
    assert reason(tmp_path) == (
        f"CheckpointError: {source}: holds no averaged weights of denoiser, and init_from.load is 'ema'. Set it to "
        "'weights'."
    )


def test_a_parent_without_a_checkpoint_is_named(world: Path, tmp_path: Path) -> None:
    assert sdtrain("train", child(tmp_path, world, "ema"), "init_from.checkpoint=nowhere") == 4
    said = reason(tmp_path)
    assert "nowhere: holds no checkpoint; give a run folder or one of its checkpoints/step-* folders" in said
