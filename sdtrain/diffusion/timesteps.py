"""From uniform draws to timesteps."""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


def uniform_timesteps(uniforms: Float64[Tensor, " batch"], num_train_timesteps: int) -> Int64[Tensor, " batch"]:
    """Timesteps floor(u * T), each of the T equally likely.

    Args:
        uniforms: Draws in [0, 1), float64.

    Raises:
        TypeError: draws that are not float64; float32 cannot hold the same draw on every device.
    """
    if uniforms.dtype != torch.float64:
        raise TypeError(f"timesteps need float64 uniform draws, found {uniforms.dtype}")
    return (uniforms * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def stratified(
    uniforms: Float64[Tensor, " batch"], positions: Int64[Tensor, " batch"], num_bins: int
) -> Float64[Tensor, " batch"]:
    """Uniform draws moved into bin `position mod num_bins` of [0, 1]: any run of positions covers all bins evenly.

    Feed the result to `uniform_timesteps`. Validation losses then hold every noise level in equal parts, at every
    checkpoint.

    Args:
        uniforms: Draws in [0, 1).
        positions: Positions in the validation order.
        num_bins: Number of equal bins.
    """
    return (positions % num_bins + uniforms) / num_bins
