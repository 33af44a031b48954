"""How fast and how right one rank's device works, alone: a product with a known result, and a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MATMUL_SIZE = {"cpu": 384, "cuda": 6144}
"""Rows of the square factors: 3 x 2^k, so that the product is exact in bf16 and fp16 too. About 5 ms of one core, and
1 ms of a current GPU, which is long enough to reach its clocks and short beside the start of a job."""
COPY_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Beyond every cache of a core, and long enough for a PCIe link to reach its speed."""
REPEATS = 10
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Speed:
    """What a rank measured on its own device.

    Attributes:
        is_right: Whether the first and the last product had the known result, bit by bit.
        matmul_seconds: Of one product; the quickest of several, as noise only adds.
        copy_seconds: Of one copy of `COPY_BYTES`, from the host's memory to the device's; alike.
    """

    is_right: bool
    matmul_seconds: float
    copy_seconds: float


def measure(device: torch.device) -> Speed:
    """Multiply and copy on a device.

    Raises:
        RuntimeError: It does not work at all.
    """
    size, dtype = MATMUL_SIZE[device.type], working_dtype(device)
    left, right = factors(size, device, dtype)
    product = left @ right
    is_right = has_known_result(product)
    matmul_seconds = quickest(lambda: torch.matmul(left, right, out=product), device)
    is_right = is_right and has_known_result(product)
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device, pin_memory=False)
    copy_seconds = quickest(lambda: target.copy_(source, non_blocking=True), device)
    return Speed(is_right, matmul_seconds, copy_seconds)


def working_dtype(device: torch.device) -> torch.dtype:
    """What the device's fastest units compute in."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def factors(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two matrices of shape (size, size) whose product is known: a[i, k] = b[i, k] = (i + k) mod 3 - 1.

    Over three neighbouring k the products of -1, 0, 1 with themselves add up to 2, and with themselves shifted by one
    or two places to -1. So the product is size / 3 times 2 where i = j mod 3, and size / 3 times -1 elsewhere: powers
    of two for the sizes used here, and every partial sum is a small integer.
    """
    index = torch.arange(size, device=device)
    matrix = ((index[:, None] + index[None, :]) % 3 - 1).to(dtype)
    return matrix, matrix.clone()


def has_known_result(product: Tensor) -> bool:
    """Whether a product of `factors` is right in every element; compared on the host, which is another device."""
    found = product.float().cpu()
    size = found.shape[0]
    index = torch.arange(size)
    rows = torch.where((index[:3, None] - index[None, :]) % 3 == 0, 2.0, -1.0) * (size // 3)  # (3, size)
    return bool((found.view(size // 3, 3, size) == rows).all())


def quickest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of several runs."""
    return min(timings(work, device, REPEATS))


def timings(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each run, after those that warm up."""
    seconds = []
    for _ in range(WARM_UP + repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
