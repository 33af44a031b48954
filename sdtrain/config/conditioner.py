"""Section `conditioner`: what the denoiser is told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sdtrain.config.base import NonEmptyStr, PositiveInt, Section


class TextArch(Section):
    """A small CLIP text model with fresh weights.

    Attributes:
        hidden_size: Width of the tokens.
        num_layers: Transformer layers.
        num_heads: Attention heads; divides hidden_size.
    """

    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt


class ClipTextConfig(Section):
    """Captions through a CLIP text model; exactly one of `weights` and `arch`.

    Attributes:
        type: `clip_text`.
        weights: A folder in transformers' layout or a hub name.
        arch: A small model with fresh weights; useful only when trained along.
        trainable: Train it together with the denoiser.
        max_length: Tokens per caption, padded and cut; 77 is the most that CLIP knows.
    """

    type: Literal["clip_text"]
    weights: NonEmptyStr | None = None
    arch: TextArch | None = None
    trainable: bool = False
    max_length: Annotated[int, Field(ge=2, le=77)] = 77


class NoConditionerConfig(Section):
    """Unconditional.

    Attributes:
        type: `none`.
    """

    type: Literal["none"]


ConditionerConfig = Annotated[ClipTextConfig | NoConditionerConfig, Field(discriminator="type")]
