"""Which timesteps a sampler visits, and the noise levels between which it steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.diffusion.targets import noise_from_clean, to_clean_and_noise
from sdtrain.errors import ConfigError
from sdtrain.samplers.thresholding import Thresholding, threshold

Model = Callable[[Float[Tensor, " batch *item"], Int64[Tensor, " batch"]], Float[Tensor, " batch *item"]]
"""(noised, timesteps) -> prediction, of the process's prediction type."""

NoiseFn = Callable[[int], Tensor]
"""Step index -> standard normal noise, shaped like the latents."""

Callback = Callable[[int, Tensor], None]
"""(step index, latents after that step) -> None."""

Spacing = Literal["leading", "trailing", "linspace"]


def spacing_of(process: DiffusionProcess) -> Spacing:
    """What a process needs: its last timestep visited (`trailing`) where that is pure noise, for else the chain would
    start from noise that the denoiser takes for a noised image; `leading`, Stable Diffusion's, elsewhere.

    Source: Lin et al. 2023, arXiv:2305.08891, section 3.3.
    """
    return "trailing" if process.ends_in_noise else "leading"


@dataclass(frozen=True, slots=True)
class Step:
    """One reverse step.

    Attributes:
        index: 0 for the first, noisiest step.
        timestep: What the denoiser is told.
        alpha_bar: Signal power of the latents that come in.
        alpha_bar_prev: Signal power of the latents that go out (earlier in the forward process).
    """

    index: int
    timestep: int
    alpha_bar: float
    alpha_bar_prev: float


def leading_timesteps(num_steps: int, num_train_timesteps: int, *, steps_offset: int = 0) -> list[int]:
    """Multiples of T // num_steps from 0, plus the offset, noisiest first: Stable Diffusion's, with offset 1."""
    ratio = num_train_timesteps // num_steps
    return [index * ratio + steps_offset for index in reversed(range(num_steps))]


def trailing_timesteps(num_steps: int, num_train_timesteps: int) -> list[int]:
    """Steps of T / num_steps down from the last timestep, which is always visited."""
    return [round(num_train_timesteps - index * (num_train_timesteps / num_steps)) - 1 for index in range(num_steps)]


def linspace_timesteps(num_steps: int, num_train_timesteps: int) -> list[int]:
    """Evenly spaced from the last timestep to 0, both visited."""
    spaced = torch.linspace(0, num_train_timesteps - 1, num_steps, dtype=torch.float64)
    return [int(timestep) for timestep in spaced.round().flip(0)]


def sampling_timesteps(
    num_steps: int, num_train_timesteps: int, *, spacing: Spacing = "leading", steps_offset: int = 0
) -> list[int]:
    """The timesteps of a chain, noisiest first, named and placed as in diffusers' `timestep_spacing`.

    Args:
        steps_offset: Added to every timestep of `leading`; the others do not look at it.

    Raises:
        ConfigError: unknown spacing, more steps than timesteps, or an offset that leaves the process.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ConfigError(
            f"num_steps: found {num_steps}, allowed are 1 to {num_train_timesteps} (the process's timesteps)"
        )
    match spacing:
        case "leading":
            timesteps = leading_timesteps(num_steps, num_train_timesteps, steps_offset=steps_offset)
        case "trailing":
            timesteps = trailing_timesteps(num_steps, num_train_timesteps)
        case "linspace":
            timesteps = linspace_timesteps(num_steps, num_train_timesteps)
        case _:
            raise ConfigError(f"spacing: found {spacing!r}, allowed are leading, trailing, linspace")
    if timesteps[0] >= num_train_timesteps or timesteps[-1] < 0:
        raise ConfigError(
            f"steps_offset: with {steps_offset}, {num_steps} leading steps run from timestep {timesteps[0]} to "
            f"{timesteps[-1]}, allowed are {num_train_timesteps - 1} to 0; lower num_steps or use steps_offset 0"
        )
    return timesteps


def reverse_steps(process: DiffusionProcess, timesteps: list[int], *, final_alpha_bar: float) -> list[Step]:
    """The chain through `timesteps`, each step ending where the next begins, the last at `final_alpha_bar`."""
    levels = [process.alpha_bar_float64[timestep].item() for timestep in timesteps]
    ends = [*levels[1:], final_alpha_bar]
    return [Step(*row) for row in zip(range(len(timesteps)), timesteps, levels, ends, strict=True)]


def predict(
    model: Model,
    noised: Float[Tensor, " batch *item"],
    step: Step,
    *,
    process: DiffusionProcess,
    thresholding: Thresholding | None,
) -> tuple[Float[Tensor, " batch *item"], Float[Tensor, " batch *item"]]:
    """Ask the denoiser once: the clean item and the noise in `noised`.

    The denoiser is shown what it was trained on, see `DiffusionProcess.denoiser_input`. Where the clean item is
    thresholded the noise is derived anew, so that both still mix to `noised`.
    """
    batch = noised.shape[0]
    timesteps = torch.full((batch,), step.timestep, dtype=torch.int64, device=noised.device)
    alpha_bar = torch.full((batch,), step.alpha_bar, dtype=torch.float64, device=noised.device)
    prediction = model(process.denoiser_input(noised, alpha_bar), timesteps)
    clean, noise = to_clean_and_noise(process.prediction_type, prediction, noised, alpha_bar)
    if thresholding is None:
        return clean, noise
    clean = threshold(clean, thresholding)
    return clean, noise_from_clean(clean, noised, alpha_bar)
