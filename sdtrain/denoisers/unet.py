"""The UNet of latent diffusion, under the parameter names of diffusers' UNet2DConditionModel and UNet2DModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from sdtrain.denoisers.unet_config import from_diffusers, to_diffusers
from sdtrain.errors import ConfigError
from sdtrain.nn.attention import SelfAttention2d, Transformer2d
from sdtrain.nn.blocks import AttentionKind, BlockSettings, DownLevel, Level, MidLevel, Signals, UpLevel
from sdtrain.nn.embeddings import TimestepEmbedding
from sdtrain.nn.initialization import output_projections, zero_
from sdtrain.nn.resnet import ResnetBlock2d, TimeScaleShift
from sdtrain.records import Conditioning


class UNet(nn.Module):
    """Predicts noise, clean latents or velocity from noised latents, a timestep and a conditioning.

    A pyramid of residual blocks walks down to low resolution and back up; each block on the way up is joined by the
    features of the same resolution on the way down. Levels are `plain`, attend to themselves (`self`) or to themselves
    and to the conditioning's tokens (`cross`).

    Args:
        in_channels: Channels of the latents, plus those of `Conditioning.spatial` where it is used.
        out_channels: Channels of the prediction.
        channels: Channels of each level, from the highest resolution down; multiples of `norm_groups`.
        down_blocks: Attention of each level; the way up mirrors the way down.
        layers_per_block: Residual blocks of each level on the way down; one more on the way up.
        num_heads: Heads of every attention (SD 1); exclusive with `head_dim`.
        head_dim: Channels of every head (SD 2), so that wider levels have more heads; exclusive with `num_heads`.
        context_dim: Width of the conditioning's tokens; None where nothing attends to them.
        linear_projection: Linear layers instead of 1x1 convolutions around transformers (SD 2).
        mid_block: Attention in the middle.
        time_scale_shift: How residual blocks take the time embedding: added, or as scale and shift.
        cross_attention_norm: `layer_norm` gives each cross-attention a layer norm of its own on the context.
        norm_groups: Groups of every group normalisation.
        norm_eps: Epsilon of the residual blocks' normalisations and of the last one.
        transformer_layers: Transformer blocks in each cross-attention transformer.
        feed_forward: Activation of the transformers' feed-forward layers.
        decoder_extra_layer: One more residual block on each level up, for the skips of the first convolution and of
            the downsamplings; without it, the skips are those of the residual blocks alone.
        upsample: Repeat pixels, then convolve; or a transposed convolution.
        time_width: Width of the time embedding; None is four times the first level's channels.
        zero_init: Start with a zero output convolution and zero output projections of all blocks: the fresh network
            predicts exactly zero, and each block starts as its shortcut.

    Raises:
        ConfigError: Arguments that do not fit each other.

    Source: Rombach et al. 2022, arXiv:2112.10752; zero initialisation: Dhariwal & Nichol 2021, arXiv:2105.05233.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        down_blocks: Sequence[AttentionKind],
        layers_per_block: int = 2,
        num_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        linear_projection: bool = False,
        mid_block: Literal["cross", "self"] = "cross",
        time_scale_shift: TimeScaleShift = "default",
        cross_attention_norm: Literal["layer_norm"] | None = None,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        transformer_layers: int = 1,
        feed_forward: Literal["geglu", "gelu"] = "geglu",
        decoder_extra_layer: bool = True,
        upsample: Literal["nearest_conv", "conv_transpose"] = "nearest_conv",
        time_width: int | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        _check_arguments(channels, down_blocks, num_heads, head_dim, context_dim, mid_block, norm_groups)
        has_cross = mid_block == "cross" or "cross" in down_blocks
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.context_dim = context_dim if has_cross else None
        self.decoder_extra_layer = decoder_extra_layer
        self.time_width = 4 * channels[0] if time_width is None else time_width
        settings = BlockSettings(
            time_width=self.time_width,
            time_scale_shift=time_scale_shift,
            norm_groups=norm_groups,
            norm_eps=norm_eps,
            num_heads=num_heads,
            head_dim=head_dim,
            context_dim=self.context_dim,
            transformer_layers=transformer_layers,
            linear_projection=linear_projection,
            feed_forward=feed_forward,
            normalize_context=cross_attention_norm == "layer_norm",
        )
        self.arch = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "down_blocks": list(down_blocks),
            "layers_per_block": layers_per_block,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "context_dim": self.context_dim,
            "linear_projection": linear_projection,
            "mid_block": mid_block,
            "time_scale_shift": time_scale_shift,
            "cross_attention_norm": cross_attention_norm,
            "norm_groups": norm_groups,
            "norm_eps": norm_eps,
            "transformer_layers": transformer_layers,
            "feed_forward": feed_forward,
            "decoder_extra_layer": decoder_extra_layer,
            "upsample": upsample,
            "time_width": self.time_width,
        }

        # The order of these lines is the order of the state dict, which is diffusers'.
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(
            sinusoid_width=channels[0], hidden_width=4 * channels[0], out_width=self.time_width
        )
        self.down_blocks = _down_levels(settings, channels, down_blocks, layers_per_block)
        skips = _skip_channels(channels, layers_per_block, with_samplers=decoder_extra_layer)
        self.up_blocks = _up_levels(settings, channels, down_blocks, skips, upsample)
        self.mid_block = MidLevel(settings, kind=mid_block, channels=channels[-1])
        self.conv_norm_out = nn.GroupNorm(norm_groups, channels[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        if zero_init:
            zero_(self.conv_out, *output_projections(self))

    def forward(
        self,
        latents: Float[Tensor, "batch channels height width"],
        timesteps: Num[Tensor, " batch"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Predict, for each item, what the process's `prediction_type` asks for.

        Args:
            latents: Noised, in the precision of the weights; height and width divisible by 2 per level but one.
            timesteps: Integers in [0, num_train_timesteps), or fractions.
            conditioning: `tokens` for cross-attention (with or without `mask`), `vector` added to the time embedding,
                `spatial` concatenated to the latents; exactly the parts that this network was built for.

        Raises:
            ConfigError: Latents or conditioning of a shape that this network cannot take.
        """
        self._check_inputs(latents, conditioning)
        embedding = self.time_embedding(timesteps)  # (B, time_width)
        if conditioning.vector is not None:
            embedding = embedding + conditioning.vector
        if conditioning.spatial is not None:
            latents = torch.cat([latents, conditioning.spatial], dim=1)  # (B, in_channels, H, W)
        signals = Signals(embedding, conditioning.tokens, conditioning.mask)

        features = self.conv_in(latents)  # (B, channels[0], H, W)
        skips = [features] if self.decoder_extra_layer else []
        for level in self.down_blocks:
            features, outputs = level(features, signals)  # (B, channels[i], H / 2^i, W / 2^i), then halved
            skips.extend(outputs)
            if self.decoder_extra_layer and level.downsamplers is not None:
                skips.append(features)
        features = self.mid_block(features, signals)  # (B, channels[-1], H / 2^(n-1), W / 2^(n-1))
        for level in self.up_blocks:
            features = level(features, skips, signals)  # (B, channels[-1-i], ...), then doubled
        return self.conv_out(F.silu(self.conv_norm_out(features)))  # (B, out_channels, H, W)

    def set_gradient_checkpointing(self, mode: Literal["none", "blocks"]) -> None:
        """Keep all activations, or only the inputs of every block and compute the rest again in the backward pass."""
        for module in self.modules():
            if isinstance(module, Level):
                module.recompute = mode == "blocks"

    def repeated_blocks(self) -> list[nn.Module]:
        """The residual blocks, transformers and attentions: compiled in place, they cover nearly all of the work."""
        return [m for m in self.modules() if isinstance(m, ResnetBlock2d | Transformer2d | SelfAttention2d)]

    def diffusers_config(self) -> dict[str, Any]:
        """The content of `config.json` beside this network's weights, under diffusers' keys."""
        return to_diffusers(self.arch)

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> UNet:
        """A fresh network of the shape that a `config.json` describes.

        Raises:
            ConfigError: A class or a setting that this UNet does not have.
        """
        return cls(**from_diffusers(config))

    def _check_inputs(self, latents: Tensor, conditioning: Conditioning) -> None:
        spatial, tokens, vector = conditioning.spatial, conditioning.tokens, conditioning.vector
        arriving = latents.shape[1] + (0 if spatial is None else spatial.shape[1])
        if arriving != self.in_channels:
            raise ConfigError(
                f"UNet: latents and spatial conditioning have {arriving} channels together, the network takes "
                f"{self.in_channels}; set in_channels to what the autoencoder and the conditioner give"
            )
        multiple = 2 ** (len(self.down_blocks) - 1)
        if latents.shape[2] % multiple or latents.shape[3] % multiple:
            raise ConfigError(
                f"UNet: latents are {latents.shape[2]}x{latents.shape[3]}; with {len(self.down_blocks)} levels, height "
                f"and width must be multiples of {multiple}; choose another image size"
            )
        token_width = None if tokens is None else tokens.shape[-1]
        if token_width != self.context_dim:
            raise ConfigError(
                f"UNet: the conditioning's tokens are {token_width} wide, the network's context_dim is "
                f"{self.context_dim}; use a conditioner of that width or set context_dim"
            )
        if vector is not None and vector.shape[-1] != self.time_width:
            raise ConfigError(
                f"UNet: the conditioning's vector is {vector.shape[-1]} wide, the time embedding {self.time_width}; "
                "they are added, so project the vector to that width"
            )


def _check_arguments(
    channels: Sequence[int],
    down_blocks: Sequence[AttentionKind],
    num_heads: int | None,
    head_dim: int | None,
    context_dim: int | None,
    mid_block: Literal["cross", "self"],
    norm_groups: int,
) -> None:
    if not channels or len(channels) != len(down_blocks):
        raise ConfigError(
            f"UNet: channels has {len(channels)} levels and down_blocks {len(down_blocks)}; give one of each per level"
        )
    uneven = [width for width in channels if width % norm_groups]
    if uneven:
        raise ConfigError(
            f"UNet: channels {uneven} are no multiples of norm_groups={norm_groups}; change the channels or norm_groups"
        )
    if (num_heads is None) == (head_dim is None):
        raise ConfigError(
            f"UNet: num_heads is {num_heads} and head_dim is {head_dim}; give exactly one of them, the other follows"
        )
    if context_dim is None and (mid_block == "cross" or "cross" in down_blocks):
        raise ConfigError(
            "UNet: there is cross-attention (mid_block or down_blocks) but no context_dim; set it to the width of the "
            "conditioner's tokens"
        )


def _down_levels(
    settings: BlockSettings, channels: Sequence[int], kinds: Sequence[AttentionKind], num_layers: int
) -> nn.ModuleList:
    return nn.ModuleList(
        DownLevel(
            settings,
            kind=kind,
            in_channels=channels[max(index - 1, 0)],
            out_channels=channels[index],
            num_layers=num_layers,
            downsample=index + 1 < len(channels),
        )
        for index, kind in enumerate(kinds)
    )


def _skip_channels(channels: Sequence[int], num_layers: int, *, with_samplers: bool) -> list[list[int]]:
    """Channels of the skips of each level up, in the order of their use: the last made is the first used."""
    made = [channels[0]] if with_samplers else []
    for index, width in enumerate(channels):
        made += [width] * num_layers
        if with_samplers and index + 1 < len(channels):
            made.append(width)
    per_level = len(made) // len(channels)
    used = made[::-1]
    return [used[start : start + per_level] for start in range(0, len(used), per_level)]


def _up_levels(
    settings: BlockSettings,
    channels: Sequence[int],
    kinds: Sequence[AttentionKind],
    skips: Sequence[Sequence[int]],
    upsample: Literal["nearest_conv", "conv_transpose"],
) -> nn.ModuleList:
    widths = list(reversed(channels))
    return nn.ModuleList(
        UpLevel(
            settings,
            kind=kind,
            in_channels=widths[max(index - 1, 0)],
            out_channels=widths[index],
            skip_channels=skips[index],
            upsample=upsample if index + 1 < len(channels) else None,
        )
        for index, kind in enumerate(reversed(kinds))
    )


_SD: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": [320, 640, 1280, 1280],
    "down_blocks": ["cross", "cross", "cross", "plain"],
}
_LC: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "channels": [128, 128, 256, 256, 512, 512],
    "num_heads": 8,
    "context_dim": 256,
    "linear_projection": True,
}
_PIXELS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "mid_block": "self",
    "time_scale_shift": "scale_shift",
}


def _kinds(letters: str) -> list[str]:
    return [{"D": "plain", "C": "cross", "A": "self"}[letter] for letter in letters]


# Constructor arguments by name. `readme` is a published variant of SD 1: attention at levels 1 to 3 instead of 0 to 2,
# plain GELU, two decoder blocks per level, transposed convolutions, a time embedding as wide as the first level. The
# `lc_*` networks were configured with a layer norm on the context, which diffusers' cross-attention blocks silently
# leave out; their published counts have none, and neither have these. `unet_r3` and `unet_r5` have heads of 8 channels,
# diffusers' default for UNet2DModel.
PRESETS: dict[str, dict[str, Any]] = {
    "sd15": {**_SD, "num_heads": 8, "context_dim": 768},
    "sd2": {**_SD, "head_dim": 64, "context_dim": 1024, "linear_projection": True},
    "readme": {
        **_SD,
        "down_blocks": _kinds("DCCC"),
        "num_heads": 8,
        "context_dim": 768,
        "feed_forward": "gelu",
        "decoder_extra_layer": False,
        "upsample": "conv_transpose",
        "time_width": 320,
    },
    "lc_unet_base": {**_LC, "down_blocks": _kinds("DDDDCD")},
    "lc_unet_3": {**_LC, "channels": [128, 128, 256, 512, 512], "down_blocks": _kinds("DCDDD")},
    "lc_unet_5": {**_LC, "down_blocks": _kinds("DDDDCC")},
    "lc_unet_6": {**_LC, "down_blocks": _kinds("CCDDDD")},
    "unet_r3": {
        **_PIXELS,
        "channels": [128, 256, 256, 512, 512, 1024],
        "down_blocks": _kinds("DDADAD"),
        "head_dim": 8,
    },
    "unet_r5": {
        **_PIXELS,
        "channels": [128, 128, 256, 256, 512, 512],
        "down_blocks": _kinds("DDDDAD"),
        "head_dim": 8,
    },
    "unet_r6": {**_PIXELS, "channels": [160, 320, 640, 640], "down_blocks": _kinds("DAAD"), "head_dim": 64},
}
