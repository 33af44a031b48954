"""The records that rooms hand each other, and the protocol between trainer and task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a denoiser is told beside the noised latents; every part is optional.

    Attributes:
        tokens: (batch, length, width) for cross-attention.
        mask: (batch, length) bool, True where a token may be attended to; None attends to all.
        vector: (batch, width) added to the time embedding.
        spatial: (batch, channels, height, width) concatenated to the latents.
        labels: (batch,) int64, a class each; the number of classes stands for none.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    vector: Tensor | None = None
    spatial: Tensor | None = None
    labels: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """The parts that are present, by name."""
        named = {
            "tokens": self.tokens,
            "mask": self.mask,
            "vector": self.vector,
            "spatial": self.spatial,
            "labels": self.labels,
        }
        return {name: part for name, part in named.items() if part is not None}

    def cat(self, other: Conditioning) -> Conditioning:
        """Stack two conditionings along the batch; both must hold the same parts."""
        mine, theirs = self.parts(), other.parts()
        if mine.keys() != theirs.keys():
            raise ValueError(f"conditionings hold different parts: {sorted(mine)} and {sorted(theirs)}")
        return Conditioning(**{name: torch.cat([mine[name], theirs[name]]) for name in mine})

    def where(self, drop: Tensor, null: Conditioning) -> Conditioning:
        """Replace the items marked in `drop` (batch,) bool by those of `null` (batch or 1 items)."""
        mine, theirs = self.parts(), null.parts()
        if mine.keys() != theirs.keys():
            raise ValueError(f"conditionings hold different parts: {sorted(mine)} and {sorted(theirs)}")

        def pick(name: str) -> Tensor:
            shape = (-1, *([1] * (mine[name].dim() - 1)))
            return torch.where(drop.view(shape), theirs[name].to(mine[name].dtype), mine[name])

        return Conditioning(**{name: pick(name) for name in mine})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every part; floating parts are cast to `dtype`."""
        return Conditioning(
            **{
                name: part.to(device=device, dtype=dtype if part.is_floating_point() else None)
                for name, part in self.parts().items()
            }
        )


@dataclass(frozen=True, slots=True)
class DrawSpec:
    """The random numbers that a task wants for every sample, drawn by the loader from the global position.

    Attributes:
        normals: name -> shape of one sample's standard normal draw.
        uniforms: names of scalar draws in [0, 1).
        follows: Field whose (height, width) the draws take, where samples have several sizes; None keeps the shapes.
    """

    normals: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    uniforms: tuple[str, ...] = ()
    follows: str | None = None

    def shapes_for(self, fields: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The normals' shapes for a sample whose fields have these shapes; one number per channel stays one."""
        if self.follows is None or self.follows not in fields:
            return dict(self.normals)
        size = fields[self.follows][-2:]
        return {name: shape if shape[-2:] == (1, 1) else (*shape[:-2], *size) for name, shape in self.normals.items()}


class Tombstone(NamedTuple):
    """A sample that could not be read and stands in its place with weight 0.

    Attributes:
        key: Sample key; the shard's path and the place in it where the key could not be read either.
        shard: Path of its shard as the manifest has it.
        reason: Why it could not be read.
    """

    key: str
    shard: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(slots=True)
class Batch:
    """A micro-batch: what was read and what was drawn.

    Attributes:
        keys: Sample keys, for messages and audits.
        positions: (batch,) int64 global positions in the order of the run.
        fields: What the shards hold, stacked: `moments`, `tokens`, `pixels`, ...
        normals: (batch, *shape) float32 standard normal draws by name.
        uniforms: (batch,) float64 draws in [0, 1) by name.
        weights: (batch,) float32; 0 marks a tombstone (unreadable sample, fields are zeros).
        errors: Every sample that could not be read, and why.
    """

    keys: tuple[str, ...]
    positions: Tensor
    fields: dict[str, Tensor]
    normals: dict[str, Tensor]
    uniforms: dict[str, Tensor]
    weights: Tensor
    errors: tuple[Tombstone, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor, without waiting for the copy."""

        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        return replace(
            self,
            positions=self.positions.to(device, non_blocking=True),
            fields=move(self.fields),
            normals=move(self.normals),
            uniforms=move(self.uniforms),
            weights=self.weights.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Per-sample losses of one micro-batch; the trainer normalises by the planned batch size.

    Attributes:
        losses: (batch,) float32, with graph.
        weights: (batch,) float32; 0 removes a sample (tombstone).
        metrics: Detached per-sample (batch,) tensors to be averaged and logged, by name. A figure over some of the
            samples is a pair `name.sum` (0 for the others) and `name.count` (1 or 0): shown is the quotient of their
            means as `name`, and nothing where nobody counted.
    """

    losses: Float[Tensor, " batch"]
    weights: Float[Tensor, " batch"]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trainable:
    """Everything that one loss updates; becomes one DeepSpeed engine, one EMA, one part of the checkpoint.

    Attributes:
        module: All parameters that are stepped together (usually a ModuleDict).
        precision: `bf16`, `fp16` or `fp32`; None takes the run's. Autoencoders stay fp32.
        learning_rate: Peak learning rate; None takes the run's.
    """

    module: nn.Module
    precision: Precision | None = None
    learning_rate: float | None = None


class Task(Protocol):
    """What the trainer knows of the thing that it trains."""

    trainables: Mapping[str, Trainable]
    frozen: Mapping[str, nn.Module]
    draws: DrawSpec

    def is_active(self, name: str, step: int) -> bool:
        """Whether trainable `name` is updated at `step`."""
        ...

    def loss(self, name: str, batch: Batch, step: int) -> LossOutput:
        """Losses of one micro-batch for trainable `name`."""
        ...

    def validate(self, batch: Batch) -> Mapping[str, Tensor]:
        """Per-sample (batch,) figures, `loss` among them; called without gradients."""
        ...

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        """Images (batch, 3, height, width) in [-1, 1]; item i depends on seeds[i] alone."""
        ...
