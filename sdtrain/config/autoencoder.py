"""Section `autoencoder`: the images' way to latents and back."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdtrain.config.base import NonEmptyStr, PositiveFloat, PositiveInt, Section


class AutoencoderArch(Section):
    """A KL autoencoder of one's own; every level but the last halves the resolution.

    Attributes:
        latent_channels: Channels of the latents.
        channels: Width of each level, from the image inwards.
        layers_per_block: Residual blocks per level of the encoder.
        attention_in_middle: Whether the innermost level attends over all places.
        norm_groups: Groups of every group norm; divides each of `channels`.
    """

    latent_channels: PositiveInt
    channels: tuple[PositiveInt, ...] = Field(min_length=1)
    layers_per_block: PositiveInt = 2
    attention_in_middle: bool = True
    norm_groups: PositiveInt = 32


class AutoencoderConfig(Section):
    """The autoencoder; exactly one of `weights`, `preset` and `arch` says what it looks like.

    Attributes:
        type: `kl`.
        weights: A folder in diffusers' layout or a hub name; brings its own architecture.
        preset: A known architecture with fresh weights.
        arch: An architecture of one's own with fresh weights.
        scaling_factor: Factor that gives latents unit variance; null takes the one kept with the weights or the preset.
    """

    type: Literal["kl"]
    weights: NonEmptyStr | None = None
    preset: Literal["sd", "tiny"] | None = None
    arch: AutoencoderArch | None = None
    scaling_factor: PositiveFloat | None = None
