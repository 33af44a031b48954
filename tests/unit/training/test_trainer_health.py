"""The loop where steps or samples are sick: what is thrown away, what goes back, and when it gives up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdtrain import distributed
from sdtrain.errors import DataError, DivergedError, ExitCode, PeerLostError
from sdtrain.records import Batch
from sdtrain.training.forensics import SickStep
from sdtrain.training.health import Cause, HealthSettings
from sdtrain.training.rollback import Restart
from sdtrain.training.trainer import Periodic, Report, Trainer
from tests.engines import PlainEngine
from tests.unit.training.loops import MICRO, CountingTask, batches, make, micro_batch

# When it gives up -----------------------------------------------------------------------------------------------------


def few(**limits: Any) -> dict[str, Any]:
    return {"health": HealthSettings(**({"max_skipped_in_a_row": 3} | limits))}


def test_gradients_that_stay_sick_are_a_divergence() -> None:
    engine = PlainEngine(skips=range(2, 100))
    with pytest.raises(DivergedError) as raised:
        make({"denoiser": engine}, max_steps=50, settings=few(), on_sick=lambda sick: Path("sick/it.json")).fit()
    assert raised.value.exit_code == ExitCode.DIVERGED == 5
    assert str(raised.value) == (
        "denoiser: 3 updates in a row were thrown away (3 x gradients not finite), the last one in step 4, and there "
        "is no checkpoint to go back to. What went into it: sick/it.json. Lower optimizer.learning_rate, lengthen "
        "optimizer.warmup_steps or look at these samples, then resume from an older checkpoint; where memory is short, "
        "lower data.micro_batch_size. health.max_rollbacks counts over all starts of the run."
    )


def test_skips_between_applied_steps_are_no_divergence() -> None:
    engine = PlainEngine(skips=[0, 1, 3, 4, 6, 7])
    assert make({"denoiser": engine}, max_steps=9, settings=few()).fit() is True


def test_too_many_skips_within_the_window_are_a_divergence_in_a_row_or_not() -> None:
    settings = few(max_skipped_in_window=4, window_steps=9)
    told = r"^denoiser: 4 updates within 9 steps were thrown away \(4 x gradients not finite\), the last one in step 8,"
    with pytest.raises(DivergedError, match=told):
        make({"denoiser": PlainEngine(skips=[0, 2, 5, 8])}, max_steps=50, settings=settings).fit()
    assert make({"denoiser": PlainEngine(skips=[0, 2, 5, 9])}, max_steps=50, settings=settings).fit() is True


def test_a_healthy_trainable_does_not_hide_a_diverged_one() -> None:
    engines = {"generator": PlainEngine(name="generator"), "judge": PlainEngine(name="judge", skips=range(100))}
    with pytest.raises(DivergedError, match=r"^judge: 3 updates in a row were thrown away"):
        make(engines, max_steps=50, settings=few()).fit()


# Sick steps -----------------------------------------------------------------------------------------------------------


def spoilt(steps: Sequence[int], factor: float) -> CountingTask:
    return CountingTask(change=lambda step, losses: (losses + 1) * (factor if step in steps else 1.0))


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_thrown_away(factor: float) -> None:
    engine, seen = PlainEngine(), list[SickStep]()
    make({"denoiser": engine}, task=spoilt([2], factor), on_sick=lambda sick: seen.append(sick)).fit()
    assert engine.applied_steps == 3
    assert [(sick.step, sick.applied_steps, sick.evidence.cause) for sick in seen] == [(2, 2, Cause.LOSS)]
    assert ("rewind", "denoiser", False) in engine.log, "the loss scale has nothing to do with it"


def test_overflowing_gradients_keep_the_lowered_loss_scale() -> None:
    engines = {name: PlainEngine(name=name, log=[]) for name in ("generator", "judge")}
    engines["judge"]._skips = {1}
    make(engines).fit()
    assert ("rewind", "judge", True) in engines["judge"].log
    assert ("rewind", "generator", True) in engines["generator"].log


def test_a_spike_is_thrown_away_and_does_not_raise_the_limit() -> None:
    engine, seen = PlainEngine(), list[SickStep]()
    settings = {"health": HealthSettings(spike_window_steps=8)}
    task = CountingTask(change=lambda step, losses: torch.full_like(losses, 5.0 if step in (6, 7, 9) else 1.0))
    make({"denoiser": engine}, max_steps=12, task=task, settings=settings, on_sick=lambda sick: seen.append(sick)).fit()
    assert [(sick.step, sick.evidence.cause) for sick in seen] == [(step, Cause.SPIKE) for step in (6, 7, 9)]
    assert engine.applied_steps == 9
    assert list(seen[-1].health.history.losses) == [1.0] * 8


def test_a_forward_without_memory_is_thrown_away_with_what_was_accumulated() -> None:
    log: list[Any] = []
    engine, calls = PlainEngine(accumulation=3, log=log), iter(range(100))

    def starve() -> None:
        if next(calls) == 4:  # step 1, micro-step 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    seen: list[SickStep] = []
    task = CountingTask(on_loss=starve)
    make({"denoiser": engine}, accumulation=3, task=task, max_steps=3, on_sick=lambda sick: seen.append(sick)).fit()
    assert [row[0] for row in log if row[0] != "alone"] == [
        *["backward"] * 3, "step", "backward", "discard", "step", "rewind", *["backward"] * 3, "step",
    ]  # fmt: skip
    (sick,) = seen
    assert (sick.evidence.cause, sick.step) == (Cause.OUT_OF_MEMORY, 1)
    assert sick.evidence.lost == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert [micro.batch.keys for micro in sick.evidence.micro_steps] == [("6", "7")]
    assert engine.applied_steps == 2


def test_a_backward_without_memory_is_thrown_away_where_the_engine_can() -> None:
    engine, seen = PlainEngine(accumulation=2, loses=[2]), list[SickStep]()
    make({"denoiser": engine}, accumulation=2, on_sick=lambda sick: seen.append(sick)).fit()
    assert [(sick.step, sick.evidence.cause, sick.evidence.lost) for sick in seen] == [
        (1, Cause.OUT_OF_MEMORY, "MemoryError: too little")
    ]
    assert engine.applied_steps == 3


def test_all_ranks_throw_away_what_one_of_them_lacks_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter(range(100))

    def peer_starves(value: float) -> float:
        return 1.0 if isinstance(value, IntEnum) and next(asked) == 2 else value

    monkeypatch.setattr(distributed, "max_over_ranks", peer_starves)
    engine, seen = PlainEngine(), list[SickStep]()
    make({"denoiser": engine}, on_sick=lambda sick: seen.append(sick)).fit()
    assert [(sick.step, sick.evidence.cause, sick.evidence.lost) for sick in seen] == [(2, Cause.OUT_OF_MEMORY, "")]


def test_the_second_trainable_reads_what_the_first_had_no_memory_for() -> None:
    engines = {
        name: PlainEngine(name=name, accumulation=3, loses=[3] if name == "first" else [])
        for name in ("first", "second")
    }
    reports: list[Report] = []
    make(engines, accumulation=3, max_steps=2, on_report=reports.append).fit()
    assert [engine.applied_steps for engine in engines.values()] == [1, 2]
    assert reports[0].means["second/loss"] == 5.5, "twelve samples, each once"


def test_an_error_of_this_rank_is_told_before_it_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(distributed, "gather_objects", lambda item: told.append(item) or [item])

    def fail() -> None:
        raise DataError("field 'tokens' is missing")

    with pytest.raises(DataError, match=r"^field 'tokens' is missing$"):
        make({"denoiser": PlainEngine()}, task=CountingTask(on_loss=fail)).fit()
    assert told == ["DataError: field 'tokens' is missing"]


def test_an_error_of_another_rank_ends_this_one_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "max_over_ranks", lambda value: 2.0)
    monkeypatch.setattr(distributed, "gather_objects", lambda item: [item, "DataError: torn"])
    engine = PlainEngine()
    with pytest.raises(PeerLostError, match=r"^rank 1 failed and ends the run: DataError: torn$"):
        make({"denoiser": engine}).fit()
    assert not any(row[0] == "backward" for row in engine.log), "no rank enters a backward that not all will enter"


def test_an_error_while_reading_is_told_like_any_other() -> None:
    def broken() -> Iterator[tuple[int, int, Batch]]:
        yield 0, 0, micro_batch(0)
        raise DataError("shard 7 is torn")

    with pytest.raises(DataError, match=r"^shard 7 is torn$"):
        make({"denoiser": PlainEngine()}, stream=broken()).fit()


def test_a_reader_without_memory_is_no_sick_step() -> None:
    def starved() -> Iterator[tuple[int, int, Batch]]:
        yield 0, 0, micro_batch(0)
        raise MemoryError("cannot allocate 3 GiB")

    with pytest.raises(DataError) as raised:
        make({"denoiser": PlainEngine()}, stream=starved()).fit()
    assert str(raised.value) == (
        "host memory was not enough to read samples: cannot allocate 3 GiB. Lower data.num_workers or data.prefetch."
    )


# The way back ---------------------------------------------------------------------------------------------------------


def test_a_sick_run_goes_on_from_where_it_is_told() -> None:
    reports: list[Report] = []
    asked: list[tuple[int, int, str]] = []

    def roll_back(first_sick_step: int, finished_steps: int, story: str) -> Restart:
        asked.append((first_sick_step, finished_steps, story))
        again = ((step, 0, micro_batch((step + 5) * MICRO)) for step in range(2, 100))
        return Restart(2, again, {"denoiser": {"losses": [7.0], "skipped": [], "row": []}})

    engine = PlainEngine(skips=[4, 5, 6])
    events: list[int] = []
    trainer = make(
        {"denoiser": engine},
        max_steps=8,
        settings=few() | {"log_every_steps": 4},
        roll_back=roll_back,
        on_report=reports.append,
        events=[Periodic(1, events.append)],
    )
    assert trainer.fit() is True
    assert asked == [(4, 7, "denoiser: 3 updates in a row were thrown away (3 x gradients not finite)")]
    assert events == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7, 8], "step 7 of the sick run has no events"
    assert [(report.step, report.rollbacks) for report in reports] == [(4, 0), (4, 1), (8, 1)]
    assert reports[1].means["denoiser/loss"] == 15.5, "positions 14 to 17"
    assert reports[1].skipped == 0
    assert trainer.health_state()["denoiser"] == {
        "losses": [7.0, 14.5, 16.5, 18.5, 20.5, 22.5, 24.5],  # what the checkpoint knew, and the steps since
        "skipped": [],
        "row": [],
    }


def test_rollbacks_that_do_not_help_end_the_run() -> None:
    def roll_back(first_sick_step: int, finished_steps: int, story: str) -> Restart:
        return Restart(2, batches(2, 1))

    engine = PlainEngine(skips=range(4, 100))
    with pytest.raises(DivergedError, match=r"in step 4, and 2 rollbacks did not help\. What went into it: None\."):
        make({"denoiser": engine}, max_steps=50, settings=few(), roll_back=roll_back).fit()


def test_rollbacks_of_earlier_starts_count() -> None:
    with pytest.raises(DivergedError, match=r"and 2 rollbacks did not help\..*over all starts of the run\."):
        make({"denoiser": PlainEngine(skips=range(9))}, settings=few(), rollbacks=2).fit()


def test_a_resumed_run_sees_the_spike_that_the_whole_run_sees() -> None:
    """Step 10 spikes. The run that begins at step 9 has seen one loss of its own by then."""

    def change(step: int, losses: Tensor) -> Tensor:
        return torch.full_like(losses, 1e6 if step == 10 else 1.0 + step % 3 / 100)

    def train(start: int, end: int, health: Any = None) -> Trainer:
        settings = {"health": HealthSettings(spike_window_steps=8)}
        engine, task = PlainEngine(), CountingTask(change=change)
        trainer = make({"denoiser": engine}, max_steps=end, start=start, settings=settings, task=task, health=health)
        trainer.fit()
        return trainer

    whole, half = train(0, 14), train(0, 9)
    rest = train(9, 14, json.loads(json.dumps(half.health_state())))
    assert rest.health_state() == whole.health_state()
    assert [step for step, _ in whole.health_state()["denoiser"]["skipped"]] == [10]


def test_without_rollbacks_nothing_is_asked() -> None:
    with pytest.raises(DivergedError, match="and 0 rollbacks did not help"):
        make({"denoiser": PlainEngine(skips=range(9))}, settings=few(max_rollbacks=0), roll_back=None).fit()


# Samples that cannot be read ------------------------------------------------------------------------------------------


def test_too_many_unreadable_samples_end_the_run_by_name() -> None:
    reports: list[Report] = []
    trainer = make(
        {"denoiser": PlainEngine()}, bad=[4, 6, 7], on_report=reports.append, settings={"max_bad_fraction": 0.25}
    )
    with pytest.raises(DataError) as raised:
        trainer.fit()
    assert raised.value.exit_code == ExitCode.DATA == 3
    assert [report.step for report in reports] == [2, 4]
    assert str(raised.value) == (
        "3 of 8 samples of one rank could not be read; data.max_bad_fraction = 0.25 allows 2. "
        "The first ones of this rank:\n  4: torn\n  6: torn\n  7: torn\n"
        "Repair the shards or raise data.max_bad_fraction."
    )


def test_few_unreadable_samples_do_not_end_the_run() -> None:
    told: list[tuple[int, list[str]]] = []
    trainer = make(
        {"denoiser": PlainEngine()},
        bad=[4, 6],
        settings={"max_bad_fraction": 0.25},
        on_unreadable=lambda step, found: told.append((step, list(map(str, found)))),
    )
    assert trainer.fit() is True
    assert [str(tombstone) for tombstone in trainer.tombstones] == ["4: torn", "6: torn"]
    assert [news for news in told if news[1]] == [(2, ["4: torn"]), (3, ["6: torn"])]


def test_a_single_unreadable_sample_never_ends_a_run() -> None:
    assert make({"denoiser": PlainEngine()}, bad=[1], settings={"max_bad_fraction": 0.0}).fit() is True


def test_all_ranks_stop_for_one_rank_s_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        distributed, "max_over_ranks", lambda value: value if isinstance(value, IntEnum) else max(value, 3.0)
    )
    with pytest.raises(DataError, match=r"^3 of 4 samples .* allows 1\. .*\n  \(all on other ranks\)\n"):
        make({"denoiser": PlainEngine()}).fit()
