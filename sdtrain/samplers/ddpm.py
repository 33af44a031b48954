"""DDPM: ancestral sampling from the posterior, over all timesteps or a respaced chain.

Source: Ho et al. 2020, arXiv:2006.11239, equations 6 and 7.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.errors import ConfigError
from sdtrain.samplers.steps import Callback, Model, NoiseFn, Spacing, predict, reverse_steps, sampling_timesteps
from sdtrain.samplers.thresholding import Thresholding


def ddpm_mean(
    clean: Float[Tensor, " batch *item"],
    noised: Float[Tensor, " batch *item"],
    *,
    alpha_bar: float,
    alpha_bar_prev: float,
) -> Float[Tensor, " batch *item"]:
    """Mean of q(latents at the lower level | noised, clean): equation 7, for any two levels of the process."""
    alpha = alpha_bar / alpha_bar_prev
    of_clean = alpha_bar_prev**0.5 * (1 - alpha) / (1 - alpha_bar)
    of_noised = alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return of_clean * clean + of_noised * noised


def ddpm_sigma(alpha_bar: float, alpha_bar_prev: float) -> float:
    """Standard deviation of q(latents at the lower level | noised, clean); 0 where that level has no noise."""
    return ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)) ** 0.5


def sample_ddpm(
    model: Model,
    noised: Float[Tensor, " batch *item"],
    *,
    process: DiffusionProcess,
    num_steps: int | None = None,
    noise_fn: NoiseFn,
    callback: Callback | None = None,
    spacing: Spacing = "leading",
    steps_offset: int = 0,
    thresholding: Thresholding | None = None,
    noiseless_final_steps: int = 0,
) -> Float[Tensor, " batch *item"]:
    """Latents from noise by ancestral sampling.

    Args:
        model: Prediction for (noised, timesteps).
        noised: Standard normal noise, float32 or float64.
        num_steps: Calls of the model; None visits every timestep, whatever the spacing.
        noise_fn: Standard normal noise for step i; not asked in the last step, which adds none.
        callback: Called with (step index, latents) after every step.
        spacing: Which timesteps a respaced chain visits.
        steps_offset: Added to `leading` timesteps.
        thresholding: See `samplers.thresholding`; None leaves the prediction alone.
        noiseless_final_steps: Take the mean alone in this many last steps ("clean finish"): smoother, less diverse.

    Raises:
        ConfigError: steps that are not allowed.
    """
    if noiseless_final_steps < 0:
        raise ConfigError(f"noiseless_final_steps: found {noiseless_final_steps}, allowed are 0 and more")
    total = process.num_train_timesteps
    timesteps = (
        list(reversed(range(total)))
        if num_steps is None
        else sampling_timesteps(num_steps, total, spacing=spacing, steps_offset=steps_offset)
    )
    num_noisy = len(timesteps) - max(noiseless_final_steps, 1)
    for step in reverse_steps(process, timesteps, final_alpha_bar=1.0):
        clean, _ = predict(model, noised, step, process=process, thresholding=thresholding)
        levels = {"alpha_bar": step.alpha_bar, "alpha_bar_prev": step.alpha_bar_prev}
        noised = ddpm_mean(clean, noised, **levels)
        if step.index < num_noisy:
            noised = noised + ddpm_sigma(**levels) * noise_fn(step.index)
        if callback is not None:
            callback(step.index, noised)
    return noised
