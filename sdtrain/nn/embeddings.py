"""The embedding of the timestep."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn


def sinusoidal_embedding(timesteps: Num[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """Cosines, then sines of the timestep at geometric frequencies from 1 down to, excluding, 1/10000.

    Args:
        timesteps: Integers, or fractions for continuous time.
        width: Width of the embedding; even.

    Returns:
        float32, whatever precision the network runs in: bf16 cannot tell timestep 999 from 1000.

    Source: Ho et al. 2020, arXiv:2006.11239, appendix B; Stable Diffusion puts the cosines first.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=timesteps.device) * -math.log(10000) / half)
    angles = timesteps.float()[:, None] * frequencies  # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, width)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep through a two-layer perceptron.

    Args:
        sinusoid_width: Width of the sinusoidal embedding; even.
        hidden_width: Width between the two layers.
        out_width: Width of the result.
    """

    def __init__(self, *, sinusoid_width: int, hidden_width: int, out_width: int) -> None:
        super().__init__()
        self.sinusoid_width = sinusoid_width
        self.linear_1 = nn.Linear(sinusoid_width, hidden_width)
        self.linear_2 = nn.Linear(hidden_width, out_width)

    def forward(self, timesteps: Num[Tensor, " batch"]) -> Float[Tensor, "batch out_width"]:
        """Embed each item's timestep, in the precision of the weights."""
        sinusoids = sinusoidal_embedding(timesteps, self.sinusoid_width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))
