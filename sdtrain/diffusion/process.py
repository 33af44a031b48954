"""The forward process: one record that knows every noise level."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from sdtrain.diffusion import schedules
from sdtrain.diffusion.schedules import BetaSchedule
from sdtrain.diffusion.targets import PredictionType, add_noise, rectified
from sdtrain.errors import ConfigError

__all__ = ["DiffusionProcess", "add_noise"]


@dataclass(frozen=True, kw_only=True)
class DiffusionProcess:
    """A discrete-time, variance-preserving process and what the denoiser predicts about it.

    Rectified flow is one of them: its path is the variance-preserving one on another scale (see `targets`), which
    `denoiser_input` goes over to.

    Tables are computed in float64: near timestep 0 the noise power 1 - alpha_bar is the small difference of two large
    numbers, of which float32 keeps three to four digits, and one for a flow.

    Attributes:
        beta_schedule: `linear`, `scaled_linear` or `cosine`; None for `flow`, whose path is straight.
        beta_start: beta at timestep 0; `cosine` and `flow` do not look at it.
        beta_end: beta at the last timestep; `cosine` and `flow` do not look at it.
        num_train_timesteps: T; timesteps are 0 ... T-1.
        prediction_type: `epsilon`, `v_prediction`, `sample` or `flow`.
        zero_terminal_snr: Rescale the schedule so that the last timestep is pure noise; a flow ends so anyway.
        shift: Of a flow's times towards the noise; 1 is none.

    Raises:
        ConfigError: a value that is not allowed, or epsilon prediction of pure noise, which says nothing of the image.
    """

    beta_schedule: BetaSchedule | None = None
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int
    prediction_type: PredictionType
    zero_terminal_snr: bool = False
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(PredictionType):
            allowed = ", ".join(get_args(PredictionType))
            raise ConfigError(f"process.prediction_type: found {self.prediction_type!r}, allowed are {allowed}")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ConfigError(
                "process.zero_terminal_snr: the last timestep holds no signal, so process.prediction_type epsilon "
                "cannot give the image back; allowed are v_prediction and sample"
            )
        if self.prediction_type == "flow" and (self.beta_schedule is not None or self.zero_terminal_snr):
            raise ConfigError(
                f"process.beta_schedule {self.beta_schedule}, process.zero_terminal_snr {self.zero_terminal_snr}: "
                "process.prediction_type flow runs straight to pure noise and has neither; leave both out"
            )
        if self.prediction_type != "flow" and self.shift != 1:
            raise ConfigError(
                f"process.shift: found {self.shift}, but process.prediction_type {self.prediction_type} takes its "
                "noise levels from the betas; leave shift out, or predict flow"
            )
        _ = self.alpha_bar_float64  # wrong schedules fail here, not in the first step

    @cached_property
    def betas(self) -> Float64[Tensor, " timesteps"]:
        """Noise variance added at each timestep, float64; a flow's are those of its variance-preserving twin."""
        if self.prediction_type == "flow":
            alpha_bar = self.alpha_bar_float64
            return 1 - alpha_bar / torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        plain = schedules.betas(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)
        return schedules.rescale_to_zero_terminal_snr(plain) if self.zero_terminal_snr else plain

    @cached_property
    def alpha_bar_float64(self) -> Float64[Tensor, " timesteps"]:
        """Cumulative signal power at each timestep, unrounded; samplers take their scalars from here."""
        if self.prediction_type == "flow":
            return schedules.rectified_alpha_bar(self.num_train_timesteps, self.shift)
        return (1 - self.betas).cumprod(0)

    @cached_property
    def alpha_bar(self) -> Float32[Tensor, " timesteps"]:
        """Cumulative signal power at each timestep, rounded to float32."""
        return self.alpha_bar_float64.float()

    def alpha_bar_at(self, timesteps: Int64[Tensor, " batch"]) -> Float64[Tensor, " batch"]:
        """Cumulative signal power of each item, unrounded, on the device of `timesteps`."""
        return self._lookup("alpha_bar", timesteps)

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last timestep holds no signal; samplers must then start there."""
        return self.alpha_bar_float64[-1].item() == 0

    def denoiser_input(
        self, noised: Float[Tensor, " batch *item"], alpha_bar: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch *item"]:
        """What the denoiser is shown of noised items: those of a flow on the flow's own scale, others as they are."""
        return rectified(noised, alpha_bar) if self.prediction_type == "flow" else noised

    def alpha_sigma(
        self, timesteps: Int64[Tensor, " batch"]
    ) -> tuple[Float32[Tensor, " batch"], Float32[Tensor, " batch"]]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of each item."""
        return self._lookup("alpha", timesteps), self._lookup("sigma", timesteps)

    def snr(self, timesteps: Int64[Tensor, " batch"]) -> Float32[Tensor, " batch"]:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of each item."""
        return self._lookup("snr", timesteps)

    def log_snr(self, timesteps: Int64[Tensor, " batch"]) -> Float32[Tensor, " batch"]:
        """Natural logarithm of the signal-to-noise ratio of each item; -inf where the signal ends."""
        return self._lookup("log_snr", timesteps)

    @cached_property
    def _tables(self) -> dict[str, Float[Tensor, " timesteps"]]:
        exact = self.alpha_bar_float64
        snr = exact / (1 - exact)
        tables = {"alpha": exact.sqrt(), "sigma": (1 - exact).sqrt(), "snr": snr, "log_snr": snr.log()}
        return {"alpha_bar": exact} | {name: table.float() for name, table in tables.items()}

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.device], Tensor]:
        return {}

    def _lookup(self, name: str, timesteps: Tensor) -> Tensor:
        """Rows of a table; its copy on each device is kept, since copying it every step would wait for the device."""
        key = (name, timesteps.device)
        if key not in self._copies:
            self._copies[key] = self._tables[name].to(timesteps.device)
        return self._copies[key][timesteps]
