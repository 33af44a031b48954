"""Reads ZeRO-2 partitions back at any world size: flat vectors, the spans that ranks wrote, parameters by name.

An optimiser group is one flat float32 vector, the group's parameters one behind the other. ZeRO-2 pads it and gives
every rank an equal piece. Checkpoints hold the pieces without padding, so that the flat vector is the same at every
world size and any span of it can be read from whatever files overlap it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdtrain.checkpoints.manifest import Checkpoint, rank_file
from sdtrain.errors import CheckpointError

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter lies in its group's flat vector.

    Attributes:
        name: Parameter name inside the trainable's module.
        shape: Shape of the parameter.
        offset: First element in the flat vector.
    """

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Group:
    """One optimiser group: its parameters in the order of the flat vector."""

    slots: tuple[Slot, ...]

    @property
    def numel(self) -> int:
        """Length of the flat vector, padding excluded."""
        return max((slot.offset + slot.numel for slot in self.slots), default=0)


@dataclass(frozen=True, slots=True)
class Layout:
    """All groups of one trainable; the same at every world size."""

    groups: tuple[Group, ...]

    def to_json(self) -> list[list[list[Any]]]:
        """Groups of `[name, shape, offset]`, for `MANIFEST.json`."""
        return [[[slot.name, list(slot.shape), slot.offset] for slot in group.slots] for group in self.groups]

    @classmethod
    def from_json(cls, groups: Sequence[Sequence[Sequence[Any]]]) -> Layout:
        """The inverse of `to_json`."""
        return cls(
            tuple(Group(tuple(Slot(name, tuple(shape), offset) for name, shape, offset in group)) for group in groups)
        )

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Sequence[int]]]) -> Layout:
        """Lay out groups of `name -> shape`, in order, without gaps."""
        laid: list[Group] = []
        for group in groups:
            slots: list[Slot] = []
            offset = 0
            for name, shape in group.items():
                slots.append(Slot(name, tuple(shape), offset))
                offset += slots[-1].numel
            laid.append(Group(tuple(slots)))
        return cls(tuple(laid))


def span(numel: int, partition_size: int, rank: int) -> tuple[int, int]:
    """The part `[start, stop)` of a flat vector that `rank` owns; empty where only padding is left.

    Args:
        numel: Elements of the flat vector, padding excluded.
        partition_size: Elements per rank, padding included; the same on every rank.
        rank: The owner.
    """
    return min(rank * partition_size, numel), min((rank + 1) * partition_size, numel)


def spans(layout: Layout, partition_sizes: Sequence[int], world_size: int) -> list[list[list[int]]]:
    """Every rank's span of every group, `[rank][group] = [start, stop]`, for `MANIFEST.json`."""
    pairs = list(zip(layout.groups, partition_sizes, strict=True))
    return [[list(span(group.numel, size, rank)) for group, size in pairs] for rank in range(world_size)]


def tensor_name(group: int, kind: str) -> str:
    """Name of a span inside a rank's file."""
    return f"group{group}/{kind}"


def layout_of(checkpoint: Checkpoint, trainable: str) -> Layout:
    """The layout that a checkpoint was written with.

    Raises:
        CheckpointError: It holds no such trainable.
    """
    layouts = checkpoint.manifest.get("layouts", {})
    if trainable not in layouts:
        raise CheckpointError(
            f"{checkpoint.path}: holds no trainable {trainable!r}; it holds {', '.join(layouts) or 'none'}"
        )
    return Layout.from_json(layouts[trainable])


def kinds_of(checkpoint: Checkpoint, trainable: str) -> tuple[str, ...]:
    """Which of `KINDS` a checkpoint holds for a trainable: `ema` is absent in runs without EMA."""
    layout_of(checkpoint, trainable)
    with _open(checkpoint.path / rank_file(trainable, 0)) as file:
        names = set(file.keys())
    return tuple(kind for kind in KINDS if tensor_name(0, kind) in names)


def read_span(
    checkpoint: Checkpoint, trainable: str, group: int, kind: str, start: int, stop: int
) -> Float[Tensor, " length"]:
    """Elements `[start, stop)` of a group's flat vector, read from whatever rank files overlap; nothing else is read.

    Args:
        checkpoint: Verified by `protocol.find` or `protocol.verify`.
        trainable: Its name, such as `denoiser`.
        group: Index of the optimiser group.
        kind: One of `KINDS`.
        start: First element.
        stop: One past the last element; at most the group's length.

    Returns:
        float32 on the CPU, (stop - start,).

    Raises:
        CheckpointError: The ranks' spans leave a gap, or a file does not hold what the manifest says.
    """
    result = torch.empty(stop - start, dtype=torch.float32)
    written = checkpoint.manifest.get("spans", {}).get(trainable, [])
    filled = start
    for rank, (first, last) in enumerate(tuple(groups[group]) for groups in written):
        low, high = max(start, first), min(stop, last)
        if low < high and low == filled:
            path = checkpoint.path / rank_file(trainable, rank)
            _read_into(result[low - start : high - start], path, tensor_name(group, kind), (first, last), low)
            filled = high
    if filled != stop:
        raise CheckpointError(
            f"{checkpoint.path}: {trainable}, group {group}, {kind}: elements {filled} to {stop} are in no rank's file"
        )
    return result


def _read_into(result: Tensor, path: Path, name: str, written: tuple[int, int], low: int) -> None:
    """Fill `result` from element `low` on, out of a file's tensor that covers `written` of the flat vector."""
    first, last = written
    with _open(path) as file:
        held = sorted(file.keys())
        if name not in held:
            raise CheckpointError(f"{path}: holds no tensor {name!r}; it holds {', '.join(held)}")
        part = file.get_slice(name)
        if part.get_shape() != [last - first] or part.get_dtype() != "F32":
            raise CheckpointError(
                f"{path}: {name} is {part.get_dtype()} {part.get_shape()}, the manifest says F32 {[last - first]}"
            )
        result.copy_(part[low - first : low - first + result.numel()])


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def assemble(checkpoint: Checkpoint, trainable: str, kind: str) -> dict[str, Tensor]:
    """Whole parameters by name, float32 on the CPU, of one kind (`master`, `ema`, ...), at any world size."""
    return {
        slot.name: read_span(checkpoint, trainable, index, kind, slot.offset, slot.offset + slot.numel).view(slot.shape)
        for index, group in enumerate(layout_of(checkpoint, trainable).groups)
        for slot in group.slots
    }


def coverage_problems(checkpoint: Checkpoint) -> list[str]:
    """What a manifest's layouts, spans and files do not agree on; empty if every element has exactly one owner."""
    problems: list[str] = []
    for trainable in checkpoint.trainables:
        written = checkpoint.manifest.get("spans", {}).get(trainable, [])
        if len(written) != checkpoint.world_size:
            problems.append(f"{trainable}: spans of {len(written)} ranks, world size {checkpoint.world_size}")
        names = [rank_file(trainable, rank) for rank in range(checkpoint.world_size)]
        problems += [f"{name}: not in the manifest" for name in names if name not in checkpoint.files]
        for index, group in enumerate(layout_of(checkpoint, trainable).groups):
            edges = [0, *(edge for groups in written for edge in groups[index]), group.numel]
            if edges[::2] != edges[1::2]:
                problems.append(f"{trainable}: spans of group {index} do not tile its {group.numel} elements")
    return problems
