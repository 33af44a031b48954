"""No conditioning: for denoisers that are told nothing but the timestep."""

from __future__ import annotations

from torch import Tensor, nn

from sdtrain.records import Conditioning


class NoConditioner(nn.Module):
    """Stands where a conditioner is expected and tells nothing; has no parameters."""

    width: int | None = None

    def forward(self, tokens: Tensor | None = None) -> Conditioning:
        """An empty conditioning, whatever is given."""
        return Conditioning()

    def null(self, batch: int) -> Conditioning:
        """The same empty conditioning: with and without condition are one."""
        return Conditioning()
