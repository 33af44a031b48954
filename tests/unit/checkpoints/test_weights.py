from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdtrain import distributed
from sdtrain.checkpoints.manifest import buffer_key, rank_file
from sdtrain.checkpoints.protocol import commit
from sdtrain.checkpoints.recut import KINDS, Layout, spans, tensor_name
from sdtrain.checkpoints.weights import load_weights, open_checkpoint, read_buffers, read_config
from sdtrain.errors import CheckpointError

PAGE = """\
schema_version: 1
kind: training
name: small
task: {type: autoencoding}
data: {manifest: m.json, batch_size: 8, micro_batch_size: 4}
autoencoder: {type: kl, preset: tiny}
optimizer: {learning_rate: 1.0e-3, lr_schedule: constant}
trainer: {max_steps: 4, precision: fp32}
"""


def network(step: int = 0) -> torch.nn.Module:
    torch.manual_seed(step)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))


def write(folder: Path, step: int, *, kinds: tuple[str, ...] = KINDS, **more: Any) -> Path:
    """Commit a network: master = its weights, EMA = half of them, and its buffers."""
    module = network(step)
    layout = Layout.of([{name: parameter.shape for name, parameter in module.named_parameters()}])
    flat = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    values = {"master": flat, "exp_avg": flat + 1, "exp_avg_sq": flat**2, "ema": flat / 2}
    files: dict[str, dict[str, Tensor]] = {
        rank_file("denoiser", 0): {tensor_name(0, kind): values[kind] for kind in kinds},
        rank_file("extra", 0): {buffer_key("denoiser", name): buffer for name, buffer in module.named_buffers()},
    }
    facts = {"layouts": {"denoiser": layout.to_json()}, "spans": {"denoiser": spans(layout, [len(flat)], 1)}}
    path = commit(folder, step=step, attempt="a", files=files, facts=facts, **more)
    assert path is not None
    return path


def test_ema_weights_and_buffers_fill_the_network(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", 1)
    weights = load_weights(tmp_path, "denoiser")
    blank, trained = network(99), network(1)
    blank.load_state_dict(weights)
    for name, parameter in trained.named_parameters():
        assert torch.equal(blank.get_parameter(name), parameter / 2)
    assert weights["1.num_batches_tracked"].dtype == torch.int64


def test_master_weights_on_request(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    weights = load_weights(path, "denoiser", ema=False)
    assert torch.equal(weights["0.weight"], network(1).get_parameter("0.weight"))


def test_a_dtype_is_given_to_floating_tensors_alone(tmp_path: Path) -> None:
    weights = load_weights(write(tmp_path, 1), "denoiser", dtype=torch.bfloat16)
    assert weights["0.weight"].dtype == weights["1.running_mean"].dtype == torch.bfloat16
    assert weights["1.num_batches_tracked"].dtype == torch.int64


def test_without_ema_the_last_weights_are_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, 1, kinds=KINDS[:3])
    weights = load_weights(path, "denoiser")
    assert torch.equal(weights["0.weight"], network(1).get_parameter("0.weight"))
    assert "holds no EMA weights of denoiser: its last weights are taken" in caplog.text


def test_run_folder_checkpoints_folder_and_checkpoint_all_name_it(tmp_path: Path) -> None:
    older, newer = write(tmp_path / "checkpoints", 1), write(tmp_path / "checkpoints", 2)
    assert open_checkpoint(tmp_path).path == newer
    assert open_checkpoint(tmp_path / "checkpoints").path == newer
    assert open_checkpoint(older).path == older


def test_a_damaged_newest_one_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    (newer / rank_file("denoiser", 0)).unlink()
    assert open_checkpoint(tmp_path).path == older
    assert f"{newer} is corrupt and not used: denoiser.rank00000.safetensors: is missing" in caplog.text
    assert not (newer / "CORRUPT").exists()  # a reader leaves the run as it is


def test_a_named_damaged_one_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    (path / rank_file("extra", 0)).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is valid:\n  step-00000002: extra.*: truncated to 0 of"):
        load_weights(path, "denoiser")


def test_nothing_there_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; give a run folder or one of its checkpoints/step"):
        open_checkpoint(tmp_path / "absent")


def test_an_unknown_trainable_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no trainable 'autoencoder'; it holds denoiser"):
        load_weights(write(tmp_path, 1), "autoencoder")


def test_buffers_are_those_of_the_asked_rank(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, 1))
    assert sorted(read_buffers(checkpoint, "denoiser")) == [
        "1.num_batches_tracked",
        "1.running_mean",
        "1.running_var",
    ]
    assert read_buffers(checkpoint, "critic") == {}
    assert read_buffers(checkpoint, "denoiser", rank=1) == {}


def test_no_process_group_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, 1)

    def refuse(*given: object) -> None:
        raise AssertionError("a reader must not wait for ranks")

    for name in ("gather_objects", "broadcast_object", "barrier", "_reduce"):
        monkeypatch.setattr(distributed, name, refuse)
    assert len(load_weights(path, "denoiser")) == 7


def test_the_page_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path, 1, texts={"config.yaml": PAGE})
    config = read_config(path)
    assert config.name == "small"
    assert config.data.batch_size == 8
    with pytest.raises(CheckpointError, match=r"holds no config.yaml; it was not written by `sdtrain train`"):
        read_config(write(tmp_path / "other", 1))
