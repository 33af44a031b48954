from __future__ import annotations

import math

import torch

from sdtrain.nn.embeddings import TimestepEmbedding, grid_embedding, sinusoidal_embedding


def test_sinusoids_are_those_of_the_formula_cosines_first() -> None:
    embedding = sinusoidal_embedding(torch.tensor([0, 7]), 8)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    angles = [7 * 10000 ** (-k / 4) for k in range(4)]
    expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    torch.testing.assert_close(embedding[1], expected)


def test_every_timestep_has_its_own_embedding() -> None:
    """In bf16 arithmetic, neighbours above 256 would collapse."""
    timesteps = torch.arange(0, 1000, dtype=torch.float32)
    embedding = sinusoidal_embedding(timesteps, 320)
    assert float((embedding[1:] - embedding[:-1]).norm(dim=1).min()) > 0.1


def test_fractional_timesteps_lie_between_their_neighbours() -> None:
    low, middle, high = sinusoidal_embedding(torch.tensor([500.0, 500.5, 501.0]), 64)
    assert float((middle - low).norm()) < float((high - low).norm())


def test_perceptron_runs_in_the_precision_of_its_weights() -> None:
    module = TimestepEmbedding(sinusoid_width=8, hidden_width=32, out_width=12).to(torch.bfloat16)
    embedded = module(torch.tensor([3, 999]))
    assert embedded.shape == (2, 12)
    assert embedded.dtype == torch.bfloat16


def test_the_slowest_frequency_is_reached_where_it_is_included() -> None:
    embedding = sinusoidal_embedding(torch.tensor([5000]), 8, includes_slowest=True)
    torch.testing.assert_close(embedding[0, 3], torch.tensor(math.cos(0.5)))
    assert sinusoidal_embedding(torch.tensor([5000]), 8)[0, 3] < 0.3, "of 1/1000"


def test_cells_of_a_grid_are_sines_and_cosines_of_column_and_row() -> None:
    embedding = grid_embedding(2, 3, channels=8, base=2).unflatten(0, (2, 3))
    assert embedding.dtype == torch.float32
    row, column = 1, 2 * 2 / 3  # three columns are stretched over the extent of two
    angles = [place * frequency for place in (column, row) for frequency in (1.0, 0.01)]
    expected = [f(angle) for pair in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for angle in pair]
    torch.testing.assert_close(embedding[1, 2], torch.tensor(expected))
