import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.samplers.thresholding import DynamicPercentile, FixedRange, threshold


def test_fixed_range_clamps():
    clean = torch.tensor([-3.0, -0.5, 0.0, 2.5]).view(1, 1, 2, 2)
    assert threshold(clean, FixedRange(2.0)).flatten().tolist() == [-2.0, -0.5, 0.0, 2.0]


def test_dynamic_percentile_scales_each_item_by_its_own_spread():
    small = torch.tensor([-0.5, 0.1, 0.2, 0.9])
    large = torch.tensor([-4.0, 1.0, 2.0, 8.0])
    clean = torch.stack([small, large]).view(2, 1, 2, 2)
    result = threshold(clean, DynamicPercentile(ratio=2 / 3))
    torch.testing.assert_close(result[0].flatten(), small)  # nothing beyond 1: left alone
    torch.testing.assert_close(result[1].flatten(), torch.tensor([-1.0, 0.25, 0.5, 1.0]))  # s = 4
    bounded = threshold(clean, DynamicPercentile(ratio=2 / 3, max_value=2.0))
    torch.testing.assert_close(bounded[1].flatten(), torch.tensor([-1.0, 0.5, 1.0, 1.0]))


def test_clamping_latents_shrinks_them():
    latents = torch.randn(1, 4, 300, 300, generator=torch.Generator().manual_seed(0))
    assert threshold(latents, FixedRange(1.0)).std().item() == pytest.approx(0.718, abs=2e-3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FixedRange(0.0), "thresholding.limit: found 0.0, allowed are numbers above 0"),
        (
            lambda: DynamicPercentile(ratio=0.0),
            "thresholding.ratio: found 0.0, allowed are numbers above 0 and up to 1",
        ),
        (
            lambda: DynamicPercentile(ratio=1.1),
            "thresholding.ratio: found 1.1, allowed are numbers above 0 and up to 1",
        ),
        (lambda: DynamicPercentile(max_value=0.5), "thresholding.max_value: found 0.5, allowed are numbers from 1 on"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ConfigError) as caught:
        make()
    assert text in str(caught.value)
