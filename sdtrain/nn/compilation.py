"""Compilation of a network's repeated blocks, each in place: parameter names stay as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn

from sdtrain.errors import ConfigError

CompileMode = Literal["default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"]
"""torch's modes; the last two record CUDA graphs, which a training page is refused."""

MAX_VARIANTS = 1024
"""Blocks of one kind, in one shape, are one variant. A full-size UNet has some 15 kinds, times the buckets of its data.
"""


@runtime_checkable
class RepeatedBlocks(Protocol):
    """A network that names its repeated blocks; none of them lies within another."""

    def repeated_blocks(self) -> list[nn.Module]:
        """The blocks that cover nearly all of the work."""
        ...


def compile_blocks(network: nn.Module, *, mode: CompileMode = "default") -> int:
    """Let the repeated blocks of a network, and of all networks within it, be compiled when they first run.

    Equal blocks share what is compiled, so a network of many costs little more than one of each kind. Shapes are
    compiled as they are: each new shape is a variant of its own. One graph for all shapes, to which torch changes of
    itself at the second, would be slower, and inductor (torch 2.13) cannot even compile a UNet's transformers so.

    torch stops compiling a piece of code after `recompile_limit` variants (by default 8), and runs all others eagerly
    with no more than a line in its log; the limits are raised beyond what networks and buckets need. One of inductor's
    fusions for GPUs is switched off: from torch 2.10 to 2.13 at least, it leaves gradients of norms that are scaled and
    shifted per sample (adaLN) unwritten in micro-batches of one large sample (pytorch issue 193061).

    Args:
        network: Trained or not; after DeepSpeed took it over and its weights are loaded.
        mode: Of `torch.compile`.

    Returns:
        The number of compiled blocks.

    Raises:
        ConfigError: This machine has no compiler for the code that torch writes.
    """
    blocks = {id(block): block for part in network.modules() for block in _blocks_of(part)}
    if not blocks:
        return 0
    _refuse_without_compiler(next(network.parameters()).device.type)
    from torch._inductor import config as inductor  # both bring all of the compiler along
    from torch.compiler import config as limits

    limits.recompile_limit = limits.accumulated_recompile_limit = MAX_VARIANTS
    inductor.triton.mix_order_reduction = False
    for block in blocks.values():
        block.compile(mode=mode, dynamic=False)
    return len(blocks)


def _blocks_of(part: nn.Module) -> list[nn.Module]:
    return part.repeated_blocks() if isinstance(part, RepeatedBlocks) else []


def _refuse_without_compiler(device: str) -> None:
    """torch writes C++ for a CPU, and Triton, whose launchers are C, for a GPU."""
    variable, names = ("CC", ("gcc", "clang")) if device == "cuda" else ("CXX", ("g++",))
    wanted = (os.environ[variable],) if variable in os.environ else names
    if not any(map(shutil.which, wanted)):
        raise ConfigError(
            f"trainer.compile needs {' or '.join(wanted)} to compile what torch writes for {device}, and this machine "
            f"has none on its PATH; install one, name another by the variable {variable}, or set trainer.compile: false"
        )


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled blocks as they were written: for shapes and modes that are not worth a compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield
