"""Section `denoiser`: the network that is trained to remove noise."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sdtrain.config.base import Fraction, NonEmptyStr, PositiveFloat, PositiveInt, Section

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
DiTPreset = Literal["dit_s_2", "dit_b_2", "dit_l_2", "dit_xl_2", "dit_small", "dit_large", "dit_celeba_hq"]

CONTEXT_WIDTHS: dict[str, int] = {"sd15": 768, "readme": 768, "sd2": 1024}
"""Width of the text tokens that a UNet's preset attends to."""


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


class UNetConfig(Section):
    """A UNet; exactly one of `weights`, `preset` and `arch` says what it looks like.

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


class DiTArch(Section):
    """A DiT of one's own, in the words of `sdtrain.denoisers.dit.DiT`.

    Attributes:
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction.
        width: Width of the tokens; a multiple of num_heads and of 4.
        num_layers: Transformer blocks.
        num_heads: Attention heads of every block.
        patch_size: Height and width of the latents' patches; each becomes a token.
        sample_size: Height and width of the latents whose patches are 1 apart in the fixed positions; take the data's.
        sinusoid_width: Width of the timestep's sinusoids.
        num_classes: Classes with an embedding of their own; null has none.
        context_dim: Width of the conditioning tokens; null without them.
        context: Every block attends to the tokens (`cross_attention`), or their mean modulates the blocks (`adaln`).
        shared_embedding: One embedding of timestep and conditions for all blocks, or one for each.
        dropout: Probability of dropping channels after attentions and within feed-forward layers.
        norm_eps: Added to variances in the norms before cross-attention and feed-forward.
    """

    in_channels: PositiveInt
    out_channels: PositiveInt
    width: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    patch_size: PositiveInt = 2
    sample_size: PositiveInt = 32
    sinusoid_width: PositiveInt = 256
    num_classes: PositiveInt | None = None
    context_dim: PositiveInt | None = None
    context: Literal["cross_attention", "adaln"] = "cross_attention"
    shared_embedding: bool = True
    dropout: Fraction = 0.0
    norm_eps: PositiveFloat = 1e-6


class DiTConfig(Section):
    """A diffusion transformer; exactly one of `weights`, `preset` and `arch` says what it looks like.

    Attributes:
        type: `dit`.
        weights: A folder in diffusers' layout or a hub name to start from; brings its own architecture.
        preset: A known architecture with fresh weights.
        arch: An architecture of one's own with fresh weights.
        context_dim: For a preset: width of the conditioning tokens, which every block attends to; replaces the classes.
        sample_size: For a preset: height and width of the latents, where they are not the preset's.
    """

    type: Literal["dit"]
    weights: NonEmptyStr | None = None
    preset: DiTPreset | None = None
    arch: DiTArch | None = None
    context_dim: PositiveInt | None = None
    sample_size: PositiveInt | None = None

    @property
    def token_width(self) -> int | None:
        """Width of the tokens that the network is built for; None without them, and where only weights tell."""
        return self.arch.context_dim if self.arch else self.context_dim


DenoiserConfig = Annotated[UNetConfig | DiTConfig, Field(discriminator="type")]
