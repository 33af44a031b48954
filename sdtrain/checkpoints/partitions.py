"""The one door to DeepSpeed's internals: this rank's fp32 master partition, its Adam moments and its gradients.

Checkpoint and EMA work on what `MasterPartitions` shows, so a DeepSpeed release that moves its attributes breaks this
file and its tests, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdtrain import distributed
from sdtrain.checkpoints.recut import Group, Layout, Slot, span
from sdtrain.errors import CheckpointError, PreflightError

MOMENTS = ("exp_avg", "exp_avg_sq")
FLAT_GRADIENTS = "_get_preflattened_grad_partition"
"""Where DeepSpeed looks for the `flat_partition` of a group's gradients; made for what its compiler passes lay flat."""
ROW = 2**14
"""Squares that are added up in fp32; on a CPU, over 4e7 of them in one go, the norm came out 0.3 % too small."""


def norm_of(flat: Float[Tensor, " numel"]) -> Float[Tensor, ""]:
    """Euclidean norm of a long fp32 vector, good to 1e-6, in two passes of one call each and without a copy."""
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1)
    return torch.linalg.vector_norm(torch.cat([rows, torch.linalg.vector_norm(flat[whole:]).view(1)]))


class FlatGradients(list[Tensor]):
    """This rank's gradients of one group, in the form that DeepSpeed takes over as it is.

    DeepSpeed steps on `flat_partition` and goes through the list only for the norm of its elements and for what is not
    finite among them. One element with the norm of all stands in for them there.

    Attributes:
        flat_partition: (partition size,) gradients in the order of the master.
    """

    def __init__(self, flat: Float[Tensor, " numel"]) -> None:
        super().__init__([norm_of(flat)])
        self.flat_partition = flat


@dataclass(frozen=True)
class MasterPartitions:
    """This rank's slice of every parameter group's flat fp32 vector.

    ZeRO-2 lays the parameters of a group end to end, pads the vector to a multiple of the ranks and gives each rank
    one slice. The layout does not depend on the number of ranks; the spans do.

    Attributes:
        layout: Name, shape and offset of every parameter, group by group; the same on all ranks.
        spans: (start, stop) of this rank's slice of every group's vector, padding excluded.
    """

    _optimizer: Any
    layout: Layout
    spans: tuple[tuple[int, int], ...]
    _buffers: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, optimizer: Any, module: nn.Module) -> MasterPartitions:
        """Read the layout from a DeepSpeed ZeRO-1/2 optimiser that steps the parameters of `module`.

        Raises:
            CheckpointError: The optimiser does not hold flat fp32 partitions (ZeRO stage 0 or another optimiser).
            PreflightError: It cannot be given flat gradients (another release of DeepSpeed).
        """
        if not hasattr(optimizer, "single_partition_of_fp32_groups"):
            raise CheckpointError(
                f"{type(optimizer).__name__} holds no flat fp32 partitions: checkpoints and EMA need "
                "trainer.zero_stage 2"
            )
        if not hasattr(optimizer, FLAT_GRADIENTS):  # it would step on what stands in for the gradients
            raise PreflightError(
                f"deepspeed {version('deepspeed')} takes no gradients that are one vector already: its ZeRO optimiser "
                f"has no {FLAT_GRADIENTS}. Install the release that requirements.lock names."
            )
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = tuple(
            Group(
                tuple(
                    Slot(names[id(parameter)], tuple(parameter.shape), offset)
                    for parameter, offset in zip(parameters, offsets, strict=True)
                )
            )
            for parameters, offsets in zip(
                optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
            )
        )
        rank = distributed.ranks().rank
        spans = tuple(
            span(group.numel, size, rank) for group, size in zip(groups, optimizer.partition_size, strict=True)
        )
        return cls(optimizer, Layout(groups), spans)

    def masters(self) -> list[Tensor]:
        """The fp32 master slice of every group, padding excluded; views, so writing changes the master."""
        return [
            partition.data[: stop - start]
            for partition, (start, stop) in zip(
                self._optimizer.single_partition_of_fp32_groups, self.spans, strict=True
            )
        ]

    def load(self, parameters: Mapping[str, Tensor]) -> None:
        """Make whole parameters the master, each rank its own span of them; the working weights follow. Collective.

        Args:
            parameters: Every parameter of the layout by name, float32, the same on all ranks.
        """
        for master, group, (start, stop) in zip(self.masters(), self.layout.groups, self.spans, strict=True):
            for slot in group.slots:
                low, high = max(start, slot.offset), min(stop, slot.offset + slot.numel)
                if low < high:
                    whole = parameters[slot.name].flatten()
                    master[low - start : high - start].copy_(whole[low - slot.offset : high - slot.offset])
        self._optimizer.update_lp_params()

    # Gradients ----------------------------------------------------------------------------------------------------

    def lend_memory(self) -> None:
        """Before a step's first backward: let DeepSpeed gather this rank's gradients where the last step's were.

        Only where it gathers them at all (in half precision they add up in one vector) and memory is the host's.
        """
        optimizer = self._optimizer
        if self._keeps_memory and optimizer.dtype == torch.float32:
            numel = sum(parameter.numel() for group in optimizer.params_in_partition for parameter in group)
            optimizer.grads_in_partition, optimizer.grads_in_partition_offset = self._kept("gathered", numel), 0

    @torch.no_grad()
    def flatten_gradients(self) -> None:
        """Before a step: lay this rank's reduced gradients end to end, and tell DeepSpeed their norm.

        By itself DeepSpeed copies every parameter's gradient to float64 for its norm: with some hundreds of parameters
        that is a third of what its step costs.
        """
        gradients = self._optimizer.averaged_gradients
        for index, pieces in gradients.items():
            flat = getattr(pieces, "flat_partition", None)  # in half precision
            gradients[index] = FlatGradients(self._laid_flat(index, pieces) if flat is None else flat)

    def _laid_flat(self, index: int, pieces: Sequence[Tensor]) -> Float[Tensor, " numel"]:
        """The gradients of a group as one vector."""
        flat = [piece.flatten() for piece in pieces]
        return torch.cat(flat, out=self._kept(f"flat{index}", sum(map(len, flat))) if self._keeps_memory else None)

    @property
    def _keeps_memory(self) -> bool:
        """Whether to hold on to large buffers between steps.

        The C library gives a block of more than 32 MiB back to the kernel when it is freed, and getting it anew costs
        several times what writing to it does. Memory of an accelerator is cached by torch.
        """
        return self._optimizer.single_partition_of_fp32_groups[0].device.type == "cpu"

    def _kept(self, use: str, numel: int) -> Float[Tensor, " numel"]:
        if use not in self._buffers:
            self._buffers[use] = torch.empty(numel)
        return self._buffers[use]

    # State --------------------------------------------------------------------------------------------------------

    def tensors(self, ema: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Everything of this rank that a checkpoint holds, by the names of the checkpoint format."""
        named: dict[str, Tensor] = {}
        for index, master in enumerate(self.masters()):
            state = self._optimizer.optimizer.state.get(self._optimizer.single_partition_of_fp32_groups[index], {})
            named[f"group{index}/master"] = master
            for moment in MOMENTS:
                held = state.get(moment)
                named[f"group{index}/{moment}"] = torch.zeros_like(master) if held is None else held[: len(master)]
            if ema is not None:
                named[f"group{index}/ema"] = ema[index]
        return named

    def restore(self, read: Mapping[str, Tensor], *, applied_steps: int) -> None:
        """Write master and moments back, set Adam's step count, and refresh the working weights on all ranks.

        Args:
            read: `group{g}/{kind}` -> this rank's span, 1-D float32.
            applied_steps: Optimiser updates that were really applied; Adam's bias correction counts them. Before the
                first one there are no moments, whatever this optimiser has gathered since.
        """
        for index, master in enumerate(self.masters()):
            master.copy_(read[f"group{index}/master"])
            if applied_steps > 0:
                self._restore_moments(index, read, applied_steps)
            else:  # the optimiser makes them at its first step, as it does in a fresh run
                self._optimizer.optimizer.state.pop(self._optimizer.single_partition_of_fp32_groups[index], None)
        self._optimizer.update_lp_params()

    def _restore_moments(self, index: int, read: Mapping[str, Tensor], applied_steps: int) -> None:
        partition = self._optimizer.single_partition_of_fp32_groups[index]
        state = self._optimizer.optimizer.state[partition]
        fused = self._optimizer.optimizer.param_groups[index].get("fused")
        state["step"] = torch.tensor(float(applied_steps), device=partition.device if fused else "cpu")
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(partition, requires_grad=False)
            source = read[f"group{index}/{moment}"]
            state[moment][: len(source)].copy_(source)

    @contextmanager
    def working_weights_from(self, replacement: Sequence[Tensor]) -> Iterator[None]:
        """Let the network run on other weights (the EMA) for a while; collective, the master is untouched after.

        Not after an error, with which a rank leaves: putting the weights back is collective, and a rank that waited for
        the others there would keep its error to itself.
        """
        saved = [master.clone() for master in self.masters()]
        self._write(replacement)
        yield
        self._write(saved)

    def _write(self, values: Sequence[Tensor]) -> None:
        for master, value in zip(self.masters(), values, strict=True):
            master.copy_(value)
        self._optimizer.update_lp_params()
