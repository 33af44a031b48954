import math

import pytest
import torch

from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.diffusion.targets import add_noise, target
from sdtrain.errors import ConfigError
from sdtrain.samplers.ddim import ddim_sigma, ddim_step, sample_ddim
from sdtrain.samplers.ddpm import ddpm_mean, ddpm_sigma, sample_ddpm
from sdtrain.samplers.euler import euler_step, flow_time, sample_euler
from sdtrain.samplers.settings import SamplerSettings, run_sampler
from sdtrain.samplers.thresholding import FixedRange

TYPES = ("epsilon", "v_prediction", "sample", "flow")


def process(prediction_type="epsilon", **changes):
    if prediction_type == "flow":
        return DiffusionProcess(prediction_type="flow", **({"num_train_timesteps": 1000} | changes))
    values = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    return DiffusionProcess(prediction_type=prediction_type, **(values | changes))


def noise_of(index):
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(100 + index), dtype=torch.float64)


def at_level(of, shown, timesteps):
    """(noised, alpha, sigma, alpha_bar): what the denoiser was shown, back on the process's own scale."""
    alpha_bar = of.alpha_bar_float64[timesteps]
    alpha, sigma = (root.sqrt().view(-1, 1, 1, 1) for root in (alpha_bar, 1 - alpha_bar))
    return shown * (alpha + sigma if of.prediction_type == "flow" else 1), alpha, sigma, alpha_bar


def oracle(of, mean, std):
    """The ideal denoiser of data N(mean, std^2): E[target | noised], in closed form."""

    def model(shown, timesteps):
        noised, alpha, sigma, alpha_bar = at_level(of, shown, timesteps)
        clean = mean + (noised - alpha * mean) * alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        noise = (noised - alpha * clean) / sigma
        return target(of.prediction_type, clean, noise, alpha_bar)

    return model


def known_clean(of, clean):
    """A denoiser that knows the one clean item."""

    def model(shown, timesteps):
        noised, alpha, sigma, alpha_bar = at_level(of, shown, timesteps)
        return target(of.prediction_type, clean, (noised - alpha * clean) / sigma, alpha_bar)

    return model


@pytest.mark.parametrize("prediction_type", TYPES)
def test_samplers_find_the_only_item_there_is(prediction_type):
    of, clean, start = process(prediction_type), noise_of(50), noise_of(0)
    model = known_clean(of, clean)
    by_ddim = sample_ddim(model, start, process=of, num_steps=5, final_alpha_bar="one")
    by_ddpm = sample_ddpm(model, start, process=of, num_steps=5, noise_fn=noise_of)
    by_euler = sample_euler(model, start, process=of, num_steps=5)
    torch.testing.assert_close(by_euler, clean, rtol=0, atol=1e-9)
    torch.testing.assert_close(by_ddim, clean, rtol=0, atol=1e-9)
    torch.testing.assert_close(by_ddpm, clean, rtol=0, atol=1e-9)


def test_ddim_keeps_the_noise_and_ends_at_the_level_of_timestep_0():
    """For the oracle of one item DDIM is add_noise of that item with the noise of the start."""
    of, clean, start = process(), noise_of(50), noise_of(0)
    steps = []
    end = sample_ddim(
        known_clean(of, clean),
        start,
        process=of,
        num_steps=10,
        spacing="trailing",
        callback=lambda i, x: steps.append((i, x)),
    )
    level = of.alpha_bar_float64[-1]
    noise = (start - level.sqrt() * clean) / (1 - level).sqrt()
    assert [index for index, _ in steps] == list(range(10))
    assert torch.equal(steps[-1][1], end)
    for index, timestep in [(0, 899), (4, 499), (8, 99), (9, 0)]:
        expected = add_noise(clean, noise, of.alpha_bar_float64[timestep].expand(2))
        torch.testing.assert_close(steps[index][1], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_ddim_converges_to_the_closed_form_of_a_gaussian(prediction_type):
    """Data N(m, s^2): the probability flow maps noise z to m + s * z (up to what is left at the two ends)."""
    of = process(prediction_type)
    mean, std = 1.5, 0.5
    start = math.sqrt(of.alpha_bar_float64[-1]) * mean + noise_of(0)  # what the forward process ends in
    end = sample_ddim(oracle(of, mean, std), start, process=of, num_steps=1000, steps_offset=0, final_alpha_bar="one")
    torch.testing.assert_close(end, mean + std * noise_of(0), rtol=0, atol=0.02)


def test_ddpm_samples_have_the_spread_of_the_data():
    of, mean, std = process(), 1.5, 0.5
    generator = torch.Generator().manual_seed(0)

    def draw(index):
        return torch.randn(64, 4, 6, 6, generator=generator, dtype=torch.float64)

    end = sample_ddpm(oracle(of, mean, std), draw(-1), process=of, noise_fn=draw)
    assert end.mean().item() == pytest.approx(mean, abs=0.02)
    assert end.std().item() == pytest.approx(std, abs=0.01)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_euler_is_ddim_without_noise(prediction_type):
    """On every process: the straight path between noise and clean item is DDIM's path on another scale."""
    of = process(prediction_type)
    model = oracle(of, 0.3, 0.8)
    by_euler = sample_euler(model, noise_of(0), process=of, num_steps=12)
    by_ddim = sample_ddim(model, noise_of(0), process=of, num_steps=12, spacing="trailing", final_alpha_bar="one")
    torch.testing.assert_close(by_euler, by_ddim, rtol=0, atol=1e-12)


def test_euler_closed_forms():
    latents, velocity = noise_of(0), noise_of(1)
    torch.testing.assert_close(euler_step(latents, velocity, time=0.75, next_time=0.25), latents - 0.5 * velocity)
    assert [flow_time(0.0), flow_time(1.0), flow_time(0.5)] == [1.0, 0.0, 0.5]
    assert flow_time(0.36) == pytest.approx(0.8 / 1.4)


def test_ddim_with_eta_1_is_ancestral_sampling():
    of = process()
    arguments = {"process": of, "num_steps": 12, "noise_fn": noise_of, "steps_offset": 0}
    by_ddim = sample_ddim(oracle(of, 0.3, 0.8), noise_of(0), eta=1.0, final_alpha_bar="one", **arguments)
    by_ddpm = sample_ddpm(oracle(of, 0.3, 0.8), noise_of(0), **arguments)
    torch.testing.assert_close(by_ddim, by_ddpm, rtol=0, atol=1e-12)


def test_one_step_closed_forms():
    clean, noise = noise_of(0), noise_of(1)
    torch.testing.assert_close(ddim_step(clean, noise, alpha_bar_prev=0.36), 0.6 * clean + 0.8 * noise)
    # 0.8^2 = 0.64 = 0.48^2 + 0.64^2
    fresh = ddim_step(clean, noise, alpha_bar_prev=0.36, sigma=0.48, fresh_noise=noise_of(2))
    torch.testing.assert_close(fresh, 0.6 * clean + 0.64 * noise + 0.48 * noise_of(2))
    # alpha_bar 0.25 -> 0.5: alpha = 0.5, variance = 0.5 / 0.75 * 0.5 = 1/3
    assert ddim_sigma(0.25, 0.5, 1.0) == pytest.approx(math.sqrt(1 / 3))
    assert ddim_sigma(0.25, 0.5, 0.5) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert ddpm_sigma(0.25, 0.5) == pytest.approx(math.sqrt(1 / 3))
    mean = ddpm_mean(clean, noise, alpha_bar=0.25, alpha_bar_prev=0.5)
    torch.testing.assert_close(mean, math.sqrt(0.5) * (0.5 / 0.75 * clean + 0.5 / 0.75 * noise))


def test_the_posterior_is_consistent_with_the_forward_process():
    """Noising clean to the high level and stepping back gives the mean and the variance of the low level."""
    high, low = 0.1, 0.6
    clean_weight = ddpm_mean(torch.ones(1), torch.zeros(1), alpha_bar=high, alpha_bar_prev=low).item()
    noised_weight = ddpm_mean(torch.zeros(1), torch.ones(1), alpha_bar=high, alpha_bar_prev=low).item()
    assert clean_weight + noised_weight * math.sqrt(high) == pytest.approx(math.sqrt(low))
    assert noised_weight**2 * (1 - high) + ddpm_sigma(high, low) ** 2 == pytest.approx(1 - low)


def test_clean_finish_adds_no_noise_in_the_last_steps():
    of, asked = process(), []

    def noise_fn(index):
        asked.append(index)
        return noise_of(index)

    sample_ddpm(oracle(of, 0.0, 1.0), noise_of(0), process=of, num_steps=10, noise_fn=noise_fn)
    assert asked == list(range(9))
    asked.clear()
    sample_ddpm(oracle(of, 0.0, 1.0), noise_of(0), process=of, num_steps=10, noise_fn=noise_fn, noiseless_final_steps=4)
    assert asked == list(range(6))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler"])
def test_latents_are_not_clipped_unless_asked(sampler):
    of, clean = process(), 5.0 * noise_of(50)
    model = known_clean(of, clean)
    plain = SamplerSettings(sampler=sampler, num_steps=5, final_alpha_bar="one")
    clipped = SamplerSettings(sampler=sampler, num_steps=5, final_alpha_bar="one", thresholding=FixedRange(1.0))
    torch.testing.assert_close(
        run_sampler(plain, model, noise_of(0), process=of, noise_fn=noise_of), clean, rtol=0, atol=1e-8
    )
    bounded = run_sampler(clipped, model, noise_of(0), process=of, noise_fn=noise_of)
    torch.testing.assert_close(bounded, clean.clamp(-1, 1), rtol=0, atol=1e-8)


def test_samplers_start_from_pure_noise_with_zero_terminal_snr():
    of, clean = process("v_prediction", zero_terminal_snr=True), noise_of(50)

    def model(noised, timesteps):  # at alpha_bar 0 the velocity is -clean
        alpha_bar = of.alpha_bar_float64[timesteps]
        alpha, sigma = (root.sqrt().view(-1, 1, 1, 1) for root in (alpha_bar, 1 - alpha_bar))
        return target("v_prediction", clean, (noised - alpha * clean) / sigma, alpha_bar)

    for sampler in ("ddim", "ddpm", "euler"):
        settings = SamplerSettings(sampler=sampler, num_steps=8, spacing="trailing", final_alpha_bar="one")
        end = run_sampler(settings, model, noise_of(0), process=of, noise_fn=noise_of)
        torch.testing.assert_close(end, clean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler"])
@pytest.mark.parametrize(
    ("of", "visited"),
    [
        (process(), [751, 501, 251, 1]),
        (process("v_prediction", zero_terminal_snr=True), [999, 749, 499, 249]),
        (process("sample", zero_terminal_snr=True), [999, 749, 499, 249]),
        (process("flow"), [999, 749, 499, 249]),
    ],
)
def test_a_process_that_ends_in_noise_is_sampled_from_its_end(sampler, of, visited):
    asked = []

    def model(shown, timesteps):
        asked.append(timesteps[0].item())
        return torch.zeros_like(shown)

    end = run_sampler(SamplerSettings(sampler=sampler, num_steps=4), model, noise_of(0), process=of, noise_fn=noise_of)
    assert asked == visited
    assert end.isfinite().all()


def test_a_flow_ends_without_noise_whatever_samples_it():
    of, clean = process("flow", shift=3.0), noise_of(50)
    for sampler in ("ddim", "ddpm", "euler"):
        settings = SamplerSettings(sampler=sampler, num_steps=6)
        end = run_sampler(settings, known_clean(of, clean), noise_of(0), process=of, noise_fn=noise_of)
        torch.testing.assert_close(end, clean, rtol=0, atol=1e-9)


def test_settings_reach_the_sampler():
    of, model = process(), oracle(process(), 0.3, 0.8)
    calls = []
    settings = SamplerSettings(num_steps=6, eta=0.5, spacing="linspace", final_alpha_bar="one")
    end = run_sampler(
        settings, model, noise_of(0), process=of, noise_fn=noise_of, callback=lambda index, _: calls.append(index)
    )
    expected = sample_ddim(
        model,
        noise_of(0),
        process=of,
        num_steps=6,
        eta=0.5,
        noise_fn=noise_of,
        spacing="linspace",
        final_alpha_bar="one",
    )
    assert torch.equal(end, expected)
    assert calls == list(range(6))
    everything = SamplerSettings(sampler="ddpm", num_steps=None)
    short = process(num_train_timesteps=20)
    assert torch.equal(
        run_sampler(everything, oracle(short, 0.3, 0.8), noise_of(0), process=short, noise_fn=noise_of),
        sample_ddpm(oracle(short, 0.3, 0.8), noise_of(0), process=short, noise_fn=noise_of),
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SamplerSettings(sampler="pndm"), "sampler: found 'pndm', allowed are ddim, ddpm, euler"),
        (lambda: SamplerSettings(num_steps=None), "num_steps: found none, ddim needs a number of steps"),
        (
            lambda: SamplerSettings(sampler="euler", num_steps=None),
            "num_steps: found none, euler needs a number of steps; only ddpm can visit every timestep",
        ),
        (
            lambda: sample_ddim(None, noise_of(0), process=process(), num_steps=5, eta=1.5),
            "eta: found 1.5, allowed are 0 (deterministic) to 1 (ancestral)",
        ),
        (
            lambda: sample_ddim(None, noise_of(0), process=process(), num_steps=5, eta=0.5),
            "eta: 0.5 adds noise at every step, so noise_fn must be given; use eta 0 without one",
        ),
        (
            lambda: sample_ddpm(None, noise_of(0), process=process(), noise_fn=noise_of, noiseless_final_steps=-1),
            "noiseless_final_steps: found -1, allowed are 0 and more",
        ),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ConfigError) as caught:
        make()
    assert text in str(caught.value)
