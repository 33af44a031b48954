import pytest
import torch

from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.diffusion.targets import add_noise, target, to_clean_and_noise
from sdtrain.diffusion.weighting import min_snr

TYPES = ("epsilon", "v_prediction", "sample", "flow")


def test_golden_weight_of_stable_diffusion_at_timestep_0():
    process = DiffusionProcess(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        prediction_type="epsilon",
    )
    snr = process.snr(torch.tensor([0]))
    assert min_snr(snr, 5.0, "epsilon").item() == pytest.approx(0.00425, abs=5e-6)
    assert min_snr(snr, 5.0, "v_prediction").item() == pytest.approx(5 / (1 + 0.99915 / 0.00085))
    assert min_snr(snr, 5.0, "sample").item() == 5.0


def test_closed_forms_on_both_sides_of_gamma():
    snr = torch.tensor([0.5, 5.0, 20.0])
    torch.testing.assert_close(min_snr(snr, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 0.25]))
    torch.testing.assert_close(min_snr(snr, 5.0, "v_prediction"), torch.tensor([1 / 3, 5 / 6, 5 / 21]))
    torch.testing.assert_close(min_snr(snr, 5.0, "sample"), torch.tensor([0.5, 5.0, 5.0]))
    time = 1 / (1 + snr.sqrt())  # of the straight path
    torch.testing.assert_close(min_snr(snr, 5.0, "flow"), torch.tensor([0.5, 5.0, 5.0]) * time**2)


def test_no_signal_and_no_noise_give_finite_weights():
    nothing, everything = torch.zeros(1), torch.full((1,), torch.inf)
    assert [min_snr(nothing, 5.0, kind).item() for kind in TYPES] == [1.0, 0.0, 0.0, 0.0]
    assert [min_snr(everything, 5.0, kind).item() for kind in TYPES] == [0.0, 0.0, 5.0, 0.0]


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_weighted_error_is_the_same_objective_for_every_prediction(prediction_type):
    """Weight x error of a prediction == min(SNR, gamma) x error of the clean item that it stands for."""
    generator = torch.Generator().manual_seed(0)
    clean, noise, wrong = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    alpha_bar = torch.tensor([0.999, 0.9, 0.4, 0.01], dtype=torch.float64)
    snr = alpha_bar / (1 - alpha_bar)
    wanted = target(prediction_type, clean, noise, alpha_bar)
    prediction = wanted + 0.1 * wrong
    clean_back, _ = to_clean_and_noise(prediction_type, prediction, add_noise(clean, noise, alpha_bar), alpha_bar)
    error = (prediction - wanted).square().flatten(1).mean(1)
    clean_error = (clean_back - clean).square().flatten(1).mean(1)
    torch.testing.assert_close(min_snr(snr, 5.0, prediction_type) * error, snr.clamp(max=5.0) * clean_error)
