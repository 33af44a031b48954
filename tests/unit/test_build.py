"""From a page to classes: every branch, and shards that another recipe made are refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain import build
from sdtrain.autoencoders.kl import PRESETS as AUTOENCODERS
from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.autoencoders.load import autoencoder_facts, save_autoencoder
from sdtrain.conditioners.none import NoConditioner
from sdtrain.conditioners.text import ClipTextConditioner, build_tokenizer, tokenizer_fingerprint
from sdtrain.config.denoiser import DenoiserConfig
from sdtrain.config.load import load_training
from sdtrain.config.run import TrainingConfig
from sdtrain.data.manifest import Manifest, ShardEntry
from sdtrain.denoisers.dit import DiT
from sdtrain.denoisers.load import Denoiser, save_denoiser
from sdtrain.errors import ConfigError, DataError, ExitCode
from sdtrain.nn.folders import write_folder
from sdtrain.nn.resnet import ResnetBlock2d
from sdtrain.tasks.autoencoding import AutoencodingTask
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask
from tests.support import make_latent_manifest, tiny_page

ARCH = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": [16, 32],
    "down_blocks": ["plain", "cross"],
    "layers_per_block": 1,
    "num_heads": 2,
    "context_dim": 32,
    "norm_groups": 8,
}
VALIDATION = {"every_steps": 2, "num_samples": 8, "batch_size": 4, "timestep_bins": 5}


def page(folder: Path, *overrides: str, **sections: dict[str, Any]) -> TrainingConfig:
    return load_training(tiny_page(folder, folder / "manifest.json", **sections), overrides)


def manifest(*, samples: int = 48, fingerprint: dict[str, Any] | None = None, **shapes: tuple[int, ...]) -> Manifest:
    """A data set that is only talked about: no shard is opened."""
    entry = ShardEntry("train.tar", "train", samples, 1, "0", "0", ("jpg", "moments.npy", "tokens.npy"))
    known = {"moments.npy": (8, 6, 4), "tokens.npy": (77,), "jpg": (3, 32, 64)}
    return Manifest(Path("data/manifest.json"), (entry,), fingerprint or {}, shapes or known)


def autoencoder(seed: int = 0, **changes: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    values: dict[str, Any] = dict(AUTOENCODERS["tiny"]) | {"channels": [8, 8], "scaling_factor": 0.7}
    return AutoencoderKL(**(values | changes))


# Parts ----------------------------------------------------------------------------------------------------------------


def test_an_autoencoder_by_preset_architecture_and_weights(tmp_path: Path) -> None:
    preset = build.build_autoencoder(page(tmp_path).autoencoder)
    assert preset.scaling_factor == AUTOENCODERS["tiny"]["scaling_factor"]
    assert preset.downsample_factor == 8

    arch = {"latent_channels": 4, "channels": [8, 16], "layers_per_block": 1, "norm_groups": 4}
    own = build.build_autoencoder(page(tmp_path, autoencoder={"preset": None, "arch": arch}).autoencoder)
    assert (own.downsample_factor, own.scaling_factor) == (2, 1.0)

    save_autoencoder(autoencoder(), tmp_path / "vae")
    weights = {"preset": None, "weights": str(tmp_path / "vae")}
    loaded = build.build_autoencoder(page(tmp_path, autoencoder=weights).autoencoder)
    assert loaded.scaling_factor == 0.7
    assert torch.equal(loaded.quant_conv.weight, autoencoder().quant_conv.weight)


@pytest.mark.parametrize("kind", ["preset", "arch", "weights"])
def test_the_page_s_scaling_factor_wins(kind: str, tmp_path: Path) -> None:
    save_autoencoder(autoencoder(), tmp_path / "vae")
    choices = {
        "preset": "tiny",
        "arch": {"latent_channels": 4, "channels": [8, 16], "layers_per_block": 1, "norm_groups": 4},
        "weights": str(tmp_path / "vae"),
    }
    section = {"preset": None, kind: choices[kind], "scaling_factor": 0.25}
    assert build.build_autoencoder(page(tmp_path, autoencoder=section).autoencoder).scaling_factor == 0.25


def test_a_denoiser_by_architecture_preset_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = page(tmp_path)
    assert config.denoiser is not None
    own = build.build_denoiser(config.denoiser)
    assert (own.in_channels, own.context_dim) == (4, 32)

    write_folder(tmp_path / "unet", own.diffusers_config(), own.state_dict())
    weights = page(tmp_path, denoiser={"arch": None, "weights": str(tmp_path / "unet")}).denoiser
    assert weights is not None
    loaded = build.build_denoiser(weights)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in own.state_dict().items())

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(build.unet, "UNet", lambda **kwargs: asked.append(kwargs))
    preset = page(
        tmp_path, denoiser={"arch": None, "preset": "sd15"}, conditioner={"arch": None, "weights": "x"}
    ).denoiser
    assert preset is not None
    build.build_denoiser(preset)
    assert asked == [build.unet.PRESETS["sd15"]]


def test_a_dit_by_architecture_preset_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def section(text: str, *more: str) -> DenoiserConfig:
        denoiser = page(tmp_path, f"denoiser={text}", *more).denoiser
        assert denoiser is not None
        return denoiser

    arch = "{in_channels: 4, out_channels: 4, width: 16, num_layers: 1, num_heads: 2, context_dim: 32, sample_size: 8}"
    own = build.build_denoiser(section(f"{{type: dit, arch: {arch}}}"))
    assert isinstance(own, DiT) and (own.width, own.context_dim) == (16, 32)

    save_denoiser(own, tmp_path / "transformer")
    loaded = build.build_denoiser(section(f"{{type: dit, weights: {tmp_path}}}"))
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in own.state_dict().items())

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(build.dit, "DiT", lambda **kwargs: asked.append(kwargs))
    build.build_denoiser(section("{type: dit, preset: dit_b_2, context_dim: 32, sample_size: 8}"))
    build.build_denoiser(section("{type: dit, preset: dit_small}", "conditioner={type: none}"))
    published = build.dit.PRESETS
    assert asked[0] == published["dit_b_2"] | {"context_dim": 32, "num_classes": None, "sample_size": 8}
    assert asked[1] == published["dit_small"]


def test_variances_are_not_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        build.build_task(page(tmp_path, denoiser={"arch": {**ARCH, "out_channels": 8}}), manifest())
    assert str(error.value) == (
        "denoiser: predicts 8 channels, the latents in data/manifest.json have 4; choose a network with as many (one "
        "that also predicts variances has twice as many, and is not trained here)"
    )


def test_a_conditioner_by_architecture_weights_and_none(tmp_path: Path) -> None:
    own = build.build_conditioner(page(tmp_path).conditioner, seed=7)
    assert isinstance(own, ClipTextConditioner)
    assert own.width == 32
    again = build.build_conditioner(page(tmp_path).conditioner, seed=7)
    other = build.build_conditioner(page(tmp_path).conditioner, seed=8)
    weight = "text_model.embeddings.token_embedding.weight"
    weights = [
        next(value for name, value in one.state_dict().items() if name.endswith(weight)) for one in (own, again, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])

    own.save_pretrained(tmp_path / "text")
    section = {"arch": None, "weights": str(tmp_path / "text"), "trainable": False}
    loaded = build.build_conditioner(page(tmp_path, conditioner=section).conditioner)
    assert isinstance(loaded, ClipTextConditioner)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    tokens = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(tokens).tokens, own.eval()(tokens).tokens)

    assert isinstance(build.build_conditioner(unconditional(tmp_path).conditioner), NoConditioner)


def unconditional(folder: Path) -> TrainingConfig:
    arch = {"down_blocks": ["plain", "self"], "mid_block": "self", "context_dim": None}
    path = tiny_page(folder, folder / "manifest.json")
    content = json.loads(path.read_text().split("\n", 1)[1])
    content["conditioner"] = {"type": "none"}
    content["denoiser"]["arch"] |= arch
    path.write_text(json.dumps(content))
    return load_training(path)


def autoencoding(folder: Path, **sections: dict[str, Any]) -> TrainingConfig:
    path = tiny_page(folder, folder / "manifest.json", **sections)
    content = json.loads(path.read_text().split("\n", 1)[1])
    content["task"] = {"type": "autoencoding", "reconstruction": "l1", "kl_weight": 0.5}
    for name in ("denoiser", "conditioner", "process"):
        del content[name]
    path.write_text(json.dumps(content))
    return load_training(path)


def test_the_process_is_the_page_s(tmp_path: Path) -> None:
    config = page(tmp_path, process={"prediction_type": "v_prediction", "num_train_timesteps": 50})
    assert config.process is not None
    process = build.build_process(config.process)
    assert (process.prediction_type, process.num_train_timesteps, process.beta_schedule) == (
        "v_prediction",
        50,
        "scaled_linear",
    )
    assert (process.beta_start, process.beta_end) == (0.00085, 0.012)


# Tasks ----------------------------------------------------------------------------------------------------------------


def test_latent_diffusion_takes_its_shapes_from_the_shards(tmp_path: Path) -> None:
    task = build.build_task(page(tmp_path, task={"latents": "mean"}, validation=VALIDATION), manifest())
    assert isinstance(task, LatentDiffusionTask)
    assert task.latent_shape == (4, 6, 4)
    assert (task.condition_dropout, task.latents) == (0.1, "mean")
    assert set(task.trainables) == {"denoiser"}
    assert any(name.startswith("conditioner.") for name, _ in task.trainables["denoiser"].module.named_parameters())


@pytest.mark.parametrize(
    ("weighting", "expected"), [({"type": "none"}, None), ({"type": "min_snr", "gamma": 3.0}, 3.0)]
)
def test_loss_weighting(
    weighting: dict[str, Any], expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(build, "LatentDiffusionTask", lambda **kwargs: asked.append(kwargs))
    build.build_task(page(tmp_path, task={"loss_weighting": weighting}), manifest())
    assert asked[0]["loss_weighting"] == expected
    assert asked[0]["timestep_bins"] == 20  # without a validation section


def test_autoencoding_takes_its_shapes_from_the_pictures(tmp_path: Path) -> None:
    task = build.build_task(autoencoding(tmp_path), manifest())
    assert isinstance(task, AutoencodingTask)
    assert task.latent_shape == (4, 4, 8)
    assert (task.reconstruction, task.kl_weight) == ("l1", 0.5)


def test_the_same_seed_builds_the_same_networks(tmp_path: Path) -> None:
    def weights() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return build.build_task(page(tmp_path), manifest()).trainables["denoiser"].module.state_dict()

    one, other = weights(), weights()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_prepare_recomputes_the_repeated_blocks_where_the_page_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = page(tmp_path, trainer={"gradient_checkpointing": "blocks"})
    assert config.denoiser is not None
    network: Denoiser = build.build_denoiser(config.denoiser)
    modes: list[str] = []
    monkeypatch.setattr(network, "set_gradient_checkpointing", modes.append)
    build.prepare(network, config)
    build.prepare(network, page(tmp_path))
    assert modes == ["blocks", "none"]


def test_what_is_trained_is_compiled_under_its_names_where_the_page_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[str, str]] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode, dynamic: compiled.append((type(self).__name__, mode))
    )
    wanted = {"compile": True, "compile_mode": "max-autotune-no-cudagraphs"}
    denoising, encoding = page(tmp_path, trainer=wanted), autoencoding(tmp_path, trainer=wanted)
    for config, name in ((denoising, "denoiser"), (encoding, "autoencoder")):
        task = build.build_task(config, manifest())
        module = task.trainables[name].module
        names = list(module.state_dict())
        assert build.compile_networks(task, config) == len(compiled)
        kinds = Counter(kind for kind, _ in compiled)
        resnets = sum(isinstance(each, ResnetBlock2d) for each in module.modules())
        assert kinds["ResnetBlock2d"] == resnets > 0
        assert {mode for _, mode in compiled} == {"max-autotune-no-cudagraphs"}
        assert list(module.state_dict()) == names
        compiled.clear()
    assert build.compile_networks(build.build_task(page(tmp_path), manifest()), page(tmp_path)) == 0
    assert compiled == []


# Data -----------------------------------------------------------------------------------------------------------------


def test_fields_are_what_the_task_reads(tmp_path: Path) -> None:
    assert build.fields_of(page(tmp_path)) == ("moments", "tokens")
    assert build.fields_of(unconditional(tmp_path)) == ("moments",)
    assert build.fields_of(autoencoding(tmp_path)) == ("pixels",)


def test_a_field_that_is_not_there_is_named() -> None:
    images = manifest(jpg=(3, 8, 8))
    assert build.field_shape(images, "pixels") == (3, 8, 8)
    with pytest.raises(DataError) as raised:
        build.field_shape(images, "moments")
    assert raised.value.exit_code == ExitCode.DATA
    assert str(raised.value) == (
        "data/manifest.json: holds no 'moments' (moments.npy), which this task trains on; it holds jpg. "
        "Point data.manifest at the manifest of another stage."
    )


def test_of_several_buckets_the_largest_one_s_shape_is_what_is_sampled() -> None:
    shards = tuple(
        ShardEntry(f"{bucket}.tar", "train", count, 1, "0", "0", ("moments.npy",), bucket)
        for bucket, count in (("a", 5), ("b", 9), ("c", 9))
    )
    shapes = {"a": {"moments.npy": (8, 4, 4)}, "b": {"moments.npy": (8, 2, 6)}, "c": {"moments.npy": (8, 6, 2)}}
    assert build.field_shape(Manifest(Path("m.json"), shards, {}, {}, shapes), "moments") == (8, 2, 6)


@pytest.mark.parametrize(("samples", "epochs", "steps"), [(48, 1, 6), (48, 3, 18), (49, 1, 7), (47, 2, 12), (5, 1, 1)])
def test_epochs_are_steps_enough_to_see_every_sample(samples: int, epochs: int, steps: int, tmp_path: Path) -> None:
    config = page(tmp_path, trainer={"max_steps": None, "max_epochs": epochs}, optimizer={"warmup_steps": 0})
    assert config.data.batch_size == 8
    assert build.max_steps(config, manifest(samples=samples)) == steps


def test_steps_are_taken_as_they_stand(tmp_path: Path) -> None:
    assert build.max_steps(page(tmp_path, trainer={"max_steps": 5}), manifest()) == 5


def test_training_shuffles_and_validation_does_not(tmp_path: Path) -> None:
    make_latent_manifest(tmp_path, train=32, validation=16)
    config, data = page(tmp_path), Manifest.load(tmp_path / "manifest.json")
    draws = build.build_task(config, data).draws
    keys = {}
    for split, count in (("train", 32), ("validation", 16)):
        dataset = build.build_dataset(config, data, draws, split)
        samples = [dataset[position] for position in range(count)]
        assert set(samples[0].fields) == {"moments", "tokens"}
        assert set(samples[0].normals) == set(draws.normals)
        keys[split] = [sample.key for sample in samples]
        dataset.close()
    assert keys["validation"] == sorted(keys["validation"])
    assert keys["train"] != sorted(keys["train"])
    assert len(set(keys["train"])) == 32


def test_a_manifest_on_object_storage_is_read_through_a_cache(tmp_path: Path) -> None:
    make_latent_manifest(tmp_path, train=48, validation=16)
    local = build.load_manifest(page(tmp_path).data)
    url = [f"data.manifest=file://{tmp_path}/manifest.json", f"data.cache_dir={tmp_path}/cache"]
    config = page(tmp_path, *url)
    remote = build.load_manifest(config.data)
    assert (remote.sha256, local.cache) == (local.sha256, None)
    draws = build.build_task(config, remote).draws
    datasets = [build.build_dataset(config, manifest, draws) for manifest in (local, remote)]
    for mine, theirs in zip(*([dataset[place] for place in range(48)] for dataset in datasets), strict=True):
        assert (mine.key, mine.error, theirs.error) == (theirs.key, None, None)
        assert (mine.fields["moments"] == theirs.fields["moments"]).all()
    for dataset in datasets:
        dataset.close()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3
    with pytest.raises(ConfigError) as raised:
        build.load_manifest(page(tmp_path, *url, "data.cache_gib=1e-4", "data.window_shards=4").data)
    assert str(raised.value).startswith("data.cache_gib = 0.0001 is too small: with data.window_shards = 4 up to 0.000")
    assert str(raised.value).endswith("GiB of shards are read or brought ahead at a time; raise data.cache_gib")


# Shards that another recipe made --------------------------------------------------------------------------------------


def tokens_of(max_length: int = 77) -> dict[str, Any]:
    return {"tokenizer": tokenizer_fingerprint(build_tokenizer(max_length))}


def test_fitting_shards_pass(tmp_path: Path) -> None:
    build.check_manifest(page(tmp_path), manifest(fingerprint=tokens_of()))
    build.check_manifest(unconditional(tmp_path), manifest())
    build.check_manifest(autoencoding(tmp_path), manifest())


def test_another_tokenizer_s_tokens_are_refused(tmp_path: Path) -> None:
    found = tokens_of()
    found["tokenizer"] |= {"pad_token_id": 0}
    with pytest.raises(DataError, match=r"tokenizer\.pad_token_id: found 0, expected 49407") as raised:
        build.check_manifest(page(tmp_path), manifest(fingerprint=found))
    assert raised.value.exit_code == ExitCode.DATA == 3
    with pytest.raises(DataError, match=r"tokenizer\.max_length: found 77, expected 64"):
        build.check_manifest(page(tmp_path, conditioner={"max_length": 64}), manifest(fingerprint=tokens_of()))
    with pytest.raises(DataError, match="found 'absent'"):
        build.check_manifest(page(tmp_path), manifest())


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    save_autoencoder(autoencoder(0), folder / "mine")
    save_autoencoder(autoencoder(1), folder / "other")
    save_autoencoder(autoencoder(0, scaling_factor=0.9), folder / "rescaled")
    return folder


def latents_of(folder: Path) -> dict[str, Any]:
    """As ingestion writes it down, with a fact beside that training does not know."""
    return tokens_of() | {"autoencoder": autoencoder_facts(str(folder)) | {"precision": "bf16"}}


def reads(folder: Path, encoder: Path, **more: Any) -> TrainingConfig:
    return page(folder, autoencoder={"preset": None, "weights": str(encoder), **more})


def test_latents_of_the_page_s_autoencoder_pass(tmp_path: Path, encoders: Path) -> None:
    build.check_manifest(reads(tmp_path, encoders / "mine"), manifest(fingerprint=latents_of(encoders / "mine")))


def test_latents_of_another_autoencoder_are_refused(tmp_path: Path, encoders: Path) -> None:
    config = reads(tmp_path, encoders / "mine")
    mine, other = (autoencoder_facts(str(encoders / name))["weights_sha256"] for name in ("mine", "other"))
    assert mine != other
    with pytest.raises(DataError) as raised:
        build.check_manifest(config, manifest(fingerprint=latents_of(encoders / "other")))
    assert str(raised.value) == (
        "data/manifest.json: the shards were made with other parts than this recipe's:\n"
        f"  autoencoder.weights_sha256: found {other!r}, expected {mine!r}\n"
        "Make the shards again with the recipe's parts, or point data.manifest at shards that fit."
    )
    with pytest.raises(DataError, match=r"autoencoder\.weights_sha256: found 'absent'"):
        build.check_manifest(config, manifest(fingerprint=tokens_of()))


def test_another_scale_is_refused_unless_the_page_asks_for_it(tmp_path: Path, encoders: Path) -> None:
    """Shards hold unscaled moments, so a factor in the page changes nothing that stands in them."""
    data = manifest(fingerprint=latents_of(encoders / "mine"))
    with pytest.raises(DataError, match=r"autoencoder\.scaling_factor: found 0\.7, expected 0\.9\n"):
        build.check_manifest(reads(tmp_path, encoders / "rescaled"), data)
    build.check_manifest(reads(tmp_path, encoders / "mine", scaling_factor=0.9), data)


def test_an_autoencoder_without_stored_weights_has_no_facts(tmp_path: Path, encoders: Path) -> None:
    build.check_manifest(page(tmp_path), manifest(fingerprint=latents_of(encoders / "mine")))
