from itertools import pairwise

import pytest
import torch

from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.errors import ConfigError
from sdtrain.samplers.steps import reverse_steps, sampling_timesteps


def process(**changes):
    values = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    }
    return DiffusionProcess(**(values | changes))


def test_spacings():
    assert sampling_timesteps(4, 1000, spacing="leading", steps_offset=1) == [751, 501, 251, 1]
    assert sampling_timesteps(4, 1000, spacing="leading") == [750, 500, 250, 0]
    assert sampling_timesteps(4, 1000, spacing="trailing") == [999, 749, 499, 249]
    assert sampling_timesteps(4, 1000, spacing="linspace") == [999, 666, 333, 0]
    assert sampling_timesteps(30, 1000, spacing="leading", steps_offset=1)[:2] == [958, 925]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_all_steps_visit_every_timestep(spacing):
    assert sampling_timesteps(50, 50, spacing=spacing) == list(reversed(range(50)))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 7, 30, 33, 999])
def test_chains_fall_strictly_and_stay_inside(spacing, num_steps):
    timesteps = sampling_timesteps(num_steps, 1000, spacing=spacing)
    assert len(timesteps) == num_steps
    assert all(a > b for a, b in pairwise(timesteps))
    assert timesteps[-1] >= 0
    assert timesteps[0] <= 999


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_steps": 0}, "num_steps: found 0, allowed are 1 to 1000"),
        ({"num_steps": 1001}, "num_steps: found 1001, allowed are 1 to 1000"),
        ({"num_steps": 5, "spacing": "karras"}, "spacing: found 'karras', allowed are leading, trailing, linspace"),
        (
            {"num_steps": 1000, "steps_offset": 1},
            "steps_offset: with 1, 1000 leading steps run from timestep 1000 to 1, allowed are 999 to 0; "
            "lower num_steps or use steps_offset 0",
        ),
        ({"num_steps": 10, "steps_offset": -1}, "run from timestep 899 to -1"),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(ConfigError) as caught:
        sampling_timesteps(num_train_timesteps=1000, **arguments)
    assert text in str(caught.value)


def test_each_step_ends_where_the_next_begins():
    steps = reverse_steps(process(), [999, 500, 0], final_alpha_bar=1.0)
    assert [step.timestep for step in steps] == [999, 500, 0]
    assert [step.index for step in steps] == [0, 1, 2]
    assert steps[0].alpha_bar_prev == steps[1].alpha_bar
    assert steps[1].alpha_bar_prev == steps[2].alpha_bar == pytest.approx(0.99915)
    assert steps[2].alpha_bar_prev == 1.0
    torch.testing.assert_close(torch.tensor(steps[0].alpha_bar), process().alpha_bar[999])
