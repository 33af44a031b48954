"""Section `process`: how noise is added, and what is predicted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sdtrain.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Section

Beta = Annotated[float, Field(gt=0, lt=1)]


class ProcessConfig(Section):
    """The forward noising process.

    Attributes:
        beta_schedule: `linear`, `scaled_linear` (linear in the square root) or `cosine`; null for `flow`.
        beta_start: First beta; without effect for `cosine` and `flow`.
        beta_end: Last beta; without effect for `cosine` and `flow`.
        num_train_timesteps: Number of noise levels.
        prediction_type: What the denoiser returns: `epsilon` (the noise), `v_prediction`, `sample` (clean latents) or
            `flow` (rectified flow: noise minus clean latents, on the straight path between the two).
        zero_terminal_snr: Rescale the betas so that the last noise level is pure noise (Lin et al. 2023,
            arXiv:2305.08891); for `v_prediction` and `sample`. Sampling then visits the last level.
        noise_offset: Standard deviation of one extra noise value per sample and channel, so that the network learns to
            change the mean brightness; 0 is off, 0.1 is usual.
        shift: For `flow`: moves the noise levels towards more noise, which larger images need; 1 is none.
    """

    beta_schedule: Literal["linear", "scaled_linear", "cosine"] | None = None
    beta_start: Beta = 0.00085
    beta_end: Beta = 0.012
    num_train_timesteps: PositiveInt = 1000
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"]
    zero_terminal_snr: bool = False
    noise_offset: NonNegativeFloat = 0.0
    shift: PositiveFloat = 1.0
