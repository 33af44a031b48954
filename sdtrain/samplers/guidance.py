"""Classifier-free guidance, and noise that belongs to a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sdtrain.data.randomness import normals
from sdtrain.records import Conditioning
from sdtrain.samplers.steps import Model

_STREAM = "sampler"


@runtime_checkable
class Denoiser(Protocol):
    """The trained network, as a sampler sees it."""

    def __call__(
        self,
        latents: Float[Tensor, " batch *item"],
        timesteps: Int64[Tensor, " batch"],
        conditioning: Conditioning,
        /,
    ) -> Float[Tensor, " batch *item"]:
        """Prediction for noised latents."""
        ...


def guided(denoiser: Denoiser, conditioning: Conditioning, null: Conditioning, guidance_scale: float) -> Model:
    """A model that follows `conditioning`: null + guidance_scale * (conditional - null).

    Both passes are one forward of twice the batch. Scale 1 is the conditional pass alone, and so is a conditioning
    without parts, where both passes would be the same.

    Args:
        conditioning: What the images shall show, one item per latent.
        null: The dropped condition, as many items.
        guidance_scale: 1 is off; 7.5 is usual for text.

    Source: Ho & Salimans 2022, arXiv:2207.12598, equation 6 with guidance_scale = 1 + w.
    """

    def conditional_alone(noised: Tensor, timesteps: Tensor) -> Tensor:
        return denoiser(noised, timesteps, conditioning)

    if guidance_scale == 1.0 or not conditioning.parts():
        return conditional_alone
    both = null.cat(conditioning)

    def with_guidance(noised: Tensor, timesteps: Tensor) -> Tensor:
        prediction = denoiser(torch.cat([noised, noised]), torch.cat([timesteps, timesteps]), both)
        unconditional, conditional = prediction.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return with_guidance


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...], step: int) -> Float32[Tensor, " batch *item"]:
    """Standard normal noise on the CPU; item i depends on seeds[i], shape and step alone.

    Args:
        shape: Shape of one item.
        step: 0 is the noise that sampling starts from; i + 1 is what step i adds.
    """
    return torch.from_numpy(np.stack([normals(seed, _STREAM, step, shape) for seed in seeds]))
