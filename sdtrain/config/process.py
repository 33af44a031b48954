"""Section `process`: how noise is added, and what is predicted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sdtrain.config.base import PositiveInt, Section

Beta = Annotated[float, Field(gt=0, lt=1)]


class ProcessConfig(Section):
    """The forward noising process.

    Attributes:
        beta_schedule: `linear`, `scaled_linear` (linear in the square root) or `cosine`.
        beta_start: First beta; without effect for `cosine`.
        beta_end: Last beta; without effect for `cosine`.
        num_train_timesteps: Number of noise levels.
        prediction_type: What the denoiser returns: `epsilon` (the noise), `v_prediction` or `sample` (clean latents).
    """

    beta_schedule: Literal["linear", "scaled_linear", "cosine"]
    beta_start: Beta = 0.00085
    beta_end: Beta = 0.012
    num_train_timesteps: PositiveInt = 1000
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
