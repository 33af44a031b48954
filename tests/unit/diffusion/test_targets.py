import pytest
import torch

from sdtrain.diffusion.targets import add_noise, noise_from_clean, rectified, target, to_clean_and_noise

TYPES = ("epsilon", "v_prediction", "sample", "flow")
ALPHA_BAR = torch.tensor([0.99915, 0.5, 0.00466])


def pair(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=dtype)
    return clean, noise


def test_add_noise_closed_form():
    clean, noise = pair()
    noised = add_noise(clean, noise, torch.tensor([1.0, 0.36, 0.0]))
    assert torch.equal(noised[0], clean[0])
    torch.testing.assert_close(noised[1], 0.6 * clean[1] + 0.8 * noise[1])
    assert torch.equal(noised[2], noise[2])


def test_targets_closed_form():
    clean, noise = pair()
    alpha_bar = torch.tensor([0.36, 0.36, 0.64])
    assert torch.equal(target("epsilon", clean, noise, alpha_bar), noise)
    assert torch.equal(target("sample", clean, noise, alpha_bar), clean)
    velocity = target("v_prediction", clean, noise, alpha_bar)
    torch.testing.assert_close(velocity[0], 0.6 * noise[0] - 0.8 * clean[0])
    torch.testing.assert_close(velocity[2], 0.8 * noise[2] - 0.6 * clean[2])
    assert torch.equal(target("flow", clean, noise, alpha_bar), noise - clean)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_prediction_gives_clean_and_noise_back(prediction_type):
    clean, noise = pair(torch.float64)
    noised = add_noise(clean, noise, ALPHA_BAR)
    perfect = target(prediction_type, clean, noise, ALPHA_BAR)
    clean_back, noise_back = to_clean_and_noise(prediction_type, perfect, noised, ALPHA_BAR)
    torch.testing.assert_close(clean_back, clean, rtol=0, atol=1e-6)  # alpha_bar is float32 here
    torch.testing.assert_close(noise_back, noise, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_any_prediction_mixes_back_to_what_was_noised(prediction_type):
    noised, prediction = pair()
    clean, noise = to_clean_and_noise(prediction_type, prediction, noised, ALPHA_BAR)
    torch.testing.assert_close(add_noise(clean, noise, ALPHA_BAR), noised, rtol=1e-4, atol=1e-5)


def test_noise_from_clean_mixes_back():
    noised, clean = pair()
    torch.testing.assert_close(add_noise(clean, noise_from_clean(clean, noised, ALPHA_BAR), ALPHA_BAR), noised)


def test_velocity_is_the_derivative_along_the_angle():
    # Salimans & Ho: with alpha = cos(phi), sigma = sin(phi), v = d noised / d phi.
    clean, noise = pair(torch.float64)
    phi = torch.tensor([0.2, 0.7, 1.3], dtype=torch.float64)
    step = 1e-6
    slope = (
        add_noise(clean, noise, torch.cos(phi + step) ** 2) - add_noise(clean, noise, torch.cos(phi - step) ** 2)
    ) / (2 * step)
    torch.testing.assert_close(target("v_prediction", clean, noise, torch.cos(phi) ** 2), slope, rtol=1e-7, atol=1e-7)


def test_flow_is_the_derivative_along_the_straight_line():
    clean, noise = pair(torch.float64)
    time = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def on_the_line(time):
        alpha_bar = (1 - time) ** 2 / ((1 - time) ** 2 + time**2)
        return rectified(add_noise(clean, noise, alpha_bar), alpha_bar)

    place = time.view(-1, 1, 1, 1)
    torch.testing.assert_close(on_the_line(time), (1 - place) * clean + place * noise)
    slope = (on_the_line(time + 1e-6) - on_the_line(time - 1e-6)) / 2e-6
    torch.testing.assert_close(target("flow", clean, noise, time), slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "flow"])
def test_pure_noise_gives_the_clean_item_that_is_predicted_and_itself(prediction_type):
    clean, noise = pair()
    nothing = torch.zeros(3)
    perfect = target(prediction_type, clean, noise, nothing)
    clean_back, noise_back = to_clean_and_noise(prediction_type, perfect, noise, nothing)
    torch.testing.assert_close(clean_back, clean)
    torch.testing.assert_close(noise_back, noise)


def test_float64_levels_do_not_promote_float32_items():
    clean, noise = pair()
    assert add_noise(clean, noise, ALPHA_BAR.double()).dtype == torch.float32
    prediction = noise.to(torch.bfloat16)
    back = to_clean_and_noise("epsilon", prediction, clean, ALPHA_BAR.double())
    assert [part.dtype for part in back] == [torch.float32, torch.float32]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(half):
    clean, noise = pair()
    text = "diffusion maths needs float32 or float64: found alpha_bar {} and items {}; cast after the noise is added"
    with pytest.raises(TypeError) as caught:
        add_noise(clean, noise, ALPHA_BAR.to(half))
    assert text.format(half, torch.float32) in str(caught.value)
    with pytest.raises(TypeError) as caught:
        target("v_prediction", clean.to(half), noise.to(half), ALPHA_BAR)
    assert text.format(torch.float32, half) in str(caught.value)
