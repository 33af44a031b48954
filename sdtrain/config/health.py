"""Section `health`: which steps are thrown away, and when the run goes back to an older checkpoint."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sdtrain.config.base import NonNegativeInt, PositiveInt, Section

Ratio = Annotated[float, Field(gt=1)]


class HealthConfig(Section):
    """Steps whose loss or gradients are not finite are thrown away on all ranks, and so are spikes of the loss.

    Each leaves a file in the run folder, `sick/step-N.json`. A run that throws too many away goes back to the newest
    checkpoint from before them (the oldest one, if all are younger) and leaves out all samples up to where it was; if
    that does not help it stops (code 5).

    Attributes:
        max_skipped_in_a_row: So many updates of one trainable thrown away in a row are too many.
        max_skipped_in_window: So many within `window_steps` are too many, in a row or not.
        window_steps: Length of that window.
        max_rollbacks: How often a run goes back, over all its starts; 0 stops at once.
        spike_ratio: A loss above this many times the median of the last ones is a spike, if `spike_deviations` agrees;
            null looks for none, as is right where the task itself changes its loss by much in the course of a run.
        spike_deviations: A spike is also so many standard deviations of the log loss above the median, which are
            estimated robustly, so that a noisy loss has a higher limit.
        spike_window_steps: Applied steps that both are estimated from; the first half of them only fills it.
    """

    max_skipped_in_a_row: PositiveInt = 25
    max_skipped_in_window: PositiveInt = 50
    window_steps: PositiveInt = 1000
    max_rollbacks: NonNegativeInt = 2
    spike_ratio: Ratio | None = 4.0
    spike_deviations: Annotated[float, Field(gt=0)] = 12.0
    spike_window_steps: Annotated[int, Field(ge=8)] = 128
