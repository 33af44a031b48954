"""Stage `filter-percentiles`: the exact value at a percentile of a column over all tables.

Each table's values are sorted once; the value at a rank is then found by bisection over the sorted files, which stay on
disk. The result is exact and the same for any number of files, workers or orders of work: percentile p of n values is
the one with floor(n * p / 100) values before it in sorted order. Absent and infinite values do not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.stage import Needs, Unit, Work
from data_pipeline.stages.metadata import read_card, table_units
from sdtrain.errors import DataError


@dataclass(frozen=True)
class PercentilesStage:
    """The sorted values of the columns, for each table `<unit>.<column>.npy`.

    Attributes:
        columns: The columns, by our names.
        source: Folder of the metadata stage.
        folder: Where the sorted values go.
    """

    columns: tuple[str, ...]
    source: Path
    folder: Path
    name: str = "filter-percentiles"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """The columns."""
        return {"columns": list(self.columns)}

    def units(self) -> list[Unit]:
        """One for each table."""
        return table_units(self.source)

    def worker(self) -> Work:
        """Sort one table's values."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            table = read_card(unit.inputs[0])
            for column in self.columns:
                if column not in table.columns.chosen:
                    raise DataError(
                        f"{table.source}: filter.percentiles needs a column {column}; columns present: "
                        f"{', '.join(table.columns.present)}"
                    )
            parts: dict[str, list[npt.NDArray[Any]]] = {column: [] for column in self.columns}
            for batch in table.batches(self.columns):
                for column in self.columns:
                    values = batch[column].drop_null().to_numpy(zero_copy_only=False)
                    parts[column].append(values[np.isfinite(values)])
            for column, found in parts.items():
                np.save(folder / f"{unit.name}.{column}.npy", np.sort(np.concatenate(found)), allow_pickle=False)
            return {column: sum(map(len, found)) for column, found in parts.items()}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """How many values there are."""
        counts = [f"{sum(row[column] for row in stats):,} of {column}" for column in self.columns]
        return f"filter-percentiles: values sorted: {', '.join(counts)}"


def read_cuts(folder: Path, percents: Mapping[str, float], columns: Mapping[str, str]) -> dict[str, float]:
    """The values that percentiles stand for.

    Args:
        folder: Of the stage.
        percents: Rule family -> percentile in [0, 100].
        columns: Rule family -> column.

    Returns:
        Column -> value.

    Raises:
        DataError: A column has no value at all.
    """
    return {columns[family]: _at_percentile(folder, columns[family], percent) for family, percent in percents.items()}


def _at_percentile(folder: Path, column: str, percent: float) -> float:
    paths = sorted(folder.glob(f"*.{column}.npy"))
    return value_at_percentile([np.load(path, mmap_mode="r", allow_pickle=False) for path in paths], percent, column)


def value_at_percentile(parts: Sequence[npt.NDArray[Any]], percent: float, column: str) -> float:
    """The value with floor(n * percent / 100) of the n values before it; the greatest one for 100.

    Args:
        parts: Ascending values, all finite.
        percent: In [0, 100].
        column: What messages call them.

    Raises:
        DataError: There is no value.
    """
    filled = [part for part in parts if len(part)]
    count = sum(map(len, filled))
    if not count:
        raise DataError(f"filter.percentiles: no row has a value of {column}; switch this percentile off with null")
    rank = min(math.floor(count * percent / 100), count - 1)
    low, high = min(float(part[0]) for part in filled), max(float(part[-1]) for part in filled)
    while low < high:  # the least value with more than `rank` values up to it
        middle = _between(low, high)
        if sum(_count_up_to(part, middle) for part in filled) > rank:
            high = middle
        else:
            low = math.nextafter(middle, math.inf)
    return low


def _count_up_to(part: npt.NDArray[Any], value: float) -> int:
    """How many values are <= `value`; compared in the part's own precision, so that numpy copies nothing."""
    own = part.dtype.type(value)
    if float(own) > value:
        own = np.nextafter(own, part.dtype.type(-np.inf))
    return int(np.searchsorted(part, own, side="right"))


def _between(low: float, high: float) -> float:
    """Halfway, and never `high` itself."""
    middle = low / 2 + high / 2
    return middle if middle < high else low
