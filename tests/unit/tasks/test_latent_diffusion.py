"""The latent diffusion task with fakes whose numbers can be worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from sdtrain.data.randomness import normals
from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.diffusion.timesteps import TimestepPhase, TimestepSampling
from sdtrain.errors import ConfigError, DataError
from sdtrain.records import Batch, Conditioning
from sdtrain.samplers.ddpm import sample_ddpm
from sdtrain.samplers.guidance import seeded_noise
from sdtrain.samplers.settings import SamplerSettings
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask

LATENT_SHAPE = (2, 4, 4)
SHIFT, FACTOR = 0.5, 0.25


class FakeAutoencoder(nn.Module):
    """Moments as the real one has them; decoding is a gain of 3 in the weights' dtype."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0))
        self.decoded_dtypes = []

    def posterior_sample(self, moments, noise):
        mean, log_variance = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance) * noise

    def posterior_mean(self, moments):
        return moments.chunk(2, dim=1)[0]

    def scale(self, raw_latents):
        return (raw_latents - SHIFT) * FACTOR

    def unscale(self, latents):
        return latents / FACTOR + SHIFT

    def encode(self, images):
        raise AssertionError("training on stored moments encodes nothing")

    def kl(self, moments):
        raise AssertionError("the posterior is not trained here")

    def decode(self, raw_latents):
        self.decoded_dtypes.append(raw_latents.dtype)
        return raw_latents * self.gain


class FakeConditioner(nn.Module):
    """Token ids -> embeddings; the null condition is an id of its own."""

    NULL = 9

    def __init__(self, trainable):
        super().__init__()
        self.embedding = nn.Embedding(10, 3)
        self.requires_grad_(trainable)
        self.null_calls = []

    def forward(self, tokens):
        return Conditioning(tokens=self.embedding(tokens))

    def null(self, batch):
        self.null_calls.append(batch)
        return self(torch.full((batch, 4), self.NULL))


class FakeDenoiser(nn.Module):
    """prediction = gain * latents + mean of the tokens; remembers what it was given."""

    def __init__(self, gain=0.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.calls = []

    def forward(self, latents, timesteps, conditioning):
        self.calls.append((latents.detach(), timesteps, conditioning, self.training))
        told = 0.0 if conditioning.tokens is None else conditioning.tokens.mean((1, 2)).view(-1, 1, 1, 1)
        return self.gain * latents + told


def process(**changes):
    values = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    }
    return DiffusionProcess(**(values | changes))


def make(*, trainable=False, gain=0.0, **changes):
    torch.manual_seed(0)
    values = {
        "denoiser": FakeDenoiser(gain),
        "conditioner": FakeConditioner(trainable),
        "autoencoder": FakeAutoencoder(),
        "process": process(),
        "latent_shape": LATENT_SHAPE,
        "condition_dropout": 0.1,
        "loss_weighting": None,
        "latents": "sample",
    }
    return LatentDiffusionTask(**(values | changes))


def make_batch(task, uniforms=(0.0, 0.25, 0.5, 0.999), drops=(0.05, 0.5, 0.0999, 0.1), **changes):
    generator = torch.Generator().manual_seed(3)
    size = len(uniforms)
    channels, height, width = LATENT_SHAPE
    values = {
        "keys": tuple(f"sample{index}" for index in range(size)),
        "positions": torch.arange(40, 40 + size),
        "fields": {
            "moments": torch.randn(size, 2 * channels, height, width, generator=generator).half(),
            "tokens": torch.randint(0, 9, (size, 4), generator=generator),
        },
        "normals": {
            name: torch.randn(size, *shape, generator=generator) for name, shape in sorted(task.draws.normals.items())
        },
        "uniforms": {
            "timestep": torch.tensor(uniforms, dtype=torch.float64),
            "condition_drop": torch.tensor(drops, dtype=torch.float64),
        },
        "weights": torch.ones(size),
    }
    return Batch(**(values | changes))


def test_what_the_loader_and_the_trainer_are_told():
    task = make()
    assert task.draws.normals == {"noise": LATENT_SHAPE, "posterior": LATENT_SHAPE}
    assert task.draws.uniforms == ("timestep", "condition_drop")
    assert task.is_active("denoiser", 0)
    assert list(task.trainables) == ["denoiser"]
    assert [name for name, _ in task.trainables["denoiser"].module.named_parameters()] == ["denoiser.gain"]
    assert task.frozen == {"autoencoder": task.autoencoder, "conditioner": task.conditioner}
    assert not any(parameter.requires_grad for part in task.frozen.values() for parameter in part.parameters())
    assert not any(part.training for part in task.frozen.values())


def test_a_trained_conditioner_is_stepped_with_the_denoiser():
    task = make(trainable=True)
    names = [name for name, _ in task.trainables["denoiser"].module.named_parameters()]
    assert names == ["denoiser.gain", "conditioner.embedding.weight"]
    assert list(task.frozen) == ["autoencoder"]


def test_draws_follow_the_options():
    assert make(latents="mean").draws.normals == {"noise": LATENT_SHAPE}
    assert make(latents="mean", noise_offset=0.1).draws.normals == {"noise": LATENT_SHAPE, "noise_offset": (2, 1, 1)}


def test_loss_by_hand():
    """With gain 0 and conditions dropped everywhere the prediction is one known number."""
    task = make()
    batch = make_batch(task, drops=(0.0,) * 4)
    output = task.loss("denoiser", batch, 0)
    told = task.conditioner.embedding.weight[FakeConditioner.NULL].mean()
    expected = (batch.normals["noise"] - told).square().mean((1, 2, 3))
    torch.testing.assert_close(output.losses, expected)
    torch.testing.assert_close(output.metrics["mse"], expected)
    assert not output.metrics["mse"].requires_grad
    assert output.losses.requires_grad
    assert output.weights is batch.weights


def test_what_the_denoiser_is_given():
    task = make()
    batch = make_batch(task)
    task.loss("denoiser", batch, 0)
    noised, timesteps, conditioning, training = task.denoiser.calls[0]
    assert timesteps.tolist() == [0, 250, 500, 999]
    assert training
    mean, log_variance = batch.fields["moments"].float().chunk(2, dim=1)
    clean = (mean + torch.exp(0.5 * log_variance) * batch.normals["posterior"] - SHIFT) * FACTOR
    alpha_bar = task.process.alpha_bar[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noised, alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * batch.normals["noise"])
    null, real = task.conditioner.null(1).tokens[0], task.conditioner(batch.fields["tokens"]).tokens
    # dropped where the draw is below 0.1: items 0 and 2; 0.1 itself is not below
    assert torch.equal(conditioning.tokens, torch.stack([null, real[1], null, real[3]]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_targets_and_min_snr_weights_by_prediction_type(prediction_type):
    task = make(
        process=process(prediction_type=prediction_type), loss_weighting=5.0, latents="mean", condition_field=None
    )
    task.denoiser.requires_grad_(False)
    task.conditioner.null = lambda batch: Conditioning()
    batch = make_batch(task)
    output = task.loss("denoiser", batch, 0)
    timesteps = torch.tensor([0, 250, 500, 999])
    exact = task.process.alpha_bar_float64[timesteps]
    alpha_bar = exact.view(-1, 1, 1, 1)
    clean = (batch.fields["moments"][:, :2].double() - SHIFT) * FACTOR
    noise = batch.normals["noise"].double()
    snr = exact / (1 - exact)
    bounded = snr.clamp(max=5.0)
    wanted, weight = {
        "epsilon": (noise, bounded / snr),
        "v_prediction": (alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean, bounded / (snr + 1)),
        "sample": (clean, bounded),
    }[prediction_type]
    mse = wanted.square().mean((1, 2, 3))  # gain 0: the prediction is 0
    torch.testing.assert_close(output.metrics["mse"].double(), mse, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(output.losses.double(), mse * weight, rtol=1e-5, atol=1e-7)


def test_a_flow_is_shown_its_straight_path_and_asked_for_its_velocity():
    task = make(
        process=DiffusionProcess(num_train_timesteps=1000, prediction_type="flow"),
        loss_weighting=5.0,
        latents="mean",
        condition_field=None,
    )
    task.conditioner.null = lambda batch: Conditioning()
    batch = make_batch(task)
    output = task.loss("denoiser", batch, 0)
    clean = (batch.fields["moments"][:, :2].double() - SHIFT) * FACTOR
    noise = batch.normals["noise"].double()
    time = torch.tensor([0.001, 0.251, 0.501, 1.0], dtype=torch.float64)
    place = time.view(-1, 1, 1, 1)
    shown, timesteps, _, _ = task.denoiser.calls[0]
    assert timesteps.tolist() == [0, 250, 500, 999]
    torch.testing.assert_close(shown.double(), (1 - place) * clean + place * noise, rtol=1e-5, atol=1e-6)
    mse = (noise - clean).square().mean((1, 2, 3))  # gain 0: the prediction is 0
    torch.testing.assert_close(output.metrics["mse"].double(), mse, rtol=1e-5, atol=1e-7)
    snr = ((1 - time) / time).square()
    torch.testing.assert_close(output.losses.double(), mse * snr.clamp(max=5.0) * time**2, rtol=1e-5, atol=1e-7)


def test_how_timesteps_are_chosen_is_the_sampling_s_business():
    phases = (TimestepPhase(until_step=7), TimestepPhase(edges=(0.5,), weights=(0.0, 1.0)))
    task = make(timesteps=TimestepSampling(strata=4, phases=phases))
    batch = make_batch(task, uniforms=(0.0,) * 4)
    task.loss("denoiser", batch, 6)
    assert sorted(task.denoiser.calls[-1][1].tolist()) == [0, 250, 500, 750]
    task.loss("denoiser", batch, 7)
    assert sorted(task.denoiser.calls[-1][1].tolist()) == [500, 625, 750, 875]
    figures = task.validate(make_batch(task, uniforms=(0.0,) * 4))
    assert figures["timesteps"].tolist() == [0, 50, 100, 150], (
        "validation walks through all levels, whatever training does"
    )


def test_losses_by_bins_of_the_timesteps():
    """The quotient of a pair's means is the mean loss of the samples in the bin."""
    task = make(gain=0.5, loss_bins=4)
    output = task.loss("denoiser", make_batch(task, uniforms=(0.0, 0.26, 0.3, 0.999)), 0)
    assert output.metrics["timesteps"].tolist() == [0.0, 260.0, 300.0, 999.0]
    losses = output.losses.detach()
    pairs = [(output.metrics[f"loss_bin_{i:02d}.sum"], output.metrics[f"loss_bin_{i:02d}.count"]) for i in range(4)]
    assert [pair[1].tolist() for pair in pairs] == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert pairs[1][0].mean() / pairs[1][1].mean() == pytest.approx(losses[1:3].mean().item())
    assert pairs[3][0].tolist() == [0.0, 0.0, 0.0, losses[3].item()]
    assert not any(values.requires_grad for values in output.metrics.values())
    assert "loss_bin_04.sum" not in output.metrics
    assert set(make(loss_bins=0).loss("denoiser", make_batch(task), 0).metrics) == {"mse", "timesteps"}


def test_offset_noise_shifts_whole_channels():
    task = make(noise_offset=0.1, latents="mean")
    batch = make_batch(task, uniforms=(0.9995,), drops=(0.5,))
    task.loss("denoiser", batch, 0)
    plain = make(latents="mean")
    plain.loss("denoiser", batch, 0)
    difference = task.denoiser.calls[0][0] - plain.denoiser.calls[0][0]
    expected = 0.1 * batch.normals["noise_offset"] * (1 - task.process.alpha_bar[999]).sqrt()
    torch.testing.assert_close(difference, expected.expand_as(difference), rtol=0, atol=1e-6)


def test_offset_noise_has_the_covariance_of_its_two_parts():
    """Within a channel every two values share the offset: variance 1 + s^2, covariance s^2; across channels 0."""
    offset = 0.5
    task = make(noise_offset=offset, latents="mean", gain=1.0)
    size, (channels, height, width) = 20_000, LATENT_SHAPE
    seeds = range(size)
    draws = {
        name: torch.from_numpy(np.stack([normals(1, name, seed, shape) for seed in seeds]))
        for name, shape in task.draws.normals.items()
    }
    noise = task._noise(make_batch(task, normals=draws)).flatten(1).double()
    measured = noise.T @ noise / size
    same_channel = torch.block_diag(*[torch.ones(height * width, height * width)] * channels)
    expected = torch.eye(channels * height * width) + offset**2 * same_channel
    spread = (expected.diagonal().outer(expected.diagonal()) + expected.square()).sqrt() / size**0.5  # of each entry
    assert ((measured - expected) / spread).abs().max().item() < 5.0


def test_maths_stays_float32_around_a_bf16_denoiser():
    task = make(gain=0.5)
    task.denoiser.bfloat16()
    batch = make_batch(task)
    output = task.loss("denoiser", batch, 0)
    noised, _, conditioning, _ = task.denoiser.calls[0]
    assert noised.dtype == conditioning.tokens.dtype == torch.bfloat16
    assert output.losses.dtype == torch.float32
    reference = make(gain=0.5)
    reference_output = reference.loss("denoiser", batch, 0)
    assert torch.equal(noised, reference.denoiser.calls[0][0].bfloat16())  # cast last, not before the noise
    torch.testing.assert_close(output.losses, reference_output.losses, rtol=0.02, atol=0.02)


def test_every_draw_comes_from_the_batch():
    task = make(gain=0.5)
    batch = make_batch(task)
    torch.manual_seed(1)
    first = task.loss("denoiser", batch, 0).losses
    torch.manual_seed(2)
    assert torch.equal(task.loss("denoiser", batch, 7).losses, first)


def test_a_sample_does_not_see_its_neighbours():
    task = make(gain=0.5)
    batch = make_batch(task)
    whole = task.loss("denoiser", batch, 0).losses
    alone = Batch(
        keys=batch.keys[2:3],
        positions=batch.positions[2:3],
        fields={name: values[2:3] for name, values in batch.fields.items()},
        normals={name: values[2:3] for name, values in batch.normals.items()},
        uniforms={name: values[2:3] for name, values in batch.uniforms.items()},
        weights=batch.weights[2:3],
    )
    torch.testing.assert_close(task.loss("denoiser", alone, 0).losses[0], whole[2])


def test_a_tombstone_is_finite_and_keeps_its_zero_weight():
    task = make(gain=0.5, trainable=True)
    batch = make_batch(task)
    for values in batch.fields.values():
        values[1] = 0
    batch.weights[1] = 0
    output = task.loss("denoiser", batch, 0)
    assert output.losses.isfinite().all()
    (output.losses * output.weights).sum().backward()
    assert all(p.grad.isfinite().all() for p in task.trainables["denoiser"].module.parameters())


@pytest.mark.parametrize("drops", [(0.5,) * 4, (0.0,) * 4, (0.05, 0.5, 0.0, 0.5)])
def test_the_null_condition_is_always_computed(drops):
    """Every rank runs the same graph: each parameter gets a gradient, be it zero, whatever was dropped."""
    task = make(trainable=True)
    batch = make_batch(task, drops=drops)
    task.loss("denoiser", batch, 0).losses.sum().backward()
    assert task.conditioner.null_calls == [1]
    gradient = task.conditioner.embedding.weight.grad
    used = {
        token for row, drop in zip(batch.fields["tokens"].tolist(), drops, strict=True) if drop >= 0.1 for token in row
    }
    if any(drop < 0.1 for drop in drops):
        used.add(FakeConditioner.NULL)
    assert {index for index in range(10) if gradient[index].abs().sum() > 0} == used


def test_a_frozen_conditioner_builds_no_graph():
    task = make()
    task.loss("denoiser", make_batch(task), 0)
    assert not task.denoiser.calls[0][2].tokens.requires_grad


def test_without_dropout_the_null_condition_is_left_alone():
    task = make(condition_dropout=0.0)
    task.loss("denoiser", make_batch(task, drops=(0.0,) * 4), 0)
    assert task.conditioner.null_calls == []


def test_validation_keeps_every_condition_and_walks_through_the_noise_levels():
    task = make(loss_weighting=5.0, timestep_bins=4)
    batch = make_batch(task, uniforms=(0.0, 0.5, 0.999, 0.2), drops=(0.0,) * 4)
    figures = task.validate(batch)
    assert figures["timesteps"].tolist() == [0, 375, 749, 800]  # positions 40 ... 43 are bins 0 ... 3
    _, _, conditioning, training = task.denoiser.calls[0]
    assert torch.equal(conditioning.tokens, task.conditioner(batch.fields["tokens"]).tokens)
    assert not training
    snr = task.process.snr(figures["timesteps"])
    torch.testing.assert_close(figures["loss"], figures["mse"] * (5.0 / snr).clamp(max=1.0))
    assert not figures["loss"].requires_grad
    assert figures["loss"].shape == (4,)


def test_validation_and_sampling_give_the_modes_back():
    task = make(trainable=True)
    task.trainables["denoiser"].module.train()
    task.conditioner.embedding.eval()
    task.validate(make_batch(task))
    task.sample(task.conditioner(torch.zeros(1, 4, dtype=torch.int64)), [0], num_steps=2)
    assert task.denoiser.training
    assert task.conditioner.training
    assert not task.conditioner.embedding.training


def test_sampling_decodes_the_unscaled_latents():
    """A denoiser that predicts the noise as zero: DDIM only rescales the start noise."""
    settings = SamplerSettings(num_steps=10, guidance_scale=1.0, spacing="trailing", final_alpha_bar="one")
    task = make(condition_field=None, sampler=settings)
    task.conditioner.null = lambda batch: Conditioning()
    task.autoencoder.gain.data.fill_(0.001)
    task.autoencoder.bfloat16()
    images = task.sample(Conditioning(), [5, 6])
    latents = seeded_noise([5, 6], LATENT_SHAPE, 0) / task.process.alpha_bar[999].sqrt()
    expected = ((latents / FACTOR + SHIFT) * 0.001).clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0.02, atol=1e-3)
    assert task.autoencoder.decoded_dtypes == [torch.bfloat16]
    assert images.dtype == torch.float32


def test_images_stay_in_range():
    task = make(sampler=SamplerSettings(num_steps=5))
    images = task.sample(task.conditioner(torch.zeros(2, 4, dtype=torch.int64)), [0, 1])
    assert images.abs().max().item() == 1.0  # a gain of 3 would leave the range


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler"])
def test_an_image_depends_on_its_seed_and_condition_alone(sampler):
    task = make(gain=0.3)
    task.autoencoder.gain.data.fill_(0.01)
    conditioning = task.conditioner(torch.arange(12).view(3, 4) % 9)
    options = {"num_steps": 6, "sampler": sampler, "guidance_scale": 3.0}
    if sampler == "ddim":
        options["eta"] = 0.8
    together = task.sample(conditioning, [7, 8, 9], **options)
    alone = task.sample(Conditioning(tokens=conditioning.tokens[1:2]), [8], **options)
    torch.testing.assert_close(alone[0], together[1])
    assert torch.equal(task.sample(conditioning, [7, 8, 9], **options), together)
    assert not torch.allclose(together[0], task.sample(conditioning, [1, 8, 9], **options)[0])


def test_every_step_has_noise_of_its_own():
    task = make(gain=0.3)
    conditioning = task.conditioner(torch.zeros(2, 4, dtype=torch.int64))
    steps = []
    options = {"num_steps": 5, "sampler": "ddpm", "guidance_scale": 1.0}
    task.sample(conditioning, [7, 8], callback=lambda index, latents: steps.append(latents), **options)
    expected = sample_ddpm(
        lambda noised, timesteps: task.denoiser(noised, timesteps, conditioning),
        seeded_noise([7, 8], LATENT_SHAPE, 0),
        process=task.process,
        num_steps=5,
        steps_offset=1,
        noise_fn=lambda index: seeded_noise([7, 8], LATENT_SHAPE, index + 1),
    )
    torch.testing.assert_close(steps[-1], expected)


def test_guidance_is_one_forward_of_twice_the_batch():
    task = make(sampler=SamplerSettings(num_steps=4))
    conditioning = task.conditioner(torch.zeros(3, 4, dtype=torch.int64))
    seen = []
    task.sample(conditioning, [0, 1, 2], guidance_scale=7.5, callback=lambda index, latents: seen.append(index))
    assert [call[0].shape[0] for call in task.denoiser.calls] == [6] * 4
    assert seen == [0, 1, 2, 3]
    null = task.conditioner.null(3).tokens
    assert torch.equal(task.denoiser.calls[0][2].tokens, torch.cat([null, conditioning.tokens]))
    task.denoiser.calls.clear()
    task.sample(conditioning, [0, 1, 2], guidance_scale=1.0)
    assert [call[0].shape[0] for call in task.denoiser.calls] == [3] * 4


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"condition_dropout": 1.0}, "task.condition_dropout: found 1.0, allowed are 0 up to below 1"),
        ({"loss_weighting": 0.0}, "task.loss_weighting.gamma: found 0.0, allowed are numbers above 0"),
        ({"latents": "mode"}, "task.latents: found 'mode', allowed are sample, mean"),
        ({"noise_offset": -0.1}, "process.noise_offset: found -0.1, allowed are 0 and more"),
        ({"loss_bins": 101}, "task.loss_bins: found 101, allowed are 0 to 100"),
    ],
)
def test_refused_arguments(changes, text):
    with pytest.raises(ConfigError) as caught:
        make(**changes)
    assert text in str(caught.value)


def test_a_missing_field_is_named():
    task = make()
    batch = make_batch(task)
    del batch.fields["moments"]
    with pytest.raises(DataError) as caught:
        task.loss("denoiser", batch, 0)
    assert "task latent_diffusion needs the field 'moments' of every sample; fields found: tokens." in str(caught.value)


def test_a_batch_of_another_size_is_trained_on_in_its_own_size():
    task = make()
    assert task.draws.follows == "moments"
    batch = make_batch(task)
    batch.fields["moments"] = torch.zeros(4, 4, 2, 6).half()
    batch.normals = {name: torch.ones(4, 2, 2, 6) for name in task.draws.normals}
    assert task.loss("denoiser", batch, 0).losses.shape == (4,)
    assert task.validate(batch)["loss"].shape == (4,)
    batch.normals["noise"] = torch.ones(4, 2, 4, 4)
    with pytest.raises(DataError, match=r"found shape \(4, 2, 6\), but latents \(2, 4, 4\) need \(4, 4, 4\)"):
        task.loss("denoiser", batch, 0)


def test_moments_of_another_autoencoder_are_refused():
    task = make()
    batch = make_batch(task)
    batch.fields["moments"] = torch.zeros(4, 8, 4, 4)
    with pytest.raises(DataError) as caught:
        task.loss("denoiser", batch, 0)
    text = "field 'moments' of sample 'sample0': found shape (8, 4, 4), but latents (2, 4, 4) need (4, 4, 4)"
    assert text in str(caught.value)
