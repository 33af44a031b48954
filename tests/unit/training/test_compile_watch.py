"""What is compiled is counted; what is compiled after its shapes' first step is told with the reason."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdtrain import distributed
from sdtrain.records import Batch
from sdtrain.training.compile_watch import CompileWatch, Tally

Micro = tuple[int, int, Batch]


class Block(nn.Module):
    """Compiled without a code generator, which takes milliseconds."""

    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.power = 2
        self.breaks = breaks
        self.compile(backend="eager", dynamic=False)

    def forward(self, values: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return (values * self.scale) ** self.power


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch(width: int) -> Batch:
    values = torch.ones(2, width)
    return Batch(("a", "b"), torch.arange(2), {"values": values}, {}, {}, torch.ones(2))


def stream(*widths: int, micro_steps: int = 1) -> Generator[Micro]:
    for step, width in enumerate(widths):
        for micro_step in range(micro_steps):
            yield step, micro_step, batch(width)


def test_each_shape_is_compiled_once_and_that_is_no_news() -> None:
    block, watch = Block(), CompileWatch()
    graphs = []
    for _, _, each in watch.over(stream(3, 5, 3, 7, 5, 7, micro_steps=2)):
        block(each.fields["values"]).sum().backward()
        figures, news = watch.figures()
        assert news == []
        graphs.append(figures["compile/graphs"])
    assert graphs == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert figures["compile/recompiles"] == figures["compile/graph_breaks"] == 0
    assert figures["compile/seconds"] > 0


def test_a_graph_of_known_shapes_is_news_with_torch_s_reason() -> None:
    block, watch = Block(), CompileWatch()
    told: list[tuple[int, float, list[str]]] = []
    for step, _, each in watch.over(stream(3, 3, 3, 3)):
        block.power = 3 if step == 2 else 2
        block(each.fields["values"])
        figures, news = watch.figures()
        told.append((step, figures["compile/recompiles"], news))
    (reason,) = told[2][2]
    assert [(step, count, len(news)) for step, count, news in told] == [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 1, 0)]
    assert re.match(r"forward \(test_compile_watch\.py:\d+\) in step 2: .*power == 2", reason)
    assert "\n" not in reason


def test_news_belong_to_the_step_they_were_made_in_however_late_they_are_read() -> None:
    block, watch = Block(), CompileWatch()
    for step, _, each in watch.over(stream(3, 3, 5)):
        block.power = 2 + step
        block(each.fields["values"])
    figures, news = watch.figures()
    assert (figures["compile/graphs"], figures["compile/recompiles"]) == (3, 1)
    assert ["in step 1: " in line for line in news] == [True]


def test_code_that_first_runs_after_warm_up_is_news_too() -> None:
    blocks, watch = (Block(), Block(breaks=True)), CompileWatch()
    for step, _, each in watch.over(stream(3, 3)):
        torch.compiler.reset()
        blocks[step](each.fields["values"])
    _, news = watch.figures()
    assert news
    assert all(line.endswith("in step 1: it ran for the first time") for line in news)


def test_graph_breaks_are_counted() -> None:
    Block(breaks=True)(torch.ones(1))  # before the watch
    torch.compiler.reset()
    watch, block = CompileWatch(), Block(breaks=True)
    for _, _, each in watch.over(stream(3, 3)):
        block(each.fields["values"])
    figures, news = watch.figures()
    assert (figures["compile/graph_breaks"], news) == (1, [])


def test_an_eager_stance_compiles_nothing() -> None:
    from sdtrain.nn.compilation import eagerly

    block, watch = Block(), CompileWatch()
    with eagerly():
        assert block(torch.full((2,), 3.0)).tolist() == [9, 9]
    assert watch.figures()[0]["compile/graphs"] == 0
    block(torch.ones(2))
    assert watch.figures()[0]["compile/graphs"] == 1


def test_the_first_step_lasts_from_its_first_forward_to_what_follows_it() -> None:
    now = [0.0]
    watch = CompileWatch(clock=lambda: now[0])

    def beat(seconds: float, phase: str, step: int | None) -> float:
        now[0] += seconds
        watch.beat(phase, step)
        return watch.figures()[0]["compile/first_step_seconds"]

    before = [beat(1, "build", 7), beat(1, "restore", None), beat(1, "data", 7), beat(1, "forward", 7)]
    within = [beat(4, "agree", 7), beat(8, "backward", 7), beat(16, "forward", 7), beat(32, "step", 7)]
    after = [beat(64, "report", 8), beat(1, "forward", 8), beat(1, "agree", 9)]
    assert before + within == [0.0] * 8
    assert after == [124.0] * 3


def test_the_rank_with_most_is_shown_and_equal_news_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [
        Tally(graphs=3, seconds=1.0, recompiles=1, first_step_seconds=9.0, news=["f in step 2: a"]),
        Tally(graphs=2, seconds=5.0, graph_breaks=1, recompiles=2, news=["f in step 2: a", "f in step 3: b"]),
    ]
    watch = CompileWatch()

    def gather(mine: Any) -> list[Any]:
        assert isinstance(mine, Tally)
        return ranks

    monkeypatch.setattr(distributed, "gather_objects", gather)
    assert watch.figures() == (
        {
            "compile/graphs": 3.0,
            "compile/seconds": 5.0,
            "compile/graph_breaks": 1.0,
            "compile/recompiles": 2.0,
            "compile/first_step_seconds": 9.0,
        },
        ["f in step 2: a", "f in step 3: b"],
    )


def test_closing_the_watched_batches_closes_the_batches() -> None:
    closed = []

    def source() -> Generator[Micro]:
        try:
            yield from stream(3, 3)
        finally:
            closed.append(True)

    batches = CompileWatch().over(source())
    next(batches)
    assert not closed
    batches.close()
    assert closed
