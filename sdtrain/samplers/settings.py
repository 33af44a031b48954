"""Which sampler runs, and how: one record from the config's values to a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.errors import ConfigError
from sdtrain.samplers.ddim import FinalAlphaBar, sample_ddim
from sdtrain.samplers.ddpm import sample_ddpm
from sdtrain.samplers.steps import Callback, Model, NoiseFn, Spacing
from sdtrain.samplers.thresholding import Thresholding

SamplerName = Literal["ddim", "ddpm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """How latents are sampled; the defaults are Stable Diffusion's.

    Attributes:
        sampler: `ddim` or `ddpm`.
        num_steps: Calls of the denoiser; None visits every timestep (`ddpm` only).
        guidance_scale: Classifier-free guidance; 1 is off.
        eta: Noise added by `ddim`; `ddpm` does not look at it.
        spacing: Which timesteps are visited.
        steps_offset: Added to `leading` timesteps.
        final_alpha_bar: Where the last step of `ddim` ends; `ddpm` always ends without noise.
        thresholding: None, the right choice for latents, or an option of `samplers.thresholding`.

    Raises:
        ConfigError: an unknown sampler, or `ddim` without a number of steps.
    """

    sampler: SamplerName = "ddim"
    num_steps: int | None = 30
    guidance_scale: float = 7.5
    eta: float = 0.0
    spacing: Spacing = "leading"
    steps_offset: int = 1
    final_alpha_bar: FinalAlphaBar = "first"
    thresholding: Thresholding | None = None

    def __post_init__(self) -> None:
        if self.sampler not in get_args(SamplerName):
            raise ConfigError(f"sampler: found {self.sampler!r}, allowed are {', '.join(get_args(SamplerName))}")
        if self.sampler == "ddim" and self.num_steps is None:
            raise ConfigError("num_steps: found none, ddim needs a number of steps; only ddpm can visit every timestep")


def run_sampler(
    settings: SamplerSettings,
    model: Model,
    noised: Float[Tensor, " batch *item"],
    *,
    process: DiffusionProcess,
    noise_fn: NoiseFn,
    callback: Callback | None = None,
) -> Float[Tensor, " batch *item"]:
    """Latents from noise by the sampler of `settings`; guidance is part of `model` already."""
    if settings.sampler == "ddim" and settings.num_steps is not None:
        return sample_ddim(
            model,
            noised,
            process=process,
            num_steps=settings.num_steps,
            eta=settings.eta,
            noise_fn=noise_fn,
            callback=callback,
            spacing=settings.spacing,
            steps_offset=settings.steps_offset,
            final_alpha_bar=settings.final_alpha_bar,
            thresholding=settings.thresholding,
        )
    return sample_ddpm(
        model,
        noised,
        process=process,
        num_steps=settings.num_steps,
        noise_fn=noise_fn,
        callback=callback,
        spacing=settings.spacing,
        steps_offset=settings.steps_offset,
        thresholding=settings.thresholding,
    )
