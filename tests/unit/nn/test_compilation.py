"""Blocks are compiled in place: each kind in each shape once, all of them, under unchanged names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError
from sdtrain.nn.compilation import compile_blocks, eagerly


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        return values + self.layer(values).tanh()


class Network(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for width in widths)

    def repeated_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, batch: int) -> Tensor:
        return torch.stack([block(torch.ones(batch, block.layer.in_features)).sum() for block in self.blocks]).sum()


@pytest.fixture(autouse=True)
def _quick_compiler() -> Iterator[None]:
    """Everything but the generation of code, which takes seconds."""
    before = torch.compiler.get_default_backend()
    torch.compiler.reset()
    torch.compiler.set_default_backend("eager")
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.set_default_backend(before)
    torch.compiler.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_equal_blocks_share_what_is_compiled() -> None:
    network = Network(3, 3, 5, 3, 5, 3, 3, 3)
    assert compile_blocks(network) == 8
    assert graphs() == 0
    network(2).backward()
    assert graphs() == 2
    network(2).backward()
    assert graphs() == 2


def test_more_variants_than_torch_s_own_limits_are_all_compiled_and_only_once() -> None:
    """At its default of 8, torch would run the others eagerly and say so in a log that nobody reads."""
    network = Network(*range(2, 8))
    compile_blocks(network)
    for _ in range(2):
        for batch in (2, 3, 5):
            network(batch).backward()
        assert graphs() == 6 * 3


def test_names_and_gradients_are_those_of_the_network_itself() -> None:
    plain, network = Network(3, 3, 5), Network(3, 3, 5)
    compile_blocks(network)
    for each in (plain, network):
        each(2).backward()
    assert graphs() == 2
    assert list(network.state_dict()) == list(plain.state_dict())
    for (name, mine), wanted in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad, wanted.grad)
    plain.load_state_dict(network.state_dict())
    network.load_state_dict(plain.state_dict())


def test_networks_within_networks_are_found_and_no_block_is_compiled_twice() -> None:
    inner = Network(3, 5)
    assert compile_blocks(nn.ModuleDict({"denoiser": inner, "again": inner, "conditioner": nn.Linear(2, 2)})) == 2
    assert compile_blocks(nn.Linear(2, 2)) == 0


def test_the_eager_stance_leaves_compiled_blocks_as_they_were_written() -> None:
    network = Network(3)
    compile_blocks(network)
    with torch.no_grad(), eagerly():
        expected = network(7)
    assert graphs() == 0
    torch.testing.assert_close(network(7), expected)
    assert graphs() == 1


def test_the_fusion_that_loses_gradients_of_adaptive_norms_is_off() -> None:
    compile_blocks(Network(3))
    assert torch._inductor.config.triton.mix_order_reduction is False


@pytest.mark.parametrize(
    ("device", "variables", "wanted"),
    [
        ("cpu", {}, "needs g++ to compile what torch writes for cpu"),
        ("cpu", {"CXX": "icpx"}, "needs icpx to compile what torch writes for cpu"),
        ("cuda", {"CXX": "g++"}, "needs gcc or clang to compile what torch writes for cuda"),
    ],
)
def test_a_machine_without_a_compiler_is_told_so_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, variables: dict[str, str], wanted: str
) -> None:
    network = Network(3)
    monkeypatch.setattr(nn.Module, "parameters", lambda self: iter([SimpleNamespace(device=torch.device(device))]))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        compile_blocks(network)
    variable = "CC" if device == "cuda" else "CXX"
    assert str(caught.value) == (
        f"trainer.compile {wanted}, and this machine has none on its PATH; install one, name another by the variable "
        f"{variable}, or set trainer.compile: false"
    )
    assert compile_blocks(nn.Linear(2, 2)) == 0, "nothing to compile"
