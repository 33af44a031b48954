"""Section `samples`: pictures drawn while training."""

from __future__ import annotations

from pydantic import Field

from sdtrain.config.base import NonEmptyStr, NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class SamplesConfig(Section):
    """Grids of samples by the averaged weights, with the same seeds every time.

    Attributes:
        every_steps: Steps between two grids.
        prompts: One picture per prompt.
        guidance_scale: Strength of classifier-free guidance; 1.0 is off.
        num_steps: DDIM steps.
        seed: Seed of the first prompt; the next ones count on.
    """

    every_steps: PositiveInt
    prompts: tuple[NonEmptyStr, ...] = Field(min_length=1)
    guidance_scale: NonNegativeFloat = 7.5
    num_steps: PositiveInt = 30
    seed: NonNegativeInt = 0
