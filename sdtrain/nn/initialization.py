"""Initial values that matter: what starts at zero."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sdtrain.nn.attention import SelfAttention2d, Transformer2d
from sdtrain.nn.resnet import ResnetBlock2d


def output_projections(network: nn.Module) -> Iterator[nn.Module]:
    """The last layer of every residual branch on feature maps: what each block adds to its input."""
    for module in network.modules():
        match module:
            case ResnetBlock2d():
                yield module.conv2
            case Transformer2d():
                yield module.proj_out
            case SelfAttention2d():
                yield module.to_out[0]


def zero_(*layers: nn.Module) -> None:
    """Set all parameters of the layers to zero, in place."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
