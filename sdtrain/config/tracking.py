"""Section `tracking`: the copy of the metrics in Weights & Biases."""

from __future__ import annotations

from typing import Literal

from sdtrain.config.base import NonEmptyStr, Section


class TrackingConfig(Section):
    """Weights & Biases; metrics.jsonl in the run folder is written in any case.

    Attributes:
        project: Project that the run is shown under.
        mode: `auto` is `online` where a key is known and `offline` elsewhere; `disabled` writes nothing.
    """

    project: NonEmptyStr = "sdtrain"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
