from __future__ import annotations

import torch

from sdtrain.conditioners.none import NoConditioner


def test_it_tells_nothing_and_learns_nothing() -> None:
    conditioner = NoConditioner()
    assert conditioner(torch.zeros(2, 77)).parts() == {}
    assert conditioner().parts() == {}
    assert conditioner.null(4).parts() == {}
    assert list(conditioner.parameters()) == []
    assert conditioner.width is None
