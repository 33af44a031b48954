from __future__ import annotations

from typing import Any

import pytest
import torch

from sdtrain.denoisers.unet import PRESETS, UNet
from sdtrain.denoisers.unet_config import from_diffusers, to_diffusers
from sdtrain.errors import ConfigError

# unet/config.json of runwayml/stable-diffusion-v1-5, as published.
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
# What stabilityai/stable-diffusion-2 has differently.
SD2 = SD15 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
    "upcast_attention": True,
}


def arch_of(**kwargs: Any) -> dict[str, Any]:
    with torch.device("meta"):
        return UNet(**kwargs).arch


@pytest.mark.parametrize(("preset", "published"), [("sd15", SD15), ("sd2", SD2)])
def test_published_configs_are_our_presets(preset: str, published: dict[str, Any]) -> None:
    assert arch_of(**from_diffusers(published)) == arch_of(**PRESETS[preset])
    ours = to_diffusers(arch_of(**PRESETS[preset]))
    without_effect = {"_diffusers_version", "sample_size", "upcast_attention", "num_class_embeds"}
    assert {key: ours.get(key) for key in published if key not in without_effect} == {
        key: value for key, value in published.items() if key not in without_effect
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_go_both_ways(preset: str) -> None:
    arch = arch_of(**PRESETS[preset])
    assert arch_of(**from_diffusers(to_diffusers(arch))) == arch


MIXED: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": [32, 64, 96, 64],
    "down_blocks": ["cross", "plain", "self", "plain"],
    "num_heads": 8,
    "context_dim": 8,
}


def test_self_attention_heads_stand_at_the_opposite_level_too() -> None:
    """diffusers builds the way up from the unreversed list."""
    config = to_diffusers(arch_of(**MIXED))
    assert config["_class_name"] == "UNet2DConditionModel"
    assert config["attention_head_dim"] == [8, 12, 12, 8]
    assert arch_of(**from_diffusers(config)) == arch_of(**MIXED)


@pytest.mark.parametrize(
    "changes",
    [
        {"cross_attention_norm": "layer_norm"},
        {"feed_forward": "gelu"},
        {"decoder_extra_layer": False},
        {"upsample": "conv_transpose"},
        {"time_width": 32},
        {"mid_block": "self"},
        {"down_blocks": ["cross", "cross", "self", "plain"]},
        {"down_blocks": ["self", "plain", "plain", "self"], "mid_block": "self", "context_dim": None},
    ],
)
def test_networks_that_diffusers_lacks_carry_our_class_name(changes: dict[str, Any]) -> None:
    arch = arch_of(**(MIXED | changes))
    config = to_diffusers(arch)
    assert config == {"_class_name": "sdtrain.UNet", **arch}
    assert arch_of(**from_diffusers(config)) == arch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "Transformer2DModel"},
            "UNet config: _class_name is 'Transformer2DModel'; allowed: UNet2DConditionModel, UNet2DModel, "
            "sdtrain.UNet",
        ),
        ({"act_fn": "mish"}, "UNet config: act_fn is 'mish'; this UNet has only 'silu'"),
        (
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
            "UNet config: mid_block_type is 'UNetMidBlock2DSimpleCrossAttn'; this UNet has only "
            "'UNetMidBlock2DCrossAttn'",
        ),
        ({"time_embedding_dim": 512}, "UNet config: time_embedding_dim is 512; this UNet has only 1280"),
        (
            {"addition_embed_type": "text_time"},
            "UNet config: addition_embed_type is 'text_time'; this UNet does not have that setting, only without it",
        ),
        (
            {"transformer_layers_per_block": [1, 2, 10, 1]},
            "UNet config: transformer_layers_per_block is [1, 2, 10, 1]; this UNet has one number for all levels",
        ),
        (
            {"down_block_types": ["CrossAttnDownBlock2D", "KDownBlock2D", "DownBlock2D", "DownBlock2D"]},
            "UNet config: down_block_types[1] is 'KDownBlock2D'; allowed: AttnDownBlock2D, CrossAttnDownBlock2D, "
            "DownBlock2D",
        ),
        (
            {"up_block_types": ["UpBlock2D"] * 4},
            "UNet config: up_block_types ['UpBlock2D', 'UpBlock2D', 'UpBlock2D', 'UpBlock2D'] do not mirror "
            "down_block_types ['CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D']; "
            "only mirrored networks are supported",
        ),
        (
            {"attention_head_dim": [4, 10, 20, 20]},
            "UNet config: attention_head_dim is [4, 10, 20, 20], with neither the same number of heads nor the same "
            "width of head at every level; such a network is not supported",
        ),
    ],
)
def test_settings_that_this_unet_lacks(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_diffusers(SD15 | changes)
    assert str(error.value) == message


def test_missing_settings_are_named() -> None:
    config = {key: value for key, value in SD15.items() if key not in ("in_channels", "up_block_types")}
    with pytest.raises(ConfigError) as error:
        from_diffusers(config)
    assert str(error.value) == (
        "UNet config: in_channels, up_block_types missing; a config.json that diffusers wrote has them"
    )
