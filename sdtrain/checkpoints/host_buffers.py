"""Host memory that tensors are copied to, so that training may change them while the copies are written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostBuffers:
    """One buffer per tensor, allocated at its first copy and used again by every later one.

    Buffers of tensors on an accelerator are pinned, which makes the copy as fast as the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

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
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)
