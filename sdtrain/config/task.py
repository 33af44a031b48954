"""Section `task`: what is learned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sdtrain.config.base import Fraction, NonNegativeFloat, PositiveFloat, Section


class NoWeighting(Section):
    """Every timestep's loss counts the same.

    Attributes:
        type: `none`.
    """

    type: Literal["none"] = "none"


class MinSnrWeighting(Section):
    """Min-SNR weighting (Hang et al. 2023, arXiv:2303.09556), in the form that the prediction type needs.

    Attributes:
        type: `min_snr`.
        gamma: Signal-to-noise ratio above which a timestep counts less.
    """

    type: Literal["min_snr"]
    gamma: PositiveFloat = 5.0


LossWeighting = Annotated[NoWeighting | MinSnrWeighting, Field(discriminator="type")]


class LatentDiffusionTask(Section):
    """Learn to denoise the latents of a frozen autoencoder.

    Attributes:
        type: `latent_diffusion`.
        condition_dropout: Probability that a sample is trained on the empty condition; guidance needs it.
        loss_weighting: `{type: none}` or `{type: min_snr, gamma: 5.0}`.
        latents: `sample` draws from the stored posterior anew at every visit, `mean` takes its mean.
    """

    type: Literal["latent_diffusion"]
    condition_dropout: Fraction = 0.1
    loss_weighting: LossWeighting = NoWeighting()
    latents: Literal["sample", "mean"] = "sample"


class AutoencodingTask(Section):
    """Learn to compress and restore images.

    Attributes:
        type: `autoencoding`.
        reconstruction: Pixel loss, squared (`mse`) or absolute (`l1`).
        kl_weight: Factor of the posterior's divergence from the standard normal.
    """

    type: Literal["autoencoding"]
    reconstruction: Literal["mse", "l1"] = "mse"
    kl_weight: NonNegativeFloat = 1e-6


TaskConfig = Annotated[LatentDiffusionTask | AutoencodingTask, Field(discriminator="type")]
