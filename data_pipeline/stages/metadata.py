"""Stage `metadata`: takes stock of LAION's files, whatever their schema, and fetches those that lie elsewhere.

Nothing on this machine is copied: the filter reads the files where they are, by the columns that the cards name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.sources.laion import Columns, Table
from data_pipeline.sources.tables import RemoteTable, find_tables
from data_pipeline.stage import Needs, Unit, Work, numbered_files
from sdtrain.errors import DataError

_CARD = ".json"


@dataclass(frozen=True)
class MetadataStage:
    """One card for each source file: where it lies, its rows, its columns; and a copy of it where it is remote.

    Attributes:
        metadata: Folder, glob or URL of the source's parquet files.
        columns: Our name -> the file's name, where the alias map does not know it.
        folder: Where cards and copies go.
    """

    metadata: str
    columns: Mapping[str, str]
    folder: Path
    name: str = "metadata"
    version: str = "2"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """The column overrides."""
        return {"columns": dict(self.columns)}

    def units(self) -> list[Unit]:
        """The source's files in the order of their names; a remote one is known by what its store says of it."""
        return [
            Unit(index, (), {"remote": asdict(table)}) if isinstance(table, RemoteTable) else Unit(index, (table,))
            for index, table in enumerate(find_tables(self.metadata))
        ]

    def worker(self) -> Work:
        """Fetch what is remote, read the footer, write the card."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            if unit.inputs:
                table = Table.open(unit.inputs[0], self.columns)
                where = str(table.path.absolute())
            else:
                remote = RemoteTable(**unit.facts["remote"])
                where = f"{unit.name}.parquet"
                remote.fetch(folder / where)
                table = Table.open(folder / where, self.columns, remote.url)
            card = {
                "file": where,
                "source": table.source,
                "rows": table.rows,
                "bytes": (folder / where).stat().st_size,
                "columns": dict(table.columns.chosen),
                "present": list(table.columns.present),
            }
            (folder / f"{unit.name}{_CARD}").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
            return {name: card[name] for name in ("source", "rows", "bytes", "columns")}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """How many rows there are, and which columns only some of the files have."""
        rows, size = (sum(row[name] for row in stats) for name in ("rows", "bytes"))
        lines = [f"metadata: {rows:,} rows in {len(stats)} files, {size / 1e9:.2f} GB"]
        for column in sorted({column for row in stats for column in row["columns"]}):
            without = [row["source"] for row in stats if column not in row["columns"]]
            if without:
                lines.append(f"metadata: {len(without)} of {len(stats)} files have no {column}, such as {without[0]}")
        return "\n".join(lines)


def table_units(folder: Path) -> list[Unit]:
    """One unit for each card, made from the card and the table.

    Raises:
        DataError: There is no card.
    """
    cards = numbered_files(folder, _CARD)
    if not cards:
        raise DataError(f"{folder} holds no card of a table; run the stage metadata first")
    return [Unit(int(path.name.removesuffix(_CARD)), (path, read_card(path).path)) for path in cards]


def read_card(path: Path) -> Table:
    """The table that a card describes."""
    card = json.loads(path.read_text(encoding="utf-8"))
    columns = Columns(card["columns"], tuple(card["present"]))
    return Table(path.parent / card["file"], card["source"], card["rows"], columns)
