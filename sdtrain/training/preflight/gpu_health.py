"""What the driver says of this node's GPUs: memory errors, remapped rows, throttling, a wish to be reset."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from xml.etree import ElementTree

QUERY_SECONDS = 60
"""nvidia-smi answers within seconds; a GPU that fell off the bus can hold it for ever."""
_UNCORRECTABLE = ("double_bit/total", "dram_uncorrectable", "sram_uncorrectable", "sram_uncorrectable_parity")
_UNCORRECTABLE += ("sram_uncorrectable_secded",)
_THROTTLES = ("clocks_throttle_reasons/clocks_throttle_reason_", "clocks_event_reasons/clocks_event_reason_")
_SLOWDOWNS = {"hw_thermal_slowdown": "too hot", "hw_power_brake_slowdown": "short of power"}


@dataclass(frozen=True, slots=True)
class GpuReport:
    """One GPU as nvidia-smi sees it.

    Attributes:
        name: Its model.
        driver: Version of the driver.
        sick: What makes it unfit for a job; the driver's own words where it has any.
        strained: What a job can live with: clocks held down at this moment, a repair that waits for a reset.
    """

    name: str
    driver: str
    sick: tuple[str, ...]
    strained: tuple[str, ...]


def query() -> str | None:
    """nvidia-smi's report of all GPUs as XML; None where there is no nvidia-smi.

    Raises:
        OSError: It did not answer in time, or failed; with its words.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, timeout=QUERY_SECONDS)
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi did not answer within {QUERY_SECONDS} s: a GPU or its driver hangs") from None
    if done.returncode != 0:
        raise OSError(f"nvidia-smi failed: {(done.stderr or done.stdout).strip() or done.returncode}")
    return done.stdout


def parse(report: str) -> list[GpuReport]:
    """Read nvidia-smi's XML; what a GPU or an older driver does not tell counts as well.

    Raises:
        OSError: It is no such report.
    """
    try:
        root = ElementTree.fromstring(report)
    except ElementTree.ParseError as error:
        raise OSError(f"nvidia-smi's report cannot be read: {error}") from None
    driver = root.findtext("driver_version", "unknown")
    return [
        GpuReport(gpu.findtext("product_name", "GPU"), driver, tuple(_sick(gpu)), tuple(_strained(gpu)))
        for gpu in root.findall("gpu")
    ]


def _sick(gpu: ElementTree.Element) -> list[str]:
    counts = [gpu.findtext(f"ecc_errors/volatile/{name}", "0") for name in _UNCORRECTABLE]
    errors = sum(int(count) for count in counts if count.isdigit())
    said = [f"{errors} uncorrectable memory errors since the driver was loaded"] if errors else []
    if gpu.findtext("remapped_rows/remapped_row_failure") == "Yes":
        said.append("a memory row could not be remapped")
    action = gpu.findtext("gpu_recovery_action", "None")  # what the driver wants after an Xid error
    if action not in ("None", "N/A"):
        said.append(f"the driver asks for: {action}")
    return said


def _strained(gpu: ElementTree.Element) -> list[str]:
    said = [
        f"slowed down, {words}"
        for reason, words in _SLOWDOWNS.items()
        if any(gpu.findtext(f"{prefix}{reason}") == "Active" for prefix in _THROTTLES)
    ]
    if gpu.findtext("remapped_rows/remapped_row_pending") == "Yes":
        said.append("a remapped memory row waits for a reset")
    return said
