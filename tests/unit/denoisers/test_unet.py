from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sdtrain.denoisers.unet import PRESETS, UNet
from sdtrain.errors import ConfigError
from sdtrain.nn.blocks import Level
from sdtrain.nn.resnet import ResnetBlock2d
from sdtrain.records import Conditioning

SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": [16, 32],
    "down_blocks": ["cross", "plain"],
    "layers_per_block": 1,
    "num_heads": 2,
    "context_dim": 12,
    "norm_groups": 8,
}
README: dict[str, Any] = {
    "down_blocks": ["plain", "cross"],
    "layers_per_block": 2,
    "feed_forward": "gelu",
    "decoder_extra_layer": False,
    "upsample": "conv_transpose",
    "time_width": 16,
}
SELF: dict[str, Any] = {
    "down_blocks": ["self", "plain"],
    "mid_block": "self",
    "time_scale_shift": "scale_shift",
    "context_dim": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "cross": SMALL,
    "self": {**SMALL, **SELF},
    "readme": {**SMALL, **README},
    "normed context": {**SMALL, "cross_attention_norm": "layer_norm"},
}


def build(**changes: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(**{**SMALL, "zero_init": False, **changes})


def inputs(unet: UNet, *, batch: int = 2, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, unet.in_channels, size, size, generator=generator)
    width = unet.context_dim
    tokens = None if width is None else torch.randn(batch, 5, width, generator=generator)
    return latents, torch.arange(batch) * 300, Conditioning(tokens=tokens)


@pytest.mark.parametrize(
    ("preset", "parameters", "tensors"),
    [
        ("sd15", 859_520_964, 686),
        ("sd2", 865_910_724, 686),
        ("readme", 780_718_404, 560),
        ("lc_unet_base", 140_457_987, 546),
        ("lc_unet_3", 104_950_915, 486),
        ("lc_unet_5", 168_036_867, 676),
        ("lc_unet_6", 116_838_147, 676),
        ("unet_r3", 288_906_627, 500),
        ("unet_r5", 118_793_987, 448),
        ("unet_r6", 166_489_763, 378),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        unet = UNet(**PRESETS[preset])
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    assert len(unet.state_dict()) == tensors
    assert not list(unet.buffers())


def test_every_preset_is_counted() -> None:
    (marks,) = test_presets_have_the_published_number_of_parameters.pytestmark
    assert {row[0] for row in marks.args[1]} == set(PRESETS)


@pytest.mark.parametrize("preset", ["sd15", "unet_r6", "readme"])
def test_presets_run(preset: str) -> None:
    """On the meta device: shapes of every layer fit, at full width, without computing."""
    with torch.device("meta"):
        unet = UNet(**PRESETS[preset])
        tokens = None if unet.context_dim is None else torch.empty(2, 77, unet.context_dim)
        latents = torch.empty(2, unet.in_channels, 64, 64)
        assert unet(latents, torch.empty(2), Conditioning(tokens=tokens)).shape == latents.shape


def test_context_norm_adds_one_layer_norm_to_each_cross_attention() -> None:
    with torch.device("meta"):
        plain = UNet(**PRESETS["lc_unet_base"])
        normed = UNet(**PRESETS["lc_unet_base"], cross_attention_norm="layer_norm")
    added = set(normed.state_dict()) - set(plain.state_dict())
    cross_attentions = [name for name in plain.state_dict() if name.endswith("attn2.to_q.weight")]
    assert {name.split(".attn2.")[1] for name in added} == {"norm_cross.weight", "norm_cross.bias"}
    assert len(added) == 2 * len(cross_attentions) == 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_network_predicts_zero(variant: str) -> None:
    unet = UNet(**VARIANTS[variant])
    assert torch.equal(unet(*inputs(unet)), torch.zeros(2, 4, 8, 8))


def test_blocks_of_a_fresh_network_are_their_shortcuts() -> None:
    unet, features = UNet(**{**SMALL, **SELF}), torch.randn(2, 16, 8, 8)
    level = unet.down_blocks[0]
    assert torch.equal(level.resnets[0](features, torch.randn(2, 64)), features)
    assert torch.equal(level.attentions[0](features), features)
    cross = UNet(**SMALL).down_blocks[0].attentions[0]
    assert torch.equal(cross(features, torch.randn(2, 5, 12)), features)


def test_a_zero_start_still_learns() -> None:
    """Gradients reach the output convolution at once and everything else one step later."""
    unet = UNet(**SMALL)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    unet(*inputs(unet)).sub(1).square().mean().backward()
    assert float(unet.conv_out.weight.grad.norm()) > 0
    optimizer.step()
    optimizer.zero_grad()
    unet(*inputs(unet)).sub(1).square().mean().backward()
    assert float(unet.down_blocks[0].resnets[0].conv2.weight.grad.norm()) > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_no_value(variant: str) -> None:
    unet = UNet(**VARIANTS[variant], zero_init=False)
    values = {}
    for mode in ("none", "blocks"):
        unet.set_gradient_checkpointing(mode)
        unet.zero_grad()
        prediction = unet(*inputs(unet))
        prediction.square().sum().backward()
        values[mode] = [prediction.detach(), *(p.grad for p in unet.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(values["none"], values["blocks"], strict=True))


def test_gradient_checkpointing_keeps_fewer_tensors() -> None:
    unet, kept = build(), {}

    def saved_bytes() -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unet(*inputs(unet))
        return sum(sizes)

    for mode in ("none", "blocks"):
        unet.set_gradient_checkpointing(mode)
        kept[mode] = saved_bytes()
    assert kept["blocks"] < 0.5 * kept["none"]
    assert all(level.recompute for level in unet.modules() if isinstance(level, Level))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_matters(variant: str) -> None:
    unet = UNet(**VARIANTS[variant], zero_init=False)
    unet(*inputs(unet)).square().sum().backward()
    missing = [name for name, parameter in unet.named_parameters() if parameter.grad is None]
    assert missing == []


def test_items_of_a_batch_do_not_touch() -> None:
    unet = build()
    latents, timesteps, conditioning = inputs(unet)
    alone = Conditioning(tokens=conditioning.tokens[1:])
    with torch.no_grad():
        both, second = unet(latents, timesteps, conditioning), unet(latents[1:], timesteps[1:], alone)
    torch.testing.assert_close(both[1:], second, rtol=1e-4, atol=1e-5)


def test_prediction_depends_on_timestep_and_tokens() -> None:
    unet = build()
    latents, timesteps, conditioning = inputs(unet)
    with torch.no_grad():
        prediction = unet(latents, timesteps, conditioning)
        assert not torch.allclose(prediction, unet(latents, timesteps + 50, conditioning), atol=1e-4)
        other = Conditioning(tokens=conditioning.tokens + 1)
        assert not torch.allclose(prediction, unet(latents, timesteps, other), atol=1e-4)


def test_vector_is_added_to_the_time_embedding() -> None:
    unet = build()
    latents, timesteps, conditioning = inputs(unet)
    vector = torch.randn(2, unet.time_width)
    seen: list[torch.Tensor] = []
    unet.mid_block.register_forward_pre_hook(lambda module, args: seen.append(args[1].embedding))
    unet(latents, timesteps, conditioning)
    unet(latents, timesteps, Conditioning(tokens=conditioning.tokens, vector=vector))
    torch.testing.assert_close(seen[1], seen[0] + vector)


def test_spatial_conditioning_is_concatenated_behind_the_latents() -> None:
    unet = build(in_channels=7)
    latents, timesteps, conditioning = inputs(unet)
    parts = Conditioning(tokens=conditioning.tokens, spatial=latents[:, 4:])
    assert torch.equal(unet(latents[:, :4], timesteps, parts), unet(latents, timesteps, conditioning))


def test_rectangles_and_channels_last() -> None:
    unet = build()
    latents, timesteps, conditioning = inputs(unet)
    latents = torch.cat([latents, latents], dim=3)
    prediction = unet(latents, timesteps, conditioning)
    assert prediction.shape == (2, 4, 8, 16)
    unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        unet(latents.to(memory_format=torch.channels_last), timesteps, conditioning), prediction, rtol=1e-4, atol=1e-5
    )


def test_bf16_stays_bf16() -> None:
    unet = build().to(torch.bfloat16)
    latents, timesteps, conditioning = inputs(unet)
    assert unet(latents.bfloat16(), timesteps, conditioning.to(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_repeated_blocks_hold_nearly_all_parameters() -> None:
    with torch.device("meta"):
        unet = UNet(**PRESETS["sd15"])
    blocks = unet.repeated_blocks()
    assert sum(isinstance(block, ResnetBlock2d) for block in blocks) == 22
    assert len(blocks) == 22 + 16
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    assert sum(p.numel() for block in blocks for p in block.parameters()) == sum(
        p.numel() for p in unet.parameters() if id(p) in inside
    ), "a block inside another would be compiled twice"
    assert sum(p.numel() for p in unet.parameters() if id(p) in inside) > 0.9 * 859_520_964


def test_readme_skips_are_those_of_the_residual_blocks_alone() -> None:
    unet = build(**README)
    taken: list[int] = []
    for level in unet.up_blocks:
        level.register_forward_pre_hook(lambda module, args: taken.append(len(args[1])))
    unet(*inputs(unet))
    assert taken == [4, 2]
    assert [len(level.resnets) for level in unet.up_blocks] == [2, 2]
    assert isinstance(unet.up_blocks[0].upsamplers[0].conv, nn.ConvTranspose2d)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"channels": [16, 32, 32]},
            "UNet: channels has 3 levels and down_blocks 2; give one of each per level",
        ),
        ({"channels": [], "down_blocks": []}, "UNet: channels has 0 levels and down_blocks 0"),
        (
            {"channels": [16, 20]},
            "UNet: channels [20] are no multiples of norm_groups=8; change the channels or norm_groups",
        ),
        (
            {"head_dim": 8},
            "UNet: num_heads is 2 and head_dim is 8; give exactly one of them, the other follows",
        ),
        (
            {"num_heads": None},
            "UNet: num_heads is None and head_dim is None; give exactly one of them, the other follows",
        ),
        (
            {"context_dim": None},
            "UNet: there is cross-attention (mid_block or down_blocks) but no context_dim; set it to the width of the "
            "conditioner's tokens",
        ),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(**changes)
    assert str(error.value).startswith(message)


def test_inputs_that_do_not_fit() -> None:
    unet = build()
    latents, timesteps, conditioning = inputs(unet)

    def refusal(latents: torch.Tensor, conditioning: Conditioning) -> str:
        with pytest.raises(ConfigError) as error:
            unet(latents, timesteps, conditioning)
        return str(error.value)

    assert refusal(latents[:, :3], conditioning) == (
        "UNet: latents and spatial conditioning have 3 channels together, the network takes 4; set in_channels to what "
        "the autoencoder and the conditioner give"
    )
    assert refusal(latents[:, :, :7], conditioning) == (
        "UNet: latents are 7x8; with 2 levels, height and width must be multiples of 2; choose another image size"
    )
    assert refusal(latents, Conditioning()) == (
        "UNet: the conditioning's tokens are None wide, the network's context_dim is 12; use a conditioner of that "
        "width or set context_dim"
    )
    assert refusal(latents, Conditioning(tokens=torch.zeros(2, 5, 13))).startswith(
        "UNet: the conditioning's tokens are 13 wide, the network's context_dim is 12"
    )
    assert refusal(latents, Conditioning(tokens=conditioning.tokens, vector=torch.zeros(2, 3))) == (
        "UNet: the conditioning's vector is 3 wide, the time embedding 64; they are added, so project the vector to "
        "that width"
    )


def test_tokens_for_a_network_that_hears_none() -> None:
    unet = build(**SELF)
    latents, timesteps, _ = inputs(unet)
    with pytest.raises(ConfigError, match="tokens are 12 wide, the network's context_dim is None"):
        unet(latents, timesteps, Conditioning(tokens=torch.zeros(2, 5, 12)))
