"""Stages `images` and `manifest`: what is listed, what is left out, what becomes of a manifest that was right once."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Runner
from data_pipeline.stages.manifest import ManifestStage, list_shard
from sdtrain.data.manifest import Manifest, check_fingerprint, verify
from sdtrain.data.shard import ShardWriter
from sdtrain.errors import DataError


@dataclass(frozen=True)
class Made:
    facts: tuple[tuple[str, Any], ...]

    def fingerprint(self) -> Mapping[str, Any]:
        return {name: {"value": value} for name, value in self.facts}


MAKERS = (Made((("transform", 512),)), Made((("tokenizer", 77), ("autoencoder", "abc"))))


def write_shard(folder: Path, index: int, rows: int, split: str | None = "train", shift: int = 0) -> Path:
    path = folder / "latents" / f"{index:05d}.tar"
    with ShardWriter(path) as writer:
        for row in range(rows):
            facts = {"caption": "x"} if split is None else {"caption": "x", "split": split}
            moments = np.full((8, 4, 4), row + shift, np.float16)
            writer.write(f"{index}-{row}", {"moments.npy": moments, "txt": "x", "json": facts})
    return path


def stage_for(folder: Path, makers: tuple[Made, ...] = MAKERS) -> ManifestStage:
    return ManifestStage("manifest", folder / "latents", folder / "07-manifest", folder / "manifest.json", makers)


def run(folder: Path, stage: ManifestStage) -> str:
    shown = io.StringIO()
    runner = Runner(output=folder, executor=InlineExecutor(), max_attempts=1, console=Console(file=shown, width=2000))
    runner.run([stage])
    return shown.getvalue()


def test_the_manifest_lists_every_shard_that_holds_samples_by_its_split(tmp_path: Path) -> None:
    for index, (rows, split) in enumerate([(3, "train"), (0, "train"), (2, "validation"), (4, "train")]):
        write_shard(tmp_path, index, rows, split)
    shown = run(tmp_path, stage_for(tmp_path))
    manifest = Manifest.load(tmp_path / "manifest.json")
    assert [(shard.path, shard.split, shard.num_samples) for shard in manifest.shards] == [
        ("latents/00000.tar", "train", 3),
        ("latents/00003.tar", "train", 4),
        ("latents/00002.tar", "validation", 2),
    ]
    assert manifest.field_shapes == {"moments.npy": (8, 4, 4)}
    verify(manifest, deep=True)
    check_fingerprint(
        manifest, {"tokenizer": {"value": 77}, "autoencoder": {"value": "abc"}, "transform": {"value": 512}}
    )
    assert f"manifest: 7 train, 2 validation samples in 3 shards; wrote {tmp_path / 'manifest.json'}" in shown


def test_running_again_leaves_the_manifest_alone(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, 3)
    run(tmp_path, stage_for(tmp_path))
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert f"{tmp_path / 'manifest.json'} stands" in run(tmp_path, stage_for(tmp_path))
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.glob("*manifest*")) == ["07-manifest", "manifest.json"]


def test_a_lost_manifest_is_written_again(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, 3)
    run(tmp_path, stage_for(tmp_path))
    content = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").unlink()
    run(tmp_path, stage_for(tmp_path))
    assert (tmp_path / "manifest.json").read_bytes() == content


@pytest.mark.parametrize("change", ["shard", "facts"])
def test_another_data_set_gets_another_manifest_and_the_old_one_is_kept(tmp_path: Path, change: str) -> None:
    write_shard(tmp_path, 0, 3)
    run(tmp_path, stage_for(tmp_path))
    old = Manifest.load(tmp_path / "manifest.json")
    makers = MAKERS
    if change == "shard":
        write_shard(tmp_path, 0, 3, shift=1)
    else:
        makers = (*MAKERS[:1], Made((("tokenizer", 20), ("autoencoder", "abc"))))
    shown = run(tmp_path, stage_for(tmp_path, makers))
    kept = tmp_path / f"manifest.superseded-{old.sha256[:12]}.json"
    assert Manifest.load(kept).sha256 == old.sha256 != Manifest.load(tmp_path / "manifest.json").sha256
    assert f"the one before is {kept.name} now, its shards were replaced" in shown
    verify(Manifest.load(tmp_path / "manifest.json"), deep=True)


def test_shards_without_a_single_sample_are_no_data_set(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, 0)
    with pytest.raises(DataError, match=r"not one of 1 shards holds a sample; see summary.json there"):
        run(tmp_path, stage_for(tmp_path))
    assert not (tmp_path / "manifest.json").exists()


def test_no_shard_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"latents holds no shard; run the stage that writes them first"):
        stage_for(tmp_path).units()


def test_a_sample_must_say_its_split(tmp_path: Path) -> None:
    path = write_shard(tmp_path, 0, 1, split=None)
    with pytest.raises(DataError, match=r"has split None; expected 'train' or 'validation'"):
        list_shard(path, tmp_path)


def test_many_shards_are_listed_in_parts_and_only_the_part_that_changed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(5):
        write_shard(tmp_path, index, index % 3, "validation" if index == 4 else "train")
    run(tmp_path, stage_for(tmp_path))
    whole = (tmp_path / "manifest.json").read_bytes()
    monkeypatch.setattr("data_pipeline.stages.manifest.SHARDS_AT_ONCE", 2)
    (tmp_path / "manifest.json").unlink()
    shown = run(tmp_path, stage_for(tmp_path))
    assert (tmp_path / "manifest.json").read_bytes() == whole
    assert sorted(path.name for path in (tmp_path / "07-manifest").glob("*.shards.json")) == [
        "00000.shards.json",
        "00001.shards.json",
        "00002.shards.json",
    ]
    assert "manifest: 3 train, 1 validation samples in 3 shards; wrote" in shown
    write_shard(tmp_path, 2, 2, shift=5)
    shown = run(tmp_path, stage_for(tmp_path))
    assert "manifest: 2 of 3 up to date; 1 with changed input" in shown and "the one before is" in shown
    (tmp_path / "latents" / "00004.tar.index.json").unlink()
    assert "manifest: 2 of 2 up to date; 1 obsolete, to be removed" in run(tmp_path, stage_for(tmp_path))
    assert {shard.split for shard in Manifest.load(tmp_path / "manifest.json").shards} == {"train"}
