"""The tokens stage: uint16 rows beside each image shard, as transformers' tokenizer gives them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Runner
from data_pipeline.stage import Unit
from data_pipeline.stages.tokenize import TokenizeStage
from sdtrain.conditioners.text import build_tokenizer, tokenizer_fingerprint
from sdtrain.data.shard import ShardReader, ShardWriter
from sdtrain.errors import DataError

CAPTIONS = ["a red handwritten seven on a blue background", "", "Ein schöner Hund 🐕", "word " * 200]
START, END = 49406, 49407


def write_images(folder: Path, index: int, captions: list[str]) -> Path:
    path = folder / f"{index:05d}.tar"
    with ShardWriter(path) as writer:
        for row, caption in enumerate(captions):
            writer.write(f"{index}-{row}", {"jpg": b"not looked at", "txt": caption, "json": {"split": "train"}})
    return path


def test_each_image_shard_gets_its_tokens(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 0, CAPTIONS)
    write_images(tmp_path / "images", 3, [])
    stage = TokenizeStage(tmp_path / "images", tmp_path / "tokens", max_length=77)
    runner = Runner(output=tmp_path, executor=InlineExecutor(), console=Console(file=io.StringIO()))
    runner.run([stage])
    with ShardReader(tmp_path / "tokens" / "00000.tar") as reader:
        assert reader.keys == ["0-0", "0-1", "0-2", "0-3"]
        assert reader.fields == ["tokens.npy"]
        rows = [reader.decode(sample, "tokens.npy") for sample in range(4)]
    tokenizer = build_tokenizer(77)
    for caption, row in zip(CAPTIONS, rows, strict=True):
        assert (row.dtype, row.shape) == (np.uint16, (77,))
        expected = tokenizer(caption, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert row.tolist() == expected
    assert rows[1].tolist() == [START, *[END] * 76]
    with ShardReader(tmp_path / "tokens" / "00003.tar") as reader:
        assert reader.keys == []
    assert runner.plan(stage).is_current


def test_two_runs_write_the_same_bytes_and_count_full_rows(tmp_path: Path) -> None:
    unit = Unit(0, (write_images(tmp_path / "images", 0, CAPTIONS),))
    shards = []
    for name in ("a", "b"):
        stage = TokenizeStage(tmp_path / "images", tmp_path / name, max_length=16)
        stats = [stage.worker()(unit, stage.folder)]
        assert stats == [{"captions": 4, "full": 1}]
        assert stage.report(stats) == "tokens: 4 captions, 1 fill all 16 tokens (the rest of them is cut)"
        shards.append((stage.folder / "00000.tar").read_bytes())
    assert shards[0] == shards[1]


def test_the_fingerprint_is_the_tokenizer_s(tmp_path: Path) -> None:
    stage = TokenizeStage(tmp_path, tmp_path, max_length=20)
    assert stage.fingerprint() == {"tokenizer": tokenizer_fingerprint(build_tokenizer(20))}
    assert stage.config_facts() != TokenizeStage(tmp_path, tmp_path, max_length=77).config_facts()
    assert stage.fingerprint()["tokenizer"]["pad_token_id"] == END


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no numbered .tar file; run the stage that writes it first"):
        TokenizeStage(tmp_path, tmp_path, max_length=77).units()
