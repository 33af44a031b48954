"""Section `init_from`: the checkpoint of another run that this one starts from, on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sdtrain.config.base import Section


class InitFromConfig(Section):
    """A fork: a new run with samples, steps and a learning rate schedule of its own, but not from fresh weights.

    It counts where the run's folder holds no checkpoint yet; from then on the run resumes its own.

    Attributes:
        checkpoint: A checkpoint's folder, or a run folder, of which the newest valid one is taken.
        load: `weights` or `ema` (the averaged ones) with a fresh optimiser, or `all`: weights, average and the
            optimiser's state go on.
    """

    checkpoint: Path
    load: Literal["weights", "ema", "all"]
