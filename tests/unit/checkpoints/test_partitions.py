"""The door to DeepSpeed's internals: what it shows, and that what goes in comes out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from sdtrain.checkpoints.partitions import ROW, MasterPartitions, norm_of
from sdtrain.checkpoints.recut import Layout, span
from sdtrain.errors import CheckpointError, ExitCode, PreflightError
from sdtrain.training.engine import Engine, EngineSettings
from tests.engines import one_rank


def test_an_optimiser_without_partitions_is_refused() -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(CheckpointError) as raised:
        MasterPartitions.of(torch.optim.AdamW(network.parameters()), network)
    assert raised.value.exit_code == ExitCode.CHECKPOINT
    assert str(raised.value) == "AdamW holds no flat fp32 partitions: checkpoints and EMA need trainer.zero_stage 2"


def test_a_deepspeed_that_would_step_on_the_stand_in_for_the_gradients_is_refused() -> None:
    other_release = SimpleNamespace(single_partition_of_fp32_groups=[])
    with pytest.raises(PreflightError) as raised:
        MasterPartitions.of(other_release, nn.Linear(2, 2))
    assert str(raised.value) == (
        f"deepspeed {version('deepspeed')} takes no gradients that are one vector already: its ZeRO optimiser has no "
        "_get_preflattened_grad_partition. Install the release that requirements.lock names."
    )


@pytest.mark.parametrize("numel", [0, 1, ROW - 1, ROW, ROW + 1, 5_000_001])
def test_the_norm_of_a_long_vector_is_that_of_its_squares_added_up_in_float64(numel: int) -> None:
    flat = torch.rand(numel, generator=torch.Generator().manual_seed(0)) + 1
    assert float(norm_of(flat)) == pytest.approx(float(flat.double().square().sum().sqrt()), rel=5e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, ROW, 2 * ROW])
def test_one_element_that_is_not_finite_shows_in_the_norm(bad: float, position: int) -> None:
    flat = torch.ones(2 * ROW + 1)
    flat[position] = bad
    assert not torch.isfinite(norm_of(flat))


def test_pieces_become_one_vector_and_what_is_one_already_is_not_copied() -> None:
    pieces = [torch.ones(2, 3), torch.arange(4.0), torch.zeros(2)]
    flat = torch.arange(5.0)
    optimizer = SimpleNamespace(
        averaged_gradients={0: pieces, 1: SimpleNamespace(flat_partition=flat)},
        single_partition_of_fp32_groups=[torch.empty(12), torch.empty(5)],
    )
    MasterPartitions(optimizer, Layout.of([]), ()).flatten_gradients()
    first, second = optimizer.averaged_gradients.values()
    assert first.flat_partition.tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 2, 3, 0, 0]
    assert second.flat_partition is flat
    assert [float(one) ** 2 for (one,) in (first, second)] == pytest.approx([20, 30])


@pytest.mark.parametrize(("dtype", "lends"), [(torch.float32, True), (torch.bfloat16, False)])
def test_gradients_are_gathered_in_the_same_memory_at_every_step(dtype: torch.dtype, lends: bool) -> None:
    optimizer = SimpleNamespace(
        single_partition_of_fp32_groups=[torch.empty(4)],
        dtype=dtype,
        params_in_partition=[[torch.empty(2, 3)], [torch.empty(5)]],
        grads_in_partition=None,
    )
    partitions = MasterPartitions(optimizer, Layout.of([]), ())
    seen = []
    for _ in range(2):
        optimizer.grads_in_partition, optimizer.grads_in_partition_offset = None, 7  # as a backward leaves it
        partitions.lend_memory()
        seen.append(optimizer.grads_in_partition)
    assert (seen[0] is not None) == lends
    assert seen[0] is seen[1]
    if lends:
        assert (len(seen[0]), optimizer.grads_in_partition_offset) == (11, 0)


@pytest.fixture(scope="module")
def place() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def network(place: None) -> nn.Module:
    """47 elements in matrices, so that a padded partition would show; a frozen layer that must not appear."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(5, 3, bias=False), nn.Linear(3, 3)
    )
    network[4].requires_grad_(False)
    return network


@pytest.fixture(scope="module")
def engine(network: nn.Module) -> Engine:
    """Two groups, bf16: matrices with weight decay, vectors without."""
    settings = EngineSettings(micro_batch_size=2, grad_accum_steps=1, weight_decay_on="matrices", precision="bf16")
    return Engine(network, settings)


def train(engine: Engine, steps: int) -> None:
    for step in range(steps):
        inputs = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(step)).bfloat16()
        engine.backward(engine.module(inputs).float().square().mean(1), torch.ones(2))
        engine.step(1e-2)


def by_name(engine: Engine, kind: str) -> dict[str, Tensor]:
    """Whole parameters out of the flat vectors, by the layout."""
    tensors, layout = engine.partitions.tensors(), engine.partitions.layout
    return {
        slot.name: tensors[f"group{index}/{kind}"][slot.offset : slot.offset + slot.numel].view(slot.shape)
        for index, group in enumerate(layout.groups)
        for slot in group.slots
    }


@pytest.mark.engine
def test_the_layout_names_every_trained_parameter_without_gaps(engine: Engine, network: nn.Module) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters() if parameter.requires_grad}
    groups = engine.partitions.layout.groups
    assert [[slot.name for slot in group.slots] for group in groups] == [
        ["0.weight", "3.weight"],
        ["0.bias", "1.weight", "1.bias"],
    ]
    assert {slot.name: slot.shape for group in groups for slot in group.slots} == shapes
    assert [[slot.offset for slot in group.slots] for group in groups] == [[0, 135], [0, 5, 10]]
    assert engine.partitions.spans == ((0, 150), (0, 15))
    assert [len(master) for master in engine.partitions.masters()] == [150, 15]


@pytest.mark.engine
def test_before_the_first_step_moments_are_zeros_and_the_master_is_the_network(
    engine: Engine, network: nn.Module
) -> None:
    if engine.applied_steps:
        pytest.fail("runs first in this module")
    tensors = engine.partitions.tensors()
    for index in (0, 1):
        assert not tensors[f"group{index}/exp_avg"].any()
        assert not tensors[f"group{index}/exp_avg_sq"].any()
    for name, value in by_name(engine, "master").items():
        assert value.dtype == torch.float32
        assert torch.equal(value.bfloat16(), network.get_parameter(name))


def test_each_rank_loads_its_own_span_of_whole_parameters() -> None:
    """A vector of 6 + 3 elements in three pieces of 4, 4 and 1 with 3 of padding."""
    layout = Layout.of([{"weight": (2, 3), "bias": (3,)}])
    whole = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.arange(6.0, 9.0)}
    pieces = []
    for rank in range(3):
        refresh = Mock()
        optimizer = SimpleNamespace(single_partition_of_fp32_groups=[torch.full((4,), -1.0)], update_lp_params=refresh)
        partitions = MasterPartitions(optimizer, layout, (span(9, 4, rank),))
        partitions.load(whole)
        pieces.append(optimizer.single_partition_of_fp32_groups[0])
        refresh.assert_called_once_with()
    assert torch.cat(pieces).tolist() == [*map(float, range(9)), -1.0, -1.0, -1.0]


@pytest.mark.engine
def test_master_and_moments_are_those_of_the_named_parameter(engine: Engine, network: nn.Module) -> None:
    train(engine, 3)
    masters, first, second = (by_name(engine, kind) for kind in ("master", "exp_avg", "exp_avg_sq"))
    assert any(moment.any() for moment in first.values())
    for name, master in masters.items():
        assert torch.equal(master.bfloat16(), network.get_parameter(name))
        assert {value.dtype for value in (master, first[name], second[name])} == {torch.float32}
        assert (second[name] >= 0).all()


@pytest.mark.engine
def test_what_is_saved_comes_back_and_reaches_the_working_weights(engine: Engine, network: nn.Module) -> None:
    train(engine, 1)
    saved = copy.deepcopy(engine.partitions.tensors())
    working = {name: parameter.clone() for name, parameter in network.named_parameters()}
    train(engine, 3)
    assert not torch.equal(network.get_parameter("0.weight"), working["0.weight"])
    engine.partitions.restore(saved, applied_steps=2)
    found = engine.partitions.tensors()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert all(torch.equal(parameter, working[name]) for name, parameter in network.named_parameters())
    states = engine._engine.optimizer.optimizer.state.values()
    assert [float(state["step"]) for state in states] == [2.0, 2.0], "Adam's bias correction goes on from here"


@pytest.mark.engine
def test_restoring_an_untrained_state_leaves_adam_fresh(place: None) -> None:
    torch.manual_seed(1)
    settings = EngineSettings(micro_batch_size=2, grad_accum_steps=1)
    fresh = Engine(nn.Linear(3, 2), settings)
    values = {f"group0/{kind}": torch.full((8,), 0.5) for kind in ("master", "exp_avg", "exp_avg_sq")}
    fresh.partitions.restore(values, applied_steps=0)
    assert not fresh.partitions.tensors()["group0/exp_avg"].any()
    assert all((parameter == 0.5).all() for parameter in fresh.module.parameters())


@pytest.mark.engine
def test_a_trained_engine_that_goes_back_to_its_beginning_is_a_fresh_one(place: None) -> None:
    def take_steps(engine: Engine) -> list[Tensor]:
        for step in range(3):
            inputs = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
            engine.backward(engine.module(inputs).square().mean(1), torch.ones(2))
            engine.step(1e-2)
        return [tensor.clone() for tensor in engine.tensors().values()]

    torch.manual_seed(1)
    engine = Engine(nn.Linear(3, 2), EngineSettings(micro_batch_size=2, grad_accum_steps=1))
    beginning = copy.deepcopy(engine.tensors())
    first = take_steps(engine)
    engine.restore(beginning, applied_steps=0, scaler={})
    again = engine.tensors()
    assert all(torch.equal(again[name], beginning[name]) for name in beginning)
    assert all(torch.equal(one, other) for one, other in zip(first, take_steps(engine), strict=True))


@pytest.mark.engine
def test_working_weights_swap_and_return_exactly(engine: Engine, network: nn.Module) -> None:
    before = copy.deepcopy(engine.partitions.tensors())
    working = {name: parameter.clone() for name, parameter in network.named_parameters()}
    replacement = [torch.full_like(master, 0.1) for master in engine.partitions.masters()]
    with engine.partitions.working_weights_from(replacement):
        for parameter in (network.get_parameter("0.weight"), network.get_parameter("1.bias")):
            assert (parameter == torch.tensor(0.1).bfloat16()).all()
    after = engine.partitions.tensors()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(parameter, working[name]) for name, parameter in network.named_parameters())
    train(engine, 1)  # the partitions still belong to the optimiser
    assert not torch.equal(engine.partitions.tensors()["group0/master"], before["group0/master"])


@pytest.mark.engine
def test_deepspeed_gathers_in_lent_memory_and_takes_flat_gradients_as_they_are(
    place: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EngineSettings(micro_batch_size=2, grad_accum_steps=1, gradient_clip_norm=None)
    engine = Engine(nn.Linear(3, 2), settings)
    optimizer = engine._engine.optimizer
    monkeypatch.setattr(optimizer, "flatten_dense_tensors_aligned", None)  # its own way to lay them flat
    places = []
    for _ in range(2):
        engine.backward(engine.module(torch.ones(2, 3)).square().mean(1), torch.ones(2))
        places.append([piece.untyped_storage().data_ptr() for piece in optimizer.averaged_gradients[0]])
        result = engine.step(1e-2)
        assert result is not None and result.applied
    assert len({*places[0], *places[1]}) == 1


@pytest.mark.engine
def test_an_error_under_other_weights_waits_for_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks do not have this error, so they would not come to a collective."""
    replacement = [torch.full_like(master, 0.1) for master in engine.partitions.masters()]
    with pytest.raises(ZeroDivisionError, match="mine"), engine.partitions.working_weights_from(replacement):
        monkeypatch.setattr(type(engine.partitions), "_write", None)
        raise ZeroDivisionError("mine")
