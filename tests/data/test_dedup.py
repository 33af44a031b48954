"""One row per URL over all files, the first wins; the split; parts; the same bytes for any number of workers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.cluster import InlineExecutor, RayExecutor
from data_pipeline.ledger import sha256_file
from data_pipeline.runner import Runner
from data_pipeline.stages import dedup as dedup_module
from data_pipeline.stages.dedup import PickStage, SplitStage, dedup_stages
from data_pipeline.stages.identity import (
    HashIdentity,
    holdout_rank,
    identity,
    is_listed,
    read_excluded_urls,
    to_words,
)
from sdtrain.errors import DataError


def write_files(out: Path, files: list[list[tuple[str, str]]]) -> None:
    """Filtered files of (url, caption) rows; `similarity` numbers the rows of a file, so that a row can be told."""
    folder = out / "02-filter"
    folder.mkdir(parents=True, exist_ok=True)
    for index, rows in enumerate(files):
        columns = {
            "url": pa.array([url for url, _ in rows], pa.string()),
            "caption": pa.array([caption for _, caption in rows], pa.string()),
            "similarity": pa.array([float(row) for row in range(len(rows))], pa.float64()),
        }
        pq.write_table(pa.table(columns), folder / f"{index:05d}.parquet", row_group_size=7)


def run(out: Path, executor=None, **settings) -> list[pa.Table]:
    options = {"by": "url", "seed": 1, "num_validation": 0, "samples_per_shard": 1000, **settings}
    stages = dedup_stages(source=out / "02-filter", folder=out / "03-dedup", **options)
    Runner(output=out, executor=executor or InlineExecutor()).run(stages)
    return [pq.read_table(path) for path in sorted((out / "03-dedup").glob("0*.parquet"))]


def rows_of(parts: list[pa.Table], split: str) -> list[tuple[str, str]]:
    chosen = [part for part in parts if part["split"][0].as_py() == split]
    return [pair for part in chosen for pair in zip(part["url"].to_pylist(), part["caption"].to_pylist(), strict=True)]


def many_files(seed: int = 0) -> list[list[tuple[str, str]]]:
    rng = np.random.default_rng(seed)
    return [
        [(f"http://host/{rng.integers(300)}", f"caption {rng.integers(3)}") for _ in range(size)]
        for size in (200, 0, 150, 90)
    ]


def first_of_each(files, by: str) -> list[tuple[str, str]]:
    """What a set and a loop say."""
    seen, kept = set(), []
    for rows in files:
        for url, caption in rows:
            key = url if by == "url" else (url, caption)
            if key not in seen:
                seen.add(key)
                kept.append((url, caption))
    return kept


@pytest.mark.parametrize("by", ["url", "url_text"])
@pytest.mark.parametrize("rows_per_bucket", [4_000_000, 25])
def test_the_first_row_of_each_identity_wins_over_all_files(tmp_path, monkeypatch, by, rows_per_bucket):
    monkeypatch.setattr(dedup_module, "ROWS_PER_BUCKET", rows_per_bucket)
    files = many_files()
    write_files(tmp_path, files)
    parts = run(tmp_path, by=by, samples_per_shard=40)
    expected = first_of_each(files, by)
    assert rows_of(parts, "train") == expected
    assert [part.num_rows for part in parts] == [40] * (len(expected) // 40) + [len(expected) % 40]
    told = json.loads((tmp_path / "03-dedup-pick" / "duplicates.json").read_text())
    assert told == {"rows_in": 440, "excluded": 0, "duplicates": 440 - len(expected), "rows_out": len(expected)}
    buckets = len(list((tmp_path / "03-dedup-pick").glob("0*.arrow")))
    assert buckets == (1 if rows_per_bucket > 25 else 18)


def test_the_first_by_file_and_row_wins_not_by_hash_or_name(tmp_path):
    write_files(tmp_path, [[("http://b", "x"), ("http://a", "first")], [("http://a", "second"), ("http://c", "y")]])
    (part,) = run(tmp_path)
    assert part["caption"].to_pylist() == ["x", "first", "y"]
    assert part["similarity"].to_pylist() == [0.0, 1.0, 1.0]


def test_keys_and_hashes(tmp_path):
    write_files(tmp_path, [[("http://a/ü", "été")], [("http://b", "z")]])
    (part,) = run(tmp_path)
    assert part["key"].to_pylist() == [identity("http://a/ü", "", "url").hex(), identity("http://b", "", "url").hex()]
    assert part["hash"][0].as_py() == mmh3.hash64("http://a/üété".encode())[0]
    (other,) = run(tmp_path, by="url_text")
    assert other["key"][1].as_py() == identity("http://b", "z", "url_text").hex() != part["key"][1].as_py()
    assert len(identity("u", "t", "url")) == 16 and identity("a\0", "b", "url_text") != identity("a", "\0b", "url")


def test_the_smallest_ranks_are_held_out_and_parts_never_mix(tmp_path):
    files = many_files()
    write_files(tmp_path, files)
    parts = run(tmp_path, num_validation=30, samples_per_shard=12, seed=5)
    expected = first_of_each(files, "url")
    places, _ = to_words(identity(url, "", "url") for url, _ in expected)
    queue = [expected[index] for index in np.argsort(holdout_rank(places, 5))]
    assert set(rows_of(parts, "validation")) == set(queue[:30]) and len(rows_of(parts, "validation")) == 30
    assert rows_of(parts, "train") == [row for row in expected if row not in queue[:30]]
    assert all(len(set(part["split"].to_pylist())) == 1 for part in parts)
    assert [part["split"][0].as_py() for part in parts][-3:] == ["validation"] * 3
    assert {part.num_rows for part in parts[:-4]} == {12} and parts[-1].num_rows == 30 % 12
    others = set(rows_of(run(tmp_path, num_validation=30, samples_per_shard=12, seed=6), "validation"))
    assert others != set(queue[:30])


def test_captions_of_one_url_stand_on_one_side(tmp_path):
    rows = [(f"http://{index}", f"caption {copy}") for index in range(50) for copy in range(3)]
    write_files(tmp_path, [rows])
    parts = run(tmp_path, by="url_text", num_validation=20)
    held_out = {url for url, _ in rows_of(parts, "validation")}
    assert held_out and held_out.isdisjoint(url for url, _ in rows_of(parts, "train"))


def test_errors_of_empty_and_too_small_sets(tmp_path):
    write_files(tmp_path, [[("http://a", "x"), ("http://a", "x"), ("http://b", "x")]])
    with pytest.raises(DataError, match=r"validation\.num_samples = 2, but only 2 rows are left after dedup: nothing"):
        run(tmp_path, num_validation=2)
    assert len(rows_of(run(tmp_path, num_validation=1), "train")) == 1
    write_files(tmp_path / "none", [[], []])
    with pytest.raises(DataError, match=r"02-filter: no row passed the filter; .*funnel\.json shows which rule"):
        run(tmp_path / "none")


def test_files_of_different_schemas_share_a_part(tmp_path):
    write_files(tmp_path, [[("http://a", "x")], [("http://b", "y")]])
    path = tmp_path / "02-filter" / "00001.parquet"
    table = pq.read_table(path).append_column("aesthetic_v2", pa.array([7.0], pa.float32()))
    pq.write_table(table.set_column(2, "similarity", pa.array([0.5], pa.float32())), path)
    (part,) = run(tmp_path)
    assert part["aesthetic_v2"].to_pylist() == [None, 7.0]
    assert part.schema.field("similarity").type == pa.float64() and part["similarity"].to_pylist() == [0.0, 0.5]


def test_a_changed_file_changes_the_parts_and_an_equal_run_does_nothing(tmp_path):
    files = many_files()
    write_files(tmp_path, files)
    run(tmp_path, samples_per_shard=40)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "03-dedup").glob("0*")}
    run(tmp_path, samples_per_shard=40)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "03-dedup").glob("0*")} == before
    files[3] = files[3][:-50]
    write_files(tmp_path, files)
    parts = run(tmp_path, samples_per_shard=40)
    assert rows_of(parts, "train") == first_of_each(files, "url")
    parts = run(tmp_path, samples_per_shard=100)
    assert rows_of(parts, "train") == first_of_each(files, "url") and len(parts) == 3


@pytest.mark.heavy
def test_any_number_of_workers_gives_the_same_bytes(tmp_path):
    digests = []
    for name, executor in (("inline", nullcontext(InlineExecutor())), ("ray", RayExecutor(workers=3))):
        write_files(tmp_path / name, many_files())
        with executor as workers:
            run(tmp_path / name, workers, num_validation=30, samples_per_shard=40)
        digests.append({path.name: sha256_file(path) for path in (tmp_path / name / "03-dedup").glob("0*")})
    assert digests[0] == digests[1] and len(digests[0]) > 10


def test_groups_name_every_duplicate_and_the_row_that_stands_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup_module, "ROWS_PER_BUCKET", 100)
    monkeypatch.setattr(dedup_module, "ROWS_IN_MEMORY", 70)  # files are split in several runs
    files = many_files()
    write_files(tmp_path, files)
    parts = run(tmp_path)
    first: dict[str, tuple[int, int]] = {}
    expected = {}
    for file, rows in enumerate(files):
        for row, (url, _) in enumerate(rows):
            if first.setdefault(url, (file, row)) != (file, row):
                expected[file, row] = first[url]
    groups = [pq.read_table(path) for path in (tmp_path / "03-dedup-pick").glob("*.groups.parquet")]
    found = {
        (row["file"], row["row"]): (row["kept_file"], row["kept_row"]) for table in groups for row in table.to_pylist()
    }
    assert found == expected and len(groups) == 5
    copies = {
        url: count
        for part in parts
        for url, count in zip(*(part[n].to_pylist() for n in ("url", "copies")), strict=True)
    }
    assert copies == Counter(url for rows in files for url, _ in rows)


@pytest.mark.parametrize("by", ["url", "url_text"])
def test_an_evaluation_set_is_left_out_by_url_key_sha256_or_table(tmp_path, capsys, by):
    files = [[(f"http://host/{index}", "first") for index in range(8)], [("http://host/1", "second")]]
    write_files(tmp_path, files)
    lines = ["# an evaluation set", "http://host/0", identity("http://host/1", "", "url").hex(), ""]
    lines += [hashlib.sha256(b"http://host/2").hexdigest(), "http://elsewhere"]
    text, table = tmp_path / "list.txt", tmp_path / "list.parquet"
    text.write_text("\n".join(lines))
    pq.write_table(pa.table({"URL": ["http://host/3", None]}), table)
    parts = run(tmp_path, by=by, exclude=(text, table))
    assert [url for url, _ in rows_of(parts, "train")] == [f"http://host/{index}" for index in (4, 5, 6, 7)]
    told = json.loads((tmp_path / "03-dedup-pick/duplicates.json").read_text())
    assert told == {"rows_in": 9, "excluded": 5, "duplicates": 0, "rows_out": 4}
    assert "0 of 9 rows are duplicates, 5 excluded, 4 left" in capsys.readouterr().out
    text.write_text("http://host/7\n")
    assert len(rows_of(run(tmp_path, by=by, exclude=(text, table)), "train")) == (6 if by == "url" else 7)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"dedup\.exclude: .*none\.txt: no such file"),
        ("empty.txt", b"# nothing\n", r"dedup\.exclude: .*empty\.txt is empty; give a URL or its hash in each line"),
        ("bytes.txt", b"\xff\xfe\x00", r"dedup\.exclude: .*bytes\.txt: cannot be read \(.*\); give a text or parquet"),
        ("cut.parquet", b"PAR1", r"dedup\.exclude: .*cut\.parquet: cannot be read \(.*\); give a text or parquet file"),
    ],
)
def test_lists_that_cannot_be_used_are_named(tmp_path, name, content, message):
    write_files(tmp_path, [[("http://a", "x"), ("http://b", "y")]])
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path, exclude=(tmp_path / name,))


def test_a_list_in_a_table_needs_one_column_of_urls(tmp_path):
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"link": ["http://a"]}), path)
    with pytest.raises(DataError, match=r"list\.parquet: 0 columns of URLs; columns present: link; name one url"):
        read_excluded_urls((path,))


def test_hashes_of_pictures_go_through_the_same_passes(tmp_path, capsys):
    source = tmp_path / "02-filter"
    source.mkdir()
    hashes = [["0f" * 32, None, "ab" * 32], ["ab" * 32, "0f" * 32, "cd" * 32, None]]
    for index, column in enumerate(hashes):
        pq.write_table(pa.table({"sha256": pa.array(column, pa.string())}), source / f"{index:05d}.parquet")
    stages = [
        SplitStage(HashIdentity("sha256"), source, tmp_path / "split"),
        PickStage(0, 0, tmp_path / "split", tmp_path / "pick", name="pictures-pick"),
    ]
    Runner(output=tmp_path, executor=InlineExecutor()).run(stages)
    groups = pq.read_table(tmp_path / "pick/00000.groups.parquet").to_pylist()
    assert groups == [
        {"kept_file": 0, "kept_row": 2, "file": 1, "row": 0},
        {"kept_file": 0, "kept_row": 0, "file": 1, "row": 1},
    ]
    told = json.loads((tmp_path / "pick/duplicates.json").read_text())
    assert told == {"rows_in": 7, "excluded": 2, "duplicates": 2, "rows_out": 3}
    assert "pictures: 2 of 7 rows are duplicates, 2 excluded, 3 left" in capsys.readouterr().out


def test_columns_that_hold_no_hashes_are_errors(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"sha256": ["no hash"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: 'no hash' is no hexadecimal hash"):
        list(HashIdentity("sha256").of(path))
    with pytest.raises(DataError, match=r"a\.parquet: no column 'phash'; run the stage that hashes the pictures"):
        list(HashIdentity("phash").of(path))


def test_equal_first_halves_are_told_apart_by_the_second():
    listed = to_words([b"\0" * 8 + b"a" * 8, b"\0" * 8 + b"c" * 8, b"\1" * 16])
    high, low = to_words([b"\0" * 8 + b"b" * 8, b"\0" * 8 + b"c" * 8, b"\2" * 16, b"\1" * 16])
    assert is_listed(high, low, listed).tolist() == [False, True, False, True]
    assert is_listed(high, low, to_words([])).tolist() == [False] * 4
