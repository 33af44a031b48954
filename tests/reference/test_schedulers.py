"""Schedules, noising and every step of the samplers against diffusers' schedulers.

A step is compared from the same latents and the same prediction, so an error cannot hide in, or grow along, the chain.
Twice: in float32 against the scheduler as it is shipped, and in float64 with our table in place of the scheduler's
(its float32 rounding is worth up to 2e-5 in a step of the full chain), which leaves the step's formula alone.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.diffusion.targets import add_noise, target
from sdtrain.samplers.ddim import sample_ddim
from sdtrain.samplers.ddpm import sample_ddpm
from sdtrain.samplers.euler import flow_time, sample_euler
from sdtrain.samplers.steps import sampling_timesteps
from sdtrain.samplers.thresholding import DynamicPercentile, FixedRange

TYPES = ("epsilon", "v_prediction", "sample")
SCHEDULES = {
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
    "linear": ("linear", 1e-4, 0.02),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
}
SHAPE = (2, 4, 8, 8)


def ours(schedule, prediction_type, **changes):
    _, start, end = SCHEDULES[schedule]
    return DiffusionProcess(
        beta_schedule=schedule,
        beta_start=start,
        beta_end=end,
        num_train_timesteps=1000,
        prediction_type=prediction_type,
        **changes,
    )


def theirs(kind, schedule, prediction_type, **changes):
    name, start, end = SCHEDULES[schedule]
    values = {"beta_schedule": name, "beta_start": start, "beta_end": end, "clip_sample": False}
    return kind(prediction_type=prediction_type, **(values | changes))


def with_exact_levels(scheduler, process):
    """The scheduler computing in float64 from the levels of our process."""
    scheduler.alphas_cumprod = process.alpha_bar_float64
    if isinstance(scheduler, DDIMScheduler):
        to_one = scheduler.config.set_alpha_to_one
        scheduler.final_alpha_cumprod = torch.tensor(1.0).double() if to_one else process.alpha_bar_float64[0]
    return scheduler


def draw(index, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(index)).to(dtype)


def model(noised, timesteps):
    """Some network: bounded, and different at every timestep and in every item."""
    shift = torch.sin(timesteps.to(noised.dtype)).view(-1, 1, 1, 1)
    return torch.tanh(noised + 0.3 * shift) + 0.1 * draw(999, noised.dtype)


class Trace:
    """Remembers what the model was asked and what came out of every step."""

    def __init__(self):
        self.asked = []
        self.results = []

    def model(self, noised, timesteps):
        assert (timesteps == timesteps[0]).all()
        self.asked.append((noised, timesteps[0].item(), model(noised, timesteps)))
        return self.asked[-1][2]

    def callback(self, index, latents):
        assert index == len(self.results)
        self.results.append(latents)


def assert_steps_agree(trace, timesteps, their_step):
    assert [timestep for _, timestep, _ in trace.asked] == timesteps
    for index, ((noised, timestep, prediction), result) in enumerate(zip(trace.asked, trace.results, strict=True)):
        expected = their_step(index, prediction, timestep, noised)
        assert result.dtype == expected.dtype == noised.dtype
        tolerance = 1e-5 if noised.dtype == torch.float32 else 1e-9  # diffusers ends DDPM with noise of std 1e-10
        error = (result - expected).abs().max() / max(1.0, expected.abs().max())
        assert error.item() < tolerance, f"step {index}, timestep {timestep}"


def comparison(kind, schedule, prediction_type, exact, **changes):
    """(process, scheduler, dtype) of one comparison."""
    process, scheduler = ours(schedule, prediction_type), theirs(kind, schedule, prediction_type, **changes)
    if exact:
        return process, with_exact_levels(scheduler, process), torch.float64
    return process, scheduler, torch.float32


CASES = [("scaled_linear", False), ("linear", False), ("scaled_linear", True), ("linear", True), ("cosine", True)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    process, scheduler = ours(schedule, "epsilon"), theirs(DDPMScheduler, schedule, "epsilon")
    # diffusers bounds the cosine's betas by 0.999, the paper (and ours) by 0.9999: the last timestep alone differs.
    shared = slice(0, 999 if schedule == "cosine" else 1000)
    torch.testing.assert_close(process.betas[shared].float(), scheduler.betas[shared], rtol=2e-6, atol=0)
    torch.testing.assert_close(process.alpha_bar[shared], scheduler.alphas_cumprod[shared], rtol=5e-5, atol=0)


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_zero_terminal_snr(schedule):
    process = ours(schedule, "v_prediction", zero_terminal_snr=True)
    rescaled = rescale_zero_terminal_snr(ours(schedule, "v_prediction").betas)  # theirs, in float64
    assert (process.betas - rescaled).abs().max() < 1e-12
    scheduler = theirs(DDIMScheduler, schedule, "v_prediction", rescale_betas_zero_snr=True)  # as shipped, in float32
    assert (process.alpha_bar - scheduler.alphas_cumprod).abs().max() < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_of_a_flow(shift):
    process = DiffusionProcess(num_train_timesteps=1000, prediction_type="flow", shift=shift)
    times = torch.tensor([flow_time(level) for level in process.alpha_bar_float64.tolist()])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert (times - scheduler.sigmas.flip(0)).abs().max() < 1e-6  # theirs fall


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noising_and_velocity(schedule):
    process, scheduler = ours(schedule, "v_prediction"), theirs(DDPMScheduler, schedule, "v_prediction")
    timesteps = torch.tensor([0, 700])
    clean, noise = draw(0), draw(1)
    alpha_bar = process.alpha_bar_at(timesteps)
    assert (add_noise(clean, noise, alpha_bar) - scheduler.add_noise(clean, noise, timesteps)).abs().max() < 1e-5
    velocity = target("v_prediction", clean, noise, alpha_bar)
    assert (velocity - scheduler.get_velocity(clean, noise, timesteps)).abs().max() < 1e-5


@pytest.mark.parametrize("num_steps", [1, 20, 30, 50])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_spacings(num_steps, spacing, offset):
    scheduler = theirs(DDIMScheduler, "linear", "epsilon", timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(num_steps)
    assert (
        sampling_timesteps(num_steps, 1000, spacing=spacing, steps_offset=offset)
        == scheduler.timesteps.tolist()[:num_steps]
    )


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize(("schedule", "exact"), CASES)
@pytest.mark.parametrize(("eta", "set_alpha_to_one", "offset"), [(0.0, False, 1), (0.0, True, 0), (0.7, False, 1)])
def test_every_ddim_step_of_30(schedule, exact, prediction_type, eta, set_alpha_to_one, offset):
    settings = {"set_alpha_to_one": set_alpha_to_one, "steps_offset": offset}
    process, scheduler, dtype = comparison(DDIMScheduler, schedule, prediction_type, exact, **settings)
    scheduler.set_timesteps(30)
    trace = Trace()
    sample_ddim(
        trace.model,
        draw(0, dtype),
        process=process,
        num_steps=30,
        eta=eta,
        noise_fn=lambda index: draw(index + 1, dtype),
        callback=trace.callback,
        steps_offset=offset,
        final_alpha_bar="one" if set_alpha_to_one else "first",
    )

    def their_step(index, prediction, timestep, noised):
        fresh = draw(index + 1, dtype) if eta else None
        return scheduler.step(prediction, timestep, noised, eta=eta, variance_noise=fresh).prev_sample

    assert_steps_agree(trace, scheduler.timesteps.tolist(), their_step)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize(("num_steps", "exact"), [(20, False), (25, False), (50, True), (1000, True)])
def test_every_ddim_step_from_zero_terminal_snr(num_steps, exact, prediction_type):
    """Trailing steps, where they divide the process: the first one starts from pure noise."""
    scheduler = theirs(
        DDIMScheduler, "scaled_linear", prediction_type, timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    process = ours("scaled_linear", prediction_type, zero_terminal_snr=True)
    dtype = torch.float64 if exact else torch.float32
    scheduler = with_exact_levels(scheduler, process) if exact else scheduler
    scheduler.set_timesteps(num_steps)
    trace = Trace()
    end = sample_ddim(
        trace.model,
        draw(0, dtype),
        process=process,
        num_steps=num_steps,
        callback=trace.callback,
        spacing="trailing",
        final_alpha_bar="one",
    )
    assert trace.asked[0][1] == 999
    assert end.isfinite().all()
    assert_steps_agree(trace, scheduler.timesteps.tolist(), lambda _, *args: scheduler.step(*args).prev_sample)


@pytest.mark.parametrize(
    ("num_steps", "spacing", "shift"),
    [
        (28, "linspace", 1.0),
        (10, "linspace", 1.0),
        (28, "trailing", 1.0),
        (28, "trailing", 3.0),
        (1000, "trailing", 3.0),
    ],
)
@pytest.mark.parametrize("sampler", [sample_euler, sample_ddim])
def test_every_euler_step_of_a_flow(sampler, num_steps, spacing, shift):
    """`linspace` is diffusers' own set_timesteps, whole where 999 divides; `trailing` are the times that Flux gives it.

    DDIM is compared as well: it is the same step on another scale.
    """
    process = DiffusionProcess(num_train_timesteps=1000, prediction_type="flow", shift=shift)
    timesteps = sampling_timesteps(num_steps, 1000, spacing=spacing)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    if spacing == "linspace":
        scheduler.set_timesteps(num_steps)
    else:
        scheduler.set_timesteps(sigmas=[(timestep + 1) / 1000 for timestep in timesteps])
    trace = Trace()
    is_ddim = {"final_alpha_bar": "one"} if sampler is sample_ddim else {}
    end = sampler(
        trace.model, draw(0), process=process, num_steps=num_steps, callback=trace.callback, spacing=spacing, **is_ddim
    )
    times = [flow_time(process.alpha_bar_float64[timestep].item()) for timestep in timesteps]
    assert (torch.tensor([*times, 0.0]) - scheduler.sigmas).abs().max() < 1e-6
    assert [timestep for _, timestep, _ in trace.asked] == timesteps
    came_out = [*(shown for shown, _, _ in trace.asked[1:]), end]  # the denoiser is shown the flow's own scale
    for index, ((shown, _, prediction), result) in enumerate(zip(trace.asked, came_out, strict=True)):
        expected = scheduler.step(prediction, scheduler.timesteps[index], shown).prev_sample
        assert (result - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max()), f"step {index}"


@pytest.mark.parametrize(
    ("thresholding", "settings"),
    [
        (FixedRange(1.0), {"clip_sample": True}),
        (FixedRange(0.5), {"clip_sample": True, "clip_sample_range": 0.5}),
        (
            DynamicPercentile(0.9, max_value=1.5),
            {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
        ),
    ],
)
def test_every_thresholded_ddim_step(thresholding, settings):
    scheduler = theirs(DDIMScheduler, "linear", "epsilon", set_alpha_to_one=False, steps_offset=1, **settings)
    scheduler.set_timesteps(30)
    trace = Trace()
    sample_ddim(
        trace.model,
        draw(0),
        process=ours("linear", "epsilon"),
        num_steps=30,
        callback=trace.callback,
        thresholding=thresholding,
    )

    def their_step(_, prediction, timestep, noised):
        return scheduler.step(prediction, timestep, noised, use_clipped_model_output=True).prev_sample

    assert_steps_agree(trace, scheduler.timesteps.tolist(), their_step)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize(("schedule", "exact"), CASES)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_every_ddpm_step_of_30(schedule, exact, prediction_type, spacing, monkeypatch):
    process, scheduler, dtype = comparison(DDPMScheduler, schedule, prediction_type, exact, timestep_spacing=spacing)
    scheduler.set_timesteps(30)
    check_ddpm(process, scheduler, dtype, monkeypatch, num_steps=30, spacing=spacing)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_ddpm_step_of_the_full_chain(schedule, prediction_type, monkeypatch):
    process, scheduler, dtype = comparison(DDPMScheduler, schedule, prediction_type, exact=True)
    check_ddpm(process, scheduler, dtype, monkeypatch, num_steps=None)


def check_ddpm(process, scheduler, dtype, monkeypatch, **arguments):
    trace = Trace()
    sample_ddpm(
        trace.model,
        draw(0, dtype),
        process=process,
        noise_fn=lambda index: draw(index + 1, dtype),
        callback=trace.callback,
        **arguments,
    )

    def their_step(index, prediction, timestep, noised):
        fresh = draw(index + 1, dtype)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: fresh)
        return scheduler.step(prediction, timestep, noised).prev_sample

    assert_steps_agree(trace, scheduler.timesteps.tolist(), their_step)


def test_whole_chain_of_a_stable_diffusion_scheduler_config():
    """The keys of a published scheduler_config.json, 30 steps from the same noise, end to end."""
    published = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
        "trained_betas": None,
    }
    scheduler = DDIMScheduler.from_config(published)
    scheduler.set_timesteps(30)
    latents = draw(0)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(model(latents, timestep.expand(2)), timestep, latents).prev_sample
    result = sample_ddim(model, draw(0), process=ours("scaled_linear", "epsilon"), num_steps=30)
    assert ((result - latents).norm() / latents.norm()).item() < 1e-4
