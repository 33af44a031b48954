"""A real run over samples of three sizes, through the cache: two ranks, then one, across the ends of epochs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sdtrain.conditioners.text import build_tokenizer, tokenize, tokenizer_fingerprint
from sdtrain.data.manifest import describe_shard, write_manifest
from sdtrain.data.shard import ShardWriter
from sdtrain.run_dir import RunDir
from sdtrain.training.metrics import read_metrics
from tests.support import CAPTIONS, tiny_page, torchrun

pytestmark = [pytest.mark.heavy, pytest.mark.long]

BUCKETS = {"8x8": (8, 8, 21), "8x16": (8, 16, 13), "16x8": (16, 8, 9)}
STEPS = 14


def write_data(folder: Path) -> Path:
    """Moments and tokens of three sizes, 43 samples to train on in batches of 8, and some of each to validate with."""
    tokenizer, entries, number = build_tokenizer(77), [], 0
    for split, share in (("train", 1), ("validation", 3)):
        for bucket, (height, width, count) in BUCKETS.items():
            path = folder / f"{split}-{bucket}.tar"
            with ShardWriter(path) as writer:
                for _ in range(count // share):
                    random = np.random.Generator(np.random.Philox(number))
                    mean = random.standard_normal((4, height, width))
                    moments = np.concatenate([mean, np.full_like(mean, -6.0)]).astype(np.float16)
                    tokens = tokenize(tokenizer, [CAPTIONS[number % len(CAPTIONS)]])[0]
                    writer.write(f"{number:05d}", {"moments.npy": moments, "tokens.npy": tokens})
                    number += 1
            entries.append(describe_shard(path, split=split, folder=folder, bucket=bucket))
    write_manifest(folder / "manifest.json", entries, fingerprint={"tokenizer": tokenizer_fingerprint(tokenizer)})
    return folder / "manifest.json"


def run(world: Path, name: str, *legs: tuple[int, int], **data: str) -> RunDir:
    """Train in legs of (ranks, steps until it ends); `data` changes the page."""
    folder = world / name
    folder.mkdir()
    page = tiny_page(
        folder,
        world / "data" / "manifest.json",
        data={"num_workers": 1, **data},
        checkpoint={"every_steps": 100},
        validation={"every_steps": STEPS, "num_samples": 14, "batch_size": 4},
        optimizer={"lr_schedule": "constant"},
    )
    for nproc, until in legs:
        done = torchrun(nproc, "-m", "sdtrain", "train", str(page), f"trainer.max_steps={until}")
        assert done.returncode == 0, done.stderr[-3000:]
    return RunDir(folder / "run")


def losses(run: RunDir) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(run.metrics) if "train/loss" in row}


def test_a_run_over_three_sizes_is_the_same_on_two_ranks_then_one(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    whole = run(tmp_path, "whole", (1, STEPS))
    url, cache = f"file://{tmp_path}/data/manifest.json", str(tmp_path / "cache")
    parts = run(tmp_path, "parts", (2, 5), (1, STEPS), manifest=url, cache_dir=cache)
    mine, theirs = losses(parts), losses(whole)
    assert sorted(mine) == sorted(theirs) == list(range(1, STEPS + 1))
    assert all(abs(mine[step] - theirs[step]) <= 1e-4 * abs(theirs[step]) for step in theirs)
    assert json.loads(parts.exit_file.read_text())["code"] == 0
    validated = {row["step"]: row["validation/loss"] for row in read_metrics(parts.metrics) if "validation/loss" in row}
    assert list(validated) == [5, STEPS], "at the end of each leg, over all three sizes"
    assert np.isfinite(list(validated.values())).all()
