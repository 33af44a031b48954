"""Conditional diffusion in the latents of a frozen autoencoder: from a batch to losses, from seeds to images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.diffusion.targets import add_noise, target
from sdtrain.diffusion.timesteps import TimestepSampling, stratified, uniform_timesteps
from sdtrain.diffusion.weighting import min_snr
from sdtrain.errors import ConfigError, DataError
from sdtrain.records import Batch, Conditioning, DrawSpec, LossOutput, Trainable
from sdtrain.samplers.guidance import guided, seeded_noise
from sdtrain.samplers.settings import SamplerName, SamplerSettings, run_sampler
from sdtrain.samplers.steps import Callback
from sdtrain.tasks.parts import (
    Autoencoder,
    Conditioner,
    as_module,
    bin_losses,
    count_flops,
    device_of,
    evaluating,
    field,
    freeze,
    is_trained,
    per_sample_mean,
    working_dtype,
)

LatentsFrom = Literal["sample", "mean"]

MAX_LOSS_BINS = 100

_NAME = "latent_diffusion"


class LatentDiffusionTask:
    """Trains a denoiser, and the conditioner where it has trained parameters, on stored moments.

    Latents, noise, targets and losses are float32 whatever the networks compute in: the denoiser's input is cast last
    and its output first.

    Attributes:
        trainables: `denoiser`: the denoiser and, if any of its parameters require gradients, the conditioner.
        frozen: The autoencoder and, if it is not trained, the conditioner.
        draws: `noise`, `posterior` where latents are sampled, `noise_offset` where it is used; `timestep` and
            `condition_drop`.
    """

    trainables: Mapping[str, Trainable]
    frozen: Mapping[str, nn.Module]
    draws: DrawSpec

    def __init__(
        self,
        *,
        denoiser: nn.Module,
        conditioner: Conditioner,
        autoencoder: Autoencoder,
        process: DiffusionProcess,
        latent_shape: tuple[int, int, int],
        condition_dropout: float,
        loss_weighting: float | None,
        latents: LatentsFrom,
        condition_field: str | None = "tokens",
        noise_offset: float = 0.0,
        timesteps: TimestepSampling | None = None,
        timestep_bins: int = 20,
        loss_bins: int = 10,
        sampler: SamplerSettings | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            denoiser: (latents, timesteps, conditioning) -> prediction.
            conditioner: Field of the shards -> conditioning, and the null condition.
            autoencoder: Encodes nothing here: it draws latents from moments, scales and decodes.
            process: Noise levels and prediction type.
            latent_shape: (channels, height, width) of one sample's latents; where shards hold several sizes, of what
                `sample` draws.
            condition_dropout: Probability that training sees the null condition instead, in [0, 1).
            loss_weighting: Gamma of Min-SNR, or None for equal weights.
            latents: A fresh posterior sample for every visit, or the posterior mean.
            condition_field: What the conditioner reads from the shards; None trains without conditions.
            noise_offset: Standard deviation of one extra draw per channel, added to the noise; 0 is off.
            timesteps: How training chooses noise levels; None draws each of them equally likely.
            timestep_bins: Equal bins of the noise levels that validation walks through.
            loss_bins: Equal bins of the noise levels that the training loss is also shown for, at most 100; 0 is off.
            sampler: How `sample` works unless told otherwise.

        Raises:
            ConfigError: a number or a choice that is not allowed.
        """
        if not 0 <= condition_dropout < 1:
            raise ConfigError(f"task.condition_dropout: found {condition_dropout}, allowed are 0 up to below 1")
        if loss_weighting is not None and loss_weighting <= 0:
            raise ConfigError(f"task.loss_weighting.gamma: found {loss_weighting}, allowed are numbers above 0")
        if latents not in get_args(LatentsFrom):
            raise ConfigError(f"task.latents: found {latents!r}, allowed are {', '.join(get_args(LatentsFrom))}")
        if noise_offset < 0:
            raise ConfigError(f"process.noise_offset: found {noise_offset}, allowed are 0 and more")
        if not 0 <= loss_bins <= MAX_LOSS_BINS:
            raise ConfigError(f"task.loss_bins: found {loss_bins}, allowed are 0 to {MAX_LOSS_BINS}")
        self.denoiser = denoiser
        self.conditioner = conditioner
        self.autoencoder = autoencoder
        self.process = process
        self.latent_shape = latent_shape
        self.condition_dropout = condition_dropout
        self.loss_weighting = loss_weighting
        self.latents: LatentsFrom = latents
        self.condition_field = condition_field
        self.noise_offset = noise_offset
        self.timesteps = timesteps or TimestepSampling()
        self.timestep_bins = timestep_bins
        self.loss_bins = loss_bins
        self.sampler = sampler or SamplerSettings()
        self._trains_conditioner = is_trained(as_module(conditioner))
        self.trainables, self.frozen = self._split()
        self.draws = self._draw_spec()

    def is_active(self, name: str, step: int) -> bool:
        """The denoiser is updated at every step."""
        return True

    def loss(self, name: str, batch: Batch, step: int) -> LossOutput:
        """Weighted mean squared error of every sample at its drawn noise level.

        Metrics: `mse` without the weights, the `timesteps`, and the loss within each of `loss_bins` equal bins of them.
        """
        assert name == "denoiser", name
        total = self.process.num_train_timesteps
        timesteps = self.timesteps.draw(
            batch.uniforms["timestep"], batch.positions, step=step, num_train_timesteps=total
        )
        drop = batch.uniforms["condition_drop"] < self.condition_dropout
        mse = self._error(batch, timesteps, self._condition(batch, drop))
        losses = mse * self._weight(timesteps)
        metrics = {"mse": mse.detach(), "timesteps": timesteps.float()}
        metrics |= bin_losses(losses.detach(), timesteps, num_bins=self.loss_bins, num_train_timesteps=total)
        return LossOutput(losses=losses, weights=batch.weights, metrics=metrics)

    def validate(self, batch: Batch) -> Mapping[str, Tensor]:
        """`loss` as in training but with every condition kept, `mse` without weights, and the `timesteps`.

        Sample i of the validation order is noised within bin i mod `timestep_bins`.
        """
        uniforms = stratified(batch.uniforms["timestep"], batch.positions, self.timestep_bins)
        timesteps = uniform_timesteps(uniforms, self.process.num_train_timesteps)
        with evaluating(self.trainables["denoiser"].module):
            mse = self._error(batch, timesteps, self._condition(batch, drop=None))
        return {"loss": mse * self._weight(timesteps), "mse": mse, "timesteps": timesteps}

    def sample(
        self,
        conditioning: Conditioning,
        seeds: Sequence[int],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: SamplerName | None = None,
        eta: float | None = None,
        callback: Callback | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in [-1, 1], float32, from the networks as they are now.

        Args:
            conditioning: One item per seed, from the conditioner.
            seeds: The noise of item i, at the start and at every step, depends on seeds[i] alone.
            num_steps: Calls of the denoiser; None takes the task's setting, as for the options below.
            guidance_scale: Classifier-free guidance; 1 is off.
            sampler: `ddim`, `ddpm` or `euler`.
            eta: Noise added by `ddim`.
            callback: Called with (step index, latents) after every step.
        """
        asked = {"num_steps": num_steps, "guidance_scale": guidance_scale, "sampler": sampler, "eta": eta}
        settings = replace(self.sampler, **{name: value for name, value in asked.items() if value is not None})
        device = device_of(self.denoiser)

        def noise(draw: int) -> Tensor:
            return seeded_noise(seeds, self.latent_shape, draw).to(device)

        with evaluating(self.trainables["denoiser"].module):
            null = self.conditioner.null(len(seeds)).to(device)
            latents = run_sampler(
                settings,
                guided(self._predict, conditioning.to(device), null, settings.guidance_scale),
                noise(0),
                process=self.process,
                noise_fn=lambda index: noise(index + 1),
                callback=callback,
            )
            return self.decode(latents)

    def decode(
        self, latents: Float[Tensor, "batch latent_channels latent_height latent_width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in [-1, 1], float32, of scaled latents."""
        raw_latents = self.autoencoder.unscale(latents)
        return self.autoencoder.decode(raw_latents.to(working_dtype(as_module(self.autoencoder)))).float().clamp(-1, 1)

    def forward_flops(self) -> int:
        """Floating-point operations of one sample's pass through the denoiser: counted on shapes, nothing is computed.

        A multiplication with its addition counts as two.
        """
        device = device_of(self.denoiser)
        with evaluating(as_module(self.conditioner)):
            conditioning = self.conditioner.null(1).to(device)
        return count_flops(
            self.denoiser,
            torch.empty(1, *self.latent_shape, dtype=working_dtype(self.denoiser), device="meta"),
            torch.zeros(1, dtype=torch.int64, device="meta"),
            conditioning.to("meta", dtype=working_dtype(self.denoiser)),
        )

    # The parts of a loss, in the order in which they run ------------------------------------------------------------

    def _clean(self, batch: Batch) -> Float32[Tensor, "batch channels height width"]:
        """Scaled latents in float32 from the stored moments."""
        moments = field(batch, "moments", _NAME).float()
        latent_shape = (self.latent_shape[0], *batch.normals["noise"].shape[2:])  # the loader's, of this batch's bucket
        needed = (2 * latent_shape[0], *latent_shape[1:])
        if moments.shape[1:] != needed:
            raise DataError(
                f"field 'moments' of sample {batch.keys[0]!r}: found shape {tuple(moments.shape[1:])}, but latents "
                f"{latent_shape} need {needed}; encode shards with this run's autoencoder"
            )
        if self.latents == "mean":
            return self.autoencoder.scale(self.autoencoder.posterior_mean(moments))
        return self.autoencoder.scale(self.autoencoder.posterior_sample(moments, batch.normals["posterior"]))

    def _noise(self, batch: Batch) -> Float32[Tensor, "batch channels height width"]:
        noise = batch.normals["noise"]
        return noise + self.noise_offset * batch.normals["noise_offset"] if self.noise_offset else noise

    def _condition(self, batch: Batch, drop: Bool[Tensor, " batch"] | None) -> Conditioning:
        """Conditions of the batch, the dropped ones replaced by the null condition.

        The null condition is computed whether one is dropped or not: what runs must not differ between ranks.
        """
        if self.condition_field is None:
            return self.conditioner.null(len(batch))
        read = field(batch, self.condition_field, _NAME)
        with torch.set_grad_enabled(self._trains_conditioner and torch.is_grad_enabled()):
            conditioning = self.conditioner(read)
            if drop is None or self.condition_dropout == 0:
                return conditioning
            return conditioning.where(drop, self.conditioner.null(1))

    def _predict(
        self,
        noised: Float[Tensor, "batch channels height width"],
        timesteps: Int64[Tensor, " batch"],
        conditioning: Conditioning,
    ) -> Float32[Tensor, "batch channels height width"]:
        """The denoiser in its own precision, its prediction in float32."""
        dtype = working_dtype(self.denoiser)
        return self.denoiser(noised.to(dtype), timesteps, conditioning.to(dtype=dtype)).float()

    def _error(
        self, batch: Batch, timesteps: Int64[Tensor, " batch"], conditioning: Conditioning
    ) -> Float32[Tensor, " batch"]:
        """Mean squared error of every sample's prediction."""
        clean, noise = self._clean(batch), self._noise(batch)
        alpha_bar = self.process.alpha_bar_at(timesteps)
        noised = add_noise(clean, noise, alpha_bar)
        wanted = target(self.process.prediction_type, clean, noise, alpha_bar)
        shown = self.process.denoiser_input(noised, alpha_bar)
        return per_sample_mean((self._predict(shown, timesteps, conditioning) - wanted).square())

    def _weight(self, timesteps: Int64[Tensor, " batch"]) -> Float32[Tensor, " batch"]:
        if self.loss_weighting is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        return min_snr(self.process.snr(timesteps), self.loss_weighting, self.process.prediction_type)

    # What the trainer and the loader are told -----------------------------------------------------------------------

    def _split(self) -> tuple[dict[str, Trainable], dict[str, nn.Module]]:
        trained: dict[str, nn.Module] = {"denoiser": self.denoiser}
        frozen = {"autoencoder": freeze(as_module(self.autoencoder))}
        if self._trains_conditioner:
            trained["conditioner"] = as_module(self.conditioner)
        else:
            frozen["conditioner"] = freeze(as_module(self.conditioner))
        return {"denoiser": Trainable(module=nn.ModuleDict(trained))}, frozen

    def _draw_spec(self) -> DrawSpec:
        normals: dict[str, tuple[int, ...]] = {"noise": self.latent_shape}
        if self.latents == "sample":
            normals["posterior"] = self.latent_shape
        if self.noise_offset:
            normals["noise_offset"] = (self.latent_shape[0], 1, 1)
        return DrawSpec(normals=normals, uniforms=("timestep", "condition_drop"), follows="moments")
