from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdtrain.autoencoders.kl import PRESETS, AutoencoderKL
from sdtrain.autoencoders.load import load_autoencoder, save_autoencoder, with_current_names
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


def test_missing_folder() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere: no such folder"):
        load_autoencoder("nowhere")
