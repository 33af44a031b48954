"""Section `optimizer`: AdamW, its learning rate and clipping."""

from __future__ import annotations

from typing import Literal

from sdtrain.config.base import Decay, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, Section


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule, a pure function of the applied steps.

    Attributes:
        learning_rate: Peak rate.
        betas: Decays of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay per unit of learning rate.
        weight_decay_on: `all` parameters, or `matrices` only (no biases, norms and other vectors).
        lr_schedule: After the warm-up: `constant`, or down to `final_lr_fraction` by a line or half a cosine.
        warmup_steps: Steps of linear rise from warmup_start_lr to learning_rate.
        warmup_start_lr: Rate of the first step of the warm-up; without effect when warmup_steps is 0.
        final_lr_fraction: Last rate as a share of learning_rate; without effect for `constant`.
        gradient_clip_norm: Largest global gradient norm; null never clips.
    """

    learning_rate: PositiveFloat
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    weight_decay_on: Literal["all", "matrices"] = "all"
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: NonNegativeInt = 0
    warmup_start_lr: NonNegativeFloat = 1e-6
    final_lr_fraction: Fraction = 0.01
    gradient_clip_norm: PositiveFloat | None = 1.0
