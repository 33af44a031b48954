"""Section `ema`: the moving average of the weights."""

from __future__ import annotations

from sdtrain.config.base import Decay, Section


class EmaConfig(Section):
    """Exponential moving average in fp32; what is validated, sampled and exported.

    Attributes:
        decay: The decay is min(this, (1 + n) / (10 + n)) after n applied steps.
    """

    decay: Decay = 0.9999
