"""Beta schedules of the discrete-time process, in float64."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from sdtrain.errors import ConfigError

BetaSchedule = Literal["linear", "scaled_linear", "cosine"]

COSINE_OFFSET = 0.008
MAX_COSINE_BETA = 0.9999


def betas(
    beta_schedule: BetaSchedule | None, beta_start: float, beta_end: float, num_train_timesteps: int
) -> Float64[Tensor, " timesteps"]:
    """Noise variance added at each timestep.

    Args:
        beta_schedule: `linear` (Ho et al. 2020), `scaled_linear` (linear in sqrt(beta), Stable Diffusion) or `cosine`
            (Nichol & Dhariwal 2021), which is fixed by the number of timesteps and does not look at the two ends.
        beta_start: beta of timestep 0.
        beta_end: beta of the last timestep.

    Raises:
        ConfigError: unknown schedule or none, no timesteps, or ends that are not 0 < beta_start <= beta_end < 1.
    """
    if num_train_timesteps < 1:
        raise ConfigError(f"process.num_train_timesteps: found {num_train_timesteps}, allowed are 1 and more")
    match beta_schedule:
        case "linear":
            _check_ends(beta_start, beta_end)
            return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        case "scaled_linear":
            _check_ends(beta_start, beta_end)
            return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64).square()
        case "cosine":
            return _cosine_betas(num_train_timesteps)
        case _:
            allowed = ", ".join(get_args(BetaSchedule))
            raise ConfigError(f"process.beta_schedule: found {beta_schedule!r}, allowed are {allowed}")


def rescale_to_zero_terminal_snr(betas: Float64[Tensor, " timesteps"]) -> Float64[Tensor, " timesteps"]:
    """Shift and scale sqrt(alpha_bar) so that it ends at exactly 0 and still starts where it did.

    Source: Lin et al. 2023, "Common diffusion noise schedules and sample steps are flawed", algorithm 1.
    """
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root.square()
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def rectified_alpha_bar(num_train_timesteps: int, shift: float) -> Float64[Tensor, " timesteps"]:
    """Signal power of rectified flow's levels, as part of signal and noise together.

    Timestep i stands at time (i + 1) / T of the path (1 - t) * clean + t * noise, moved towards the noise by `shift`:
    t -> shift * t / (1 + (shift - 1) * t). The last timestep is pure noise.

    Args:
        num_train_timesteps: T.
        shift: 1 leaves the times alone; larger images want more, 3 is Stable Diffusion 3's.

    Raises:
        ConfigError: no timesteps, or a shift that is not above 0.

    Source: Esser et al. 2024, arXiv:2403.03206, equation 23.
    """
    if num_train_timesteps < 1:
        raise ConfigError(f"process.num_train_timesteps: found {num_train_timesteps}, allowed are 1 and more")
    if shift <= 0:
        raise ConfigError(f"process.shift: found {shift}, allowed are numbers above 0")
    time = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    time = shift * time / (1 + (shift - 1) * time)
    return (1 - time).square() / ((1 - time).square() + time.square())


def _cosine_betas(num_train_timesteps: int) -> Float64[Tensor, " timesteps"]:
    """Betas of alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2), u in [0, 1], s = 0.008, with beta <= 0.9999."""
    u = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * (math.pi / 2)).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_COSINE_BETA)


def _check_ends(beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ConfigError(
            f"process.beta_start, process.beta_end: found {beta_start} and {beta_end}, "
            "allowed are 0 < beta_start <= beta_end < 1"
        )
