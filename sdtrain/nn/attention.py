"""Attention and the transformer that stands between residual blocks, under diffusers' parameter names."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


def attend(
    query: Float[Tensor, "batch length inner"],
    key: Float[Tensor, "batch context inner"],
    value: Float[Tensor, "batch context inner"],
    *,
    num_heads: int,
    mask: Bool[Tensor, "batch context"] | None = None,
) -> Float[Tensor, "batch length inner"]:
    """Multi-head softmax(Q K^T / sqrt(head_dim)) V, heads concatenated.

    Args:
        query: Projected queries; `inner` is num_heads * head_dim.
        num_heads: Number of heads; divides `inner`.
        mask: True where a key may be attended to; None attends to all.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """

    def split(tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, heads, L, head_dim)

    bias = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, context)
    mixed = F.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=bias)
    return mixed.transpose(1, 2).flatten(2)  # (B, L, inner)


class Attention(nn.Module):
    """Attention over tokens: to themselves, or to a context.

    Args:
        width: Width of the tokens.
        num_heads: Number of heads; divides `width`.
        context_dim: Width of the context; None makes it self-attention.
        normalize_context: Layer-norm the context first (diffusers' `cross_attention_norm="layer_norm"`).
        bias: Queries, keys and values have a bias (DiT).
        dropout: Probability of dropping a channel of the result while training.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        context_dim: int | None = None,
        normalize_context: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        key_width = width if context_dim is None else context_dim
        self.num_heads = num_heads
        self.norm_cross = nn.LayerNorm(key_width) if normalize_context else None
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(key_width, width, bias=bias)
        self.to_v = nn.Linear(key_width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self,
        tokens: Float[Tensor, "batch length width"],
        context: Float[Tensor, "batch context context_width"] | None = None,
        mask: Bool[Tensor, "batch context"] | None = None,
    ) -> Float[Tensor, "batch length width"]:
        """Attend from `tokens` to `context`, or to themselves where there is none."""
        if context is None:
            context = tokens
        elif self.norm_cross is not None:
            context = self.norm_cross(context)
        mixed = attend(self.to_q(tokens), self.to_k(context), self.to_v(context), num_heads=self.num_heads, mask=mask)
        return self.dropout(self.to_out[0](mixed))


class SelfAttention2d(nn.Module):
    """Residual self-attention over the pixels of a feature map: the attention of DDPM.

    Args:
        channels: Channels of the feature map.
        num_heads: Number of heads; divides `channels`.
        norm_groups: Groups of the normalisation before; None leaves it out, as diffusers' middle block does with
            scale-shift time conditioning.
        norm_eps: Epsilon of the normalisation.

    Source: Ho et al. 2020, arXiv:2006.11239, appendix B.
    """

    def __init__(self, *, channels: int, num_heads: int, norm_groups: int | None, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.group_norm = None if norm_groups is None else nn.GroupNorm(norm_groups, channels, eps=norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Add what each pixel gathers from all others."""
        normed = features if self.group_norm is None else self.group_norm(features)
        tokens = normed.flatten(2).transpose(1, 2)  # (B, H*W, C)
        mixed = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), num_heads=self.num_heads)
        mixed = self.to_out[0](mixed).transpose(1, 2).unflatten(2, features.shape[2:])  # (B, C, H, W)
        return features + mixed


class GatedGelu(nn.Module):
    """Linear to twice the width; one half gates the other through GELU (GEGLU, arXiv:2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch inner"]:
        """Value times GELU of the gate."""
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return value * F.gelu(gate)


class PlainGelu(nn.Module):
    """Linear, then GELU, exact or in its approximation by tanh."""

    def __init__(self, width: int, inner: int, approximate: Literal["none", "tanh"] = "none") -> None:
        super().__init__()
        self.approximate: Literal["none", "tanh"] = approximate
        self.proj = nn.Linear(width, inner)

    def forward(self, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch inner"]:
        """GELU of the projection."""
        return F.gelu(self.proj(tokens), approximate=self.approximate)


class FeedForward(nn.Module):
    """Two linear layers, the inner one four times as wide.

    Args:
        width: Width of the tokens.
        activation: `geglu` (Stable Diffusion), `gelu`, or `gelu_tanh` (DiT).
        dropout: Probability of dropping an inner channel while training.
    """

    def __init__(self, *, width: int, activation: Literal["geglu", "gelu", "gelu_tanh"], dropout: float = 0.0) -> None:
        super().__init__()
        inner = 4 * width
        match activation:
            case "geglu":
                first = GatedGelu(width, inner)
            case "gelu":
                first = PlainGelu(width, inner)
            case "gelu_tanh":
                first = PlainGelu(width, inner, approximate="tanh")
        drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.net = nn.ModuleList([first, drop, nn.Linear(inner, width)])  # diffusers' indices 0 and 2

    def forward(self, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Transform every token by itself."""
        return self.net[2](self.net[1](self.net[0](tokens)))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on layer-normed tokens and with a residual.

    Args:
        width: Width of the tokens.
        num_heads: Heads of both attentions.
        context_dim: Width of the context.
        feed_forward: Activation of the feed-forward layer.
        normalize_context: Layer-norm the context before the cross-attention.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        context_dim: int,
        feed_forward: Literal["geglu", "gelu"],
        normalize_context: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width=width, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(
            width=width, num_heads=num_heads, context_dim=context_dim, normalize_context=normalize_context
        )
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width=width, activation=feed_forward)

    def forward(
        self,
        tokens: Float[Tensor, "batch length width"],
        context: Float[Tensor, "batch context context_width"],
        mask: Bool[Tensor, "batch context"] | None = None,
    ) -> Float[Tensor, "batch length width"]:
        """Tokens after one round of looking at each other and at the context."""
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), context, mask)
        return tokens + self.ff(self.norm3(tokens))


class Transformer2d(nn.Module):
    """A transformer over the pixels of a feature map, with cross-attention to a context and a residual around it.

    Args:
        channels: Channels of the feature map and width of the tokens.
        num_heads: Heads of every attention.
        num_layers: Transformer blocks in a row.
        context_dim: Width of the context.
        linear_projection: Project by linear layers (SD 2) instead of 1x1 convolutions (SD 1); the same arithmetic,
            but weights of another shape.
        norm_groups: Groups of the normalisation before; its epsilon is 1e-6, as in Stable Diffusion.
        feed_forward: Activation of the feed-forward layers.
        normalize_context: Layer-norm the context before each cross-attention.

    Source: Rombach et al. 2022, arXiv:2112.10752, appendix E.2.1.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int,
        num_layers: int,
        context_dim: int,
        linear_projection: bool,
        norm_groups: int,
        feed_forward: Literal["geglu", "gelu"],
        normalize_context: bool,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection

        def projection() -> nn.Module:
            return nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                width=channels,
                num_heads=num_heads,
                context_dim=context_dim,
                feed_forward=feed_forward,
                normalize_context=normalize_context,
            )
            for _ in range(num_layers)
        )
        self.proj_out = projection()

    def forward(
        self,
        features: Float[Tensor, "batch channels height width"],
        context: Float[Tensor, "batch context context_width"],
        mask: Bool[Tensor, "batch context"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Add what the pixels gather from each other and from the context."""
        tokens = self._enter(self.norm(features))
        for block in self.transformer_blocks:
            tokens = block(tokens, context, mask)
        return features + self._leave(tokens, features.shape[2], features.shape[3])

    def _enter(self, features: Tensor) -> Tensor:
        if self.linear_projection:
            return self.proj_in(features.flatten(2).transpose(1, 2))  # (B, H*W, C)
        return self.proj_in(features).flatten(2).transpose(1, 2)  # (B, H*W, C)

    def _leave(self, tokens: Tensor, height: int, width: int) -> Tensor:
        if self.linear_projection:
            return self.proj_out(tokens).transpose(1, 2).unflatten(2, (height, width))  # (B, C, H, W)
        return self.proj_out(tokens.transpose(1, 2).unflatten(2, (height, width)))  # (B, C, H, W)
