"""What nvidia-smi's report means."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from sdtrain.training.preflight import gpu_health
from sdtrain.training.preflight.node_checks import check_driver

GPU = """
<gpu id="00000000:{bus}:00.0">
  <product_name>NVIDIA H100 80GB HBM3</product_name>
  <ecc_errors><volatile>
    <sram_correctable>3</sram_correctable><sram_uncorrectable_parity>0</sram_uncorrectable_parity>
    <dram_correctable>1</dram_correctable><dram_uncorrectable>{errors}</dram_uncorrectable>
  </volatile></ecc_errors>
  <remapped_rows>
    <remapped_row_pending>{pending}</remapped_row_pending><remapped_row_failure>{failure}</remapped_row_failure>
  </remapped_rows>
  <clocks_event_reasons>
    <clocks_event_reason_hw_thermal_slowdown>{hot}</clocks_event_reason_hw_thermal_slowdown>
  </clocks_event_reasons>
  <gpu_recovery_action>{action}</gpu_recovery_action>
</gpu>"""
WELL = {"bus": "18", "errors": "0", "pending": "No", "failure": "No", "hot": "Not Active", "action": "None"}


def report(*gpus: dict[str, str]) -> str:
    listed = "".join(GPU.format(**(WELL | gpu)) for gpu in gpus)
    return f"<nvidia_smi_log><driver_version>570.86</driver_version>{listed}</nvidia_smi_log>"


@pytest.mark.parametrize(
    ("gpu", "sick", "strained"),
    [
        ({}, (), ()),
        ({"errors": "2"}, ("2 uncorrectable memory errors since the driver was loaded",), ()),
        ({"failure": "Yes"}, ("a memory row could not be remapped",), ()),
        ({"action": "Reset"}, ("the driver asks for: Reset",), ()),
        ({"hot": "Active"}, (), ("slowed down, too hot",)),
        ({"pending": "Yes"}, (), ("a remapped memory row waits for a reset",)),
        ({"errors": "N/A", "pending": "N/A", "failure": "N/A"}, (), ()),
    ],
)
def test_a_gpu(gpu: dict[str, str], sick: tuple[str, ...], strained: tuple[str, ...]) -> None:
    (found,) = gpu_health.parse(report(gpu))
    assert (found.sick, found.strained, found.driver) == (sick, strained, "570.86")


def test_a_gpu_that_tells_nothing_is_well() -> None:
    (found,) = gpu_health.parse("<nvidia_smi_log><gpu><product_name>Tesla K80</product_name></gpu></nvidia_smi_log>")
    assert (found.sick, found.strained, found.driver) == ((), (), "unknown")


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_the_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.xml").write_text(report({}, {"errors": "1"}))
    nvidia_smi(tmp_path, monkeypatch, f"cat {tmp_path}/report.xml")
    found = check_driver()
    assert (found.status, found.of_node) == ("failed", True)
    assert found.found == "GPU 1: 1 uncorrectable memory errors since the driver was loaded"
    (tmp_path / "report.xml").write_text(report({}, {"hot": "Active"}))
    assert (check_driver().status, check_driver().found) == ("warning", "GPU 1: slowed down, too hot")
    (tmp_path / "report.xml").write_text(report({}, {}))
    assert check_driver().found == "2 GPUs without memory errors, driver 570.86"


def test_a_driver_that_fails_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    with pytest.raises(OSError, match="nvidia-smi failed: Failed to initialize NVML: Driver/library version mismatch"):
        gpu_health.query()
    nvidia_smi(tmp_path, monkeypatch, "exec sleep 5")
    monkeypatch.setattr(gpu_health, "QUERY_SECONDS", 0.2)
    with pytest.raises(OSError, match=r"nvidia-smi did not answer within 0.2 s: a GPU or its driver hangs"):
        gpu_health.query()
    with pytest.raises(OSError, match="nvidia-smi's report cannot be read: "):
        gpu_health.parse("<nvidia_smi_log>")
