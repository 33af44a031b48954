"""The average against its closed form, and why it must be fp32."""

import pytest
import torch

from sdtrain.training.ema import ShardedEma, decay_at


@pytest.mark.parametrize(("applied", "expected"), [(1, 2 / 11), (90, 0.91), (10**6, 0.9999)])
def test_decay_ramps_up_to_its_ceiling(applied: int, expected: float) -> None:
    assert decay_at(applied, 0.9999) == pytest.approx(expected, abs=1e-12)


def test_average_equals_the_recurrence_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(100, generator=generator)]
    ema = ShardedEma(masters, decay=0.99)
    reference = masters[0].double().clone()
    for step in range(1, 301):
        masters[0] += 0.01 * torch.randn(100, generator=generator)
        decay = ema.update(masters, applied_steps=step)
        assert decay == decay_at(step, 0.99)
        reference = decay * reference + (1 - decay) * masters[0].double()
    assert torch.linalg.norm(ema.shards[0] - reference) / torch.linalg.norm(reference) < 1e-6


def test_average_does_not_share_memory_with_the_master() -> None:
    master = torch.zeros(3)
    ema = ShardedEma([master], decay=0.9)
    master += 1
    assert ema.shards[0].tolist() == [0, 0, 0]


def test_restore_takes_over_saved_shards() -> None:
    ema = ShardedEma([torch.zeros(3)], decay=0.9)
    ema.restore([torch.arange(3.0)])
    assert ema.shards[0].tolist() == [0, 1, 2]
