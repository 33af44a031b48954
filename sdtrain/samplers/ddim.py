"""DDIM: deterministic at eta 0, ancestral at eta 1.

Source: Song et al. 2021, arXiv:2010.02502.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.errors import ConfigError
from sdtrain.samplers.steps import (
    Callback,
    Model,
    NoiseFn,
    Spacing,
    leading_timesteps,
    linspace_timesteps,
    predict,
    reverse_steps,
    sampling_timesteps,
    trailing_timesteps,
)
from sdtrain.samplers.thresholding import Thresholding

__all__ = [
    "FinalAlphaBar",
    "ddim_sigma",
    "ddim_step",
    "leading_timesteps",
    "linspace_timesteps",
    "sample_ddim",
    "trailing_timesteps",
]

FinalAlphaBar = Literal["one", "first"]
"""Where the last step ends: at no noise (diffusers' `set_alpha_to_one`), or at the level of timestep 0."""


def ddim_sigma(alpha_bar: float, alpha_bar_prev: float, eta: float) -> float:
    """Standard deviation of the noise that a step adds: equation 16."""
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    return eta * max(variance, 0.0) ** 0.5


def ddim_step(
    clean: Float[Tensor, " batch *item"],
    noise: Float[Tensor, " batch *item"],
    *,
    alpha_bar_prev: float,
    sigma: float = 0.0,
    fresh_noise: Float[Tensor, " batch *item"] | None = None,
) -> Float[Tensor, " batch *item"]:
    """Latents at the next lower noise level: equation 12.

    Args:
        clean: Predicted clean latents.
        noise: Predicted noise.
        alpha_bar_prev: Signal power that the result shall have.
        sigma: Standard deviation of the part of the noise that is drawn anew.
        fresh_noise: Standard normal; needed where sigma is above 0.
    """
    kept = max(1 - alpha_bar_prev - sigma**2, 0.0) ** 0.5
    latents = alpha_bar_prev**0.5 * clean + kept * noise
    return latents if fresh_noise is None else latents + sigma * fresh_noise


def sample_ddim(
    model: Model,
    noised: Float[Tensor, " batch *item"],
    *,
    process: DiffusionProcess,
    num_steps: int,
    eta: float = 0.0,
    noise_fn: NoiseFn | None = None,
    callback: Callback | None = None,
    spacing: Spacing = "leading",
    steps_offset: int = 1,
    final_alpha_bar: FinalAlphaBar = "first",
    thresholding: Thresholding | None = None,
) -> Float[Tensor, " batch *item"]:
    """Latents from noise in `num_steps` calls of the model.

    The defaults are Stable Diffusion's (leading, offset 1, ending at the level of timestep 0, no clipping). Each step
    ends where the next begins; diffusers' DDIM with `trailing` or `linspace` does so only where num_steps divides T.

    Args:
        model: Prediction for (noised, timesteps).
        noised: Standard normal noise, float32 or float64.
        eta: 0 is deterministic; up to 1 adds noise.
        noise_fn: Noise for step i; needed where eta is above 0.
        callback: Called with (step index, latents) after every step.
        spacing: Which timesteps are visited.
        steps_offset: Added to `leading` timesteps.
        final_alpha_bar: Where the last step ends.
        thresholding: See `samplers.thresholding`; None leaves the prediction alone.

    Raises:
        ConfigError: steps or an eta that are not allowed, or an eta without noise.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta: found {eta}, allowed are 0 (deterministic) to 1 (ancestral)")
    if eta > 0 and noise_fn is None:
        raise ConfigError(f"eta: {eta} adds noise at every step, so noise_fn must be given; use eta 0 without one")
    timesteps = sampling_timesteps(num_steps, process.num_train_timesteps, spacing=spacing, steps_offset=steps_offset)
    end = 1.0 if final_alpha_bar == "one" else process.alpha_bar_float64[0].item()
    for step in reverse_steps(process, timesteps, final_alpha_bar=end):
        clean, noise = predict(model, noised, step, process=process, thresholding=thresholding)
        noised = ddim_step(
            clean,
            noise,
            alpha_bar_prev=step.alpha_bar_prev,
            sigma=ddim_sigma(step.alpha_bar, step.alpha_bar_prev, eta),
            fresh_noise=noise_fn(step.index) if noise_fn is not None and eta > 0 else None,
        )
        if callback is not None:
            callback(step.index, noised)
    return noised
