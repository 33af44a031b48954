"""Other captions for known samples: text and tokens are replaced, pictures and latents are not touched again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build import stages_for
from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Runner
from data_pipeline.stages import captions as captions_module
from data_pipeline.stages.captions import SortStage, look_up
from data_pipeline.stages.identity import to_words
from sdtrain.conditioners.text import build_tokenizer, tokenize
from sdtrain.config.curation import CaptionsConfig
from sdtrain.config.ingestion import (
    DigitsSource,
    DownloadConfig,
    EncodeConfig,
    IngestionConfig,
    TokenizeConfig,
    ValidationSplitConfig,
)
from sdtrain.data.manifest import Manifest
from sdtrain.data.shard import ShardReader
from sdtrain.errors import DataError
from tests.support import write_tiny_autoencoder

LENGTH = 12
BEFORE_CAPTIONS = ("04-download", "06-tokens", "07-encode")


def page(out: Path, captions: CaptionsConfig | None = None, is_encoded: bool = True) -> IngestionConfig:
    encode = EncodeConfig(autoencoder=str(out.parent / "autoencoder"), batch_size=8, check_samples=0)
    return IngestionConfig(
        schema_version=1,
        kind="ingestion",
        output=out,
        source=DigitsSource(type="digits", num_images=20),
        validation=ValidationSplitConfig(num_samples=4),
        download=DownloadConfig(image_size=16, samples_per_shard=8),
        tokenize=TokenizeConfig(max_length=LENGTH),
        encode=encode if is_encoded else None,
        captions=captions,
    )


def run(config: IngestionConfig) -> None:
    Runner(output=config.output, executor=InlineExecutor(), max_attempts=1).run(stages_for(config))


def samples_of(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("0*.tar")):
        with ShardReader(path) as shard:
            for number, key in enumerate(shard.keys):
                fields = {name: shard.read(number, name) for name in shard.fields}
                found[key] = fields | {"json": shard.decode(number, "json"), "shard": path.name}
    return found


def times_of(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for name in BEFORE_CAPTIONS for path in (out / name).glob("0*")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose captions are its own."""
    folder = tmp_path_factory.mktemp("captions")
    write_tiny_autoencoder(folder / "autoencoder")
    run(page(folder / "out"))
    return folder / "out"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("by", ["key", "url"])
def test_text_and_tokens_are_replaced_and_nothing_else(
    world: Path, tmp_path: Path, by: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions_module, "ROWS_AT_ONCE", 5)  # several runs
    before, times = samples_of(world / "07-encode"), times_of(world)
    names = {key: key if by == "key" else fields["json"]["url"] for key, fields in before.items()}
    named = list(before)[:13]
    rows = [{by: names[key], "caption": f"an été of {key[:4]}"} for key in reversed(named)]
    rows += [{by: names[named[0]], "caption": "a second row"}, {by: "0" * 32, "caption": "of nobody"}]
    rows += [{by: names[key], "caption": None} for key in list(before)[13:15]]
    run(page(world, CaptionsConfig(table=str(write_jsonl(tmp_path / "new.jsonl", rows)), by=by)))
    after = samples_of(world / "07-captions")
    tokenizer = build_tokenizer(LENGTH)
    assert list(after) == list(before) and times_of(world) == times  # nothing before was made again
    for key, fields in after.items():
        assert fields["moments.npy"] == before[key]["moments.npy"] and fields["shard"] == before[key]["shard"]
        if key not in named:
            assert fields == before[key]
            continue
        text = f"an été of {key[:4]}"
        assert fields["txt"].decode() == fields["json"]["caption"] == text
        assert fields["json"]["original_caption"] == before[key]["json"]["caption"] == before[key]["txt"].decode()
        assert {**fields["json"], "caption": 0, "original_caption": 0} == {
            **before[key]["json"],
            "caption": 0,
            "original_caption": 0,
        }
        tokens = np.frombuffer(fields["tokens.npy"][-2 * LENGTH :], np.uint16)
        assert tokens.tolist() == tokenize(tokenizer, [text])[0].tolist()
    assert "captions: 13 of 20 samples (65.0%) have another caption now" in capsys.readouterr().out
    manifest = Manifest.load(world / "manifest.json")
    assert {Path(entry.path).parent.name for entry in manifest.shards} == {"07-captions"}
    assert manifest.shards[0].fields == ("json", "moments.npy", "tokens.npy", "txt")


def test_the_first_row_by_file_counts_and_parquet_reads_the_same(world: Path, tmp_path: Path) -> None:
    keys = list(samples_of(world / "07-encode"))
    folder = tmp_path / "tables"
    folder.mkdir()
    pq.write_table(pa.table({"KEY": keys[:2], "Caption": ["first file", "also first"]}), folder / "a.parquet")
    write_jsonl(folder / "b.jsonl", [{"key": key, "caption": "second file"} for key in keys[:3]])
    run(page(world, CaptionsConfig(table=str(folder))))
    texts = [fields["txt"].decode() for fields in samples_of(world / "07-captions").values()]
    assert texts[:3] == ["first file", "also first", "second file"]


def test_pictures_alone_get_captions_too(tmp_path: Path) -> None:
    run(page(tmp_path / "out", is_encoded=False))
    keys = list(samples_of(tmp_path / "out/04-download"))
    table = write_jsonl(tmp_path / "new.jsonl", [{"key": keys[3], "caption": "other"}])
    run(page(tmp_path / "out", CaptionsConfig(table=str(table)), is_encoded=False))
    after = samples_of(tmp_path / "out/07-captions")
    assert after[keys[3]]["txt"] == b"other" and set(after[keys[3]]) == {"jpg", "json", "txt", "shard"}


def test_samples_are_found_among_equal_halves(tmp_path: Path) -> None:
    rows = [("00" * 8 + "aa" * 8, "a"), ("00" * 8 + "bb" * 8, "b"), ("00" * 8 + "bb" * 8, "later"), ("ff" * 16, "f")]
    table = write_jsonl(tmp_path / "t.jsonl", [{"key": key, "caption": text} for key, text in rows])
    Runner(output=tmp_path, executor=InlineExecutor()).run([SortStage(str(table), "key", tmp_path / "runs")])
    wanted = ["00" * 8 + "bb" * 8, "00" * 16, "ff" * 16, "00" * 8 + "ac" * 8]
    found = look_up([tmp_path / "runs/00000.arrow"], *to_words(bytes.fromhex(key) for key in wanted))
    assert found == {0: "b", 2: "f"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "none.jsonl",
            None,
            r"captions\.table: .*none\.jsonl: no \.parquet or \.jsonl file there; give a fi",
        ),
        ("t.csv", b"key,caption\n", r"captions\.table: .*t\.csv: no \.parquet or \.jsonl file there"),
        ("t.jsonl", b"{}\n", r"t\.jsonl, line 1: .* is no JSON object with key and caption \(KeyError: 'key'\)"),
        (
            "t.jsonl",
            b'{"key": "x", "caption": "y"}',
            r"t\.jsonl: key 'x' is no key of a sample \(32 hex",
        ),
        ("t.jsonl", b'{"key": 5, "caption": "y"}', r"t\.jsonl: 5 is no text; key and caption are texts"),
        (
            "t.jsonl",
            b'{"key": "' + b"a" * 32 + b'", "caption": "y"}',
            r"captions: not one of 20 samples is name",
        ),
        ("t.parquet", b"PAR1", r"t\.parquet: no readable parquet file \(.*\); fetch it again"),
    ],
)
def test_tables_that_cannot_be_used_are_named(
    world: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(page(world, CaptionsConfig(table=str(tmp_path / name))))


def test_a_table_needs_its_columns(world: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["x"], "caption": ["y"]}), tmp_path / "t.parquet")
    message = (
        r"t\.parquet: 0 columns 'key'; columns present: url, caption; rename one, or set captions\.by to key or url"
    )
    with pytest.raises(DataError, match=message):
        run(page(world, CaptionsConfig(table=str(tmp_path / "t.parquet"))))
