"""Min-SNR weights against diffusers' training code, and against the figures of Stable Diffusion's schedule."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.diffusion.weighting import min_snr

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def process(prediction_type):
    return DiffusionProcess(num_train_timesteps=1000, prediction_type=prediction_type, **STABLE_DIFFUSION)


def test_snr():
    timesteps = torch.arange(1000)
    theirs = compute_snr(DDPMScheduler(**STABLE_DIFFUSION), timesteps)
    torch.testing.assert_close(process("epsilon").snr(timesteps), theirs, rtol=2e-4, atol=0)


@pytest.mark.parametrize(("prediction_type", "added"), [("epsilon", 0), ("v_prediction", 1)])
def test_weights_of_the_published_training_script(prediction_type, added):
    """min(SNR, gamma) / SNR, and / (SNR + 1) for the velocity, as the text-to-image example computes them."""
    timesteps = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(**STABLE_DIFFUSION), timesteps)
    theirs = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / (snr + added)
    weights = min_snr(process(prediction_type).snr(timesteps), 5.0, prediction_type)
    torch.testing.assert_close(weights, theirs, rtol=2e-4, atol=0)


def test_goldens_of_stable_diffusion():
    first = torch.tensor([0])
    assert process("epsilon").snr(first).item() == pytest.approx(1175.4, abs=0.1)
    assert min_snr(process("epsilon").snr(first), 5.0, "epsilon").item() == pytest.approx(0.00425, abs=5e-6)
    assert process("epsilon").alpha_bar[-1].item() == pytest.approx(0.00466, abs=5e-6)
