from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdtrain.checkpoints.manifest import Checkpoint, rank_file
from sdtrain.checkpoints.rankfile import write_tensors
from sdtrain.checkpoints.recut import (
    KINDS,
    Group,
    Layout,
    Slot,
    assemble,
    coverage_problems,
    kinds_of,
    layout_of,
    read_span,
    span,
    spans,
    tensor_name,
)
from sdtrain.errors import CheckpointError

LAYOUT = Layout.of([{"conv.weight": (4, 3, 2), "scale": ()}, {"conv.bias": (5,), "norm.weight": (2, 1)}])


def flats(layout: Layout = LAYOUT) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return {kind: [torch.randn(group.numel, generator=generator) for group in layout.groups] for kind in KINDS}


def partition_sizes(layout: Layout, world_size: int, alignment: int = 2) -> list[int]:
    """What ZeRO-2 does: pad the vector to a multiple of alignment x ranks."""
    unit = alignment * world_size
    return [-(-group.numel // unit) * unit // world_size for group in layout.groups]


def write(path: Path, world_size: int, *, layout: Layout = LAYOUT, kinds: tuple[str, ...] = KINDS) -> Checkpoint:
    """A checkpoint as `world_size` ranks write it, in one process."""
    path.mkdir(parents=True)
    vectors = flats(layout)
    owned = spans(layout, partition_sizes(layout, world_size), world_size)
    files: dict[str, Any] = {}
    for rank in range(world_size):
        tensors = {
            tensor_name(group, kind): vectors[kind][group][slice(*owned[rank][group])]
            for kind in kinds
            for group in range(len(layout.groups))
        }
        files[rank_file("denoiser", rank)] = {"size_bytes": 0, "sha256": "", "rank": rank}
        write_tensors(path / rank_file("denoiser", rank), tensors)
    manifest = {
        "step": 1,
        "world_size": world_size,
        "files": files,
        "layouts": {"denoiser": layout.to_json()},
        "spans": {"denoiser": owned},
    }
    return Checkpoint(path, manifest)


def test_a_layout_survives_json() -> None:
    assert Layout.from_json(LAYOUT.to_json()) == LAYOUT
    assert LAYOUT.groups[0].slots == (Slot("conv.weight", (4, 3, 2), 0), Slot("scale", (), 24))
    assert [group.numel for group in LAYOUT.groups] == [25, 7]


def test_the_length_of_a_group_counts_gaps_between_its_slots() -> None:
    assert Group((Slot("a", (3,), 0), Slot("b", (2,), 8))).numel == 10
    assert Group(()).numel == 0


@given(numel=st.integers(0, 1000), world_size=st.integers(1, 17), extra=st.integers(0, 9))
def test_spans_tile_the_vector_without_its_padding(numel: int, world_size: int, extra: int) -> None:
    size = -(-numel // world_size) + extra
    edges = [span(numel, size, rank) for rank in range(world_size)]
    assert [element for start, stop in edges for element in range(start, stop)] == list(range(numel))


@pytest.mark.parametrize("written_by", [1, 2, 3, 8])
@pytest.mark.parametrize("read_by", [1, 2, 4, 5])
def test_any_world_size_reads_what_any_other_wrote(tmp_path: Path, written_by: int, read_by: int) -> None:
    checkpoint = write(tmp_path / "c", written_by)
    vectors = flats()
    for rank, owned in enumerate(spans(LAYOUT, partition_sizes(LAYOUT, read_by), read_by)):
        for group, (start, stop) in enumerate(owned):
            for kind in KINDS:
                read = read_span(checkpoint, "denoiser", group, kind, start, stop)
                assert torch.equal(read, vectors[kind][group][start:stop]), (rank, group, kind)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(edges=st.tuples(st.integers(0, 25), st.integers(0, 25)).map(sorted), world_size=st.sampled_from([1, 2, 3, 7]))
def test_any_span_reads_as_the_vector(tmp_path: Path, edges: list[int], world_size: int) -> None:
    path = tmp_path / str(world_size)
    checkpoint = write(path / "c", world_size) if not path.exists() else _again(path / "c", world_size)
    start, stop = edges
    assert torch.equal(read_span(checkpoint, "denoiser", 0, "ema", start, stop), flats()["ema"][0][start:stop])


def _again(path: Path, world_size: int) -> Checkpoint:
    owned = spans(LAYOUT, partition_sizes(LAYOUT, world_size), world_size)
    return Checkpoint(path, {"layouts": {"denoiser": LAYOUT.to_json()}, "spans": {"denoiser": owned}})


def test_only_files_that_overlap_are_opened(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", 3)
    for rank in (0, 2):
        (checkpoint.path / rank_file("denoiser", rank)).unlink()
    start, stop = checkpoint.manifest["spans"]["denoiser"][1][0]
    assert torch.equal(read_span(checkpoint, "denoiser", 0, "master", start, stop), flats()["master"][0][start:stop])
    with pytest.raises(CheckpointError, match=r"denoiser.rank00000.safetensors: cannot be read as safetensors"):
        read_span(checkpoint, "denoiser", 0, "master", start - 1, stop)


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_come_back_whole_and_by_name(tmp_path: Path, world_size: int, kind: str) -> None:
    vectors = flats()[kind]
    whole = assemble(write(tmp_path / "c", world_size), "denoiser", kind)
    assert list(whole) == ["conv.weight", "scale", "conv.bias", "norm.weight"]
    assert torch.equal(whole["conv.weight"], vectors[0][:24].view(4, 3, 2))
    assert torch.equal(whole["scale"], vectors[0][24])
    assert torch.equal(whole["conv.bias"], vectors[1][:5])
    assert torch.equal(whole["norm.weight"], vectors[1][5:].view(2, 1))


def test_kinds_say_whether_there_is_an_ema(tmp_path: Path) -> None:
    assert kinds_of(write(tmp_path / "a", 2), "denoiser") == KINDS
    assert kinds_of(write(tmp_path / "b", 2, kinds=KINDS[:3]), "denoiser") == KINDS[:3]


def test_an_absent_kind_is_named_with_what_is_there(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", 1, kinds=("master",))
    with pytest.raises(CheckpointError, match=r"holds no tensor 'group0/ema'; it holds group0/master, group1/master"):
        read_span(checkpoint, "denoiser", 0, "ema", 0, 1)


def test_an_absent_trainable_is_named_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no trainable 'critic'; it holds denoiser"):
        layout_of(write(tmp_path / "c", 1), "critic")


def test_a_gap_between_ranks_is_an_error(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", 2)
    checkpoint.manifest["spans"]["denoiser"][1][0][0] += 1
    with pytest.raises(CheckpointError, match=r"denoiser, group 0, master: elements 14 to 25 are in no rank's file"):
        read_span(checkpoint, "denoiser", 0, "master", 0, 25)


def test_a_file_of_another_length_is_an_error(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", 1)
    checkpoint.manifest["spans"]["denoiser"][0][0][1] = 20
    with pytest.raises(CheckpointError, match=r"group0/master is F32 \[25\], the manifest says F32 \[20\]"):
        read_span(checkpoint, "denoiser", 0, "master", 0, 5)


def test_coverage_holds_for_what_ranks_write_and_names_what_does_not(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", 3)
    assert coverage_problems(checkpoint) == []
    checkpoint.manifest["spans"]["denoiser"][1][1][1] -= 1
    assert coverage_problems(checkpoint) == ["denoiser: spans of group 1 do not tile its 7 elements"]
    del checkpoint.manifest["files"][rank_file("denoiser", 2)]
    checkpoint.manifest["spans"]["denoiser"].pop()
    assert coverage_problems(checkpoint)[:2] == [
        "denoiser: spans of 2 ranks, world size 3",
        "denoiser.rank00002.safetensors: not in the manifest",
    ]
