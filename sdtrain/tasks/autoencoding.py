"""Training of an autoencoder on images, and the scale of its latents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from sdtrain.errors import ConfigError, DataError
from sdtrain.records import Batch, Conditioning, DrawSpec, LossOutput, Trainable
from sdtrain.samplers.guidance import seeded_noise
from sdtrain.tasks.parts import Autoencoder, as_module, device_of, evaluating, field, per_sample_mean, to_images

Reconstruction = Literal["mse", "l1"]

_NAME = "autoencoding"


class AutoencodingTask:
    """Trains a KL autoencoder on pixels: reconstruction + kl_weight * KL, per sample.

    Normalisation: the reconstruction error is a **mean** over channels, height and width, the KL divergence a **sum**
    over all latent dimensions in nats, as `kl()` of diffusers and of the LDM code gives it. The LDM code also sums the
    reconstruction error, so its weight w corresponds to w / (3 * height * width) here; for a weight stated beside a
    mean error (1e-6 in the two-stage systems) nothing has to be converted.

    Attributes:
        trainables: `autoencoder`, kept in float32: half precision would also cast its buffers.
        frozen: Nothing.
        draws: `posterior`, the noise of the posterior sample.
    """

    trainables: Mapping[str, Trainable]
    frozen: Mapping[str, nn.Module]
    draws: DrawSpec

    def __init__(
        self,
        *,
        autoencoder: Autoencoder,
        latent_shape: tuple[int, int, int],
        reconstruction: Reconstruction,
        kl_weight: float,
    ) -> None:
        """Put the parts together.

        Args:
            autoencoder: Encodes and decodes.
            latent_shape: (channels, height, width) of one image's latents.
            reconstruction: Squared (`mse`) or absolute (`l1`) error of images in [-1, 1].
            kl_weight: Weight of the divergence from the standard normal; see above.

        Raises:
            ConfigError: an unknown reconstruction error or a negative weight.
        """
        if reconstruction not in get_args(Reconstruction):
            allowed = ", ".join(get_args(Reconstruction))
            raise ConfigError(f"task.reconstruction: found {reconstruction!r}, allowed are {allowed}")
        if kl_weight < 0:
            raise ConfigError(f"task.kl_weight: found {kl_weight}, allowed are 0 and more")
        self.autoencoder = autoencoder
        self.latent_shape = latent_shape
        self.reconstruction: Reconstruction = reconstruction
        self.kl_weight = kl_weight
        self.trainables = {"autoencoder": Trainable(module=as_module(autoencoder), precision="fp32")}
        self.frozen = {}
        self.draws = DrawSpec(normals={"posterior": latent_shape})

    def is_active(self, name: str, step: int) -> bool:
        """The autoencoder is updated at every step."""
        return True

    def loss(self, name: str, batch: Batch, step: int) -> LossOutput:
        """Reconstruction error plus weighted divergence of every sample."""
        assert name == "autoencoder", name
        error, kl = self._error_and_kl(batch)
        metrics = {"reconstruction": error.detach(), "kl": kl.detach()}
        return LossOutput(losses=error + self.kl_weight * kl, weights=batch.weights, metrics=metrics)

    def validate(self, batch: Batch) -> Mapping[str, Tensor]:
        """`loss` as in training, and its parts `reconstruction` and `kl`."""
        with evaluating(as_module(self.autoencoder)):
            error, kl = self._error_and_kl(batch)
        return {"loss": error + self.kl_weight * kl, "reconstruction": error, "kl": kl}

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Float[Tensor, "batch channels height width"]:
        """Reconstructions in [-1, 1] of the images that `conditioning.spatial` holds, one per seed.

        Args:
            conditioning: `spatial`: images in [-1, 1].
            seeds: The posterior draw of item i depends on seeds[i] alone.

        Raises:
            ConfigError: no images were given; an autoencoder alone makes none.
        """
        if conditioning.spatial is None:
            raise ConfigError(
                "task autoencoding: an autoencoder has no images of its own to sample; give the images to reconstruct "
                "as the spatial conditioning, or sample a latent_diffusion run"
            )
        module = as_module(self.autoencoder)
        with evaluating(module):
            device = device_of(module)
            moments = self.autoencoder.encode(conditioning.spatial.to(device)).float()
            noise = seeded_noise(seeds, (self.latent_shape[0], *moments.shape[2:]), 0).to(device)
            return self.autoencoder.decode(self.autoencoder.posterior_sample(moments, noise)).float().clamp(-1, 1)

    def _error_and_kl(self, batch: Batch) -> tuple[Float32[Tensor, " batch"], Float32[Tensor, " batch"]]:
        """Mean reconstruction error and summed divergence of every sample."""
        images = to_images(field(batch, "pixels", _NAME))
        moments = self.autoencoder.encode(images)
        if moments.shape[2:] != self.latent_shape[1:]:
            raise DataError(
                f"field 'pixels' of sample {batch.keys[0]!r}: images {tuple(images.shape[1:])} have latents of size "
                f"{tuple(moments.shape[2:])}, this run is set up for {self.latent_shape[1:]}; train on shards of one "
                "image size"
            )
        raw_latents = self.autoencoder.posterior_sample(moments, batch.normals["posterior"])
        difference = self.autoencoder.decode(raw_latents) - images
        error = difference.square() if self.reconstruction == "mse" else difference.abs()
        return per_sample_mean(error), self.autoencoder.kl(moments)


@dataclass(frozen=True, slots=True)
class LatentStatistics:
    """Mean and spread of raw latents over a data set.

    Attributes:
        mean: Of all values.
        std: Of all values, around that mean.
        num_values: How many values were seen.
    """

    mean: float
    std: float
    num_values: int

    @property
    def scaling_factor(self) -> float:
        """The factor that gives latents unit variance; belongs into the autoencoder's own files."""
        return 1.0 / self.std


def latent_statistics(
    autoencoder: Autoencoder,
    moments: Iterable[Float[Tensor, "_ moment_channels height width"]],
    *,
    latents: Literal["sample", "mean"],
) -> LatentStatistics:
    """Global mean and standard deviation of raw latents, in one pass and float64.

    Args:
        autoencoder: Its posterior is read, its networks are not run.
        moments: Batches of moments of the training split.
        latents: `mean` for posterior means; `sample` adds the posterior's own variance instead of drawing, so the
            result holds no chance.

    Raises:
        DataError: no moments, or all values equal.
    """
    count, mean, squares = 0, 0.0, 0.0
    for batch in moments:
        means, variance = _posterior(autoencoder, batch)
        added, added_mean = means.numel(), means.mean().item()
        added_squares = (means - added_mean).square().sum().item()
        if latents == "sample":
            added_squares += variance.sum().item()
        delta, total = added_mean - mean, count + added  # Chan et al. 1979: two parts' sums of squares become one
        squares += added_squares + delta**2 * count * added / total
        mean += delta * added / total
        count = total
    if count == 0 or squares == 0:
        raise DataError(
            f"latent statistics over {count} values: the spread is not defined; give the moments of a training split"
        )
    return LatentStatistics(mean=mean, std=(squares / count) ** 0.5, num_values=count)


def _posterior(autoencoder: Autoencoder, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the posterior, as float64; the deviation is what one unit of noise adds to the mean."""
    with torch.no_grad():
        means = autoencoder.posterior_mean(moments)
        deviation = autoencoder.posterior_sample(moments, torch.ones_like(means)) - means
    return means.double(), deviation.double().square()
