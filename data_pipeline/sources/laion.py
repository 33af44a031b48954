"""LAION metadata: every published schema becomes one set of typed columns.

The alias map is the only place that knows how the files spell their columns:

- laion2B-en: SAMPLE_ID, URL, TEXT, HEIGHT, WIDTH, LICENSE, NSFW (text), similarity
- laion2B-en-joined, -aesthetic: URL, TEXT, WIDTH, HEIGHT, similarity, hash, punsafe, pwatermark, aesthetic (V1)
- LAION-400M: as laion2B-en; laion2B-multi: LANGUAGE as well
- LAION-Aesthetics V2: the above and AESTHETIC_SCORE (V2)
- Re-LAION: lower case; `width` may be of the resized picture, so `original_width` is preferred
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data_pipeline.sources.rows import Rows
from sdtrain.errors import DataError

pc: Any = pyarrow.compute  # its functions are generated at import, so a type checker sees none of them

Kind = Literal["text", "number", "integer"]

ALIASES: Mapping[str, tuple[Kind, tuple[str, ...]]] = {
    "url": ("text", ("url",)),
    "caption": ("text", ("text", "caption")),
    "width": ("integer", ("original_width", "width")),
    "height": ("integer", ("original_height", "height")),
    "nsfw": ("text", ("nsfw",)),
    "similarity": ("number", ("similarity",)),
    "punsafe": ("number", ("punsafe",)),
    "pwatermark": ("number", ("pwatermark",)),
    "aesthetic_v1": ("number", ("aesthetic",)),
    "aesthetic_v2": ("number", ("aesthetic_score",)),
    "source_hash": ("integer", ("hash",)),
    "sample_id": ("integer", ("sample_id",)),
    "md5": ("text", ("md5",)),
    "sha256": ("text", ("sha256",)),
}
"""Our name -> kind of value and the names in files, lower case, the preferred one first."""

REQUIRED = ("url", "caption")
BATCH_ROWS = 65_536
_FEWEST_ROWS, _MOST_ROWS = 20_000, 2_000_000  # of a row group that polars reads: smaller ones cost time, larger memory
_REPEATED = ("nsfw", "rejected_by", "split")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column of a file stands for which of ours.

    Attributes:
        chosen: Our name -> the file's spelling.
        present: All columns of the file, in its spelling and order.
    """

    chosen: Mapping[str, str]
    present: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A LAION file whose columns are known.

    Attributes:
        path: The file on this machine.
        source: What messages call it: its path, or the URL that it was fetched from.
        rows: Rows that its footer promises.
        columns: Which of its columns are ours.
    """

    path: Path
    source: str
    rows: int
    columns: Columns

    @classmethod
    def open(cls, path: Path, overrides: Mapping[str, str], source: str | None = None) -> Table:
        """Look at a file's footer.

        Args:
            path: The file.
            overrides: Our name -> the file's name, where the alias map does not know it.
            source: What messages call it; its path where this is None.

        Raises:
            DataError: Not a readable file, empty, a needed column is absent, or a column has the wrong type.
        """
        source = source or str(path)
        file = _open_parquet(path, source)
        columns = resolve_columns(file.schema_arrow.names, overrides, source)
        for ours, theirs in columns.chosen.items():
            _check_type(file.schema_arrow.field(theirs).type, ours, theirs, source)
        return cls(path, source, file.metadata.num_rows, columns)

    def batches(self, names: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Its rows as batches of our columns, or of some of them, in its order.

        Text becomes `string` (checked UTF-8), sizes `int64`; scores keep the precision that they were published in, so
        that a threshold means the same number there. NaN scores and sizes become null.

        Raises:
            DataError: The file is damaged inside, or a value is not of its column's kind.
        """
        file = _open_parquet(self.path, self.source)
        for group in range(file.num_row_groups):
            yield from self._of_group(file, group, names)

    def chunks(self) -> Iterator[Rows]:
        """As `batches`, with text that is not copied yet."""
        file = _open_parquet(self.path, self.source)
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            rows = self._decoded(first, count) if _FEWEST_ROWS <= count <= _MOST_ROWS else None
            if rows is None:
                yield from map(Rows.of, self._of_group(file, group, None))
            else:
                yield rows
            first += count

    def _decoded(self, first: int, count: int) -> Rows | None:
        """The rows of a row group by polars; None where it cannot read them: Arrow can, or says what is wrong."""
        chosen = self.columns.chosen
        texts = [ours for ours in chosen if ALIASES[ours][0] == "text"]
        columns = [pl.col(theirs).alias(ours) for ours, theirs in chosen.items()]
        try:
            frame = pl.scan_parquet(self.path, glob=False).slice(first, count).select(columns).collect().rechunk()
            frame = frame.with_columns(pl.col(texts).cast(pl.String))
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError):
            return None
        if len(frame) != count:
            return None
        arrays = {ours: frame[ours].to_arrow() for ours in chosen if ours not in texts}
        numbers = [_cast(array, ours, chosen[ours], self.source) for ours, array in arrays.items()]
        return Rows(pa.record_batch(numbers, names=list(arrays)), frame.select(texts), tuple(chosen))

    def _of_group(self, file: pq.ParquetFile, group: int, names: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        """The rows of one row group."""
        chosen = {ours: theirs for ours, theirs in self.columns.chosen.items() if names is None or ours in names}
        for batch in _raw_batches(file, group, list(chosen.values()), self.source):
            arrays = [_cast(batch.column(theirs), ours, theirs, self.source) for ours, theirs in chosen.items()]
            yield pa.record_batch(arrays, names=list(chosen))


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    """What is worth its time: a dictionary where values repeat, compression of text; scores do not get smaller."""
    compression = {field.name: "zstd" if pa.types.is_string(field.type) else "none" for field in schema}
    return {"compression": compression, "use_dictionary": [name for name in schema.names if name in _REPEATED]}


class TableWriter:
    """Context manager that writes batches, one at least, as a parquet file with row groups of useful size.

    Small batches are gathered first: a filter leaves few rows of each, and a row group for each would be slow to read.

    Args:
        path: The file.
        row_group: Most rows of a row group; small ones make it cheap to read a few rows.
    """

    def __init__(self, path: Path, row_group: int = BATCH_ROWS):
        self._path = path
        self._row_group = row_group
        self._writer: pq.ParquetWriter | None = None
        self._gathered: list[pa.RecordBatch] = []
        self._rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows; all batches have the columns of the first."""
        self._gathered.append(batch)
        self._rows += batch.num_rows
        if self._rows >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        table = pa.Table.from_batches(self._gathered)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, **_encodings(table.schema))
        self._writer.write_table(table, row_group_size=self._row_group)
        self._gathered, self._rows = [], 0

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        if exc_type is None and self._gathered:
            self._flush()
        if self._writer is not None:
            self._writer.close()


def resolve_columns(names: Sequence[str], overrides: Mapping[str, str], source: str) -> Columns:
    """Find our columns among a file's, whatever their case.

    Args:
        names: The file's columns.
        overrides: Our name -> the file's name, exactly; beats the alias map.
        source: What messages call the file.

    Raises:
        DataError: An override fits nothing, two columns differ by case only, or there is no URL or caption.
    """
    by_lower: dict[str, list[str]] = {}
    for name in names:
        by_lower.setdefault(name.lower(), []).append(name)
    chosen = {}
    for ours, (_, aliases) in ALIASES.items():
        for alias in aliases:
            spellings = by_lower.get(alias, [])
            if len(spellings) > 1 and ours not in overrides:
                raise DataError(
                    f"{source}: columns {' and '.join(spellings)} differ by case only; "
                    f"say which one with source.columns: {{{ours}: {spellings[0]}}}"
                )
            if spellings:
                chosen[ours] = spellings[0]
                break
    chosen.update(_checked_overrides(names, overrides, source))
    for ours in REQUIRED:
        if ours not in chosen:
            raise DataError(
                f"{source}: no {ours} column; columns present: {', '.join(names)}; "
                f"name it with source.columns: {{{ours}: ...}}"
            )
    return Columns(chosen, tuple(names))


def resolve_url_column(names: Sequence[str], source: str) -> str:
    """The column of URLs of any table, whatever its case.

    Raises:
        DataError: There is none, or more than one.
    """
    found = [name for name in names if name.lower() in ALIASES["url"][1]]
    if len(found) != 1:
        raise DataError(f"{source}: {len(found)} columns of URLs; columns present: {', '.join(names)}; name one url")
    return found[0]


def _checked_overrides(names: Sequence[str], overrides: Mapping[str, str], source: str) -> Mapping[str, str]:
    for ours, theirs in overrides.items():
        if ours not in ALIASES:
            raise DataError(f"source.columns: {ours!r} is no column of ours; allowed: {', '.join(ALIASES)}")
        if theirs not in names:
            raise DataError(f"{source}: source.columns.{ours}: no column {theirs!r}; present: {', '.join(names)}")
    return overrides


def _open_parquet(path: Path, source: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise DataError(f"{source}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{source}: not a readable parquet file, or cut off: {_one_line(error)}; fetch it again, or take it out"
        ) from None
    if file.metadata.num_rows == 0:
        raise DataError(f"{source}: the table is empty; remove the file or fetch it again")
    return file


def _raw_batches(file: pq.ParquetFile, group: int, names: list[str], source: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(BATCH_ROWS, row_groups=[group], columns=names, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        first = sum(file.metadata.row_group(before).num_rows for before in range(group))
        last = first + file.metadata.row_group(group).num_rows - 1
        raise DataError(
            f"{source}: damaged inside, in row group {group} of {file.num_row_groups} (rows {first:,} to {last:,}): "
            f"{_one_line(error)}; fetch it again, or take it out"
        ) from None


def _check_type(found: pa.DataType, ours: str, theirs: str, source: str) -> None:
    kind = ALIASES[ours][0]
    if pa.types.is_dictionary(found):
        found = found.value_type
    is_text = pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_binary(found)
    is_number = pa.types.is_integer(found) or pa.types.is_floating(found)
    if not (pa.types.is_null(found) or (is_text if kind == "text" else is_number)):
        raise DataError(
            f"{source}: column {theirs} has type {found}, but {ours} must be {_KIND_WORDS[kind]}; convert the column, "
            f"or name another one with source.columns: {{{ours}: ...}}"
        )


_KIND_WORDS = {"text": "text", "number": "a number", "integer": "a whole number"}


def _cast(array: pa.Array, ours: str, theirs: str, source: str) -> pa.Array:
    kind = ALIASES[ours][0]
    try:
        if kind == "text":
            text = array.cast(pa.string())
            text.validate(full=True)
            return text
        if pa.types.is_floating(array.type):
            array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
        if kind == "integer":
            return array.cast(pa.int64())
        return array if pa.types.is_floating(array.type) else array.cast(pa.float64())
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise DataError(f"{source}: column {theirs} does not hold {_KIND_WORDS[kind]}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
