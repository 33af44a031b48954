"""Model FLOPs utilisation: how much of what the devices could compute the denoiser really uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sdtrain.records import Precision

PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIE": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Dense bf16/fp16 operations per second with fp32 accumulation, by a part of the device's name (vendor data sheets)."""

BACKWARD_PASSES = 2
"""The backward pass costs two forward ones; what gradient checkpointing computes again does not count as use."""


def peak_flops(device_name: str) -> float | None:
    """Peak of one device in half precision; None where the table does not know it.

    The longest matching name counts, so that an H100 PCIe is no H100 and an A10G no A10.
    """
    name = device_name.upper()
    known = [part for part in PEAK_FLOPS if part in name]
    return PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True, slots=True)
class Utilisation:
    """From a speed to a share of the peak.

    Attributes:
        forward_flops: Operations of one image's pass through the denoiser; encoders and the optimiser are left out.
        peak_flops: Operations per second of all devices together.
    """

    forward_flops: float
    peak_flops: float

    def share(self, images_per_second: float) -> float:
        """Model FLOPs utilisation (MFU) at this speed, in [0, 1].

        Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
        """
        return images_per_second * (1 + BACKWARD_PASSES) * self.forward_flops / self.peak_flops


def utilisation_here(
    forward_flops: Callable[[], int | None], *, precision: Precision, world_size: int
) -> Utilisation | None:
    """What speed means on the devices of this run; None on a CPU, on unknown devices, and in fp32 (TF32 or not?).

    Args:
        forward_flops: Asked only where the peak is known.
        precision: Of the denoiser.
        world_size: Number of devices.
    """
    if not torch.cuda.is_available() or precision == "fp32":
        return None
    peak = peak_flops(torch.cuda.get_device_name())
    flops = None if peak is None else forward_flops()
    return None if peak is None or flops is None else Utilisation(flops, peak * world_size)
