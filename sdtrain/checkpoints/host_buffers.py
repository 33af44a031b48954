"""Host memory that tensors are copied to, so that training may change them while the copies are written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostBuffers:
    """One buffer per tensor, allocated once and used again by every copy.

    Buffers of tensors on an accelerator are pinned, which makes the copy as fast as the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def reserve(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Allocate the buffers of these tensors and touch every page: what else the first copy would pay for.

        Raises:
            RuntimeError: The host has no memory for them.
        """
        for name, tensors in files.items():
            for key, tensor in tensors.items():
                self._buffer_of((name, key), tensor).zero_()

    def copy(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies of all tensors, file by file; complete when this returns.

        The copies are the buffers themselves: they are valid until the next call.

        Raises:
            RuntimeError: The host has no memory for them.
        """
        copies = {
            name: {key: self._copied((name, key), tensor.detach()) for key, tensor in tensors.items()}
            for name, tensors in files.items()
        }
        for device in {tensor.device for tensors in files.values() for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _copied(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        return self._buffer_of(key, tensor).copy_(tensor, non_blocking=True)

    def _buffer_of(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer
