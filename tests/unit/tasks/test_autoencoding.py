import math

import pytest
import torch
from torch import nn

from sdtrain.errors import ConfigError, DataError
from sdtrain.records import Batch, Conditioning
from sdtrain.samplers.guidance import seeded_noise
from sdtrain.tasks.autoencoding import AutoencodingTask, latent_statistics

LATENT_SHAPE = (3, 4, 4)


class FakeAutoencoder(nn.Module):
    """Mean = pixels of every second row and column times a gain; one log-variance for all; decoding repeats."""

    def __init__(self, gain=1.0, log_variance=-2.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.log_variance = nn.Parameter(torch.tensor(log_variance))

    def encode(self, images):
        mean = images[:, :, ::2, ::2] * self.gain
        return torch.cat([mean, self.log_variance.expand_as(mean)], dim=1)

    def decode(self, raw_latents):
        return raw_latents.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def posterior_mean(self, moments):
        return moments.float().chunk(2, dim=1)[0]

    def posterior_sample(self, moments, noise):
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance) * noise

    def scale(self, raw_latents):
        return raw_latents

    def unscale(self, latents):
        return latents

    def kl(self, moments):
        mean, log_variance = moments.chunk(2, dim=1)
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def make(**changes):
    values = {
        "autoencoder": FakeAutoencoder(),
        "latent_shape": LATENT_SHAPE,
        "reconstruction": "mse",
        "kl_weight": 1e-3,
    }
    return AutoencodingTask(**(values | changes))


def make_batch(pixels):
    size = len(pixels)
    generator = torch.Generator().manual_seed(0)
    return Batch(
        keys=tuple(f"sample{index}" for index in range(size)),
        positions=torch.arange(size),
        fields={"pixels": pixels},
        normals={"posterior": torch.randn(size, *LATENT_SHAPE, generator=generator)},
        uniforms={},
        weights=torch.ones(size),
    )


def blocks(generator_seed=0, size=2):
    """Images that the fake reproduces exactly: every 2x2 block has one colour."""
    generator = torch.Generator().manual_seed(generator_seed)
    small = torch.randint(0, 256, (size, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return small.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_what_the_loader_and_the_trainer_are_told():
    task = make()
    assert task.draws.normals == {"posterior": LATENT_SHAPE}
    assert task.draws.uniforms == ()
    assert task.trainables["autoencoder"].precision == "fp32"
    assert task.trainables["autoencoder"].module is task.autoencoder
    assert task.frozen == {}
    assert task.is_active("autoencoder", 0)


def test_pixels_become_images_from_minus_one_to_one():
    task, seen = make(), []
    encode = task.autoencoder.encode
    task.autoencoder.encode = lambda images: seen.append(images) or encode(images)
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    pixels[:, 1], pixels[:, 2] = 255, 51
    task.loss("autoencoder", make_batch(pixels), 0)
    assert [channel.unique().item() for channel in seen[0][0]] == pytest.approx([-1.0, 1.0, -0.6])


@pytest.mark.parametrize("reconstruction", ["mse", "l1"])
def test_loss_by_hand(reconstruction):
    """The fake's error is the posterior noise alone; error is a mean, KL a sum."""
    task = make(reconstruction=reconstruction)
    batch = make_batch(blocks())
    output = task.loss("autoencoder", batch, 0)
    deviation = math.exp(-1.0) * batch.normals["posterior"]
    error = (deviation.square() if reconstruction == "mse" else deviation.abs()).mean((1, 2, 3))
    images = batch.fields["pixels"][:, :, ::2, ::2] / 127.5 - 1
    kl = 0.5 * (images.square() + math.exp(-2) - 1 + 2).sum((1, 2, 3))
    torch.testing.assert_close(output.metrics["reconstruction"], error)
    torch.testing.assert_close(output.metrics["kl"], kl)
    torch.testing.assert_close(output.losses, error + 1e-3 * kl)
    assert not output.metrics["kl"].requires_grad
    assert output.weights is batch.weights
    output.losses.sum().backward()
    assert all(parameter.grad.abs() > 0 for parameter in task.autoencoder.parameters())


def test_validation_has_the_training_loss_and_no_graph():
    task = make()
    batch = make_batch(blocks())
    figures = task.validate(batch)
    torch.testing.assert_close(figures["loss"], task.loss("autoencoder", batch, 0).losses.detach())
    torch.testing.assert_close(figures["loss"], figures["reconstruction"] + 1e-3 * figures["kl"])
    assert not figures["loss"].requires_grad
    assert task.autoencoder.training


def test_sampling_reconstructs_what_is_given_by_seed():
    task = make()
    images = blocks() / 127.5 - 1
    result = task.sample(Conditioning(spatial=images), [3, 4])
    noise = seeded_noise([3, 4], LATENT_SHAPE, 0).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(result, (images + math.exp(-1) * noise).clamp(-1, 1))
    torch.testing.assert_close(task.sample(Conditioning(spatial=images[1:]), [4])[0], result[1])


def test_sampling_nothing_is_refused():
    with pytest.raises(ConfigError, match="an autoencoder has no images of its own to sample; give the images"):
        make().sample(Conditioning(), [0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"reconstruction": "huber"}, "task.reconstruction: found 'huber', allowed are mse, l1"),
        ({"kl_weight": -1.0}, "task.kl_weight: found -1.0, allowed are 0 and more"),
    ],
)
def test_refused_arguments(changes, text):
    with pytest.raises(ConfigError) as caught:
        make(**changes)
    assert text in str(caught.value)


def test_images_of_another_size_are_refused():
    with pytest.raises(DataError) as caught:
        make().loss("autoencoder", make_batch(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), 0)
    assert "field 'pixels' of sample 'sample0': images (3, 16, 16) have latents of size (8, 8)" in str(caught.value)
    assert "this run is set up for (4, 4); train on shards of one image size" in str(caught.value)


def moments(size, mean=2.0, std=3.0, log_variance=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = mean + std * torch.randn(size, *LATENT_SHAPE, generator=generator)
    return torch.cat([means, torch.full_like(means, log_variance)], dim=1)


def test_statistics_of_a_stream_are_those_of_the_whole():
    whole = moments(50)
    found = latent_statistics(FakeAutoencoder(), whole.split([1, 20, 29]), latents="mean")
    means = whole[:, :3].double()
    assert found.mean == pytest.approx(means.mean().item(), rel=1e-12)
    assert found.std == pytest.approx(means.std(correction=0).item(), rel=1e-12)
    assert found.num_values == means.numel()
    assert found.scaling_factor == pytest.approx(1 / found.std)


def test_statistics_of_samples_hold_the_posterior_variance_without_drawing():
    whole = moments(2000)
    found = latent_statistics(FakeAutoencoder(), whole.split(500), latents="sample")
    by_mean = latent_statistics(FakeAutoencoder(), whole.split(500), latents="mean")
    assert found.std**2 == pytest.approx(by_mean.std**2 + math.exp(0.5), rel=1e-6)
    noise = torch.randn(2000, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    drawn = FakeAutoencoder().posterior_sample(whole, noise)
    assert found.std == pytest.approx(drawn.std().item(), rel=0.02)


def test_a_large_mean_costs_no_digits():
    whole = moments(100, mean=1e4, std=1e-2)
    found = latent_statistics(FakeAutoencoder(), whole.split(10), latents="mean")
    assert found.std == pytest.approx(whole[:, :3].double().std(correction=0).item(), rel=1e-9)


@pytest.mark.parametrize("stream", [[], [torch.ones(2, 6, 4, 4)]])
def test_statistics_of_nothing_are_refused(stream):
    with pytest.raises(DataError, match=r"latent statistics over \d+ values: the spread is not defined"):
        latent_statistics(FakeAutoencoder(), stream, latents="mean")
