"""The records that rooms hand each other."""

from __future__ import annotations

import pytest
import torch

from sdtrain.records import Batch, Conditioning, DrawSpec, Tombstone


def conditioning(value: float, batch: int = 2) -> Conditioning:
    return Conditioning(tokens=torch.full((batch, 3, 4), value), vector=torch.full((batch, 5), value))


def test_parts_are_those_that_are_there() -> None:
    assert Conditioning().parts() == {}
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert list(Conditioning(mask=mask, spatial=torch.zeros(2, 1, 2, 2)).parts()) == ["mask", "spatial"]


def test_cat_stacks_every_part_along_the_batch() -> None:
    both = conditioning(1.0).cat(conditioning(2.0, batch=1))
    assert both.tokens is not None and both.vector is not None
    assert both.tokens.shape == (3, 3, 4)
    assert both.vector[:, 0].tolist() == [1.0, 1.0, 2.0]


def test_where_replaces_the_marked_items_alone() -> None:
    drop = torch.tensor([True, False])
    chosen = conditioning(1.0).where(drop, conditioning(9.0, batch=1))
    assert chosen.tokens is not None and chosen.vector is not None
    assert chosen.tokens[:, 0, 0].tolist() == [9.0, 1.0]
    assert chosen.vector[:, 0].tolist() == [9.0, 1.0]


def test_labels_are_dropped_and_kept_whole_numbers() -> None:
    told = Conditioning(labels=torch.tensor([3, 4])).cat(Conditioning(labels=torch.tensor([5])))
    chosen = told.where(torch.tensor([False, True, False]), Conditioning(labels=torch.tensor([10])))
    moved = chosen.to(dtype=torch.bfloat16)
    assert moved.labels is not None and moved.labels.tolist() == [3, 10, 5]
    assert moved.labels.dtype == torch.int64


def test_where_keeps_the_precision_of_what_is_replaced() -> None:
    half = Conditioning(tokens=torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    chosen = half.where(torch.tensor([True, False]), Conditioning(tokens=torch.ones(1, 3, 4)))
    assert chosen.tokens is not None
    assert chosen.tokens.dtype == torch.bfloat16


def test_unlike_conditionings_do_not_mix() -> None:
    other = Conditioning(tokens=torch.zeros(2, 3, 4))
    message = r"^conditionings hold different parts: \['tokens', 'vector'\] and \['tokens'\]$"
    with pytest.raises(ValueError, match=message):
        conditioning(1.0).cat(other)
    with pytest.raises(ValueError, match=message):
        conditioning(1.0).where(torch.tensor([True, False]), other)


def test_casting_leaves_masks_alone() -> None:
    mask = torch.tensor([[True, False]])
    moved = Conditioning(tokens=torch.zeros(1, 2, 3), mask=mask).to("cpu", torch.bfloat16)
    assert moved.tokens is not None and moved.mask is not None
    assert (moved.tokens.dtype, moved.mask.dtype) == (torch.bfloat16, torch.bool)


def test_a_batch_moves_all_its_tensors_and_keeps_its_words() -> None:
    batch = Batch(
        keys=("a", "b"),
        positions=torch.arange(2),
        fields={"moments": torch.zeros(2, 8, 2, 2, dtype=torch.float16)},
        normals={"noise": torch.zeros(2, 4)},
        uniforms={"timestep": torch.zeros(2, dtype=torch.float64)},
        weights=torch.ones(2),
        errors=(Tombstone("b", "0.tar", "torn"),),
    )
    moved = batch.to("meta")
    assert len(moved) == 2
    assert (moved.keys, moved.errors) == (("a", "b"), (Tombstone("b", "0.tar", "torn"),))
    assert str(moved.errors[0]) == "b: torn"
    tensors = [
        moved.positions,
        moved.weights,
        *moved.fields.values(),
        *moved.normals.values(),
        *moved.uniforms.values(),
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.fields["moments"].dtype, moved.uniforms["timestep"].dtype) == (torch.float16, torch.float64)
    assert batch.weights.device.type == "cpu"


def test_nothing_is_drawn_unless_asked_for() -> None:
    assert (dict(DrawSpec().normals), DrawSpec().uniforms) == ({}, ())


def test_draws_follow_the_size_of_their_field() -> None:
    draws = DrawSpec(normals={"noise": (4, 8, 8), "noise_offset": (4, 1, 1)}, follows="moments")
    assert draws.shapes_for({"moments": (8, 6, 12)}) == {"noise": (4, 6, 12), "noise_offset": (4, 1, 1)}
    assert draws.shapes_for({"tokens": (77,)}) == dict(draws.normals)
    assert DrawSpec(normals={"noise": (4, 8, 8)}).shapes_for({"moments": (8, 6, 12)}) == {"noise": (4, 8, 8)}
