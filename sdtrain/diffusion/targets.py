"""The forward process at given noise levels, what a denoiser is asked for, and the way back from its answer.

Every function takes `alpha_bar` per item, so it knows no schedule. With alpha = sqrt(alpha_bar) and
sigma = sqrt(1 - alpha_bar), alpha^2 + sigma^2 = 1:

    noised       = alpha * clean + sigma * noise
    v_prediction = alpha * noise - sigma * clean
    flow         = noise - clean

Rectified flow's straight path is the same mixture on another scale: with t = sigma / (alpha + sigma),

    (1 - t) * clean + t * noise = noised / (alpha + sigma)

so a flow needs no process and no samplers of its own: the denoiser alone sees its items on that scale (`rectified`).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]

_PRECISE = (torch.float32, torch.float64)


def add_noise(
    clean: Float[Tensor, " batch *item"], noise: Float[Tensor, " batch *item"], alpha_bar: Float[Tensor, " batch"]
) -> Float[Tensor, " batch *item"]:
    """Noised items: sqrt(alpha_bar) * clean + sqrt(1 - alpha_bar) * noise.

    Args:
        clean: Scaled latents (unit variance), float32 or float64.
        alpha_bar: Cumulative signal power at each item's timestep, in [0, 1], float32 or float64.

    Raises:
        TypeError: a half-precision input; bf16 cannot resolve the low-noise end.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 4.
    """
    alpha, sigma = _alpha_sigma(alpha_bar, clean)
    return alpha * clean + sigma * noise


def target(
    prediction_type: PredictionType,
    clean: Float[Tensor, " batch *item"],
    noise: Float[Tensor, " batch *item"],
    alpha_bar: Float[Tensor, " batch"],
) -> Float[Tensor, " batch *item"]:
    """What the denoiser regresses to.

    Args:
        prediction_type: `epsilon`, the noise; `sample`, the clean item; `v_prediction`, the velocity along the circle;
            `flow`, the velocity along the straight line.
        alpha_bar: As in `add_noise`.

    Raises:
        TypeError: a half-precision input.

    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4; Liu et al. 2022, arXiv:2209.03003, equation 1, with time
    running from data to noise.
    """
    alpha, sigma = _alpha_sigma(alpha_bar, clean)
    match prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return alpha * noise - sigma * clean
        case "sample":
            return clean
        case "flow":
            return noise - clean


def to_clean_and_noise(
    prediction_type: PredictionType,
    prediction: Float[Tensor, " batch *item"],
    noised: Float[Tensor, " batch *item"],
    alpha_bar: Float[Tensor, " batch"],
) -> tuple[Float[Tensor, " batch *item"], Float[Tensor, " batch *item"]]:
    """The clean item and the noise that a prediction stands for; they mix back to `noised` exactly.

    Args:
        prediction: The denoiser's output for `noised`.
        alpha_bar: As in `add_noise`; above 0 for `epsilon`, below 1 for `sample`.

    Raises:
        TypeError: a half-precision `noised` or `alpha_bar`.
    """
    alpha, sigma = _alpha_sigma(alpha_bar, noised)
    prediction = prediction.to(noised.dtype)
    match prediction_type:
        case "epsilon":
            return (noised - sigma * prediction) / alpha, prediction
        case "v_prediction":
            return alpha * noised - sigma * prediction, sigma * noised + alpha * prediction
        case "sample":
            return prediction, (noised - alpha * prediction) / sigma
        case "flow":
            return (noised - sigma * prediction) / (alpha + sigma), (noised + alpha * prediction) / (alpha + sigma)


def noise_from_clean(
    clean: Float[Tensor, " batch *item"], noised: Float[Tensor, " batch *item"], alpha_bar: Float[Tensor, " batch"]
) -> Float[Tensor, " batch *item"]:
    """The noise that together with `clean` makes `noised`; used after `clean` was changed."""
    return to_clean_and_noise("sample", clean, noised, alpha_bar)[1]


def rectified(
    noised: Float[Tensor, " batch *item"], alpha_bar: Float[Tensor, " batch"]
) -> Float[Tensor, " batch *item"]:
    """Items on the scale of rectified flow: (1 - t) * clean + t * noise with t = sigma / (alpha + sigma)."""
    alpha, sigma = _alpha_sigma(alpha_bar, noised)
    return noised / (alpha + sigma)


def _alpha_sigma(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) in the dtype of `like`, shaped to broadcast over its items."""
    if alpha_bar.dtype not in _PRECISE or like.dtype not in _PRECISE:
        raise TypeError(
            f"diffusion maths needs float32 or float64: found alpha_bar {alpha_bar.dtype} and items {like.dtype}; "
            "cast after the noise is added, not before"
        )
    shape = (-1, *([1] * (like.dim() - 1)))
    return alpha_bar.sqrt().to(like.dtype).view(shape), (1 - alpha_bar).sqrt().to(like.dtype).view(shape)
