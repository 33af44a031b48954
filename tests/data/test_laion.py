"""Every LAION schema becomes the same typed columns; what is wrong with a file is one clear line."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Runner
from data_pipeline.sources.laion import Table, resolve_columns
from data_pipeline.sources.tables import find_tables
from data_pipeline.stages.metadata import MetadataStage, read_card
from sdtrain.errors import DataError, ExitCode

URL, TEXT = pa.array(["http://a/1", "http://a/2"]), pa.array(["one", None], pa.string())


def f32(*values):
    return pa.array(values, pa.float32())


def i32(*values):
    return pa.array(values, pa.int32())


SCHEMAS = {
    "laion2B-en": {
        "SAMPLE_ID": pa.array([1, 2], pa.int64()),
        "URL": URL,
        "TEXT": TEXT,
        "HEIGHT": i32(10, 20),
        "WIDTH": i32(30, 40),
        "LICENSE": pa.array(["?", "?"]),
        "NSFW": pa.array(["UNLIKELY", None], pa.string()),
        "similarity": pa.array([0.3, None], pa.float64()),
    },
    "laion2B-en-joined": {
        "URL": URL,
        "TEXT": TEXT,
        "WIDTH": i32(30, 40),
        "HEIGHT": i32(10, 20),
        "similarity": pa.array([0.3, None], pa.float64()),
        "hash": pa.array([-5, 6], pa.int64()),
        "punsafe": f32(0.1, math.nan),
        "pwatermark": f32(0.4, 0.5),
    },
    "laion2B-en-aesthetic": {
        "URL": URL,
        "TEXT": TEXT,
        "WIDTH": pa.array([30.0, 40.0], pa.float64()),
        "HEIGHT": pa.array([10.0, math.nan], pa.float64()),
        "similarity": pa.array([0.3, None], pa.float64()),
        "hash": pa.array([-5, 6], pa.int64()),
        "punsafe": f32(0.1, 0.2),
        "pwatermark": f32(0.4, 0.5),
        "aesthetic": f32(7.5, 8.0),
    },
    "aesthetics-v2": {
        "URL": URL,
        "TEXT": TEXT,
        "WIDTH": i32(30, 40),
        "HEIGHT": i32(10, 20),
        "similarity": pa.array([0.3, None], pa.float64()),
        "hash": pa.array([-5, 6], pa.int64()),
        "punsafe": f32(0.1, 0.2),
        "pwatermark": f32(0.4, 0.5),
        "aesthetic": f32(7.5, 8.0),
        "AESTHETIC_SCORE": f32(6.5, 6.6),
        "__index_level_0__": pa.array([0, 1], pa.int64()),
    },
    "relaion": {
        "url": URL,
        "caption": TEXT,
        "width": i32(512, 512),
        "height": i32(512, 512),
        "original_width": i32(30, 40),
        "original_height": i32(10, 20),
        "punsafe": f32(0.1, 0.2),
        "pwatermark": f32(0.4, 0.5),
        "status": pa.array(["success", "success"]),
        "hash": pa.array([-5, 6], pa.int64()),
    },
}
COLUMNS = {
    "laion2B-en": ["url", "caption", "width", "height", "nsfw", "similarity", "sample_id"],
    "laion2B-en-joined": ["url", "caption", "width", "height", "similarity", "punsafe", "pwatermark", "source_hash"],
    "laion2B-en-aesthetic": [
        *("url", "caption", "width", "height", "similarity", "punsafe", "pwatermark", "aesthetic_v1", "source_hash")
    ],
    "aesthetics-v2": [
        *("url", "caption", "width", "height", "similarity", "punsafe", "pwatermark"),
        *("aesthetic_v1", "aesthetic_v2", "source_hash"),
    ],
    "relaion": ["url", "caption", "width", "height", "punsafe", "pwatermark", "source_hash"],
}


def write(path: Path, columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def read(path: Path, overrides=None) -> pa.Table:
    return pa.Table.from_batches(list(Table.open(path, overrides or {}).batches()))


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_becomes_typed_columns(tmp_path, name):
    path = write(tmp_path / "a.parquet", SCHEMAS[name])
    table = read(path)
    assert table.schema.names == COLUMNS[name]
    assert table.schema.field("url").type == pa.string() and table.schema.field("width").type == pa.int64()
    assert table["url"].to_pylist() == ["http://a/1", "http://a/2"] and table["caption"].to_pylist() == ["one", None]
    assert table["width"].to_pylist() == [30, 40]
    assert table["height"].to_pylist() == [10, None if name == "laion2B-en-aesthetic" else 20]
    if "punsafe" in table.schema.names:
        assert table.schema.field("punsafe").type == pa.float32()
    if name == "laion2B-en-joined":
        assert table["punsafe"].to_pylist()[1] is None, "NaN is an absent value"
    assert Table.open(path, {}).columns.present == tuple(SCHEMAS[name])


def test_overrides_beat_the_alias_map(tmp_path):
    path = write(tmp_path / "a.parquet", {"link": URL, "TEXT": TEXT, "alt": pa.array(["x", "y"])})
    assert read(path, {"url": "link", "caption": "alt"})["caption"].to_pylist() == ["x", "y"]


@pytest.mark.parametrize(
    ("names", "overrides", "message"),
    [
        (
            ["URL", "WIDTH"],
            {},
            r"a\.parquet: no caption column; columns present: URL, WIDTH; name it with source\.columns: \{caption: ",
        ),
        (["TEXT"], {}, r"no url column; columns present: TEXT"),
        (
            ["URL", "url", "TEXT"],
            {},
            r"columns URL and url differ by case only; say which one with source\.columns: \{url: URL\}",
        ),
        (["URL", "TEXT"], {"url": "link"}, r"source\.columns\.url: no column 'link'; present: URL, TEXT"),
        (["URL", "TEXT"], {"uri": "URL"}, r"source\.columns: 'uri' is no column of ours; allowed: url, caption, width"),
    ],
)
def test_columns_that_do_not_fit_are_named(names, overrides, message):
    with pytest.raises(DataError, match=message):
        resolve_columns(names, overrides, "a.parquet")


def test_an_override_settles_columns_that_differ_by_case():
    columns = resolve_columns(["URL", "url", "TEXT"], {"url": "url"}, "a")
    assert columns.chosen == {"url": "url", "caption": "TEXT"}


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("WIDTH", pa.array(["30", "40"]), "column WIDTH has type string, but width must be a whole number"),
        ("WIDTH", pa.array([30.5, 40.0]), "column WIDTH does not hold a whole number: .*30.5"),
        ("similarity", pa.array([True, False]), "column similarity has type bool, but similarity must be a number"),
        ("URL", pa.array([1, 2]), "column URL has type int64, but url must be text"),
        ("TEXT", pa.array([b"ok", b"\xff\xfe"], pa.binary()), "column TEXT does not hold text: .*UTF"),
    ],
)
def test_wrong_types_are_one_line(tmp_path, column, values, message):
    path = write(tmp_path / "a.parquet", {**SCHEMAS["laion2B-en-joined"], column: values})
    with pytest.raises(DataError, match=rf"a\.parquet: {message}") as caught:
        read(path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == ExitCode.DATA


def test_a_column_of_nulls_is_taken(tmp_path):
    path = write(tmp_path / "a.parquet", {**SCHEMAS["laion2B-en"], "NSFW": pa.nulls(2), "similarity": pa.nulls(2)})
    table = read(path)
    assert table["nsfw"].to_pylist() == [None, None] and table["similarity"].to_pylist() == [None, None]


def test_empty_foreign_and_cut_files_are_one_line(tmp_path):
    whole = write(tmp_path / "whole.parquet", SCHEMAS["relaion"]).read_bytes()
    damaged = bytearray(whole)
    damaged[4:60] = bytes(56)
    cases = {
        "cut.parquet": (whole[: len(whole) // 2], "not a readable parquet file, or cut off"),
        "text.parquet": (b"<html>429</html>", "not a readable parquet file, or cut off"),
        "zero.parquet": (b"", "not a readable parquet file, or cut off"),
        "damaged.parquet": (bytes(damaged), r"damaged inside, in row group 0 of 1 \(rows 0 to 1\): .*; fetch it again"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: {message}") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="none: no such file"):
        read(tmp_path / "none")
    empty = write(tmp_path / "empty.parquet", {"URL": URL[:0], "TEXT": TEXT[:0]})
    with pytest.raises(DataError, match=r"empty\.parquet: the table is empty; remove the file or fetch it again"):
        read(empty)


def test_files_come_from_a_folder_or_a_glob_in_the_order_of_their_names(tmp_path, monkeypatch):
    for name in ("b.parquet", "a.parquet", "c.txt", "deep/d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_tables(str(tmp_path))] == ["a.parquet", "b.parquet"]
    assert [path.name for path in find_tables(str(tmp_path / "*" / "*.parquet"))] == ["d.parquet"]
    monkeypatch.chdir(tmp_path)
    assert find_tables("[ab].parquet") == [Path("a.parquet"), Path("b.parquet")]
    with pytest.raises(DataError, match=r"source\.metadata: none/\*: no parquet file there; give a folder of"):
        find_tables("none/*")


def test_the_stage_keeps_every_row_and_lists_damaged_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for index, name in enumerate(SCHEMAS):
        write(source / f"{index}.parquet", SCHEMAS[name])
    stage = MetadataStage(str(source), {}, tmp_path / "out" / "01-metadata")
    runner = Runner(output=tmp_path / "out", executor=InlineExecutor())
    runner.run([stage])
    cards = [read_card(path) for path in sorted(stage.folder.glob("0000?.json"))]
    assert [card.rows for card in cards] == [2] * len(SCHEMAS)
    assert [card.path for card in cards] == sorted(source.glob("*.parquet"))
    (source / "1.parquet").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"1 of 5 units failed\n  00001: .*1\.parquet: not a readable parquet file"):
        runner.run([stage])
