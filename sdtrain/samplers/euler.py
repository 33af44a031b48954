"""Euler: the probability flow in straight steps between noise and clean item, the sampler of rectified flows.

Source: Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.samplers.steps import Callback, Model, Spacing, predict, reverse_steps, sampling_timesteps
from sdtrain.samplers.thresholding import Thresholding


def flow_time(alpha_bar: float) -> float:
    """Time t of the path (1 - t) * clean + t * noise that has this signal power; 0 is clean, 1 is noise."""
    alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    return sigma / (alpha + sigma)


def euler_step(
    latents: Float[Tensor, " batch *item"], velocity: Float[Tensor, " batch *item"], *, time: float, next_time: float
) -> Float[Tensor, " batch *item"]:
    """Along the straight line from `time` to `next_time`.

    Args:
        latents: (1 - time) * clean + time * noise.
        velocity: noise - clean.
    """
    return latents + (next_time - time) * velocity


def sample_euler(
    model: Model,
    noised: Float[Tensor, " batch *item"],
    *,
    process: DiffusionProcess,
    num_steps: int,
    callback: Callback | None = None,
    spacing: Spacing = "trailing",
    steps_offset: int = 0,
    thresholding: Thresholding | None = None,
) -> Float[Tensor, " batch *item"]:
    """Latents from noise in `num_steps` calls of the model, always ending without noise.

    On another scale this is DDIM at eta 0, step by step, so it runs on every process.

    Args:
        model: Prediction for (noised, timesteps).
        noised: Standard normal noise, float32 or float64.
        num_steps: Calls of the model.
        callback: Called with (step index, latents on the straight path) after every step.
        spacing: Which timesteps are visited.
        steps_offset: Added to `leading` timesteps.
        thresholding: See `samplers.thresholding`; None leaves the prediction alone.

    Raises:
        ConfigError: steps that are not allowed.
    """
    timesteps = sampling_timesteps(num_steps, process.num_train_timesteps, spacing=spacing, steps_offset=steps_offset)
    steps = reverse_steps(process, timesteps, final_alpha_bar=1.0)
    latents = noised / _scale(steps[0].alpha_bar)
    for step in steps:
        clean, noise = predict(
            model, latents * _scale(step.alpha_bar), step, process=process, thresholding=thresholding
        )
        times = {"time": flow_time(step.alpha_bar), "next_time": flow_time(step.alpha_bar_prev)}
        latents = euler_step(latents, noise - clean, **times)
        if callback is not None:
            callback(step.index, latents)
    return latents


def _scale(alpha_bar: float) -> float:
    """alpha + sigma: noised items of the process per items on the straight path."""
    return alpha_bar**0.5 + (1 - alpha_bar) ** 0.5
