"""Copies in host memory: the same buffers every time, made before the first copy where they are reserved."""

from __future__ import annotations

import torch

from sdtrain.checkpoints.host_buffers import HostBuffers


def test_a_copy_is_taken_into_what_was_reserved() -> None:
    buffers, files = HostBuffers(), {"a": {"x": torch.arange(6.0).reshape(2, 3), "n": torch.tensor([7])}}
    buffers.reserve(files)
    reserved = {key: buffer.data_ptr() for key, buffer in buffers._buffers.items()}
    copies = buffers.copy(files)
    assert {("a", key): copy.data_ptr() for key, copy in copies["a"].items()} == reserved
    assert all(torch.equal(copies["a"][key], tensor) for key, tensor in files["a"].items())


def test_a_copy_does_not_follow_its_tensor_and_the_next_one_takes_its_place() -> None:
    buffers, tensor = HostBuffers(), torch.ones(4)
    first = buffers.copy({"a": {"x": tensor}})["a"]["x"]
    tensor.fill_(2)
    assert first.tolist() == [1.0] * 4
    second = buffers.copy({"a": {"x": tensor}})["a"]["x"]
    assert second.data_ptr() == first.data_ptr() and second.tolist() == [2.0] * 4


def test_a_tensor_of_another_shape_or_dtype_gets_a_buffer_of_its_own() -> None:
    buffers = HostBuffers()
    buffers.reserve({"a": {"x": torch.ones(4)}})
    for changed in (torch.ones(5), torch.ones(5, dtype=torch.float16)):
        assert torch.equal(buffers.copy({"a": {"x": changed}})["a"]["x"], changed)
