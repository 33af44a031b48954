"""One level of a UNet: residual blocks, each followed by attention or not, and a change of resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdtrain.errors import ConfigError
from sdtrain.nn.attention import SelfAttention2d, Transformer2d
from sdtrain.nn.resnet import Downsample2d, ResnetBlock2d, TimeScaleShift, Upsample2d

AttentionKind = Literal["plain", "cross", "self"]


class Signals(NamedTuple):
    """What every block hears beside the features.

    Attributes:
        embedding: (batch, time_width) of the timestep; None in networks without time.
        context: (batch, length, context_dim) for cross-attention.
        mask: (batch, length) bool, True where a context token may be attended to.
    """

    embedding: Float[Tensor, "batch time_width"] | None = None
    context: Float[Tensor, "batch length context_dim"] | None = None
    mask: Bool[Tensor, "batch length"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSettings:
    """What all levels of one network have in common.

    Attributes:
        time_width: Width of the time embedding; None in networks without time.
        time_scale_shift: How residual blocks take the time embedding.
        norm_groups: Groups of every group normalisation.
        norm_eps: Epsilon of the residual blocks' normalisations.
        num_heads: Heads of every attention; exclusive with `head_dim`.
        head_dim: Channels of every head; exclusive with `num_heads`.
        context_dim: Width of the context; needed where there is cross-attention.
        transformer_layers: Transformer blocks in each cross-attention transformer.
        linear_projection: See `Transformer2d`.
        feed_forward: Activation of the transformers' feed-forward layers.
        normalize_context: Layer-norm the context before each cross-attention.
    """

    time_width: int | None = None
    time_scale_shift: TimeScaleShift = "default"
    norm_groups: int = 32
    norm_eps: float = 1e-5
    num_heads: int | None = None
    head_dim: int | None = None
    context_dim: int | None = None
    transformer_layers: int = 1
    linear_projection: bool = False
    feed_forward: Literal["geglu", "gelu"] = "geglu"
    normalize_context: bool = False

    def heads(self, channels: int) -> int:
        """Number of attention heads at this many channels.

        Raises:
            ConfigError: The channels do not split evenly.
        """
        name, unit = ("num_heads", self.num_heads) if self.head_dim is None else ("head_dim", self.head_dim)
        if unit is None or unit < 1 or channels % unit:
            raise ConfigError(f"{name}={unit} does not divide {channels} channels; choose one that divides every level")
        return channels // unit if name == "head_dim" else unit

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock2d:
        """A residual block from `in_channels` to `out_channels`."""
        return ResnetBlock2d(
            in_channels=in_channels,
            out_channels=out_channels,
            time_width=self.time_width,
            time_scale_shift=self.time_scale_shift,
            norm_groups=self.norm_groups,
            norm_eps=self.norm_eps,
        )

    def self_attention(self, channels: int, *, norm_groups: int | None) -> SelfAttention2d:
        """Self-attention over pixels."""
        return SelfAttention2d(
            channels=channels, num_heads=self.heads(channels), norm_groups=norm_groups, norm_eps=self.norm_eps
        )

    def transformer(self, channels: int) -> Transformer2d:
        """A transformer with cross-attention.

        Raises:
            ConfigError: There is no `context_dim`.
        """
        if self.context_dim is None:
            raise ConfigError("cross-attention blocks need context_dim, the width of the conditioning's tokens; set it")
        return Transformer2d(
            channels=channels,
            num_heads=self.heads(channels),
            num_layers=self.transformer_layers,
            context_dim=self.context_dim,
            linear_projection=self.linear_projection,
            norm_groups=self.norm_groups,
            feed_forward=self.feed_forward,
            normalize_context=self.normalize_context,
        )

    def attentions(self, kind: AttentionKind, channels: int, count: int) -> nn.ModuleList | None:
        """The attentions of one level, one for each residual block; None at plain levels."""
        match kind:
            case "plain":
                return None
            case "self":
                return nn.ModuleList(self.self_attention(channels, norm_groups=self.norm_groups) for _ in range(count))
            case "cross":
                return nn.ModuleList(self.transformer(channels) for _ in range(count))


class Level(nn.Module):
    """Base of the levels: runs their blocks, recomputing them in the backward pass where that is switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False

    def run_resnet(self, block: nn.Module, features: Tensor, signals: Signals) -> Tensor:
        """Features after a residual block."""
        return self._run(block, features, signals.embedding)

    def run_attention(self, block: nn.Module, features: Tensor, signals: Signals) -> Tensor:
        """Features after an attention; self-attention hears nothing of the context."""
        if isinstance(block, SelfAttention2d):
            return self._run(block, features)
        return self._run(block, features, signals.context, signals.mask)

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class DownLevel(Level):
    """Residual blocks (with attention) at one resolution, then a step down.

    Args:
        settings: What all levels have in common.
        kind: Attention after each residual block.
        in_channels: Channels that arrive.
        out_channels: Channels of the level.
        num_layers: Residual blocks.
        downsample: Whether to halve the resolution at the end.
    """

    def __init__(
        self,
        settings: BlockSettings,
        *,
        kind: AttentionKind,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        downsample: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.attentions = settings.attentions(kind, out_channels, num_layers)
        self.resnets = nn.ModuleList(settings.resnet(widths[i], out_channels) for i in range(num_layers))
        self.downsamplers = nn.ModuleList([Downsample2d(channels=out_channels)]) if downsample else None

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"], signals: Signals
    ) -> tuple[Float[Tensor, "batch channels new_height new_width"], list[Tensor]]:
        """Features for the next level, and the output of every layer for the way up."""
        skips: list[Tensor] = []
        for index, resnet in enumerate(self.resnets):
            features = self.run_resnet(resnet, features, signals)
            if self.attentions is not None:
                features = self.run_attention(self.attentions[index], features, signals)
            skips.append(features)
        if self.downsamplers is not None:
            features = self.downsamplers[0](features)
        return features, skips


class MidLevel(Level):
    """The lowest resolution: residual block, attention, residual block.

    Args:
        settings: What all levels have in common.
        kind: The attention; `plain` leaves it out.
        channels: Channels of the level.
    """

    def __init__(self, settings: BlockSettings, *, kind: AttentionKind, channels: int) -> None:
        super().__init__()
        if kind == "self":  # diffusers' middle block has no normalisation here where time modulates by scale and shift
            groups = settings.norm_groups if settings.time_scale_shift == "default" else None
            self.attentions = nn.ModuleList([settings.self_attention(channels, norm_groups=groups)])
        else:
            self.attentions = settings.attentions(kind, channels, 1)
        self.resnets = nn.ModuleList(settings.resnet(channels, channels) for _ in range(2))

    def forward(
        self, features: Float[Tensor, "batch channels height width"], signals: Signals
    ) -> Float[Tensor, "batch channels height width"]:
        """Features after the middle."""
        features = self.run_resnet(self.resnets[0], features, signals)
        if self.attentions is not None:
            features = self.run_attention(self.attentions[0], features, signals)
        return self.run_resnet(self.resnets[1], features, signals)


class UpLevel(Level):
    """Residual blocks (with attention) at one resolution, each joined by a skip from the way down, then a step up.

    Args:
        settings: What all levels have in common.
        kind: Attention after each residual block.
        in_channels: Channels that arrive.
        out_channels: Channels of the level.
        skip_channels: Channels of the skips in the order of their use; their number is the number of layers.
        upsample: How to double the resolution at the end; None stays.
    """

    def __init__(
        self,
        settings: BlockSettings,
        *,
        kind: AttentionKind,
        in_channels: int,
        out_channels: int,
        skip_channels: Sequence[int],
        upsample: Literal["nearest_conv", "conv_transpose"] | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * len(skip_channels)
        self.attentions = settings.attentions(kind, out_channels, len(skip_channels))
        self.resnets = nn.ModuleList(
            settings.resnet(widths[i] + skip, out_channels) for i, skip in enumerate(skip_channels)
        )
        self.upsamplers = nn.ModuleList([Upsample2d(channels=out_channels, mode=upsample)]) if upsample else None

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"], skips: list[Tensor], signals: Signals
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        """Features for the next level; takes its skips off the end of `skips`."""
        for index, resnet in enumerate(self.resnets):
            features = torch.cat([features, skips.pop()], dim=1)  # (B, C + skip, H, W)
            features = self.run_resnet(resnet, features, signals)
            if self.attentions is not None:
                features = self.run_attention(self.attentions[index], features, signals)
        if self.upsamplers is not None:
            features = self.upsamplers[0](features)
        return features
