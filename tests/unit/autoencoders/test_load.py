from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from sdtrain.autoencoders.kl import PRESETS, AutoencoderKL
from sdtrain.autoencoders.load import autoencoder_facts, load_autoencoder, save_autoencoder, with_current_names
from sdtrain.errors import ConfigError


@pytest.mark.parametrize("kernel", [1, 3])
def test_an_autoencoder_comes_back_with_its_scale(kernel: int, tmp_path: Path) -> None:
    autoencoder = AutoencoderKL(**(PRESETS["tiny"] | {"scaling_factor": 0.7, "quant_kernel_size": kernel}))
    save_autoencoder(autoencoder, tmp_path / "vae")
    loaded = load_autoencoder(str(tmp_path))  # also as a pipeline's part
    assert not loaded.training
    assert loaded.scaling_factor == 0.7
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), autoencoder.parameters(), strict=True))


def test_old_names_are_replaced_in_attentions_alone() -> None:
    tensors = {
        name: torch.zeros(1)
        for name in (
            "encoder.mid_block.attentions.0.query.weight",
            "encoder.mid_block.attentions.0.proj_attn.bias",
            "encoder.mid_block.attentions.0.group_norm.bias",
            "encoder.other.key.weight",
        )
    }
    assert list(with_current_names(tensors)) == [
        "encoder.mid_block.attentions.0.to_q.weight",
        "encoder.mid_block.attentions.0.to_out.0.bias",
        "encoder.mid_block.attentions.0.group_norm.bias",
        "encoder.other.key.weight",
    ]


@pytest.mark.parametrize("kernel", [1, 3])
def test_facts_are_those_of_the_network_in_the_folder(kernel: int, tmp_path: Path) -> None:
    arch = PRESETS["tiny"] | {"scaling_factor": 0.7, "shift_factor": 0.1, "quant_kernel_size": kernel}
    save_autoencoder(AutoencoderKL(**arch), tmp_path)
    digest = hashlib.sha256((tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert autoencoder_facts(str(tmp_path)) == {
        "weights_sha256": digest,
        "scaling_factor": 0.7,
        "shift_factor": 0.1,
        "latent_channels": 4,
        "downsample_factor": 8,
    }


def test_facts_of_other_weights_have_another_digest(tmp_path: Path) -> None:
    save_autoencoder(AutoencoderKL(**PRESETS["tiny"]), tmp_path)
    before = autoencoder_facts(str(tmp_path))
    save_autoencoder(AutoencoderKL(**PRESETS["tiny"]), tmp_path)  # other random weights, same size
    after = autoencoder_facts(str(tmp_path))
    assert before["weights_sha256"] != after["weights_sha256"]


def test_facts_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        autoencoder_facts(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path / 'diffusion_pytorch_model.safetensors'}: missing; an autoencoder needs a folder with safetensors "
        "weights"
    )


def test_missing_folder() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere: no such folder"):
        load_autoencoder("nowhere")
