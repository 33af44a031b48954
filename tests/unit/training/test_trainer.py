"""The loop on engines and a task of its own: what happens when, what is counted, and when it stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sdtrain import distributed
from sdtrain.records import Batch
from sdtrain.training import trainer as trainer_module
from sdtrain.training.trainer import Periodic, Report
from sdtrain.training.window import Sums, Window
from tests.engines import PlainEngine
from tests.unit.training.loops import CountingTask, batches, make

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
