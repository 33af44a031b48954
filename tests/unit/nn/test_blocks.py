from __future__ import annotations

import pytest
import torch
from torch import nn

from sdtrain.errors import ConfigError
from sdtrain.nn.blocks import BlockSettings, DownLevel, MidLevel, Signals, UpLevel

SETTINGS = BlockSettings(time_width=6, norm_groups=4, num_heads=2, context_dim=5)
SIGNALS = Signals(embedding=torch.ones(2, 6), context=torch.ones(2, 3, 5))


@pytest.mark.parametrize("kind", ["plain", "self", "cross"])
def test_down_and_up_again(kind: str) -> None:
    down = DownLevel(SETTINGS, kind=kind, in_channels=4, out_channels=8, num_layers=2, downsample=True)
    mid = MidLevel(SETTINGS, kind=kind, channels=8)
    up = UpLevel(SETTINGS, kind=kind, in_channels=8, out_channels=4, skip_channels=[8, 8], upsample="nearest_conv")
    features, skips = down(torch.randn(2, 4, 8, 8), SIGNALS)
    assert features.shape == (2, 8, 4, 4)
    assert [skip.shape for skip in skips] == [(2, 8, 8, 8)] * 2
    features = mid(features, SIGNALS)
    features = up(torch.repeat_interleave(features, 2, -1).repeat_interleave(2, -2), skips, SIGNALS)
    assert features.shape == (2, 4, 16, 16)
    assert skips == []


def test_skips_are_used_from_the_last_to_the_first() -> None:
    up = UpLevel(SETTINGS, kind="plain", in_channels=8, out_channels=4, skip_channels=[8, 4], upsample=None)
    skips = [torch.randn(2, width, 4, 4) for width in (12, 4, 8)]
    first = skips[0]
    up(torch.randn(2, 8, 4, 4), skips, SIGNALS)
    assert len(skips) == 1
    assert skips[0] is first


def test_middle_self_attention_is_unnormed_under_scale_and_shift() -> None:
    """diffusers leaves the group norm out there; with it, weights of published pixel networks would not load."""
    modulated = BlockSettings(time_width=6, time_scale_shift="scale_shift", norm_groups=4, num_heads=2)
    assert MidLevel(SETTINGS, kind="self", channels=8).attentions[0].group_norm is not None
    assert MidLevel(modulated, kind="self", channels=8).attentions[0].group_norm is None


def test_heads_by_number_or_by_width() -> None:
    assert BlockSettings(num_heads=8).heads(320) == 8
    assert BlockSettings(head_dim=64).heads(640) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (BlockSettings(num_heads=3), "num_heads=3 does not divide 8 channels; choose one that divides every level"),
        (BlockSettings(head_dim=16), "head_dim=16 does not divide 8 channels; choose one that divides every level"),
        (BlockSettings(), "num_heads=None does not divide 8 channels; choose one that divides every level"),
    ],
)
def test_heads_that_do_not_divide(settings: BlockSettings, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings.heads(8)
    assert str(error.value) == message


def test_cross_attention_needs_a_context_width() -> None:
    with pytest.raises(ConfigError, match="cross-attention blocks need context_dim"):
        BlockSettings(norm_groups=4, num_heads=2).transformer(8)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(())), 0

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (features * self.weight).sin()


@pytest.mark.parametrize(("recompute", "grad", "calls"), [(False, True, 1), (True, True, 2), (True, False, 1)])
def test_recomputation_runs_a_block_twice_and_only_for_gradients(recompute: bool, grad: bool, calls: int) -> None:
    level, counter = MidLevel(SETTINGS, kind="plain", channels=8), Counter()
    level.recompute = recompute
    with torch.set_grad_enabled(grad):
        out = level.run_resnet(counter, torch.ones(2, 8, 2, 2), SIGNALS)
    if grad:
        out.sum().backward()
    assert counter.calls == calls
