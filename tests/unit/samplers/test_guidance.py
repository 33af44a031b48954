import pytest
import torch

from sdtrain.records import Conditioning
from sdtrain.samplers.guidance import guided, seeded_noise


class Recorder:
    """A denoiser that is linear in its condition and remembers how it was called."""

    def __init__(self):
        self.batches = []

    def __call__(self, latents, timesteps, conditioning):
        self.batches.append(latents.shape[0])
        shift = 0.0 if conditioning.tokens is None else conditioning.tokens.mean((1, 2)).view(-1, 1, 1, 1)
        return latents * timesteps.view(-1, 1, 1, 1) + shift


LATENTS = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
TIMESTEPS = torch.tensor([1, 2, 3])
CONDITIONING = Conditioning(tokens=torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1)))
NULL = Conditioning(tokens=torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2)))


def test_scale_1_is_the_conditional_pass_alone():
    denoiser = Recorder()
    prediction = guided(denoiser, CONDITIONING, NULL, 1.0)(LATENTS, TIMESTEPS)
    assert denoiser.batches == [3]
    assert torch.equal(prediction, Recorder()(LATENTS, TIMESTEPS, CONDITIONING))


@pytest.mark.parametrize("scale", [0.0, 0.5, 7.5])
def test_guidance_is_one_forward_of_twice_the_batch(scale):
    denoiser = Recorder()
    prediction = guided(denoiser, CONDITIONING, NULL, scale)(LATENTS, TIMESTEPS)
    assert denoiser.batches == [6]
    conditional = Recorder()(LATENTS, TIMESTEPS, CONDITIONING)
    unconditional = Recorder()(LATENTS, TIMESTEPS, NULL)
    torch.testing.assert_close(prediction, (1 - scale) * unconditional + scale * conditional)


def test_without_conditions_there_is_nothing_to_guide():
    denoiser = Recorder()
    guided(denoiser, Conditioning(), Conditioning(), 7.5)(LATENTS, TIMESTEPS)
    assert denoiser.batches == [3]


def test_noise_of_an_item_depends_on_its_seed_alone():
    shape = (4, 8, 8)
    noise = seeded_noise([7, 8, 9], shape, 0)
    assert noise.shape == (3, *shape)
    assert noise.dtype == torch.float32
    assert torch.equal(seeded_noise([9], shape, 0)[0], noise[2])
    assert torch.equal(seeded_noise([8, 7], shape, 0), noise[[1, 0]])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(seeded_noise([7], shape, 1)[0], noise[0])


def test_noise_is_standard_normal():
    noise = seeded_noise(range(64), (4, 32, 32), 3).double()
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01)
    assert noise.std().item() == pytest.approx(1.0, abs=0.01)
