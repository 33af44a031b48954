import dataclasses
import math

import pytest
import torch

from sdtrain.diffusion import schedules
from sdtrain.diffusion.process import DiffusionProcess, add_noise
from sdtrain.errors import ConfigError


def stable_diffusion(**changes):
    values = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    }
    return DiffusionProcess(**(values | changes))


def all_timesteps(process):
    return torch.arange(process.num_train_timesteps)


def test_golden_values_of_stable_diffusion():
    process = stable_diffusion()
    assert process.alpha_bar.dtype == torch.float32
    assert process.alpha_bar[-1].item() == pytest.approx(0.00466, abs=5e-6)
    assert process.snr(torch.tensor([0])).item() == pytest.approx(1175.4, abs=0.1)
    # 1 - beta_0 = 0.99915 exactly, so SNR(0) has a closed form; float32 arithmetic on alpha_bar misses it by 0.03.
    assert process.snr(torch.tensor([0])).item() == pytest.approx(0.99915 / 0.00085, rel=1e-7)


def test_golden_values_of_the_linear_schedule():
    process = stable_diffusion(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    assert process.betas[0].item() == 1e-4
    assert process.betas[-1].item() == pytest.approx(0.02)
    assert process.betas[500].item() == pytest.approx(1e-4 + (0.02 - 1e-4) * 500 / 999)
    assert process.alpha_bar[-1].item() == pytest.approx(4.036e-5, rel=1e-3)  # Ho et al.: "4e-5"


def test_scaled_linear_is_linear_in_the_root():
    roots = stable_diffusion().betas.sqrt()
    torch.testing.assert_close(roots.diff(), torch.full_like(roots[1:], (0.012**0.5 - 0.00085**0.5) / 999))


def test_cosine_follows_its_closed_form_until_the_bound():
    process = stable_diffusion(beta_schedule="cosine")

    def level(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for timestep in (0, 1, 499, 990):
        expected = level((timestep + 1) / 1000) / level(0)
        assert process.alpha_bar_float64[timestep].item() == pytest.approx(expected, rel=1e-10)
    assert process.betas.max().item() == 0.9999
    assert process.betas[-1].item() == 0.9999


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "cosine"])
def test_identities_of_a_variance_preserving_process(beta_schedule):
    process = stable_diffusion(beta_schedule=beta_schedule)
    timesteps = all_timesteps(process)
    alpha, sigma = process.alpha_sigma(timesteps)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000), rtol=0, atol=2e-7)
    torch.testing.assert_close(process.snr(timesteps), (alpha / sigma) ** 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(process.log_snr(timesteps).exp(), process.snr(timesteps), rtol=1e-5, atol=0)
    assert (process.alpha_bar_float64.diff() < 0).all()
    assert torch.equal(process.alpha_bar_at(timesteps), process.alpha_bar_float64)
    assert not process.ends_in_noise
    assert process.alpha_bar.dtype == alpha.dtype == torch.float32


def test_zero_terminal_snr_ends_in_pure_noise_and_starts_where_it_did():
    plain = stable_diffusion(prediction_type="v_prediction")
    rescaled = dataclasses.replace(plain, zero_terminal_snr=True)
    assert rescaled.alpha_bar[-1].item() == 0.0
    assert rescaled.ends_in_noise
    assert rescaled.alpha_bar[0].item() == plain.alpha_bar[0].item()
    assert rescaled.snr(torch.tensor([999])).item() == 0.0
    assert rescaled.log_snr(torch.tensor([999])).item() == -math.inf
    roots, plain_roots = rescaled.alpha_bar_float64.sqrt(), plain.alpha_bar_float64.sqrt()
    ratio = (roots[:-1] - roots[-1]) / (plain_roots[:-1] - plain_roots[-1])
    torch.testing.assert_close(ratio, ratio[0].expand(999), rtol=1e-9, atol=0)


def flow(**changes):
    return DiffusionProcess(**({"num_train_timesteps": 1000, "prediction_type": "flow"} | changes))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_flow_runs_straight_from_the_data_to_the_noise(shift):
    process = flow(shift=shift)
    time = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    time = shift * time / (1 + (shift - 1) * time)
    assert process.ends_in_noise
    timesteps = all_timesteps(process)
    clean, noise = torch.randn(2, 1000, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    alpha_bar = process.alpha_bar_at(timesteps)
    shown = process.denoiser_input(add_noise(clean, noise, alpha_bar), alpha_bar)
    straight = (1 - time).view(-1, 1, 1, 1) * clean.double() + time.view(-1, 1, 1, 1) * noise.double()
    assert (shown - straight).abs().max().item() < 1e-6
    assert torch.equal(shown[-1], noise[-1])
    torch.testing.assert_close(process.snr(timesteps).double(), ((1 - time) / time).square(), rtol=1e-6, atol=0)


def test_the_least_noise_of_a_flow_is_not_lost_to_rounding():
    """1 - alpha_bar is 1e-6 there, of which float32 would keep one digit."""
    clean, noise = torch.zeros(1, 1), torch.ones(1, 1)
    process = flow()
    alpha_bar = process.alpha_bar_at(torch.tensor([0]))
    shown = process.denoiser_input(add_noise(clean, noise, alpha_bar), alpha_bar)
    assert shown.item() == pytest.approx(0.001, rel=1e-6)


def test_other_predictions_are_shown_the_noised_items_themselves():
    noised = torch.randn(2, 3)
    process = stable_diffusion()
    assert process.denoiser_input(noised, process.alpha_bar_at(torch.tensor([0, 999]))) is noised


def test_the_betas_of_a_flow_are_those_of_its_variance_preserving_twin():
    process = flow(shift=3.0)
    torch.testing.assert_close((1 - process.betas).cumprod(0), process.alpha_bar_float64, rtol=1e-9, atol=1e-15)


def test_process_is_a_value():
    assert stable_diffusion() == stable_diffusion()
    assert stable_diffusion() != stable_diffusion(beta_end=0.013)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stable_diffusion().beta_end = 0.5


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule: found 'sigmoid', allowed are linear, scaled_linear, cosine"),
        ({"num_train_timesteps": 0}, "num_train_timesteps: found 0, allowed are 1 and more"),
        ({"beta_start": 0.0}, "found 0.0 and 0.012, allowed are 0 < beta_start <= beta_end < 1"),
        ({"beta_start": 0.02}, "found 0.02 and 0.012, allowed are 0 < beta_start <= beta_end < 1"),
        ({"beta_schedule": "linear", "beta_end": 1.0}, "found 0.00085 and 1.0, allowed are 0 < beta_start"),
        ({"prediction_type": "x0"}, "prediction_type: found 'x0', allowed are epsilon, v_prediction, sample"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr: the last timestep holds no signal"),
        (
            {"zero_terminal_snr": True},
            "so process.prediction_type epsilon cannot give the image back; allowed are v",
        ),
        ({"beta_schedule": None}, "beta_schedule: found None, allowed are linear, scaled_linear, cosine"),
        ({"shift": 3.0}, "process.shift: found 3.0, but process.prediction_type epsilon takes its noise levels from"),
        ({"prediction_type": "flow"}, "process.beta_schedule scaled_linear, process.zero_terminal_snr False: process"),
        (
            {"prediction_type": "flow", "beta_schedule": None, "zero_terminal_snr": True},
            "process.prediction_type flow runs straight to pure noise and has neither; leave both out",
        ),
        (
            {"prediction_type": "flow", "beta_schedule": None, "shift": 0.0},
            "process.shift: found 0.0, allowed are numbers above 0",
        ),
        (
            {"prediction_type": "flow", "beta_schedule": None, "num_train_timesteps": 0},
            "process.num_train_timesteps: found 0, allowed are 1 and more",
        ),
    ],
)
def test_refusals(changes, text):
    with pytest.raises(ConfigError) as caught:
        stable_diffusion(**changes)
    assert text in str(caught.value)


def test_betas_are_float64():
    for name in ("linear", "scaled_linear", "cosine"):
        assert schedules.betas(name, 1e-4, 0.02, 10).dtype == torch.float64
