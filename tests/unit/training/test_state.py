"""A run's state into checkpoint files and back; what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sdtrain.checkpoints.manifest import Checkpoint, buffer_key, rank_file
from sdtrain.checkpoints.protocol import commit
from sdtrain.errors import CheckpointError, ExitCode
from sdtrain.training.state import expected_bytes, rank_files, restore, state_facts
from tests.engines import PlainEngine


def saved(folder: Path, engines: dict[str, Any]) -> Checkpoint:
    path = commit(folder, step=3, attempt="a", files=rank_files(engines), facts=state_facts(engines))
    assert path is not None
    return Checkpoint.open(path)


def test_everything_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = {"denoiser": PlainEngine(), "judge": PlainEngine(nn.Linear(4, 1), has_ema=False)}
    old["denoiser"].applied_steps, old["judge"].applied_steps = 3, 2
    old["denoiser"].module(torch.randn(8, 3))  # batch norm counts
    checkpoint = saved(tmp_path, old)
    new = {"denoiser": PlainEngine(), "judge": PlainEngine(nn.Linear(4, 1), has_ema=False)}
    restore(checkpoint, new)
    for name, applied in (("denoiser", 3), ("judge", 2)):
        found = new[name].restored
        assert found is not None
        read, steps, scaler = found
        expected = old[name].tensors()
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[key], expected[key]) for key in expected)
        assert (steps, scaler) == (applied, {})
    buffers = dict(new["denoiser"].module.named_buffers())
    assert int(buffers["1.num_batches_tracked"]) == 1
    assert all(torch.equal(buffers[name], value) for name, value in old["denoiser"].module.named_buffers())


def test_facts_name_steps_spans_and_layouts() -> None:
    engines = {"denoiser": PlainEngine(nn.Linear(3, 2)), "judge": PlainEngine(nn.Linear(1, 1), has_ema=False)}
    engines["denoiser"].applied_steps = 5
    assert state_facts(engines) == {
        "applied_steps": {"denoiser": 5, "judge": 0},
        "layouts": {
            "denoiser": [[["weight", [2, 3], 0], ["bias", [2], 6]]],
            "judge": [[["weight", [1, 1], 0], ["bias", [1], 1]]],
        },
        "spans": {"denoiser": [((0, 8),)], "judge": [((0, 2),)]},
        "has_ema": {"denoiser": True, "judge": False},
        "scalers": {"denoiser": {}, "judge": {}},
    }


def test_each_rank_writes_its_own_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    files = rank_files({"denoiser": PlainEngine()})
    assert set(files) == {rank_file("denoiser", 3), rank_file("extra", 3)}
    names = {buffer_key("denoiser", f"1.{name}") for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(files[rank_file("extra", 3)]) == names


def test_an_average_that_was_not_kept_cannot_be_resumed(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"denoiser": PlainEngine(has_ema=False)})
    with pytest.raises(CheckpointError) as raised:
        restore(checkpoint, {"denoiser": PlainEngine()})
    assert str(raised.value) == (
        f"{checkpoint.path}: holds no EMA of denoiser, but this run keeps one (section ema). Set `ema: null`, or start "
        "a new run from these weights."
    )


def test_an_average_that_is_no_longer_kept_is_left_alone(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"denoiser": PlainEngine()})
    engine = PlainEngine(has_ema=False)
    restore(checkpoint, {"denoiser": engine})
    assert engine.restored is not None
    assert set(engine.restored[0]) == {"group0/master", "group0/exp_avg", "group0/exp_avg_sq"}


def test_other_trainables_are_refused(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"denoiser": PlainEngine()})
    with pytest.raises(CheckpointError) as raised:
        restore(checkpoint, {"autoencoder": PlainEngine()})
    assert str(raised.value) == f"{checkpoint.path}: holds ['denoiser'], this run trains ['autoencoder']"
    assert raised.value.exit_code == ExitCode.CHECKPOINT == 4


def test_another_network_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"denoiser": PlainEngine(nn.Linear(3, 2))})
    engine = PlainEngine(nn.Linear(4, 2))
    with pytest.raises(CheckpointError) as raised:
        restore(checkpoint, {"denoiser": engine})
    assert str(raised.value) == (
        f"{checkpoint.path}: the parameters of denoiser are laid out differently, first ['bias', 'weight']. The "
        "network or optimizer.weight_decay_on changed: start a new run from these weights instead of resuming."
    )
    assert engine.restored is None


def two_rank_checkpoint(folder: Path, engine: PlainEngine) -> Checkpoint:
    """As two ranks would have written it; rank r's batch-norm mean is r + 1."""
    flat, facts = engine.state["master"], state_facts({"denoiser": engine})
    half = len(flat) // 2
    cuts = ((0, half), (half, len(flat)))
    folder.mkdir()
    for rank, (start, stop) in enumerate(cuts):
        mine = {key: value[start:stop].clone() for key, value in engine.tensors().items()}
        save_file(mine, folder / rank_file("denoiser", rank))
        buffers = {name: torch.full_like(value, rank + 1) for name, value in engine.module.named_buffers()}
        save_file(
            {buffer_key("denoiser", name): value for name, value in buffers.items()}, folder / rank_file("extra", rank)
        )
    spans = {"denoiser": [[list(cut)] for cut in cuts]}
    return Checkpoint(folder, facts | {"world_size": 2, "step": 3, "spans": spans})


@pytest.mark.parametrize(("rank", "world_size", "expected"), [(0, 2, 1), (1, 2, 2), (0, 1, 1), (2, 4, 1)])
def test_buffers_are_a_rank_s_own_at_its_world_size_and_rank_0_s_at_another(
    rank: int, world_size: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = two_rank_checkpoint(tmp_path / "step-00000003", PlainEngine())
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    engine = PlainEngine()
    restore(checkpoint, {"denoiser": engine})
    assert set(dict(engine.module.named_buffers())["1.running_mean"].tolist()) == {expected}


def test_two_ranks_state_is_cut_anew_for_one(tmp_path: Path) -> None:
    old = PlainEngine()
    checkpoint = two_rank_checkpoint(tmp_path / "step-00000003", old)
    engine = PlainEngine()
    restore(checkpoint, {"denoiser": engine})
    assert engine.restored is not None
    assert all(torch.equal(engine.restored[0][key], value) for key, value in old.tensors().items())


@pytest.mark.parametrize("has_ema", [True, False])
def test_what_a_checkpoint_takes_is_known_before_there_is_an_engine(tmp_path: Path, has_ema: bool) -> None:
    module = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200))
    checkpoint = saved(tmp_path, {"denoiser": PlainEngine(module, has_ema=has_ema)})
    tensors = sum(entry["size_bytes"] for name, entry in checkpoint.files.items() if name.endswith(".safetensors"))
    assert expected_bytes(module, has_ema=has_ema) == pytest.approx(tensors, rel=0.01)
    module[0].requires_grad_(False)
    assert expected_bytes(module, has_ema=has_ema) == 4 * (4 if has_ema else 3) * 400 + 2 * 200 * 4 + 8
