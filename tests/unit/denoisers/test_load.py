from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdtrain.denoisers.load import load_unet, save_denoiser
from sdtrain.denoisers.unet import UNet
from sdtrain.errors import ConfigError


def readme_like() -> UNet:
    return UNet(
        in_channels=4,
        out_channels=4,
        channels=[16, 32],
        down_blocks=["plain", "cross"],
        num_heads=2,
        context_dim=12,
        norm_groups=8,
        feed_forward="gelu",
        decoder_extra_layer=False,
        upsample="conv_transpose",
        time_width=16,
        zero_init=False,
    )


def test_a_network_of_our_own_class_comes_back(tmp_path: Path) -> None:
    unet = readme_like()
    save_denoiser(unet, tmp_path)
    loaded = load_unet(str(tmp_path))
    assert loaded.arch == unet.arch
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), unet.parameters(), strict=True))


def test_weights_of_another_shape_are_refused_with_the_folder(tmp_path: Path) -> None:
    save_denoiser(readme_like(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"context_dim": 24}))
    with pytest.raises(ConfigError) as error:
        load_unet(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}: weights do not fit their config: down_blocks.1.attentions.0.")
    assert "attn2.to_k.weight is (32, 12) instead of (32, 24)" in str(error.value)
