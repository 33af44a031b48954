"""Rows whose text is copied only where they are chosen.

Most of a LAION table is text, and a filter keeps few of its rows. polars decodes strings as views into the pages that
it has unpacked, which takes half the time of Arrow's copies (`benchmarks/filter.py`). Numbers are Arrow's throughout,
so that types, nulls and rules are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of our columns.

    Attributes:
        numbers: The columns that are no text.
        texts: The columns that are, of the same rows.
        names: All columns in their order.
    """

    numbers: pa.RecordBatch
    texts: pl.DataFrame
    names: tuple[str, ...]

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> Rows:
        """The rows of a batch, whose text is known to be UTF-8."""
        is_text = [pa.types.is_string(kind) for kind in batch.schema.types]
        texts = [name for name, text in zip(batch.schema.names, is_text, strict=True) if text]
        numbers = [name for name, text in zip(batch.schema.names, is_text, strict=True) if not text]
        frame = pl.DataFrame({name: pl.Series(name, batch[name], pl.String) for name in texts})
        return cls(batch.select(numbers), frame, tuple(batch.schema.names))

    def __len__(self) -> int:
        return len(self.texts)

    def has_text(self, name: str) -> npt.NDArray[np.bool_]:
        """Where a column of text holds at least one character."""
        return (self.texts[name].str.len_bytes().fill_null(0) > 0).to_numpy()

    def take(self, rows: npt.NDArray[np.int64], names: Sequence[str] | None = None) -> pa.RecordBatch:
        """Some rows of some columns, or of all.

        Args:
            rows: Their numbers, ascending.
            names: The columns; None takes all in their order.
        """
        wanted = self.names if names is None else tuple(names)
        return pa.record_batch([self._column(name, rows) for name in wanted], names=list(wanted))

    def _column(self, name: str, rows: npt.NDArray[np.int64]) -> pa.Array:
        if name not in self.texts.columns:
            column = self.numbers[name]
            return column if len(rows) == len(column) else column.take(pa.array(rows))
        chosen = self.texts[name].gather(rows)
        return chosen.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())
