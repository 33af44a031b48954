"""Embeddings of the timestep and of places in a grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn


def sinusoidal_embedding(
    timesteps: Num[Tensor, " batch"], width: int, *, includes_slowest: bool = False
) -> Float[Tensor, "batch width"]:
    """Cosines, then sines of the timestep at geometric frequencies from 1 down to, excluding, 1/10000.

    Args:
        timesteps: Integers, or fractions for continuous time.
        width: Width of the embedding; even.
        includes_slowest: The last frequency is 1/10000 itself (diffusers' `downscale_freq_shift=1`).

    Returns:
        float32, whatever precision the network runs in: bf16 cannot tell timestep 999 from 1000.

    Source: Ho et al. 2020, arXiv:2006.11239, appendix B; Stable Diffusion puts the cosines first.
    """
    half = width // 2
    steps = half - 1 if includes_slowest else half
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=timesteps.device) * -math.log(10000) / steps)
    angles = timesteps.float()[:, None] * frequencies  # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, width)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep through a two-layer perceptron.

    Args:
        sinusoid_width: Width of the sinusoidal embedding; even.
        hidden_width: Width between the two layers.
        out_width: Width of the result.
        includes_slowest: See `sinusoidal_embedding`.
    """

    def __init__(
        self, *, sinusoid_width: int, hidden_width: int, out_width: int, includes_slowest: bool = False
    ) -> None:
        super().__init__()
        self.sinusoid_width = sinusoid_width
        self.includes_slowest = includes_slowest
        self.linear_1 = nn.Linear(sinusoid_width, hidden_width)
        self.linear_2 = nn.Linear(hidden_width, out_width)

    def forward(self, timesteps: Num[Tensor, " batch"]) -> Float[Tensor, "batch out_width"]:
        """Embed each item's timestep, in the precision of the weights."""
        sinusoids = sinusoidal_embedding(timesteps, self.sinusoid_width, includes_slowest=self.includes_slowest)
        return self.linear_2(F.silu(self.linear_1(sinusoids.to(self.linear_1.weight.dtype))))


def grid_embedding(
    height: int, width: int, *, channels: int, base: int, device: torch.device | None = None
) -> Float[Tensor, "cells channels"]:
    """Sines and cosines of every cell's column, then of its row, in float32, row by row.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        channels: Width of the embedding; a multiple of 4.
        base: Cells along either side of the grid whose cells are 1 apart; other grids are stretched over its extent.
        device: Where it is computed.

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929, appendix D.4, in the fixed 2-D form of He et al. 2022,
        arXiv:2111.06377; the stretching is diffusers'.
    """
    quarter = channels // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=device) / quarter)

    def along(length: int) -> Tensor:
        places = torch.arange(length, dtype=torch.float32, device=device) / (length / base)
        angles = places.double()[:, None] * frequencies  # (length, channels / 4)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (length, channels / 2)

    columns = along(width)[None].expand(height, -1, -1)  # (height, width, channels / 2)
    rows = along(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()  # (height * width, channels)
