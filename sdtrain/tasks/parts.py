"""What tasks ask of the networks that they are given, and the small things that they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.errors import DataError
from sdtrain.records import Batch, Conditioning


@runtime_checkable
class Conditioner(Protocol):
    """A field of the shards -> conditioning."""

    def __call__(self, field: Tensor, /) -> Conditioning:
        """Conditioning of every item."""
        ...

    def null(self, batch: int, /) -> Conditioning:
        """The dropped condition, `batch` times."""
        ...


@runtime_checkable
class Autoencoder(Protocol):
    """Images <-> latents; see `sdtrain.autoencoders`."""

    def encode(self, images: Tensor, /) -> Tensor:
        """Images in [-1, 1] -> moments, mean and log-variance stacked along the channels."""
        ...

    def decode(self, raw_latents: Tensor, /) -> Tensor:
        """Raw latents -> images."""
        ...

    def posterior_sample(self, moments: Tensor, noise: Tensor, /) -> Tensor:
        """mean + std * noise."""
        ...

    def posterior_mean(self, moments: Tensor, /) -> Tensor:
        """The mean alone."""
        ...

    def kl(self, moments: Tensor, /) -> Tensor:
        """(batch,) divergence from the standard normal, summed over all latent dimensions, in nats."""
        ...

    def scale(self, raw_latents: Tensor, /) -> Tensor:
        """Raw latents -> latents of unit variance."""
        ...

    def unscale(self, latents: Tensor, /) -> Tensor:
        """Back again."""
        ...


def as_module(part: object) -> nn.Module:
    """The network behind a protocol, as torch's own type."""
    assert isinstance(part, nn.Module), f"{type(part).__name__} is no torch module"
    return part


def working_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a network computes in: that of its first parameter."""
    return next(module.parameters()).dtype


def device_of(module: nn.Module) -> torch.device:
    """Where a network lives."""
    return next(module.parameters()).device


def is_trained(module: nn.Module) -> bool:
    """Whether a loss updates any of the module's parameters."""
    return any(parameter.requires_grad for parameter in module.parameters())


def freeze(module: nn.Module) -> nn.Module:
    """The module in evaluation mode and without gradients."""
    return module.eval().requires_grad_(False)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; every submodule gets back the mode that it had."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def count_flops(module: nn.Module, *inputs: Tensor | Conditioning) -> int:
    """Floating-point operations of a forward pass, on shapes alone: parameters are replaced by ones without storage.

    Args:
        module: Where and in which precision it is does not matter.
        inputs: On the meta device.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    with evaluating(module), torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        functional_call(module, shapes, inputs)
    return counter.get_total_flops()


def field(batch: Batch, name: str, task: str) -> Tensor:
    """A field of the batch.

    Raises:
        DataError: the shards do not hold it.
    """
    if name not in batch.fields:
        found = ", ".join(sorted(batch.fields)) or "none"
        raise DataError(
            f"task {task} needs the field {name!r} of every sample; fields found: {found}. "
            "Run the ingestion stage that writes it, or train another task on this manifest"
        )
    return batch.fields[name]


def to_images(pixels: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    """Pixels 0-255 -> images in [-1, 1], float32."""
    return pixels.float() / 127.5 - 1.0


def per_sample_mean(values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, " batch"]:
    """Mean over everything but the batch."""
    return values.flatten(1).mean(1)


def bin_losses(
    losses: Float[Tensor, " batch"], timesteps: Int64[Tensor, " batch"], *, num_bins: int, num_train_timesteps: int
) -> dict[str, Float[Tensor, " batch"]]:
    """Losses by equal bins of the timesteps, as pairs `loss_bin_03.sum` and `loss_bin_03.count` (see `LossOutput`).

    A pair's two means over any set of samples have the mean loss of the bin's samples as their quotient; nothing has
    to be read from the device to find out who is where.
    """
    bins = timesteps * num_bins // num_train_timesteps
    pairs = {}
    for index in range(num_bins):
        inside = bins == index
        pairs[f"loss_bin_{index:02d}.sum"] = torch.where(inside, losses, 0.0)
        pairs[f"loss_bin_{index:02d}.count"] = inside.to(losses.dtype)
    return pairs
