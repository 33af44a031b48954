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


class TimestepPhaseConfig(Section):
    """How likely each part of the timestep axis is, for a part of the training.

    Attributes:
        until: Where in the run the phase ends, as a share of its steps; 1.0 for the last one.
        edges: Where the timestep axis [0, 1) is cut, ascending; 0 is the least noise. Empty leaves it in one part.
        weights: How likely each part is made, one more than edges; 0 leaves a part out.
    """

    until: Fraction = 1.0
    edges: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    weights: tuple[NonNegativeFloat, ...] = (1.0,)


class TimestepsConfig(Section):
    """How training chooses the noise level of every sample; validation always walks evenly through all of them.

    Attributes:
        distribution: `uniform`, or `logit_normal` (the middle more often; Esser et al. 2024, arXiv:2403.03206).
        logit_mean: For `logit_normal`: 0.0 is symmetric, above favours noise.
        logit_std: For `logit_normal`: spread.
        quasi_random: Spread the levels of each global batch evenly over the distribution; less variance, no bias.
        phases: Parts of the training that favour parts of the timestep axis. Timesteps are drawn in proportion to
            distribution times weight; the loss is not weighted.
    """

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: PositiveFloat = 1.0
    quasi_random: bool = False
    phases: tuple[TimestepPhaseConfig, ...] = ()


class LatentDiffusionTask(Section):
    """Learn to denoise the latents of a frozen autoencoder.

    Attributes:
        type: `latent_diffusion`.
        condition_dropout: Probability that a sample is trained on the empty condition; guidance needs it.
        loss_weighting: `{type: none}` or `{type: min_snr, gamma: 5.0}`.
        latents: `sample` draws from the stored posterior anew at every visit, `mean` takes its mean.
        timesteps: How training chooses noise levels.
        loss_bins: Equal bins of timesteps for which the training loss is shown as well, as train/loss_bin_03; 0 is off.
    """

    type: Literal["latent_diffusion"]
    condition_dropout: Fraction = 0.1
    loss_weighting: LossWeighting = NoWeighting()
    latents: Literal["sample", "mean"] = "sample"
    timesteps: TimestepsConfig = TimestepsConfig()
    loss_bins: Annotated[int, Field(ge=0, le=100)] = 10


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
