"""Stage `metadata`: LAION's files, whatever their schema, as files of our typed columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.sources.laion import metadata_files, read_canonical
from data_pipeline.stage import Needs, Unit, Work


@dataclass(frozen=True)
class MetadataStage:
    """One canonical parquet file for each source file, row by row.

    Attributes:
        metadata: Folder or glob of the source's parquet files.
        columns: Our name -> the file's name, where the alias map does not know it.
        folder: Where the canonical files go.
    """

    metadata: str
    columns: Mapping[str, str]
    folder: Path
    name: str = "metadata"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """The column overrides."""
        return {"columns": dict(self.columns)}

    def units(self) -> list[Unit]:
        """The source's files in the order of their names."""
        return [Unit(index, (path,)) for index, path in enumerate(metadata_files(self.metadata))]

    def worker(self) -> Work:
        """Stream one file through the alias map."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            rows, writer = 0, None
            try:
                for batch in read_canonical(unit.inputs[0], self.columns):
                    if writer is None:
                        target = folder / f"{unit.name}.parquet"
                        writer = pq.ParquetWriter(target, batch.schema, compression="zstd")
                    writer.write_batch(batch)
                    rows += batch.num_rows
            finally:
                if writer is not None:
                    writer.close()
            return {"rows": rows}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """How many rows were read."""
        return f"metadata: {sum(row['rows'] for row in stats):,} rows in {len(stats)} files"
