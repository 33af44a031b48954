"""What counts as sick: memory, losses that are no noise, and too many thrown-away steps."""

from __future__ import annotations

import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from sdtrain import distributed
from sdtrain.errors import DataError, PeerLostError
from sdtrain.records import LossOutput
from sdtrain.training.health import (
    Cause,
    Health,
    HealthSettings,
    LossHistory,
    StepLoss,
    StepLost,
    agree,
    for_keeps,
    is_out_of_memory,
    without_skips,
)

# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (DataError("shards are out of memory"), False),
    ],
)
def test_what_is_lack_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_real_cpu_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_a_kept_error_keeps_no_tensors_of_the_failed_work() -> None:
    def work() -> None:
        activations = torch.zeros(3)
        seen.append(weakref.ref(activations))
        try:
            raise ValueError("first")
        except ValueError as error:
            raise MemoryError("then") from error

    seen: list[weakref.ref[Tensor]] = []
    kept = None
    try:
        work()
    except MemoryError as error:
        kept = for_keeps(error)
    gc.collect()
    assert seen[0]() is None
    assert str(kept) == "then"


def test_other_errors_keep_their_frames_for_the_reader() -> None:
    try:
        raise DataError("torn")
    except DataError as error:
        kept = for_keeps(error)
    assert kept.__traceback__ is not None


def test_alone_there_is_nobody_to_agree_with() -> None:
    agree(None)
    with pytest.raises(StepLost, match=r"^MemoryError: 3 GiB$"):
        agree(MemoryError("3 GiB"))
    with pytest.raises(DataError, match=r"^torn$"):
        agree(DataError("torn"))


def test_an_error_elsewhere_is_stronger_than_lack_of_memory_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "max_over_ranks", lambda value: 2.0)
    monkeypatch.setattr(distributed, "gather_objects", lambda item: [item, "", "DataError: torn"])
    with pytest.raises(PeerLostError, match=r"^rank 2 failed and ends the run: DataError: torn$"):
        agree(MemoryError("3 GiB"))


# Losses ---------------------------------------------------------------------------------------------------------------


def output(losses: list[float], weights: list[float] | None = None) -> LossOutput:
    return LossOutput(losses=torch.tensor(losses), weights=torch.tensor(weights or [1.0] * len(losses)))


def test_a_verdict_is_exactly_one_or_nan() -> None:
    for losses, limit, expected in (
        ([1.0, 3.0], 2.0, 2.0),
        ([1.0, 3.1], 2.0, None),
        ([1.0, math.nan], math.inf, None),
        ([1.0, math.inf], math.inf, None),
        ([-math.inf, 1.0], math.inf, None),
    ):
        loss = StepLoss()
        loss.add(output(losses))
        verdict = loss.verdict(limit)
        assert verdict.dtype == torch.float32
        assert float(verdict) == 1.0 if expected is not None else math.isnan(float(verdict))
        assert expected is None or loss.read() == expected


def test_the_loss_of_a_step_is_the_mean_over_its_micro_steps_and_forgets_tombstones() -> None:
    loss = StepLoss()
    assert loss.read() is None
    loss.add(output([1.0, math.nan], [1.0, 0.0]))
    loss.add(output([4.0, 7.0]))
    assert float(loss.verdict(math.inf)) == 1.0
    assert loss.read() == 4.0


def test_a_step_of_tombstones_alone_is_not_sick() -> None:
    loss = StepLoss()
    loss.add(output([math.nan], [0.0]))
    assert float(loss.verdict(1.0)) == 1.0
    assert loss.read() == 0.0


def history(losses: np.ndarray | list[float], **settings: float) -> LossHistory:
    values = {"ratio": 4.0, "deviations": 12.0, "window_steps": 128} | settings
    made = LossHistory(**values)  # type: ignore[arg-type]
    for loss in losses:
        made.add(float(loss))
    return made


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.1, 0.3, 1.0])
def test_ordinary_noise_never_fires(spread: float) -> None:
    """Log-normal noise from large batches (2 %) to single samples (a factor e), on a falling loss."""
    random = np.random.Generator(np.random.Philox(1))
    steps = 20_000
    losses = (0.1 + np.exp(-np.arange(steps) / 2000)) * np.exp(spread * random.standard_normal(steps))
    seen = LossHistory(ratio=4.0, deviations=12.0, window_steps=128)
    fired = 0
    for loss in losses:
        fired += loss > seen.limit
        seen.add(float(loss))
    assert fired == 0


def test_a_spike_fires_above_the_larger_of_ratio_and_noise() -> None:
    random = np.random.Generator(np.random.Philox(2))
    assert history([0.2] * 64).limit == pytest.approx(0.8)
    calm = history(0.2 * np.exp(0.05 * random.standard_normal(128))).limit
    assert calm == pytest.approx(0.8, rel=0.05), "the ratio decides"
    noisy = history(0.2 * np.exp(0.3 * random.standard_normal(128))).limit
    assert 0.2 * math.exp(12 * 0.2) < noisy < 0.2 * math.exp(12 * 0.4), "the noise decides"


def test_a_few_outliers_do_not_move_the_limit() -> None:
    random = np.random.Generator(np.random.Philox(3))
    losses = 0.2 * np.exp(0.05 * random.standard_normal(128))
    before = history(losses).limit
    losses[::20] = 100.0
    assert history(losses).limit == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize(
    ("losses", "settings"),
    [([0.2] * 63, {}), ([0.2] * 128, {"ratio": None}), ([0.2] * 127 + [0.0], {}), ([-0.1] * 128, {})],
)
def test_without_enough_positive_losses_or_a_ratio_there_is_no_limit(
    losses: list[float], settings: dict[str, float]
) -> None:
    assert history(losses, **settings).limit == math.inf


def test_an_unbounded_limit_is_a_number_still() -> None:
    assert math.isfinite(history([1e-30, 1e30] * 64).limit)


# Counting -------------------------------------------------------------------------------------------------------------


def health(events: str, **limits: int) -> Health:
    """`a` is an applied step, `n`, `s`, `m` and `g` are thrown away; the first one is step 0."""
    causes = {"n": Cause.LOSS, "s": Cause.SPIKE, "m": Cause.OUT_OF_MEMORY, "g": Cause.GRADIENTS}
    settings = {"max_skipped_in_a_row": 3, "max_skipped_in_window": 4, "window_steps": 8} | limits
    made = Health(HealthSettings(**settings))
    for step, event in enumerate(events):
        if event == "a":
            made.applied(1.0)
        else:
            made.skipped(step, causes[event])
    return made


@pytest.mark.parametrize(
    ("events", "first", "story"),
    [
        ("aannn", 2, "3 updates in a row were thrown away (3 x loss not finite)"),
        ("angngg", 1, None),
        ("amsn", 1, "3 updates in a row were thrown away (1 x out of memory, 1 x loss spike, 1 x loss not finite)"),
        ("nanaann", 0, "4 updates within 8 steps were thrown away (4 x loss not finite)"),
        ("naaanaanaag", None, None),
        ("nnaaaaaaann", None, None),
        ("nnann", 0, "4 updates within 8 steps were thrown away (4 x loss not finite)"),
        ("nnanna", None, None),
    ],
)
def test_how_many_are_too_many(events: str, first: int | None, story: str | None) -> None:
    made = health(events)
    assert made.is_sick is (first is not None)
    if first is not None:
        assert made.first_sick_step == first
        assert story is None or made.story == story


def test_a_row_longer_than_the_window_still_counts_from_its_start() -> None:
    made = health("a" + "n" * 12, max_skipped_in_a_row=12, max_skipped_in_window=99)
    assert (made.is_sick, made.first_sick_step) == (True, 1)


def test_thrown_away_losses_are_no_history() -> None:
    assert list(health("anas").history.losses) == [1.0, 1.0]


def test_what_a_checkpoint_remembers_decides_as_if_nothing_had_happened() -> None:
    first, settings = health("aanann"), HealthSettings(max_skipped_in_a_row=3, max_skipped_in_window=4, window_steps=8)
    first.applied(None)
    for loss in (0.1 + 0.2, 1e-7, 1.0 / 3.0):
        first.applied(loss)
    first.skipped(10, Cause.OUT_OF_MEMORY)
    again = Health(settings, json.loads(json.dumps(first.state())))
    assert list(again.history.losses) == list(first.history.losses), "to the last bit"
    for made in (first, again):
        assert not made.is_sick
        made.skipped(11, Cause.SPIKE)
        made.skipped(12, Cause.LOSS)
    assert again.is_sick
    assert (again.first_sick_step, again.story) == (first.first_sick_step, first.story)
    assert again.state() == first.state()
    assert again.first_sick_step == 10


def test_a_rollback_keeps_the_losses_alone() -> None:
    made = health("aan")
    assert without_skips({"denoiser": made.state()}) == {"denoiser": {"losses": [1.0, 1.0], "skipped": [], "row": []}}


def test_a_shorter_memory_takes_the_newest_losses() -> None:
    state = {"losses": [float(loss) for loss in range(1, 21)], "skipped": [], "row": []}
    made = Health(HealthSettings(spike_window_steps=8), state)
    assert list(made.history.losses) == [13.0, 14.0, 15.0, 16.0, 17.0, 18.0, 19.0, 20.0]
