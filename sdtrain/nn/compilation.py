"""Compilation of a network's repeated blocks, each in place: parameter names stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn

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
    compiled as they are: each new shape is a variant of its own, and none is replaced by a slower one for all shapes.

    torch stops compiling a piece of code after `recompile_limit` variants (by default 8), and runs all others eagerly
    with no more than a line in its log; the limits are raised beyond what networks and buckets need. One of inductor's
    fusions for GPUs is switched off: from torch 2.10 to 2.13 at least, it leaves gradients of norms that are scaled and
    shifted per sample (adaLN) unwritten in micro-batches of one large sample (pytorch issue 193061).

    Args:
        network: Trained or not; after DeepSpeed took it over and its weights are loaded.
        mode: Of `torch.compile`.

    Returns:
        The number of compiled blocks.
    """
    from torch._inductor import config as inductor  # both bring all of the compiler along
    from torch.compiler import config as limits

    limits.recompile_limit = limits.accumulated_recompile_limit = MAX_VARIANTS
    inductor.triton.mix_order_reduction = False
    blocks = {id(block): block for part in network.modules() for block in _blocks_of(part)}
    for block in blocks.values():
        block.compile(mode=mode, dynamic=False)
    return len(blocks)


def _blocks_of(part: nn.Module) -> list[nn.Module]:
    return part.repeated_blocks() if isinstance(part, RepeatedBlocks) else []


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled blocks as they were written: for shapes and modes that are not worth a compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield
