"""Stage `plan-sample`: a share of the URLs of all tables with all their rows, for the planner.

A row is in the sample if the hash of its URL is small. So all copies of a URL are in or out together, whichever files
they lie in: the share of duplicates in the sample estimates that of the tables, which a sample of rows would not. The
sample does not depend on the settings of the filter: other thresholds are forecast from the same one in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mmh3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from data_pipeline.sources.laion import ALIASES, TableWriter
from data_pipeline.stage import Needs, Unit, Work
from data_pipeline.stages.metadata import read_card, table_units

pc: Any = pyarrow.compute  # its functions are generated at import, so a type checker sees none of them

_HASH_SEED = 1
_HASHES = 2**32
_NOT_JUDGED = ("source_hash", "sample_id", "md5", "sha256")


@dataclass(frozen=True)
class SampleStage:
    """The sampled rows of each table, and the least and greatest value of each of its numeric columns.

    Attributes:
        share: Share of the URLs, in (0, 1].
        min_rows: Rows that are sampled at least, as far as there are so many: small tables need a larger share.
        source: Folder of the metadata stage.
        folder: Where the sample goes.
    """

    share: float
    min_rows: int
    source: Path
    folder: Path
    name: str = "plan-sample"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """Nothing beyond the share that each unit takes."""
        return {}

    def units(self) -> list[Unit]:
        """One for each table."""
        units = table_units(self.source)
        rows = sum(read_card(unit.inputs[0]).rows for unit in units)
        share = min(max(self.share, self.min_rows / rows), 1.0)
        return [replace(unit, facts={"share": share}) for unit in units]

    def worker(self) -> Work:
        """Read one table, keep the rows whose URL is in the sample."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            table = read_card(unit.inputs[0])
            names = [name for name in table.columns.chosen if name not in _NOT_JUDGED]
            ranges = {name: _Range() for name in names if ALIASES[name][0] != "text"}
            without_url = sampled = 0
            with TableWriter(folder / f"{unit.name}.parquet") as writer:
                for batch in table.batches(names):
                    urls = batch["url"].fill_null("").to_pylist()
                    without_url += urls.count("")
                    chosen = _is_chosen(urls, unit.facts["share"])
                    sampled += int(chosen.sum())
                    writer.add(batch.filter(pa.array(chosen)))
                    for name, seen in ranges.items():
                        seen.add(batch[name])
            return {
                "rows": table.rows,
                "without_url": without_url,
                "sampled": sampled,
                "share": unit.facts["share"],
                "ranges": {name: seen.to_json() for name, seen in ranges.items()},
            }

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """How many rows the forecast rests on."""
        rows, sampled = (sum(row[name] for row in stats) for name in ("rows", "sampled"))
        return f"plan-sample: {sampled:,} of {rows:,} rows, {100 * stats[0]['share']:.3g} % of the URLs"


def _is_chosen(urls: Sequence[str], share: float) -> npt.NDArray[np.bool_]:
    """Rows whose URL is in the sample; those without one are counted, not sampled."""
    hashes = np.fromiter((mmh3.hash(url, _HASH_SEED, False) for url in urls), np.uint64, len(urls))
    has_url = np.fromiter(map(bool, urls), bool, len(urls))
    return (hashes < np.uint64(share * _HASHES)) & has_url


class _Range:
    """Least and greatest value of a column, and how many rows have none."""

    def __init__(self) -> None:
        self.least: float | None = None
        self.greatest: float | None = None
        self.absent = 0

    def add(self, values: pa.Array) -> None:
        self.absent += values.null_count
        found = pc.min_max(values).as_py()
        if found["min"] is not None:
            self.least = found["min"] if self.least is None else min(self.least, found["min"])
            self.greatest = found["max"] if self.greatest is None else max(self.greatest, found["max"])

    def to_json(self) -> dict[str, Any]:
        return {"least": self.least, "greatest": self.greatest, "absent": self.absent}
