from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdtrain.denoisers.dit import DiT
from sdtrain.denoisers.load import load_dit, load_unet, part_name, read_denoiser, save_denoiser
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


def small_dit(**changes: int) -> DiT:
    arch = {"in_channels": 4, "out_channels": 4, "width": 16, "num_layers": 2, "num_heads": 2, "sample_size": 8}
    return DiT(**(arch | changes), zero_init=False)


@pytest.mark.parametrize("changes", [{}, {"num_classes": 3}, {"context_dim": 12}])
def test_a_dit_comes_back_from_a_folder_and_from_a_pipeline(tmp_path: Path, changes: dict[str, int]) -> None:
    dit = small_dit(**changes)
    save_denoiser(dit, tmp_path / part_name(dit))
    for source in (tmp_path, tmp_path / "transformer"):
        loaded = load_dit(str(source))
        assert loaded.arch == dit.arch
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), dit.parameters(), strict=True))


def test_one_kind_where_the_other_is_asked_for(tmp_path: Path) -> None:
    save_denoiser(small_dit(), tmp_path / "dit")
    save_denoiser(readme_like(), tmp_path / "unet")
    with pytest.raises(ConfigError) as error:
        load_unet(str(tmp_path / "dit"))
    assert str(error.value) == (
        f"{tmp_path / 'dit'}: holds a DiT, and a UNet is asked for; write denoiser: {{type: dit, weights: ...}}"
    )
    with pytest.raises(ConfigError) as error:
        load_dit(str(tmp_path / "unet"))
    assert str(error.value) == (
        f"{tmp_path / 'unet'}: holds a UNet, and a DiT is asked for; write denoiser: {{type: unet, weights: ...}}"
    )


def test_another_class_is_refused_with_those_that_are_ours(tmp_path: Path) -> None:
    save_denoiser(small_dit(), tmp_path, _class_name="SD3Transformer2DModel")
    with pytest.raises(ConfigError) as error:
        read_denoiser(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'config.json'}: _class_name is 'SD3Transformer2DModel'; allowed are UNet2DConditionModel, "
        "UNet2DModel, sdtrain.UNet, DiTTransformer2DModel, Transformer2DModel, sdtrain.DiT"
    )
