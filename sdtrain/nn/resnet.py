"""Residual blocks and changes of resolution, under diffusers' parameter names."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

TimeScaleShift = Literal["default", "scale_shift"]


class ResnetBlock2d(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around a shortcut; the time embedding enters between.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; a 1x1 convolution adapts the shortcut where they differ.
        time_width: Width of the time embedding; None for networks without time (autoencoders).
        time_scale_shift: `default` adds the projected embedding before the second normalisation, `scale_shift`
            modulates after it.
        norm_groups: Groups of both normalisations.
        norm_eps: Epsilon of both normalisations.

    Source: Ho et al. 2020, arXiv:2006.11239, appendix B; scale-shift: Nichol & Dhariwal 2021, arXiv:2102.09672.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        time_width: int | None,
        time_scale_shift: TimeScaleShift = "default",
        norm_groups: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.time_scale_shift = time_scale_shift
        projected = out_channels * (2 if time_scale_shift == "scale_shift" else 1)
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_width is None else nn.Linear(time_width, projected)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(
        self,
        features: Float[Tensor, "batch in_channels height width"],
        time_embedding: Float[Tensor, "batch time_width"] | None = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Features after one residual step."""
        hidden = self.conv1(F.silu(self.norm1(features)))
        hidden = self.conv2(F.silu(self._norm_with_time(hidden, time_embedding)))
        shortcut = features if self.conv_shortcut is None else self.conv_shortcut(features)
        return shortcut + hidden

    def _norm_with_time(self, hidden: Tensor, time_embedding: Tensor | None) -> Tensor:
        if self.time_emb_proj is None or time_embedding is None:
            return self.norm2(hidden)
        projected = self.time_emb_proj(F.silu(time_embedding))[:, :, None, None]  # (B, C or 2C, 1, 1)
        if self.time_scale_shift == "default":
            return self.norm2(hidden + projected)
        scale, shift = projected.chunk(2, dim=1)
        return self.norm2(hidden) * (1 + scale) + shift


class Downsample2d(nn.Module):
    """Halve height and width by a 3x3 convolution of stride 2.

    Args:
        channels: Channels of input and output.
        asymmetric: Pad right and bottom only, as Stable Diffusion's autoencoder does; a network trained one way is
            shifted by half a pixel when run the other way.
    """

    def __init__(self, *, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels half_height half_width"]:
        """Features at half the resolution."""
        return self.conv(F.pad(features, (0, 1, 0, 1)) if self.asymmetric else features)


class Upsample2d(nn.Module):
    """Double height and width.

    Args:
        channels: Channels of input and output.
        mode: `nearest_conv` repeats pixels and convolves 3x3; `conv_transpose` is one 4x4 transposed convolution.
    """

    def __init__(self, *, channels: int, mode: Literal["nearest_conv", "conv_transpose"] = "nearest_conv") -> None:
        super().__init__()
        self.repeats = mode == "nearest_conv"
        if self.repeats:
            self.conv: nn.Module = nn.Conv2d(channels, channels, 3, padding=1)
        else:
            self.conv = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels double_height double_width"]:
        """Features at twice the resolution."""
        return self.conv(F.interpolate(features, scale_factor=2.0, mode="nearest") if self.repeats else features)
