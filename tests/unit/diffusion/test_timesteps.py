import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from sdtrain.diffusion.timesteps import (
    TimestepPhase,
    TimestepSampling,
    low_discrepancy,
    stratified,
    uniform_timesteps,
)
from sdtrain.errors import ConfigError


def test_uniform_timesteps_closed_form():
    uniforms = torch.tensor([0.0, 0.00099999, 0.001, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    timesteps = uniform_timesteps(uniforms, 1000)
    assert timesteps.tolist() == [0, 0, 1, 500, 999]
    assert timesteps.dtype == torch.int64


def test_every_timestep_is_equally_likely():
    uniforms = (torch.arange(7 * 1000, dtype=torch.float64) + 0.5) / 7000
    assert uniform_timesteps(uniforms, 1000).bincount(minlength=1000).tolist() == [7] * 1000


def test_float32_draws_are_refused():
    with pytest.raises(TypeError, match=r"timesteps need float64 uniform draws, found torch\.float32"):
        uniform_timesteps(torch.rand(3), 1000)


def test_stratified_walks_through_the_bins():
    positions = torch.arange(60, 100)
    uniforms = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timesteps = uniform_timesteps(stratified(uniforms, positions, 20), 1000)
    assert (timesteps // 50).tolist() == [*range(20)] * 2
    torch.testing.assert_close(stratified(uniforms, positions, 20) * 20 - positions % 20, uniforms)


def test_the_largest_draw_of_the_last_bin_stays_inside():
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    moved = stratified(largest, torch.tensor([19]), 20)
    assert moved.item() == 1.0  # 19 + u rounds to 20
    assert uniform_timesteps(moved, 1000).item() == 999


def uniforms(num, seed=0):
    return torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def evenly(num):
    """Every draw's place once: a distribution drawn by these has no chance left in it."""
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


def drawn(sampling, draws, *, step=0, total=1000):
    return sampling.draw(draws, torch.arange(len(draws)), step=step, num_train_timesteps=total)


# Quasi-random --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 7, 8, 60, 512])
def test_every_batch_holds_one_draw_in_every_bin(batch_size):
    positions = torch.arange(5 * batch_size, 8 * batch_size)
    moved = low_discrepancy(uniforms(3 * batch_size), positions, batch_size)
    for batch in moved.view(3, batch_size):
        assert sorted((batch * batch_size).long().tolist()) == list(range(batch_size))


def test_a_sample_s_level_is_a_function_of_its_own_position_and_draw():
    """However the batch is cut into ranks and micro-batches, and wherever a run resumes, nothing moves."""
    draws, positions = uniforms(512), torch.arange(1024, 1536)
    whole = low_discrepancy(draws, positions, 512)
    for parts in (2, 8, 64):
        cut = [low_discrepancy(*part, 512) for part in zip(draws.chunk(parts), positions.chunk(parts), strict=True)]
        assert torch.equal(torch.cat(cut), whole)


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_a_rank_s_share_of_the_batch_is_spread_out_too(parts):
    shares = low_discrepancy(uniforms(512), torch.arange(512), 512).chunk(parts)
    for share in shares:
        gaps = torch.cat([share.sort().values, torch.ones(1)]).diff(prepend=torch.zeros(1).double())
        assert gaps.max().item() * len(share) < 3, "the largest gap is below three average ones"


def test_quasi_random_means_are_unbiased_and_vary_less():
    """The mean of u^2 over batches of 64: the same 1/3, a standard deviation below a tenth of the independent one's."""
    draws = uniforms(64 * 500)
    moved = low_discrepancy(draws, torch.arange(64 * 500), 64)
    even, independent = (values.square().view(500, 64).mean(1) for values in (moved, draws))
    assert even.mean().item() == pytest.approx(1 / 3, abs=4 * even.std().item() / 500**0.5)
    assert even.std() < independent.std() / 10


def test_strata_reach_the_draw():
    sampling = TimestepSampling(strata=8)
    timesteps = sampling.draw(uniforms(8), torch.arange(80, 88), step=0, num_train_timesteps=1000)
    assert sorted((timesteps // 125).tolist()) == list(range(8))


# Logit-normal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 2.0)])
def test_logit_normal_has_its_distribution(mean, std):
    timesteps = drawn(TimestepSampling(distribution="logit_normal", logit_mean=mean, logit_std=std), evenly(100_000))
    for place in (0.1, 0.3, 0.5, 0.8):
        expected = NormalDist(mean, std).cdf(math.log(place / (1 - place)))
        assert (timesteps < place * 1000).double().mean().item() == pytest.approx(expected, abs=2e-5)


def test_logit_normal_stays_inside_at_both_ends():
    ends = torch.tensor([0.0, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    assert drawn(TimestepSampling(distribution="logit_normal"), ends).tolist() == [0, 999, 999]


# Phases --------------------------------------------------------------------------------------------------------------

THIRDS = (
    TimestepPhase(until_step=100, edges=(0.5,), weights=(1.0, 2.5)),
    TimestepPhase(until_step=200, edges=(0.25, 0.75), weights=(1.0, 3.0, 1.0)),
    TimestepPhase(edges=(0.25, 0.5), weights=(1.5, 2.5, 1.0)),
)


@pytest.mark.parametrize(
    ("step", "edges", "expected"),
    [
        (0, (0, 500, 1000), (0.286, 0.714)),
        (99, (0, 500, 1000), (0.286, 0.714)),
        (100, (0, 250, 750, 1000), (0.125, 0.75, 0.125)),
        (200, (0, 250, 500, 1000), (0.25, 0.417, 0.333)),
        (10_000, (0, 250, 500, 1000), (0.25, 0.417, 0.333)),
    ],
)
def test_thirds_of_a_training_have_the_published_probabilities(step, edges, expected):
    timesteps = drawn(TimestepSampling(phases=THIRDS), evenly(60_000), step=step)
    shares = [((timesteps >= low) & (timesteps < high)).double().mean().item() for low, high in pairwise(edges)]
    assert shares == pytest.approx(expected, abs=5e-4)


def test_levels_within_a_part_stay_equally_likely():
    counts = drawn(TimestepSampling(phases=THIRDS), evenly(700_000), step=0).bincount(minlength=1000)
    assert set(counts[:500].tolist()) == {400}
    assert set(counts[500:].tolist()) == {1000}


def test_a_weight_of_0_leaves_a_part_out():
    middle = TimestepSampling(phases=(TimestepPhase(edges=(0.2, 0.8), weights=(0.0, 1.0, 0.0)),))
    timesteps = drawn(middle, torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64))
    assert timesteps.tolist() == [200, 500, 799]


def test_phases_weigh_the_distribution_that_they_stand_on():
    phase = TimestepPhase(edges=(0.3,), weights=(1.0, 4.0))
    sampling = TimestepSampling(distribution="logit_normal", logit_mean=0.4, logit_std=0.8, phases=(phase,))
    below = NormalDist(0.4, 0.8).cdf(math.log(0.3 / 0.7))
    timesteps = drawn(sampling, evenly(100_000))
    assert (timesteps < 300).double().mean().item() == pytest.approx(below / (below + 4 * (1 - below)), abs=2e-5)
    inner = NormalDist(0.4, 0.8).cdf(math.log(0.6 / 0.4)) - below
    share = (timesteps >= 300) & (timesteps < 600)
    assert share.double().mean().item() == pytest.approx(4 * inner / (below + 4 * (1 - below)), abs=2e-5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TimestepPhase(edges=(0.5, 0.5), weights=(1.0, 1.0, 1.0)), "found edges [0.5, 0.5] and weights [1.0,"),
        (lambda: TimestepPhase(edges=(0.5,), weights=(1.0,)), "and one more weight than edges, none below 0 and one"),
        (lambda: TimestepPhase(weights=(-1.0,)), "found edges [] and weights [-1.0]; allowed are edges ascending"),
        (lambda: TimestepPhase(weights=(0.0,)), "found edges [] and weights [0.0]"),
        (
            lambda: TimestepSampling(distribution="beta"),
            "task.timesteps.distribution: found 'beta', allowed are uniform, logit_normal",
        ),
        (lambda: TimestepSampling(logit_std=0.0), "task.timesteps.logit_std: found 0.0, allowed are numbers above 0"),
        (
            lambda: TimestepSampling(phases=(TimestepPhase(until_step=5),)),
            "found phases that end before steps [5]; allowed are ends that do not fall, and none for the last phase",
        ),
        (
            lambda: TimestepSampling(
                phases=(TimestepPhase(until_step=5), TimestepPhase(until_step=4), TimestepPhase())
            ),
            "found phases that end before steps [5, 4, None]",
        ),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ConfigError) as caught:
        make()
    assert text in str(caught.value)
