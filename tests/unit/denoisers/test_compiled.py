"""Compiled blocks give the losses and all the gradients of the network as it is written, kept or computed again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdtrain.denoisers.dit import DiT
from sdtrain.denoisers.unet import UNet
from sdtrain.nn.compilation import compile_blocks
from sdtrain.records import Conditioning

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),  # torch's compiler imports it,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # and asks
]

CONTEXT = 8


def dit(**changes: Any) -> DiT:
    shape: dict[str, Any] = {"width": 16, "num_layers": 2, "num_heads": 2, "sample_size": 8, "context_dim": CONTEXT}
    return DiT(in_channels=4, out_channels=4, **(shape | changes))


def unet(**changes: Any) -> UNet:
    shape: dict[str, Any] = {"channels": [8, 16], "down_blocks": ["cross", "self"], "layers_per_block": 2}
    shape |= {"num_heads": 2, "context_dim": CONTEXT, "norm_groups": 4}
    return UNet(in_channels=4, out_channels=4, **(shape | changes))


def without_zeros(network: nn.Module) -> nn.Module:
    """A zero-initialised output would hide wrong gradients behind it."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


def step(network: nn.Module, size: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients on latents of one size."""
    generator = torch.Generator().manual_seed(size)
    latents, wanted = (torch.randn(2, 4, size, size, generator=generator) for _ in range(2))
    tokens = torch.randn(2, 3, CONTEXT, generator=generator)
    loss = (network(latents, torch.tensor([10, 700]), Conditioning(tokens=tokens)) - wanted).square().mean()
    network.zero_grad()
    loss.backward()
    gradients = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return loss.item(), gradients


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check(build: Callable[[], nn.Module], *, kinds: int, sizes: tuple[int, ...]) -> None:
    """Compile once for each kind and size, and compare with the network that is not compiled."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain: Any = without_zeros(build())
    compiled: Any = copy.deepcopy(plain)
    compile_blocks(compiled)
    for mode in ("none", "blocks", "none"):
        plain.set_gradient_checkpointing(mode)
        compiled.set_gradient_checkpointing(mode)
        for size in sizes:
            (loss, wanted), (mine, gradients) = step(plain, size), step(compiled, size)
            assert mine == pytest.approx(loss, rel=1e-5)
            norm = torch.cat([one.flatten() for one in wanted.values()]).norm()
            for name, one in wanted.items():  # that of `to_k.bias` is zero on paper and rounding in practice
                allowed = 1e-4 * one.norm() if one.norm() > 1e-6 * norm else 1e-6 * norm
                assert (gradients[name] - one).norm() < allowed, (mode, size, name)
    assert graphs() == kinds * len(sizes)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_a_dit_s_equal_blocks_are_one_graph_with_right_gradients() -> None:
    check(lambda: dit(context="adaln"), kinds=1, sizes=(4,))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_dit_that_attends_to_its_context_in_two_sizes() -> None:
    check(dit, kinds=1, sizes=(4, 8))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("time_scale_shift", ["default", "scale_shift"])
def test_a_unet_of_all_kinds_of_blocks(time_scale_shift: str) -> None:
    check(lambda: unet(time_scale_shift=time_scale_shift), kinds=10, sizes=(8,))
