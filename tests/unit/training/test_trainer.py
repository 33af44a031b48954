"""The loop on engines and a task of its own: what happens when, what is counted, and when it stops."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdtrain import distributed
from sdtrain.errors import DataError, DivergedError, ExitCode, PeerLostError
from sdtrain.records import Batch, DrawSpec, LossOutput, Tombstone, Trainable
from sdtrain.training import trainer as trainer_module
from sdtrain.training.forensics import SickStep
from sdtrain.training.health import Cause, HealthSettings
from sdtrain.training.rollback import Restart
from sdtrain.training.trainer import Periodic, Report, Trainer, TrainerSettings
from sdtrain.training.window import Sums, Window
from tests.engines import PlainEngine

MICRO = 2


class CountingTask:
    """Loss of a sample: its position, or what `change` makes of it. `draws_seen` holds what torch draws inside."""

    def __init__(
        self,
        active: Callable[[str, int], bool] = lambda name, step: True,
        on_loss: Callable[[], object] = lambda: None,
        change: Callable[[int, Tensor], Tensor] = lambda step, losses: losses,
    ) -> None:
        self.trainables: dict[str, Trainable] = {}
        self.frozen: dict[str, torch.nn.Module] = {}
        self.draws = DrawSpec()
        self.is_active = active
        self.on_loss = on_loss
        self.change = change
        self.draws_seen: list[tuple[int, float]] = []

    def loss(self, name: str, batch: Batch, step: int) -> LossOutput:
        self.on_loss()
        self.draws_seen.append((step, float(torch.rand(()))))
        values = self.change(step, batch.positions.float())
        return LossOutput(losses=values, weights=batch.weights, metrics={"double": 2 * values})

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def sample(self, conditioning: Any, seeds: Sequence[int]) -> Tensor:
        raise NotImplementedError


def micro_batch(first: int, bad: Sequence[int] = ()) -> Batch:
    positions = list(range(first, first + MICRO))
    return Batch(
        keys=tuple(map(str, positions)),
        positions=torch.tensor(positions),
        fields={},
        normals={},
        uniforms={},
        weights=torch.tensor([0.0 if position in bad else 1.0 for position in positions]),
        errors=tuple(Tombstone(str(position), "0.tar", "torn") for position in positions if position in bad),
    )


def batches(start: int, accumulation: int, bad: Sequence[int] = ()) -> Iterator[tuple[int, int, Batch]]:
    for step in range(start, 10_000):
        for micro in range(accumulation):
            yield step, micro, micro_batch((step * accumulation + micro) * MICRO, bad)


def make(
    engines: dict[str, PlainEngine],
    *,
    max_steps: int = 4,
    accumulation: int = 1,
    start: int = 0,
    bad: Sequence[int] = (),
    task: CountingTask | None = None,
    learning_rate: Callable[[str, int], float] = lambda name, applied: 0.1,
    settings: dict[str, Any] | None = None,
    stream: Iterator[tuple[int, int, Batch]] | None = None,
    **hooks: Any,
) -> Trainer:
    values = {"log_every_steps": 2} | (settings or {})
    return Trainer(
        task=task or CountingTask(),
        engines=engines,
        settings=TrainerSettings(
            max_steps=max_steps, batch_size=accumulation * MICRO, grad_accum_steps=accumulation, seed=3, **values
        ),
        batches=stream or batches(start, accumulation, bad),
        learning_rate=learning_rate,
        start_step=start,
        **hooks,
    )


# What happens when ----------------------------------------------------------------------------------------------------


def test_a_step_is_backwards_step_report_events_and_the_question_in_this_order() -> None:
    log: list[Any] = []
    trainer = make(
        {"denoiser": PlainEngine(accumulation=2, log=log)},
        max_steps=3,
        accumulation=2,
        events=[
            Periodic(2, lambda step: log.append(("validate", step))),
            Periodic(1, lambda step: log.append(("save", step))),
        ],
        on_report=lambda report: log.append(("report", report.step)),
        leaves_after=lambda step: log.append(("leaves?", step)) is not None,
    )
    assert trainer.fit() is True
    update = [("alone", "denoiser", []), ("backward", "denoiser"), ("backward", "denoiser"), ("step", "denoiser", 0.1)]
    assert log == [
        *update,
        ("save", 1),
        ("leaves?", 1),
        *update,
        ("report", 2),
        ("validate", 2),
        ("save", 2),
        ("leaves?", 2),
        *update,
        ("report", 3),  # the last step reports a window of one
        ("validate", 3),
        ("save", 3),
        ("leaves?", 3),
    ]


@pytest.mark.parametrize(("at_end", "due"), [(True, [3, 6, 7]), (False, [3, 6])])
def test_periodic_events(at_end: bool, due: list[int]) -> None:
    event = Periodic(3, lambda step: None, at_end=at_end)
    assert [step for step in range(1, 8) if event.is_due(step, max_steps=7)] == due


def test_a_wish_to_leave_ends_the_loop_at_its_step_boundary() -> None:
    engine = PlainEngine()
    trainer = make({"denoiser": engine}, max_steps=9, leaves_after=lambda step: step == 2)
    assert trainer.fit() is False
    assert (trainer.step, engine.applied_steps) == (2, 2)


def test_a_wish_to_leave_after_the_last_step_changes_nothing() -> None:
    assert make({"denoiser": PlainEngine()}, max_steps=2, leaves_after=lambda step: step == 2).fit() is True


def test_a_finished_run_reads_and_does_nothing() -> None:
    engine = PlainEngine()
    trainer = make({"denoiser": engine}, start=4, max_steps=4)
    assert trainer.fit() is True
    assert engine.log == []


def test_each_trainable_steps_when_its_task_says_so_with_the_others_frozen() -> None:
    log: list[Any] = []
    engines = {name: PlainEngine(name=name, log=log) for name in ("generator", "judge")}
    task = CountingTask(active=lambda name, step: name == "generator" or step >= 1)
    make(engines, max_steps=2, task=task).fit()
    assert [row[:2] for row in log if row[0] == "step"] == [
        ("step", "generator"),
        ("step", "generator"),
        ("step", "judge"),
    ]
    assert [row for row in log if row[0] == "alone"] == [
        ("alone", "generator", ["judge"]),
        ("alone", "generator", ["judge"]),
        ("alone", "judge", ["generator"]),
    ]


def test_networks_are_put_into_training_mode_before_every_update() -> None:
    engine = PlainEngine()
    modes: list[bool] = []
    task = CountingTask(on_loss=lambda: modes.append(engine.module.training))

    def validate(step: int) -> None:
        engine.module.eval()

    make({"denoiser": engine}, max_steps=3, task=task, events=[Periodic(1, validate)]).fit()
    assert modes == [True, True, True]


# What is counted ------------------------------------------------------------------------------------------------------


def test_only_applied_steps_move_the_learning_rate() -> None:
    engine = PlainEngine(skips=[1, 2])
    asked: list[int] = []
    make({"denoiser": engine}, max_steps=5, learning_rate=lambda name, applied: asked.append(applied) or 0.1).fit()
    assert asked == [0, 1, 1, 1, 2]
    assert engine.applied_steps == 3


def test_windows_are_means_over_their_own_samples() -> None:
    reports: list[Report] = []
    make({"denoiser": PlainEngine(accumulation=2)}, max_steps=5, accumulation=2, on_report=reports.append).fit()
    assert [report.step for report in reports] == [2, 4, 5]
    assert [report.means["denoiser/loss"] for report in reports] == [3.5, 11.5, 17.5]
    assert [report.means["denoiser/double"] for report in reports] == [7.0, 23.0, 35.0]
    assert [report.samples_seen for report in reports] == [8, 16, 20]
    assert [report.images for report in reports] == [8, 8, 4]


def test_skipped_steps_are_counted_per_window_and_leave_the_last_applied_result() -> None:
    reports: list[Report] = []
    make({"denoiser": PlainEngine(skips=[1, 2])}, max_steps=4, on_report=reports.append).fit()
    assert [report.skipped for report in reports] == [1, 1]
    assert [report.causes for report in reports] == [{"gradients not finite": 1}] * 2
    assert [report.means["denoiser/loss"] for report in reports] == [0.5, 6.5], "what was thrown away does not count"
    assert [report.results["denoiser"].applied for report in reports] == [True, True]


def test_tombstones_do_not_count_whatever_their_zeros_give() -> None:
    sums = Sums()
    sums.add("loss", torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([1.0, 0.0, 1.0]))
    sums.add("loss", torch.tensor([8.0]), torch.tensor([1.0]))
    assert sums.means() == {"loss": 4.0}


def test_a_window_of_tombstones_alone_has_a_mean_of_zero() -> None:
    sums = Sums()
    sums.add("loss", torch.tensor([float("nan")]), torch.tensor([0.0]))
    assert sums.means() == {"loss": 0.0}


def test_window_means_are_over_the_samples_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Sums()
    other.add("a", torch.tensor([10.0]), torch.ones(1))
    other.add("b", torch.tensor([1.0]), torch.ones(1))
    gathered: list[list[float]] = []
    monkeypatch.setattr(distributed, "gather_objects", lambda item: gathered.append(item) or [item])
    other.means()
    monkeypatch.setattr(distributed, "gather_objects", lambda item: [item, gathered[0]])
    mine = Sums()
    mine.add("b", torch.tensor([2.0, 3.0]), torch.ones(2))
    mine.add("a", torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))
    assert mine.means() == {"a": 4.0, "b": 2.0}


def test_events_do_not_count_as_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(trainer_module, "Window", lambda started=0.0: Window(started=started))
    reports: list[Report] = []

    def pass_time(seconds: float) -> None:
        clock[0] += seconds

    def slow() -> Iterator[tuple[int, int, Batch]]:
        for item in batches(0, 1):
            pass_time(0.25)
            yield item

    trainer = make(
        {"denoiser": PlainEngine()},
        task=CountingTask(on_loss=lambda: pass_time(1.0)),
        stream=slow(),
        on_report=reports.append,
        events=[Periodic(1, lambda step: pass_time(100.0))],
    )
    trainer.fit()
    assert [report.seconds for report in reports] == [2.5, 2.5]
    assert [report.data_wait_seconds for report in reports] == [0.5, 0.5]


def test_the_rest_is_reported_where_a_checkpoint_cuts_and_every_step_once() -> None:
    """A save of step 3, a stop after step 5, and the resumed run: their windows cover each step exactly once."""
    reports: list[Report] = []

    def train(start: int, leaves_after: Callable[[int], bool]) -> None:
        trainer = make(
            {"denoiser": PlainEngine()},
            max_steps=8,
            start=start,
            settings={"log_every_steps": 4},
            on_report=reports.append,
            leaves_after=leaves_after,
            events=[Periodic(3, lambda step: trainer.report_rest())],
        )
        trainer.fit()

    train(0, lambda step: step == 5)
    train(5, lambda step: False)
    assert [(report.step, report.images) for report in reports] == [(3, 6), (4, 2), (5, 2), (6, 2), (8, 4)]
    assert [report.means["denoiser/loss"] for report in reports] == [2.5, 6.5, 8.5, 10.5, 13.5]
    assert [report.samples_seen for report in reports] == [6, 8, 10, 12, 16]


def test_an_event_that_reports_does_not_shorten_the_next_window(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(trainer_module, "Window", lambda started=0.0: Window(started=started))
    reports: list[Report] = []

    def pass_time(seconds: float) -> None:
        clock[0] += seconds

    def save(step: int) -> None:
        pass_time(100.0)
        trainer.report_rest()
        pass_time(10.0)

    trainer = make(
        {"denoiser": PlainEngine()},
        task=CountingTask(on_loss=lambda: pass_time(1.0)),
        settings={"log_every_steps": 9},
        on_report=reports.append,
        events=[Periodic(2, save)],
    )
    trainer.fit()
    assert [(report.step, report.seconds) for report in reports] == [(2, 2.0), (4, 2.0)]


def test_what_torch_draws_depends_on_seed_step_and_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(start: int, **settings: Any) -> list[tuple[int, float]]:
        task = CountingTask()
        engine = PlainEngine(accumulation=2)
        make({"denoiser": engine}, start=start, max_steps=3, accumulation=2, task=task, settings=settings).fit()
        return task.draws_seen

    whole = draws(0)
    assert len({value for _, value in whole}) == 6
    torch.rand(7)  # whatever was drawn before
    assert draws(1) == whole[2:]
    monkeypatch.setenv("RANK", "1")
    assert not {value for _, value in draws(0)} & {value for _, value in whole}


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
