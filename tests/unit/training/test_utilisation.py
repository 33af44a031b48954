from __future__ import annotations

import pytest
import torch

from sdtrain.records import Precision
from sdtrain.training.utilisation import Utilisation, peak_flops, utilisation_here


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Radeon VII", None),
    ],
)
def test_the_longest_known_name_counts(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_share_by_hand() -> None:
    """803 GFLOPs forward, three times that with the backward, 100 images a second, on one A100."""
    assert Utilisation(803e9, 312e12).share(100.0) == pytest.approx(100 * 3 * 803e9 / 312e12)


def test_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def count() -> int:
        asked.append(1)
        return 7

    def here(precision: Precision = "bf16") -> Utilisation | None:
        return utilisation_here(count, precision=precision, world_size=4)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert here() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Unknown")
    assert here() is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert here("fp32") is None
    assert asked == [], "nothing is counted for a peak that is not known"
    assert here() == Utilisation(7, 4 * 989e12)
    assert utilisation_here(lambda: None, precision="bf16", world_size=1) is None
