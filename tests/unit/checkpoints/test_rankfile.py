from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdtrain.checkpoints import rankfile
from sdtrain.checkpoints.rankfile import digest_file, tensor_bytes, write_tensors, write_text


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "odd/bytes": torch.tensor([True, False, True]),
        "group0/master": torch.randn(1001),
        "group0/ema": torch.randn(7, 3).t(),
        "half": torch.randn(5).half(),
        "brain": torch.randn(2, 3).bfloat16(),
        "double": torch.randn(3).double(),
        "count": torch.tensor(2**40),
        "empty": torch.empty(0),
        "pixels": torch.arange(11, dtype=torch.uint8),
        "slice": torch.arange(20.0)[3:9],
    }


def test_safetensors_reads_back_every_dtype_shape_and_stride(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_tensors(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_digest_and_size_are_those_of_the_bytes_on_disk(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    written = write_tensors(path, tensors)
    content = path.read_bytes()
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    assert written.size_bytes == len(content)
    assert digest_file(path) == written


def test_pieces_do_not_change_the_file(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_tensors(tmp_path / "whole", tensors)
    monkeypatch.setattr(rankfile, "CHUNK_BYTES", 7)
    assert write_tensors(tmp_path / "pieces", tensors) == whole
    assert digest_file(tmp_path / "pieces") == whole


def test_data_is_aligned_to_eight_bytes_and_to_each_element(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_tensors(tmp_path / "a", tensors)
    content = (tmp_path / "a").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    for name, entry in json.loads(content[8:start]).items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0, name


def test_no_tensors_is_a_valid_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "none", {})
    with safe_open(tmp_path / "none", framework="pt") as file:
        assert list(file.keys()) == []


def test_the_header_is_on_disk_when_the_hook_is_called_and_the_data_is_not(tmp_path: Path) -> None:
    seen: list[int] = []
    path = tmp_path / "a"
    written = write_tensors(path, {"a": torch.zeros(100)}, after_header=lambda: seen.append(path.stat().st_size))
    assert seen == [written.size_bytes - 400]


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {})
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "a", {"a": torch.zeros(1)})


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"tensor 'wave' has dtype torch.complex64; a file can hold F64, F32, F16"):
        write_tensors(tmp_path / "a", {"wave": torch.zeros(1, dtype=torch.complex64)})
    assert not (tmp_path / "a").exists()


def test_text_is_digested_too(tmp_path: Path) -> None:
    written = write_text(tmp_path / "config.yaml", "größe: 1\n")
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "größe: 1\n"
    assert digest_file(tmp_path / "config.yaml") == written


def test_tensor_bytes_counts_elements_of_their_size() -> None:
    assert tensor_bytes({"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.int64)}) == 12 + 32


def test_writes_that_take_only_a_part_are_completed(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_tensors(tmp_path / "whole", tensors)
    real = os.write
    monkeypatch.setattr(rankfile.os, "write", lambda handle, content: real(handle, content[:13]))
    assert write_tensors(tmp_path / "parts", tensors) == whole
    assert digest_file(tmp_path / "parts") == whole
