"""LAION metadata: every published schema becomes one set of typed columns.

The alias map is the only place that knows how the files spell their columns:

- laion2B-en: SAMPLE_ID, URL, TEXT, HEIGHT, WIDTH, LICENSE, NSFW (text), similarity
- laion2B-en-joined, -aesthetic: URL, TEXT, WIDTH, HEIGHT, similarity, hash, punsafe, pwatermark, aesthetic (V1)
- LAION-Aesthetics V2: the above and AESTHETIC_SCORE (V2)
- Re-LAION: lower case; `width` may be of the resized picture, so `original_width` is preferred
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

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
}
"""Our name -> kind of value and the names in files, lower case, the preferred one first."""

REQUIRED = ("url", "caption")
BATCH_ROWS = 65_536
_COLUMNS_KEY = b"sdtrain.columns"


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column of a file stands for which of ours.

    Attributes:
        chosen: Our name -> the file's spelling.
        present: All columns of the file, in its spelling and order.
    """

    chosen: Mapping[str, str]
    present: tuple[str, ...]

    def to_metadata(self) -> dict[bytes, bytes]:
        """For the canonical file's schema, so that later errors can speak of the original's columns."""
        return {_COLUMNS_KEY: json.dumps({"chosen": dict(self.chosen), "present": list(self.present)}).encode()}

    @classmethod
    def of_canonical(cls, schema: pa.Schema) -> Columns:
        """Read back what `to_metadata` stored."""
        page = json.loads((schema.metadata or {})[_COLUMNS_KEY])
        return cls(page["chosen"], tuple(page["present"]))


def metadata_files(where: str) -> list[Path]:
    """The parquet files of a folder or a glob, sorted by name.

    Raises:
        DataError: There is none.
    """
    place = Path(where)
    root = Path(place.anchor)
    found = place.glob("*.parquet") if place.is_dir() else root.glob(str(place.relative_to(root)))
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise DataError(f"source.metadata: {where}: no parquet file there; give a folder of *.parquet or a glob")
    return files


def resolve_columns(names: Sequence[str], overrides: Mapping[str, str], source: Path) -> Columns:
    """Find our columns among a file's, whatever their case.

    Args:
        names: The file's columns.
        overrides: Our name -> the file's name, exactly; beats the alias map.
        source: The file, for messages.

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


def _checked_overrides(names: Sequence[str], overrides: Mapping[str, str], source: Path) -> Mapping[str, str]:
    for ours, theirs in overrides.items():
        if ours not in ALIASES:
            raise DataError(f"source.columns: {ours!r} is no column of ours; allowed: {', '.join(ALIASES)}")
        if theirs not in names:
            raise DataError(f"{source}: source.columns.{ours}: no column {theirs!r}; present: {', '.join(names)}")
    return overrides


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file that holds rows.

    Raises:
        DataError: It is no parquet file, is cut off, or is empty.
    """
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file, or cut off: {_one_line(error)}") from None
    if file.metadata.num_rows == 0:
        raise DataError(f"{path}: the table is empty; remove the file or fetch it again")
    return file


def read_canonical(path: Path, overrides: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    """Stream a LAION file as batches of our columns, in its order of rows.

    Text becomes `string` (checked UTF-8), sizes `int64`; scores keep the precision that they were published in, so that
    a threshold means the same number there. NaN scores and sizes become null.

    Raises:
        DataError: Not a readable file, empty, a needed column is absent, or a column has the wrong type.
    """
    file = open_parquet(path)
    columns = resolve_columns(file.schema_arrow.names, overrides, path)
    for ours, theirs in columns.chosen.items():
        _check_type(file.schema_arrow.field(theirs).type, ours, theirs, path)
    metadata = columns.to_metadata()
    for batch in _batches(file, list(columns.chosen.values()), path):
        arrays = [_cast(batch.column(theirs), ours, theirs, path) for ours, theirs in columns.chosen.items()]
        schema = pa.schema(
            [pa.field(ours, array.type) for ours, array in zip(columns.chosen, arrays, strict=True)], metadata=metadata
        )
        yield pa.record_batch(arrays, schema=schema)


def _batches(file: pq.ParquetFile, names: list[str], path: Path) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(BATCH_ROWS, columns=names)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: damaged inside: {_one_line(error)}") from None


def _check_type(found: pa.DataType, ours: str, theirs: str, path: Path) -> None:
    kind = ALIASES[ours][0]
    if pa.types.is_dictionary(found):
        found = found.value_type
    is_text = pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_binary(found)
    is_number = pa.types.is_integer(found) or pa.types.is_floating(found)
    if not (pa.types.is_null(found) or (is_text if kind == "text" else is_number)):
        raise DataError(f"{path}: column {theirs} has type {found}, but {ours} must be {_KIND_WORDS[kind]}")


_KIND_WORDS = {"text": "text", "number": "a number", "integer": "a whole number"}


def _cast(array: pa.Array, ours: str, theirs: str, path: Path) -> pa.Array:
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
        raise DataError(f"{path}: column {theirs} does not hold {_KIND_WORDS[kind]}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
