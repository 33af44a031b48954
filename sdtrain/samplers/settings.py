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
from sdtrain.samplers.euler import sample_euler
from sdtrain.samplers.steps import Callback, Model, NoiseFn, Spacing, spacing_of
from sdtrain.samplers.thresholding import Thresholding

SamplerName = Literal["ddim", "ddpm", "euler"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """How latents are sampled; the defaults are Stable Diffusion's.

    Attributes:
        sampler: `ddim`, `ddpm` or `euler`.
        num_steps: Calls of the denoiser; None visits every timestep (`ddpm` only).
        guidance_scale: Classifier-free guidance; 1 is off.
        eta: Noise added by `ddim`; the others do not look at it.
        spacing: Which timesteps are visited; None is what the process needs, see `steps.spacing_of`.
        steps_offset: Added to `leading` timesteps.
        final_alpha_bar: Where the last step of `ddim` ends; the others always end without noise. None is `one` for a
            flow and `first` elsewhere.
        thresholding: None, the right choice for latents, or an option of `samplers.thresholding`.

    Raises:
        ConfigError: an unknown sampler, or `ddim` or `euler` without a number of steps.
    """

    sampler: SamplerName = "ddim"
    num_steps: int | None = 30
    guidance_scale: float = 7.5
    eta: float = 0.0
    spacing: Spacing | None = None
    steps_offset: int = 1
    final_alpha_bar: FinalAlphaBar | None = None
    thresholding: Thresholding | None = None

    def __post_init__(self) -> None:
        if self.sampler not in get_args(SamplerName):
            raise ConfigError(f"sampler: found {self.sampler!r}, allowed are {', '.join(get_args(SamplerName))}")
        if self.sampler != "ddpm" and self.num_steps is None:
            raise ConfigError(
                f"num_steps: found none, {self.sampler} needs a number of steps; only ddpm can visit every timestep"
            )


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
    spacing = settings.spacing or spacing_of(process)
    if settings.sampler == "ddpm" or settings.num_steps is None:
        return sample_ddpm(
            model,
            noised,
            process=process,
            num_steps=settings.num_steps,
            noise_fn=noise_fn,
            callback=callback,
            spacing=spacing,
            steps_offset=settings.steps_offset,
            thresholding=settings.thresholding,
        )
    if settings.sampler == "euler":
        return sample_euler(
            model,
            noised,
            process=process,
            num_steps=settings.num_steps,
            callback=callback,
            spacing=spacing,
            steps_offset=settings.steps_offset,
            thresholding=settings.thresholding,
        )
    return sample_ddim(
        model,
        noised,
        process=process,
        num_steps=settings.num_steps,
        eta=settings.eta,
        noise_fn=noise_fn,
        callback=callback,
        spacing=spacing,
        steps_offset=settings.steps_offset,
        final_alpha_bar=settings.final_alpha_bar or ("one" if process.prediction_type == "flow" else "first"),
        thresholding=settings.thresholding,
    )
