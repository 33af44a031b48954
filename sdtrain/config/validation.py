"""Section `validation`: the loss on samples that are never trained on."""

from __future__ import annotations

from sdtrain.config.base import PositiveInt, Section


class ValidationConfig(Section):
    """Validation loss of the averaged weights, with the same draws every time.

    Attributes:
        every_steps: Steps between two validations.
        num_samples: Samples of the validation split that are used.
        batch_size: Samples in one forward on one rank.
        timestep_bins: Equal bins of timesteps that the loss is spread over evenly; without effect for autoencoding.
    """

    every_steps: PositiveInt
    num_samples: PositiveInt
    batch_size: PositiveInt
    timestep_bins: PositiveInt = 20
