"""Tables come from folders, globs and URLs; remote ones are copied once, checked, known by what their store says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Runner
from data_pipeline.sources.tables import RemoteTable, find_tables, reaching
from data_pipeline.stages.metadata import MetadataStage, read_card, table_units
from sdtrain.errors import ConfigError, DataError, ExitCode
from tests.data.hub import Hub


def table_bytes(rows: int, *, caption: str = "TEXT") -> bytes:
    columns = {"URL": [f"http://host/{row}" for row in range(rows)], caption: ["words"] * rows}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def store():
    """A store in memory with three tables, one of them deeper."""
    files = fsspec.filesystem("memory")
    for name, rows in (("b.parquet", 2), ("a.parquet", 1), ("deep/c.parquet", 3)):
        files.pipe(f"/laion/{name}", table_bytes(rows))
    files.pipe("/laion/readme.txt", b"not a table")
    yield files
    files.rm("/laion", recursive=True)


def stage_for(metadata: str, out: Path) -> MetadataStage:
    return MetadataStage(metadata, {}, out / "01-metadata")


def run(stage: MetadataStage) -> None:
    Runner(output=stage.folder.parent, executor=InlineExecutor(), backoff_seconds=0.01).run([stage])


def test_folders_globs_and_files_behind_a_url(store):
    def names(where: str) -> list[str]:
        return [table.url for table in find_tables(where)]

    assert names("memory://laion") == ["memory:///laion/a.parquet", "memory:///laion/b.parquet"]
    assert names("memory://laion/b.parquet") == ["memory:///laion/b.parquet"]
    assert names("memory://laion/**/*.parquet")[-1] == "memory:///laion/deep/c.parquet"
    assert names("memory://laion/[b-c]*.parquet") == ["memory:///laion/b.parquet"]


def test_remote_tables_are_copied_once_and_local_ones_never(store, tmp_path, capsys):
    stage = stage_for("memory://laion", tmp_path / "out")
    run(stage)
    assert "metadata: 3 rows in 2 files" in capsys.readouterr().out
    tables = [read_card(unit.inputs[0]) for unit in table_units(stage.folder)]
    assert [(table.source, table.rows) for table in tables] == [
        ("memory:///laion/a.parquet", 1),
        ("memory:///laion/b.parquet", 2),
    ]
    assert all(table.path.parent == stage.folder for table in tables)
    run(stage)
    assert "metadata: 2 of 2 up to date" in capsys.readouterr().out
    store.pipe("/laion/b.parquet", table_bytes(5))
    run(stage)
    printed = capsys.readouterr().out
    assert "1 of 2 up to date; 1 with changed settings (remote.size_bytes" in printed and "6 rows" in printed
    local = stage_for(str(stage.folder / "0*.parquet"), tmp_path / "other")
    run(local)
    assert sorted(path.suffix for path in local.folder.glob("0*")) == [".json"] * 4  # cards and stats


def test_a_table_that_changed_since_it_was_listed_is_refused(store, tmp_path):
    (table, *_) = find_tables("memory://laion")
    store.pipe("/laion/a.parquet", table_bytes(9))
    with pytest.raises(
        DataError, match=r"a\.parquet: \d+ bytes with sha256 .* arrived, \d+ bytes were listed: the file"
    ):
        table.fetch(tmp_path / "copy")


def test_places_that_cannot_be_reached_are_one_line(store, tmp_path):
    with pytest.raises(DataError, match=r"memory://none: not there \(.*\); check the address"):
        find_tables("memory://none")
    with pytest.raises(DataError, match=r"source\.metadata: memory://laion/x\*: no parquet file there; give a folder"):
        find_tables("memory://laion/x*")
    with pytest.raises(ConfigError, match=r"gopher://host/x: no installed library reads this .*sdtrain\[storage\]"):
        find_tables("gopher://host/x")
    gone = RemoteTable("memory://laion/gone.parquet", 1, "", "")
    with pytest.raises(DataError, match=r"gone\.parquet: not there"):
        gone.fetch(tmp_path / "copy")


@pytest.mark.parametrize(
    ("error", "may_heal", "expected", "message"),
    [
        (PermissionError("no"), True, DataError, r"access refused \(no\); check the credentials.*set HF_TOKEN"),
        (TimeoutError("slow\nline"), True, ConnectionError, r"cannot be read \(TimeoutError: slow line\)$"),
        (TimeoutError("slow"), False, DataError, r"cannot be read \(TimeoutError: slow\); check the address, the net"),
    ],
)
def test_only_what_may_heal_is_tried_again(store, error, may_heal, expected, message):
    with pytest.raises(expected, match=message), reaching("memory://laion", may_heal=may_heal):
        raise error


def test_a_refusal_is_known_by_its_status_too(store):
    error = RuntimeError("403")
    error.response = SimpleNamespace(status_code=403)
    with pytest.raises(DataError, match="access refused"), reaching("memory://laion", may_heal=True):
        raise error


def test_mixed_schemas_are_told_and_a_needed_column_names_its_file(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.parquet").write_bytes(table_bytes(1))
    table = pa.table({"url": ["u"], "caption": ["c"], "AESTHETIC_SCORE": [6.0]})
    pq.write_table(table, source / "b.parquet")
    stage = stage_for(str(source), tmp_path / "out")
    run(stage)
    assert f"metadata: 1 of 2 files have no aesthetic_v2, such as {source}/a.parquet" in capsys.readouterr().out
    (source / "c.parquet").write_bytes(table_bytes(1, caption="words"))
    with pytest.raises(DataError, match=r"1 of 3 units failed\n  00002: .*c\.parquet: no caption column; ") as caught:
        run(stage)
    assert caught.value.exit_code == ExitCode.DATA
    assert len(list(stage.folder.glob("0000?.json"))) == 2, "the others stand"


def test_cards_come_first(tmp_path):
    with pytest.raises(DataError, match="holds no card of a table; run the stage metadata first"):
        table_units(tmp_path)


HUB_SCRIPT = """
import json, sys
from pathlib import Path
from data_pipeline.sources.tables import find_tables
from sdtrain.errors import SdtrainError

def outcome(where):
    try:
        tables = find_tables(where)
        for number, table in enumerate(tables):
            table.fetch(Path(sys.argv[1]) / f"{number}.parquet")
        return [[table.url, table.size_bytes, table.sha256] for table in tables]
    except SdtrainError as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps([outcome(where) for where in sys.argv[2:]]))
"""


def test_a_hugging_face_repository_is_listed_and_read(tmp_path):
    small, large = table_bytes(3), table_bytes(2_000_000)  # the larger one takes several requests
    repository = {"part-0.parquet": small, "README.md": b"words", "data/part-1.parquet": large}
    hub = Hub(
        {"laion/table": repository, "laion/gated": repository, "laion/lies": repository},
        {"laion/gated"},
        {"laion/lies"},
    )
    places = [
        *("hf://datasets/laion/table", "hf://datasets/laion/table@main/data/*.parquet"),
        *("hf://datasets/laion/gated", "hf://datasets/laion/lies/part-0.parquet"),
        *("hf://datasets/laion/none", "hf://datasets/laion/table@v9"),
        f"{hub.endpoint}/datasets/laion/table/resolve/main/part-0.parquet",
    ]
    with hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
        command = [sys.executable, "-c", HUB_SCRIPT, str(tmp_path), *places]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    listed, globbed, gated, lies, none, revision, plain = json.loads(found.stdout)
    assert [row[:2] for row in listed] == [["hf://datasets/laion/table/part-0.parquet", len(small)]]
    assert [row[:2] for row in globbed] == [["hf://datasets/laion/table@main/data/part-1.parquet", len(large)]]
    assert len(listed[0][2]) == 64, "the hub's digest, which the copy was checked against"
    assert gated.startswith("DataError: hf://datasets/laion/gated/part-0.parquet: access refused")
    assert "arrived" in lies and "the file was replaced meanwhile, or damaged on its way" in lies
    assert "not there" in none and "repository not found" in none
    assert "not there" in revision and "revision not found" in revision
    assert plain == [[places[-1], len(small), ""]], "any web server will do"
    assert len(large) > 8 << 20 and hub.requests["/datasets/laion/table/resolve/main/data/part-1.parquet"] > 1
