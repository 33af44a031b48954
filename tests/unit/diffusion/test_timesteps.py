import pytest
import torch

from sdtrain.diffusion.timesteps import stratified, uniform_timesteps


def test_uniform_timesteps_closed_form():
    uniforms = torch.tensor([0.0, 0.00099999, 0.001, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    timesteps = uniform_timesteps(uniforms, 1000)
    assert timesteps.tolist() == [0, 0, 1, 500, 999]
    assert timesteps.dtype == torch.int64


def test_every_timestep_is_equally_likely():
    uniforms = (torch.arange(7 * 1000, dtype=torch.float64) + 0.5) / 7000
    assert uniform_timesteps(uniforms, 1000).bincount(minlength=1000).tolist() == [7] * 1000


def test_float32_draws_are_refused():
    with pytest.raises(TypeError, match=r"timesteps need float64 uniform draws, found torch\.float32"):
        uniform_timesteps(torch.rand(3), 1000)


def test_stratified_walks_through_the_bins():
    positions = torch.arange(60, 100)
    uniforms = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timesteps = uniform_timesteps(stratified(uniforms, positions, 20), 1000)
    assert (timesteps // 50).tolist() == [*range(20)] * 2
    torch.testing.assert_close(stratified(uniforms, positions, 20) * 20 - positions % 20, uniforms)


def test_the_largest_draw_of_the_last_bin_stays_inside():
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    moved = stratified(largest, torch.tensor([19]), 20)
    assert moved.item() == 1.0  # 19 + u rounds to 20
    assert uniform_timesteps(moved, 1000).item() == 999
