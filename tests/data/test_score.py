"""Scores by a real open_clip model with random weights, saved and loaded as published ones are; exact thresholds."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_pipeline.build import stages_for
from data_pipeline.cluster import Executor, InlineExecutor, RayExecutor
from data_pipeline.ledger import sha256_file
from data_pipeline.runner import Runner
from data_pipeline.scorer import Scorer, load_head
from data_pipeline.stages.score import ScoreStage
from data_pipeline.stages.select import thresholds_of
from sdtrain.config.curation import ContentDedupConfig, ScoresConfig
from sdtrain.config.ingestion import DigitsSource, DownloadConfig, IngestionConfig, RunnerConfig, ValidationSplitConfig
from sdtrain.data.manifest import Manifest
from sdtrain.data.shard import ShardReader
from sdtrain.errors import ConfigError, DataError

MODEL = "ViT-S-32-alt"
WIDTH = 256  # of its embeddings
PICTURES = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """State dicts: the model's in both formats, and a head of each published kind."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL, pretrained=None, load_weights=False, require_pretrained=False)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "clip.safetensors")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, folder / "clip.pt")
    linear = torch.nn.Linear(WIDTH, 1)
    torch.save(linear.state_dict(), folder / "linear.pth")
    sizes = {0: (WIDTH, 64), 2: (64, 16), 4: (16, 1)}  # LAION's has layers 0, 2, 4, 6 and 7: dropout stands between
    mlp = {
        f"layers.{number}.{name}": value
        for number, size in sizes.items()
        for name, value in torch.nn.Linear(*size).state_dict().items()
    }
    save_file(mlp, folder / "mlp.safetensors")
    return {path.stem if path.stem != "clip" else path.name: path for path in folder.iterdir()}


def settings(files: Mapping[str, Path], **changes: Any) -> ScoresConfig:
    return ScoresConfig(**({"model": MODEL, "weights": files["clip.safetensors"], "batch_size": 8} | changes))


def pictures(count: int) -> list[bytes]:
    found = []
    for seed in range(count):
        stream = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((70, 60)).save(stream, "JPEG")
        found.append(stream.getvalue())
    return found


def test_scores_are_those_of_open_clip_itself(files: dict[str, Path]) -> None:
    bodies, captions = pictures(5), [f"a picture of {word}" for word in ("one", "two", "three", "four", "five")]
    model: Any
    transform: Any
    model, _, transform = open_clip.create_model_and_transforms(MODEL, pretrained=str(files["clip.pt"]))
    model.eval()
    with torch.inference_mode():
        images = torch.stack([transform(Image.open(io.BytesIO(body))) for body in bodies])
        seen = torch.nn.functional.normalize(model.encode_image(images), dim=1)
        read = torch.nn.functional.normalize(model.encode_text(open_clip.get_tokenizer(MODEL)(captions)), dim=1)
    linear = torch.load(files["linear"], weights_only=True)
    expected = {
        "similarity": (seen * read).sum(1),
        "aesthetic": seen @ linear["weight"][0] + linear["bias"][0],
    }
    for weights in ("clip.safetensors", "clip.pt"):
        scorer = Scorer(settings(files, weights=files[weights], aesthetic_head=files["linear"]), on_gpu=False)
        found = scorer.score(bodies, captions)
        assert set(found) == set(expected)
        for name, values in found.items():
            np.testing.assert_allclose(values, expected[name].numpy(), rtol=0, atol=2e-6)
    assert len(set(found["similarity"].tolist())) == 5


def test_scores_do_not_depend_on_who_stands_beside(files: dict[str, Path]) -> None:
    scorer = Scorer(settings(files), on_gpu=False)
    bodies, captions = pictures(8), [f"picture {number}" for number in range(8)]
    whole = scorer.score(bodies, captions)["similarity"]
    assert scorer.score(bodies[:3], captions[:3])["similarity"].tobytes() == whole[:3].tobytes()
    lower = Scorer(settings(files, precision="bf16"), on_gpu=False).score(bodies, captions)["similarity"]
    assert 0 < np.abs(lower - whole).max() < 0.02


def test_the_heads_are_chains_of_linear_layers(files: dict[str, Path]) -> None:
    value = torch.randn(3, WIDTH)
    linear = torch.load(files["linear"], weights_only=True)
    assert torch.allclose(load_head(files["linear"])(value), value @ linear["weight"].T + linear["bias"], atol=1e-6)
    from safetensors.torch import load_file

    mlp, expected = load_file(files["mlp"]), value
    for number in (0, 2, 4):
        expected = expected @ mlp[f"layers.{number}.weight"].T + mlp[f"layers.{number}.bias"]
    assert torch.allclose(load_head(files["mlp"])(value), expected, atol=1e-5)


class Payload:
    """What a hostile pickle would do."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_a_file_that_would_run_code_is_refused_unrun(files: dict[str, Path], tmp_path: Path) -> None:
    hostile, marker = tmp_path / "hostile.pt", tmp_path / "ran"
    torch.save({"weight": Payload(marker), "bias": torch.zeros(1)}, hostile)
    with pytest.raises(DataError, match=r"scores\.weights: .*hostile\.pt: no state dict of ViT-S-32-alt that can"):
        Scorer(settings(files, weights=hostile), on_gpu=False)
    with pytest.raises(DataError, match=r"scores\.aesthetic_head: .*hostile\.pt: no state dict that can be read"):
        Scorer(settings(files, aesthetic_head=hostile), on_gpu=False)
    assert not marker.exists()


def test_files_that_do_not_fit_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"scores\.weights: .*linear\.pth: no state dict of ViT-S-32-alt"):
        Scorer(settings(files, weights=files["linear"]), on_gpu=False)
    save_file({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "other.safetensors")
    message = r"other\.safetensors: made for embeddings of 768 numbers, ViT-S-32-alt has 256; give the head of this"
    with pytest.raises(DataError, match=message):
        Scorer(settings(files, aesthetic_head=tmp_path / "other.safetensors"), on_gpu=False)
    save_file({"weight": torch.zeros(3, 256), "bias": torch.zeros(3)}, tmp_path / "three.safetensors")
    with pytest.raises(DataError, match=r"weight \[3, 256\].* are no chain of linear layers that ends in one number"):
        load_head(tmp_path / "three.safetensors")
    with pytest.raises(DataError, match=r"clip\.safetensors: holds .*; expected weight and bias, or layers\.0\.weight"):
        load_head(files["clip.safetensors"])
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match=r"list\.pt: no state dict that can be .*no flat mapping of names to tensors"):
        load_head(tmp_path / "list.pt")


def test_a_text_tower_of_the_hub_needs_its_files(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"scores\.model: roberta-ViT-B-32 needs more than open_clip has"):
        Scorer(settings(files, model="roberta-ViT-B-32"), on_gpu=False)


def page(out: Path, scores: ScoresConfig | None, **sections: Any) -> IngestionConfig:
    return IngestionConfig(
        schema_version=1,
        kind="ingestion",
        output=out,
        source=DigitsSource(type="digits", num_images=PICTURES),
        validation=ValidationSplitConfig(num_samples=6),
        download=DownloadConfig(image_size=32, samples_per_shard=9),
        scores=scores,
        **sections,
    )


def run(config: IngestionConfig, executor: Executor | None = None) -> None:
    Runner(output=config.output, executor=executor or InlineExecutor(), max_attempts=1).run(stages_for(config))


def scores_of(out: Path) -> dict[str, dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted((out / "04-score").glob("0*.parquet"))]
    return {row["key"]: row for table in tables for row in table.to_pylist()}


def kept_in(out: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted((out / "04-select").glob("0*.tar")):
        with ShardReader(path) as shard:
            found |= {key: shard.decode(sample, "json") for sample, key in enumerate(shard.keys)}
    return found


@pytest.fixture(scope="module")
def scored(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored")
    run(page(out, settings(files, aesthetic_head=files["mlp"])))
    return out


def test_scores_stand_in_the_json_with_what_they_were_made_with(files: dict[str, Path], scored: Path) -> None:
    scores, kept = scores_of(scored), kept_in(scored)
    assert list(kept) == list(scores) and len(kept) == PICTURES  # no threshold, so nothing is rejected
    for key, facts in kept.items():
        assert facts["clip_scores"] == {
            "similarity": scores[key]["similarity"],
            "aesthetic": scores[key]["aesthetic"],
            "model": MODEL,
            "weights_sha256": sha256_file(files["clip.safetensors"]),
            "aesthetic_head_sha256": sha256_file(files["mlp"]),
        }
    assert Manifest.load(scored / "manifest.json").shards[0].fields == ("jpg", "json", "txt")


def test_thresholds_and_percentiles_reject_exactly_what_is_below(
    files: dict[str, Path], scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = scores_of(scored)
    least = float(np.median([row["aesthetic"] for row in scores.values()]))
    wanted = settings(files, aesthetic_head=files["mlp"], similarity_percentile=30.0, min_aesthetic=least)
    before = {path: path.stat().st_mtime_ns for path in (scored / "04-score").glob("0*")}
    run(page(scored, wanted))
    assert {path: path.stat().st_mtime_ns for path in (scored / "04-score").glob("0*")} == before  # scored once
    similarities = sorted(row["similarity"] for row in scores.values())
    cut = similarities[math.floor(PICTURES * 0.3)]
    expected = [key for key, row in scores.items() if row["similarity"] >= cut and row["aesthetic"] >= least]
    assert list(kept_in(scored)) == expected and 0 < len(expected) < PICTURES - 7
    funnel = json.loads((scored / "04-select/funnel.json").read_text())
    rejected = {rule["rule"]: rule["rejected"] for rule in funnel["rules"]}
    assert rejected["similarity_percentile"] == 7 and funnel["rows_out"] == len(expected)
    assert sum(rejected.values()) == PICTURES - len(expected)
    shown = capsys.readouterr().out
    assert f"score: {PICTURES} pictures by {MODEL}" in shown or "score: 3 of 3 up to date" in shown
    manifest = Manifest.load(scored / "manifest.json")
    assert sum(entry.num_samples for entry in manifest.shards) == len(expected)


def test_duplicates_are_not_scored(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(page(out, None, content_dedup=ContentDedupConfig(by="bytes")))
    with ShardReader(out / "04-download/00000.tar") as shard:
        digest, key = shard.decode(2, "json")["sha256"], shard.keys[2]
    (tmp_path / "list.txt").write_text(digest)
    run(page(out, settings(files), content_dedup=ContentDedupConfig(by="bytes", exclude=(tmp_path / "list.txt",))))
    assert key not in scores_of(out) and len(scores_of(out)) == PICTURES - 1 == len(kept_in(out))
    assert {"content_group", "clip_scores"} <= next(iter(kept_in(out).values())).keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "ViT-S-32-olt"}, r"scores\.model: open_clip knows no 'ViT-S-32-olt'; did you mean ViT-S-32-alt\?"),
        ({"weights": Path("none.safetensors")}, r"scores\.weights: none\.safetensors: no such file; fetch it first"),
        ({"aesthetic_head": Path("head.npz")}, r"scores\.aesthetic_head: head\.npz: a state dict is read from \.safe"),
    ],
)
def test_what_no_worker_could_load_is_refused_before_one_starts(
    files: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run(page(tmp_path, None))
    with pytest.raises(ConfigError, match=message):
        run(page(tmp_path, settings(files, **changes)))


def test_a_gpu_that_is_not_there_is_no_silent_cpu(
    tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage_of(**changes: Any) -> ScoreStage:
        runner = RunnerConfig(address=changes.pop("address", None))
        config = page(tmp_path, settings(files, **changes)).model_copy(update={"runner": runner})
        (stage,) = (stage for stage in stages_for(config) if isinstance(stage, ScoreStage))
        return stage

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"scores\.device is cuda, but this machine has no GPU that torch can use"):
        stage_of(device="cuda")
    needs = {device: stage_of(device=device, address="auto").needs for device in ("auto", "cpu", "cuda")}
    assert {device: (one.num_gpus, one.prefers_gpu) for device, one in needs.items()} == {
        "auto": (0, True),
        "cpu": (0, False),
        "cuda": (1, False),
    }


def test_thresholds_come_in_the_order_of_the_page() -> None:
    config = ScoresConfig(weights=Path("w.pt"), min_similarity=0.2, similarity_percentile=5.0, aesthetic_percentile=9.0)
    assert [threshold.rule for threshold in thresholds_of(config)] == [
        "similarity",
        "similarity_percentile",
        "aesthetic_percentile",
    ]
    assert thresholds_of(None) == ()


@pytest.mark.long
def test_any_number_of_actors_gives_the_same_scores(files: dict[str, Path], tmp_path: Path) -> None:
    digests = []
    for name, workers in (("one", 1), ("two", 2)):
        with RayExecutor(workers=workers) as executor:
            run(page(tmp_path / name, settings(files, similarity_percentile=40.0)), executor)
        paths = [*(tmp_path / name / "04-score").glob("0*"), *(tmp_path / name / "04-select").glob("0*")]
        digests.append({path.relative_to(tmp_path / name): sha256_file(path) for path in paths})
    assert digests[0] == digests[1] and len(digests[0]) == 15
