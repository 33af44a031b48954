"""The encode stage: moments equal the autoencoder's, whatever the batch, and its figures say what the latents are."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float32
from PIL import Image
from rich.console import Console

from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Runner
from data_pipeline.stage import Unit, has_gpu
from data_pipeline.stages.encode import Encoder, EncodeStage, autoencoder_facts, describe, summarize
from sdtrain.autoencoders.load import load_autoencoder, save_autoencoder
from sdtrain.config.ingestion import EncodeConfig
from sdtrain.data.shard import ShardReader, ShardWriter
from sdtrain.errors import ConfigError, DataError
from tests.support import write_tiny_autoencoder

SIZE = 16


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    return write_tiny_autoencoder(tmp_path / "autoencoder")


def jpeg(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def png(seed: int, *, mirrored: bool = False) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[:, ::-1] if mirrored else pixels).save(stream, "PNG")
    return stream.getvalue()


def write_shards(folder: Path, index: int, images: list[bytes], splits: list[str] | None = None) -> None:
    splits = splits or ["train"] * len(images)
    images_writer = ShardWriter(folder / "images" / f"{index:05d}.tar")
    tokens_writer = ShardWriter(folder / "tokens" / f"{index:05d}.tar")
    with images_writer, tokens_writer:
        for row, (image, split) in enumerate(zip(images, splits, strict=True)):
            facts = {"caption": f"caption {row}", "split": split}
            images_writer.write(f"{index}-{row}", {"jpg": image, "txt": f"caption {row}", "json": facts})
            tokens_writer.write(f"{index}-{row}", {"tokens.npy": np.full(77, row, np.uint16)})


def stage_for(folder: Path, autoencoder: Path, **changes: Any) -> EncodeStage:
    settings = EncodeConfig(**({"autoencoder": str(autoencoder), "batch_size": 4, "check_samples": 2} | changes))
    return EncodeStage(folder / "images", folder / "tokens", folder / "latents", settings)


def run(folder: Path, stage: EncodeStage) -> str:
    shown = io.StringIO()
    console = Console(file=shown, width=500)
    Runner(output=folder, executor=InlineExecutor(), max_attempts=1, console=console).run([stage])
    return shown.getvalue()


def test_latent_shards_hold_the_autoencoder_s_moments_beside_tokens_and_captions(
    tmp_path: Path, autoencoder: Path
) -> None:
    write_shards(tmp_path, 0, [jpeg(seed) for seed in range(6)])
    run(tmp_path, stage_for(tmp_path, autoencoder))
    network = load_autoencoder(str(autoencoder))
    with (
        ShardReader(tmp_path / "latents" / "00000.tar") as latents,
        ShardReader(tmp_path / "images/00000.tar") as images,
    ):
        assert latents.keys == images.keys
        assert latents.fields == ["json", "moments.npy", "tokens.npy", "txt"]
        for sample in range(6):
            moments = latents.decode(sample, "moments.npy")
            assert (moments.dtype, moments.shape) == (np.float16, (8, SIZE // 2, SIZE // 2))
            pixels = torch.from_numpy(np.array(images.decode(sample, "jpg")))[None].float() / 127.5 - 1
            with torch.no_grad():
                expected = network.encode(pixels)[0].numpy()
            np.testing.assert_allclose(moments, expected, rtol=1e-3, atol=1e-4)
            assert latents.decode(sample, "tokens.npy").tolist() == [sample] * 77
            assert latents.decode(sample, "txt") == f"caption {sample}"
            assert latents.decode(sample, "json")["split"] == "train"


def test_a_last_batch_gives_the_same_moments_as_a_full_one(tmp_path: Path, autoencoder: Path) -> None:
    images = [jpeg(seed) for seed in range(8)]
    write_shards(tmp_path / "whole", 0, images)
    write_shards(tmp_path / "part", 0, images[:5])
    for name in ("whole", "part"):
        run(tmp_path / name, stage_for(tmp_path / name, autoencoder))
    with (
        ShardReader(tmp_path / "whole/latents/00000.tar") as whole,
        ShardReader(tmp_path / "part/latents/00000.tar") as part,
    ):
        assert [whole.read(i, "moments.npy") for i in range(5)] == [part.read(i, "moments.npy") for i in range(5)]


def test_two_runs_write_the_same_bytes_and_a_third_does_nothing(tmp_path: Path, autoencoder: Path) -> None:
    write_shards(tmp_path, 0, [jpeg(seed) for seed in range(3)])
    stage = stage_for(tmp_path, autoencoder)
    run(tmp_path, stage)
    first = (tmp_path / "latents" / "00000.tar").read_bytes()
    assert "1 of 1 up to date" in run(tmp_path, stage)
    (tmp_path / "latents" / "00000.tar").unlink()
    assert "missing output" in run(tmp_path, stage)
    assert (tmp_path / "latents" / "00000.tar").read_bytes() == first


def test_another_autoencoder_makes_the_latents_again(tmp_path: Path, autoencoder: Path) -> None:
    write_shards(tmp_path, 0, [jpeg(0)])
    stage = stage_for(tmp_path, autoencoder)
    run(tmp_path, stage)
    network = load_autoencoder(str(autoencoder))
    with torch.no_grad():
        network.quant_conv.weight.mul_(2)
    save_autoencoder(network, autoencoder)
    assert "with changed settings (autoencoder.weights_sha256" in run(tmp_path, stage)


def test_figures_are_those_of_posterior_draws_and_decoded_means(tmp_path: Path, autoencoder: Path) -> None:
    write_shards(tmp_path, 0, [jpeg(seed) for seed in range(5)])
    shown = run(tmp_path, stage_for(tmp_path, autoencoder, check_samples=3))
    summary = json.loads((tmp_path / "latents" / "summary.json").read_text())
    network = load_autoencoder(str(autoencoder))
    with ShardReader(tmp_path / "images" / "00000.tar") as images:
        pixels = np.stack([images.decode(sample, "jpg") for sample in range(5)])
    batch = torch.from_numpy(pixels).float() / 127.5 - 1
    with torch.no_grad():
        moments = network.encode(batch)
        draws = [network.scale(network.posterior_sample(moments, torch.randn(5, 4, 8, 8))) for _ in range(400)]
        decoded = network.decode(network.posterior_mean(moments[:3])).clamp(-1, 1)
    drawn = torch.stack(draws)
    assert summary["latent_std"] == pytest.approx(float(drawn.std()), rel=0.02)
    assert summary["latent_mean"] == pytest.approx(float(drawn.mean()), abs=0.02)
    error = float((decoded - batch[:3]).square().mean())
    assert summary["psnr_db"] == pytest.approx(10 * math.log10(4 / error), abs=0.01)
    assert (summary["samples"], summary["checked"]) == (5, 3)
    assert "encode: 5 samples, scaled latents have standard deviation" in shown


def test_a_wrong_scale_is_warned_of_with_the_right_one() -> None:
    row = {"samples": 10, "latent_mean": 0.0, "latent_mean_square": 16.0, "checked": 0, "squared_error": 0.0}
    summary = summarize([row, row])
    assert (summary["latent_std"], summary["psnr_db"], summary["samples"]) == (4.0, None, 20)
    text = describe(summary, 0.5)
    assert "warning: diffusion assumes a standard deviation of 1; a scaling_factor of 0.125 would give 1" in text
    assert "warning" not in describe(summary | {"latent_std": 1.2}, 0.5)
    assert "the latents are constant" in describe(summary | {"latent_std": 0.0}, 0.5)


def test_shards_weigh_by_their_samples() -> None:
    one = {"samples": 1, "latent_mean": 1.0, "latent_mean_square": 1.0, "checked": 1, "squared_error": 4.0}
    three = {"samples": 3, "latent_mean": -1.0, "latent_mean_square": 1.0, "checked": 0, "squared_error": 0.0}
    empty = {"samples": 0, "latent_mean": 0.0, "latent_mean_square": 0.0, "checked": 0, "squared_error": 0.0}
    summary = summarize([one, three, empty])
    assert (summary["latent_mean"], summary["latent_std"]) == (-0.5, pytest.approx(math.sqrt(0.75)))
    assert summary["psnr_db"] == 0.0
    assert describe(summarize([empty]), 1.0) == "encode: 0 samples"


def test_an_empty_shard_stays_empty(tmp_path: Path, autoencoder: Path) -> None:
    write_shards(tmp_path, 0, [])
    run(tmp_path, stage_for(tmp_path, autoencoder))
    with ShardReader(tmp_path / "latents" / "00000.tar") as reader:
        assert len(reader) == 0


@pytest.mark.parametrize(
    ("images", "splits", "message"),
    [
        ([jpeg(0), jpeg(1, (SIZE, 18))], None, "image '0-1' is 16x18; all images of a shard must be of one size"),
        ([jpeg(0, (17, 17))], None, "image '0-0' is 17x17; .* a multiple of the autoencoder's factor 2"),
        (
            [jpeg(0), jpeg(1)],
            ["train", "validation"],
            r"holds splits \['train', 'validation'\]; a shard belongs to exactly",
        ),
    ],
)
def test_shards_that_do_not_fit_are_refused(
    tmp_path: Path, autoencoder: Path, images: list[bytes], splits: list[str] | None, message: str
) -> None:
    write_shards(tmp_path, 0, images, splits)
    with pytest.raises(DataError, match=message):
        run(tmp_path, stage_for(tmp_path, autoencoder))
    assert not (tmp_path / "latents" / "00000.tar").exists()


def test_tokens_of_other_samples_are_refused(tmp_path: Path, autoencoder: Path) -> None:
    write_shards(tmp_path, 0, [jpeg(0)])
    write_shards(tmp_path, 1, [jpeg(0)])
    stage = stage_for(tmp_path, autoencoder)
    unit = Unit(0, (tmp_path / "images" / "00000.tar", tmp_path / "tokens" / "00001.tar"))
    with pytest.raises(DataError, match=r"holds other samples than .*00000.tar; run stage tokens again"):
        stage.worker()(unit, tmp_path / "latents")


def test_a_missing_token_shard_is_named(tmp_path: Path, autoencoder: Path) -> None:
    write_shards(tmp_path, 0, [jpeg(0)])
    (tmp_path / "tokens" / "00000.tar").unlink()
    with pytest.raises(DataError, match=r"no token shard for \['00000.tar'\]; run stage tokens first"):
        stage_for(tmp_path, autoencoder).units()


def test_moments_beyond_float16_are_refused(tmp_path: Path, autoencoder: Path) -> None:
    network = load_autoencoder(str(autoencoder))
    with torch.no_grad():
        network.quant_conv.weight.mul_(1e9)
    save_autoencoder(network, autoencoder)
    write_shards(tmp_path, 0, [jpeg(0)])
    with (
        pytest.warns(RuntimeWarning, match="overflow"),
        pytest.raises(
            DataError, match=r"moments of '0-0' are not finite in float16; encode with encode.precision=fp32"
        ),
    ):
        run(tmp_path, stage_for(tmp_path, autoencoder))


def moments_of(shard: Path, field: str = "moments.npy") -> Float32[np.ndarray, "samples moments h w"]:
    with ShardReader(shard) as reader:
        return np.stack([reader.decode(sample, field) for sample in range(len(reader))]).astype(np.float32)


def close(found: Float32[np.ndarray, "*shape"], expected: Float32[np.ndarray, "*shape"], share: float) -> bool:
    return bool(np.linalg.norm(found - expected) < share * np.linalg.norm(expected))


@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.03), ("fp16", 0.004)])
def test_half_precision_computes_close_to_full(tmp_path: Path, autoencoder: Path, precision: str, share: float) -> None:
    read = {}
    for name in ("fp32", precision):
        folder = tmp_path / name
        write_shards(folder, 0, [jpeg(seed) for seed in range(2)])
        run(folder, stage_for(folder, autoencoder, precision=name))
        read[name] = moments_of(folder / "latents" / "00000.tar")
    assert not np.array_equal(read["fp32"], read[precision])
    assert close(read[precision], read["fp32"], share)


def test_flips_are_the_moments_of_the_mirrored_pictures_where_there_is_training(
    tmp_path: Path, autoencoder: Path
) -> None:
    pngs = [png(seed) for seed in range(6)]  # JPEG of a mirrored picture is no mirrored JPEG
    write_shards(tmp_path, 0, pngs)
    write_shards(tmp_path, 1, pngs, ["validation"] * 6)
    run(tmp_path, stage_for(tmp_path, autoencoder, flips=True))
    write_shards(tmp_path / "mirrored", 0, [png(seed, mirrored=True) for seed in range(6)])
    write_shards(tmp_path / "plain", 0, pngs)
    for name in ("mirrored", "plain"):
        run(tmp_path / name, stage_for(tmp_path / name, autoencoder))
    train, mirrored = tmp_path / "latents/00000.tar", tmp_path / "mirrored/latents/00000.tar"
    np.testing.assert_array_equal(moments_of(train, "moments_flipped.npy"), moments_of(mirrored))
    np.testing.assert_array_equal(moments_of(train), moments_of(tmp_path / "plain/latents/00000.tar"))
    assert not close(moments_of(train), moments_of(mirrored), 0.1)
    with ShardReader(tmp_path / "latents/00001.tar") as validation:
        assert validation.fields == ["json", "moments.npy", "tokens.npy", "txt"]


def test_flips_and_compilation_are_facts_only_where_they_are_asked_for(tmp_path: Path, autoencoder: Path) -> None:
    plain = stage_for(tmp_path, autoencoder).config_facts()
    assert set(plain) == {"autoencoder", "batch_size", "check_samples"}
    changed = stage_for(tmp_path, autoencoder, flips=True, compile=True).config_facts()
    assert changed == dict(plain) | {"flips": True, "compile": True}


def test_without_a_compiler_the_key_is_named(
    tmp_path: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"encode.compile needs g\+\+ to compile .* or set encode.compile: false"):
        Encoder(stage_for(tmp_path, autoencoder, compile=True).settings, on_gpu=False)


@pytest.mark.heavy
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # torch's compiler imports it
def test_a_compiled_encoder_computes_the_same_for_every_size_of_pictures(tmp_path: Path, autoencoder: Path) -> None:
    for name, compiled in (("plain", False), ("compiled", True), ("again", True)):
        for index, size in enumerate([(16, 16), (24, 16), (16, 24)]):
            write_shards(tmp_path / name, index, [jpeg(seed, size) for seed in range(3)])
        run(tmp_path / name, stage_for(tmp_path / name, autoencoder, compile=compiled))
    for index in range(3):
        shards = [tmp_path / name / "latents" / f"{index:05d}.tar" for name in ("plain", "compiled", "again")]
        assert close(moments_of(shards[1]), moments_of(shards[0]), 1e-3)
        assert shards[1].read_bytes() == shards[2].read_bytes()


def test_the_fingerprint_names_weights_and_scale(tmp_path: Path, autoencoder: Path) -> None:
    import hashlib

    digest = hashlib.sha256((autoencoder / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    facts = {"weights_sha256": digest, "scaling_factor": 0.5, "shift_factor": 0.1, "latent_channels": 4}
    assert autoencoder_facts(str(autoencoder)) == facts | {"downsample_factor": 2}
    assert stage_for(tmp_path, autoencoder).fingerprint() == {
        "autoencoder": facts | {"downsample_factor": 2, "precision": "fp32"}
    }


def test_missing_weights_are_named(autoencoder: Path) -> None:
    (autoencoder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"diffusion_pytorch_model.safetensors: missing; an autoencoder needs"):
        autoencoder_facts(str(autoencoder))


def test_a_gpu_is_taken_where_there_is_one(tmp_path: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = stage_for(tmp_path, autoencoder).needs
    assert (needs.num_gpus, needs.prefers_gpu, needs.keeps_worker) == (0, True, True)
    for is_there in (True, False):  # in a process without Ray; tests/data/test_cluster_head.py asks Ray's workers
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert has_gpu() is is_there


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bytes_twice_and_the_cpu_s_values(tmp_path: Path, autoencoder: Path) -> None:
    write_shards(tmp_path, 0, [jpeg(seed) for seed in range(5)])
    unit = Unit(0, (tmp_path / "images" / "00000.tar", tmp_path / "tokens" / "00000.tar"))
    settings = stage_for(tmp_path, autoencoder).settings
    for name, on_gpu in (("a", True), ("b", True), ("cpu", False)):
        encoder = Encoder(settings, on_gpu=on_gpu)
        with (
            ShardReader(unit.inputs[0]) as images,
            ShardReader(unit.inputs[1]) as tokens,
            ShardWriter(tmp_path / name / "00000.tar") as writer,
        ):
            encoder.encode_shard(images, tokens, writer)
    shards = {name: (tmp_path / name / "00000.tar").read_bytes() for name in ("a", "b")}
    assert shards["a"] == shards["b"]
    with ShardReader(tmp_path / "a" / "00000.tar") as gpu, ShardReader(tmp_path / "cpu" / "00000.tar") as cpu:
        for sample in range(5):
            left, right = gpu.decode(sample, "moments.npy"), cpu.decode(sample, "moments.npy")
            np.testing.assert_allclose(left, right, rtol=2e-2, atol=2e-3)
