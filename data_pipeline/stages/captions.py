"""Stage `captions`: other captions for samples that are there, without touching pictures, latents or the network.

It comes last before the manifest, so another table costs new tokens and a copy, and nothing is encoded again. Rows find
their samples without either side being in memory: `captions-sort` sorts each table by identity, a million rows at a
time, and each shard looks its own samples up in the sorted runs. Where several rows name one sample, the first by file
and row counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.sources.tables import local_files
from data_pipeline.stage import Needs, Stage, Unit, Work, numbered_files, one_to_one
from data_pipeline.stages.identity import identity, to_words
from sdtrain.data.shard import ShardReader, ShardWriter
from sdtrain.errors import DataError

By = Literal["key", "url"]

ROWS_AT_ONCE = 1_000_000
_TABLE, _LINES = ".parquet", ".jsonl"
_KEY = re.compile(r"[0-9a-f]{32}")
_RUN = pa.schema([("high", pa.uint64()), ("low", pa.uint64()), ("caption", pa.large_string())])
TOKENS = "tokens.npy"


def caption_stages(table: str, by: By, max_length: int, source: Path, folder: Path) -> list[Stage]:
    """Both passes.

    Args:
        table: File, folder or glob of the tables.
        by: Column that rows are matched by.
        max_length: Tokens of each caption.
        source: Folder of the shards whose text is replaced.
        folder: Folder of the new shards; the sorted tables lie beside it.
    """
    runs = folder.with_name(f"{folder.name}-sort")
    return [SortStage(table, by, runs), CaptionsStage(by, max_length, source, runs, folder)]


@dataclass(frozen=True)
class SortStage:
    """Sorted runs of one table: `<table>.arrow`, a record batch for each run."""

    table: str
    by: By
    folder: Path
    name: str = "captions-sort"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """What rows are matched by."""
        return {"by": self.by}

    def units(self) -> list[Unit]:
        """One for each file, in the order of their names.

        Raises:
            DataError: There is none.
        """
        found = [path for suffix in (_TABLE, _LINES) for path in local_files(Path(self.table), suffix)]
        files = sorted({path for path in found if path.suffix in (_TABLE, _LINES)})
        if not files:
            raise DataError(
                f"captions.table: {self.table}: no .parquet or .jsonl file there; give a file, a folder or a glob of "
                "them"
            )
        return [Unit(index, (path,)) for index, path in enumerate(files)]

    def worker(self) -> Work:
        """Sort one table."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            rows = without = 0
            path = folder / f"{unit.name}.arrow"
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _RUN) as writer:
                for names, captions in _read(unit.inputs[0], self.by):
                    kept = [(name, text) for name, text in zip(names, captions, strict=True) if name and text]
                    rows, without = rows + len(names), without + len(names) - len(kept)
                    writer.write_batch(_sorted_run(kept, self.by, unit.inputs[0]))
            return {"rows": rows, "without": without}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """How many captions there are."""
        rows, without = (sum(row[name] for row in stats) for name in ("rows", "without"))
        words = f", {without:,} rows without one or without {self.by}" if without else ""
        return f"captions-sort: {rows - without:,} captions in {len(stats)} files{words}"


def _sorted_run(rows: Sequence[tuple[str, str]], by: By, source: Path) -> pa.RecordBatch:
    """Identities and captions, ascending; of equal identities the first row comes first."""
    high, low = to_words(_identity(name, by, source) for name, _ in rows)
    order = np.lexsort((low, high))
    captions = pa.array([text for _, text in rows], pa.large_string())
    return pa.record_batch([pa.array(high[order]), pa.array(low[order]), captions.take(pa.array(order))], schema=_RUN)


def _identity(name: str, by: By, source: Path) -> bytes:
    """16 bytes that a row and its sample share."""
    if by == "url":
        return identity(name, "", "url")
    if not _KEY.fullmatch(name):
        raise DataError(
            f"captions.table: {source}: key {name[:80]!r} is no key of a sample (32 hexadecimal digits); set "
            "captions.by=url where the table has URLs"
        )
    return bytes.fromhex(name)


def _read(path: Path, by: By) -> Iterator[tuple[list[Any], list[Any]]]:
    """Names and captions of a table, a million rows at a time; one piece at least.

    Raises:
        DataError: It cannot be read, a column is absent, or a value is no text.
    """
    pieces = _read_table(path, by) if path.suffix == _TABLE else _read_lines(path, by)
    is_empty = True
    for names, captions in pieces:
        is_empty = False
        odd = next((value for value in [*names, *captions] if not isinstance(value, str | None)), None)
        if odd is not None:
            raise DataError(f"captions.table: {path}: {odd!r} is no text; {by} and caption are texts")
        yield names, captions
    if is_empty:
        yield [], []


def _read_table(path: Path, by: By) -> Iterator[tuple[list[Any], list[Any]]]:
    try:
        file = pq.ParquetFile(path)
        names = [_column(file.schema_arrow.names, wanted, path) for wanted in (by, "caption")]
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=names):
            yield batch[names[0]].to_pylist(), batch[names[1]].to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"captions.table: {path}: no readable parquet file ({error}); fetch it again") from None


def _column(names: Sequence[str], wanted: str, path: Path) -> str:
    """A column whatever its case."""
    found = [name for name in names if name.lower() == wanted]
    if len(found) != 1:
        raise DataError(
            f"captions.table: {path}: {len(found)} columns {wanted!r}; columns present: {', '.join(names)}; rename "
            "one, or set captions.by to key or url"
        )
    return found[0]


def _read_lines(path: Path, by: By) -> Iterator[tuple[list[Any], list[Any]]]:
    names: list[Any] = []
    captions: list[Any] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                names.append(row[by])
                captions.append(row["caption"])
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise DataError(
                    f"captions.table: {path}, line {number}: {line[:80]!r} is no JSON object with {by} and caption "
                    f"({type(error).__name__}: {error})"
                ) from None
            if len(names) == ROWS_AT_ONCE:
                yield names, captions
                names, captions = [], []
    if names:
        yield names, captions


@dataclass(frozen=True)
class CaptionsStage:
    """One shard for each shard, with the text that the tables have for it, and tokens of that text.

    The text before stays in the json as `original_caption`. All other fields are copied byte for byte.
    """

    by: By
    max_length: int
    source: Path
    runs: Path
    folder: Path
    name: str = "captions"
    version: str = "1"

    @property
    def needs(self) -> Needs:
        """Long-lived processes: the tokenizer takes a second to build."""
        return Needs(keeps_worker=True)

    def config_facts(self) -> dict[str, Any]:
        """What rows are matched by; the tokenizer."""
        from data_pipeline.stages.tokenize import tokenizer_facts

        return {"by": self.by, "tokenizer": tokenizer_facts(self.max_length)}

    def units(self) -> list[Unit]:
        """One for each shard; each looks into all tables."""
        runs = numbered_files(self.runs, ".arrow")
        return [replace(unit, inputs=(*unit.inputs, *runs)) for unit in one_to_one(self.source, ".tar")]

    def worker(self) -> Work:
        """Build the tokenizer once."""
        from sdtrain.conditioners.text import build_tokenizer, tokenize

        tokenizer = build_tokenizer(self.max_length)

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            source, *runs = unit.inputs
            with ShardReader(source) as shard, ShardWriter(folder / f"{unit.name}.tar") as writer:
                facts = [shard.decode(sample, "json") for sample in range(len(shard))]
                names = [facts[sample]["url"] if self.by == "url" else key for sample, key in enumerate(shard.keys)]
                found = look_up(runs, *to_words(_identity(name, self.by, source) for name in names))
                places = sorted(found)
                has_tokens = bool(places) and TOKENS in shard.fields
                tokens = tokenize(tokenizer, [found[place] for place in places]) if has_tokens else None
                rows = {place: row for row, place in enumerate(places)}
                for sample, key in enumerate(shard.keys):
                    fields: dict[str, Any] = {name: shard.read(sample, name) for name in shard.fields}
                    if sample in found:
                        fields |= _replaced(found[sample], facts[sample])
                        fields |= {} if tokens is None else {TOKENS: tokens[rows[sample]]}
                    writer.write(key, fields)
                return {"samples": len(shard), "matched": len(found)}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """How many samples have another text now.

        Raises:
            DataError: Not one.
        """
        samples, matched = (sum(row[name] for row in stats) for name in ("samples", "matched"))
        if not matched:
            raise DataError(
                f"captions: not one of {samples:,} samples is named in captions.table by its {self.by}; compare with "
                f"the json of a sample in {self.source}"
            )
        return f"captions: {matched:,} of {samples:,} samples ({matched / samples:.1%}) have another caption now"


def _replaced(caption: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that hold the text."""
    before = facts.get("original_caption", facts["caption"])
    return {"txt": caption, "json": {**facts, "caption": caption, "original_caption": before}}


def look_up(paths: Sequence[Path], high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> dict[int, str]:
    """Position -> caption for each identity that any run has; the first run that has it counts."""
    found: dict[int, str] = {}
    for path in paths:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            for number in range(reader.num_record_batches):
                run = reader.get_batch(number)
                for position, row in _matches(run, high, low):
                    found.setdefault(position, run["caption"][row].as_py())
    return found


def _matches(
    run: pa.RecordBatch, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]
) -> Iterator[tuple[int, int]]:
    """(position, row) of each identity that stands in a sorted run: its first row there."""
    run_high, run_low = run["high"].to_numpy(), run["low"].to_numpy()
    start, end = np.searchsorted(run_high, high, side="left"), np.searchsorted(run_high, high, side="right")
    for position in np.flatnonzero(start < end).tolist():
        row = start[position] + int(np.searchsorted(run_low[start[position] : end[position]], low[position]))
        if row < end[position] and run_low[row] == low[position]:
            yield position, int(row)
