from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch.nn import functional as F

from sdtrain.nn.resnet import Downsample2d, ResnetBlock2d, Upsample2d


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(*, in_channels: int = 8, mode: Literal["default", "scale_shift"] = "default") -> ResnetBlock2d:
    return ResnetBlock2d(
        in_channels=in_channels, out_channels=16, time_width=6, time_scale_shift=mode, norm_groups=4, norm_eps=1e-5
    )


@pytest.mark.parametrize("mode", ["default", "scale_shift"])
def test_time_enters_as_the_formula_says(mode: Literal["default", "scale_shift"]) -> None:
    module, features, time = block(mode=mode), rand(2, 8, 4, 4), rand(2, 6)
    hidden = module.conv1(F.silu(module.norm1(features)))
    projected = module.time_emb_proj(F.silu(time))[:, :, None, None]
    if mode == "default":
        hidden = module.norm2(hidden + projected)
    else:
        hidden = module.norm2(hidden) * (1 + projected[:, :16]) + projected[:, 16:]
    expected = module.conv_shortcut(features) + module.conv2(F.silu(hidden))
    torch.testing.assert_close(module(features, time), expected)
    assert not torch.allclose(module(features, time), module(features, -time), atol=1e-3)


def test_zero_last_convolution_leaves_the_shortcut() -> None:
    module, features = block(in_channels=16), rand(2, 16, 4, 4)
    assert module.conv_shortcut is None
    torch.nn.init.zeros_(module.conv2.weight)
    torch.nn.init.zeros_(module.conv2.bias)
    assert torch.equal(module(features, rand(2, 6)), features)


def test_downsampling_sides() -> None:
    """The symmetric kernel starts one pixel outside at the left, the asymmetric one at the first pixel."""
    features = torch.zeros(1, 1, 4, 4)
    features[0, 0, 0, 0] = 1.0
    for asymmetric, weight_seen in ((False, (1, 1)), (True, (0, 0))):
        module = Downsample2d(channels=1, asymmetric=asymmetric)
        with torch.no_grad():
            out = module(features) - module.conv.bias.view(1, 1, 1, 1)
        assert out.shape == (1, 1, 2, 2)
        torch.testing.assert_close(out[0, 0, 0, 0], module.conv.weight[0, 0, *weight_seen].detach())


@pytest.mark.parametrize("mode", ["nearest_conv", "conv_transpose"])
def test_upsampling_doubles(mode: Literal["nearest_conv", "conv_transpose"]) -> None:
    module = Upsample2d(channels=4, mode=mode)
    assert module(rand(1, 4, 3, 5)).shape == (1, 4, 6, 10)
    kernel = 3 if mode == "nearest_conv" else 4
    assert sum(p.numel() for p in module.parameters()) == 4 * 4 * kernel**2 + 4
