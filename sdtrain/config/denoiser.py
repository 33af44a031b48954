"""Section `denoiser`: the network that is trained to remove noise."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdtrain.config.base import NonEmptyStr, PositiveFloat, PositiveInt, Section

UNetPreset = Literal[
    "sd15",
    "sd2",
    "readme",
    "lc_unet_base",
    "lc_unet_3",
    "lc_unet_5",
    "lc_unet_6",
    "unet_r3",
    "unet_r5",
    "unet_r6",
]

CONTEXT_WIDTHS: dict[str, int] = {"sd15": 768, "readme": 768, "sd2": 1024}
"""Width of the text tokens that a preset attends to."""


class UNetArch(Section):
    """A UNet of one's own, in the words of `sdtrain.denoisers.unet.UNet`.

    Attributes:
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction.
        channels: Width of each level, from the latents inwards.
        down_blocks: Kind of each level: `plain`, `cross` (text and self-attention) or `self`; the way up mirrors it.
        layers_per_block: Residual blocks per level on the way down.
        num_heads: Attention heads at every level; or give head_dim.
        head_dim: Width of one attention head; or give num_heads.
        context_dim: Width of the conditioning tokens; null without cross-attention.
        linear_projection: Project into the transformer by a linear layer in place of a 1x1 convolution.
        mid_block: Attention of the innermost block, `cross` or `self`.
        time_scale_shift: Whether the time embedding is added (`default`) or scales and shifts (`scale_shift`).
        cross_attention_norm: `layer_norm` normalises the conditioning tokens before they are attended to.
        norm_groups: Groups of every group norm; divides each of `channels`.
        norm_eps: Added to variances in the group norms.
        transformer_layers: Transformer layers of each attention block.
        feed_forward: Activation of the transformers' feed-forward layers.
        decoder_extra_layer: One residual block more per level on the way up than on the way down.
        upsample: Nearest neighbour and convolution, or a transposed convolution.
    """

    in_channels: PositiveInt
    out_channels: PositiveInt
    channels: tuple[PositiveInt, ...] = Field(min_length=1)
    down_blocks: tuple[Literal["plain", "cross", "self"], ...] = Field(min_length=1)
    layers_per_block: PositiveInt = 2
    num_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    context_dim: PositiveInt | None = None
    linear_projection: bool = False
    mid_block: Literal["cross", "self"] = "cross"
    time_scale_shift: Literal["default", "scale_shift"] = "default"
    cross_attention_norm: Literal["layer_norm"] | None = None
    norm_groups: PositiveInt = 32
    norm_eps: PositiveFloat = 1e-5
    transformer_layers: PositiveInt = 1
    feed_forward: Literal["geglu", "gelu"] = "geglu"
    decoder_extra_layer: bool = True
    upsample: Literal["nearest_conv", "conv_transpose"] = "nearest_conv"


class DenoiserConfig(Section):
    """The denoiser; exactly one of `weights`, `preset` and `arch` says what it looks like.

    Attributes:
        type: `unet`.
        weights: A folder in diffusers' layout or a hub name to start from; brings its own architecture.
        preset: A known architecture with fresh weights.
        arch: An architecture of one's own with fresh weights.
    """

    type: Literal["unet"]
    weights: NonEmptyStr | None = None
    preset: UNetPreset | None = None
    arch: UNetArch | None = None
