"""Exports of tiny runs: complete, described, never half there, and the same system when loaded back."""

import hashlib
import io
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from sdtrain import build
from sdtrain.autoencoders.load import load_autoencoder
from sdtrain.checkpoints.manifest import rank_file
from sdtrain.checkpoints.pipelines import from_checkpoint, load_pipeline, read_process
from sdtrain.checkpoints.protocol import commit
from sdtrain.checkpoints.recut import Layout, spans, tensor_name
from sdtrain.config.load import load_training
from sdtrain.data.manifest import Manifest, describe_shard, read_fields, write_manifest
from sdtrain.data.shard import ShardWriter
from sdtrain.denoisers.dit import DiT
from sdtrain.denoisers.load import save_denoiser
from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.errors import CheckpointError, ConfigError
from sdtrain.export import diffusers
from sdtrain.export.diffusers import export, measure_scale, scheduler_config

LATENT_DIFFUSION = """\
schema_version: 1
kind: training
name: tiny
task: {{type: latent_diffusion}}
data: {{manifest: {manifest}, batch_size: 8, micro_batch_size: 4}}
autoencoder: {{type: kl, scaling_factor: 0.5, arch: {{latent_channels: 4, channels: [16, 32], layers_per_block: 1,
  attention_in_middle: false, norm_groups: 8}}}}
denoiser: {{type: unet, arch: {{in_channels: 4, out_channels: 4, channels: [16, 32], down_blocks: {blocks},
  layers_per_block: 1, num_heads: 2, context_dim: {context}, norm_groups: 8, mid_block: {mid}}}}}
conditioner: {conditioner}
process: {process}
optimizer: {{learning_rate: 1.0e-3, lr_schedule: constant}}
trainer: {{max_steps: 4, precision: fp32}}
"""
TEXT = "{type: clip_text, max_length: 16, arch: {hidden_size: 16, num_layers: 1, num_heads: 2}, trainable: %s}"
AUTOENCODING = """\
schema_version: 1
kind: training
name: tiny-autoencoder
task: {type: autoencoding}
data: {manifest: m.json, batch_size: 8, micro_batch_size: 4}
autoencoder: {type: kl, arch: {latent_channels: 4, channels: [16, 32], layers_per_block: 1,
  attention_in_middle: false, norm_groups: 8}}
optimizer: {learning_rate: 1.0e-3, lr_schedule: constant}
trainer: {max_steps: 4, precision: fp32}
"""


def shards(folder: Path, field: str = "moments.npy") -> Path:
    """Two samples of latents 8 x 8, or of images 16 x 16."""
    rng = np.random.default_rng(0)
    moments = [rng.normal(size=(8, 8, 8)).astype(np.float16) for _ in range(2)]
    with ShardWriter(folder / "train" / "00000.tar") as writer:
        for i, value in enumerate(moments):
            writer.write(f"{i:05d}", {field: value if field == "moments.npy" else picture(i)})
    entry = describe_shard(folder / "train" / "00000.tar", split="train", folder=folder)
    write_manifest(folder / "manifest.json", [entry], fingerprint={})
    return folder / "manifest.json"


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def save(
    run: Path, text: str, trainable: str, module: nn.Module, *, kinds: tuple[str, ...] = ("master", "ema")
) -> Path:
    """Commit a module as a one-rank checkpoint: the EMA holds its weights, the master their double."""
    names = {name: parameter.shape for name, parameter in module.named_parameters()}
    layout = Layout.of([names])
    flat = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    values = {"master": 2 * flat, "exp_avg": flat, "exp_avg_sq": flat**2, "ema": flat}
    files = {rank_file(trainable, 0): {tensor_name(0, kind): values[kind] for kind in kinds}}
    facts = {"layouts": {trainable: layout.to_json()}, "spans": {trainable: spans(layout, [len(flat)], 1)}}
    path = commit(run / "checkpoints", step=4, attempt="a", files=files, facts=facts, texts={"config.yaml": text})
    assert path is not None
    return path


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights that no initialisation gives, so that a part that was not loaded shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def page(
    tmp_path: Path, *, trainable: bool = True, text: bool = True, schedule: str = "scaled_linear", process: str = ""
) -> str:
    manifest = tmp_path / "data" / "manifest.json"
    if not manifest.exists():
        shards(tmp_path / "data")
    return LATENT_DIFFUSION.format(
        manifest=manifest,
        process=process or f"{{beta_schedule: {schedule}, prediction_type: epsilon}}",
        blocks="[cross, plain]" if text else "[self, plain]",
        context=16 if text else "null",
        mid="cross" if text else "self",
        conditioner=TEXT % str(trainable).lower() if text else "{type: none}",
    )


def run_of(tmp_path: Path, *, kinds: tuple[str, ...] = ("master", "ema"), **settings) -> Path:
    """A latent diffusion run with one checkpoint."""
    text = page(tmp_path, **settings)
    (tmp_path / "page.yaml").write_text(text)
    config = load_training(tmp_path / "page.yaml")
    assert config.denoiser is not None and config.conditioner is not None
    trained = nn.ModuleDict({"denoiser": build.build_denoiser(config.denoiser)})
    if settings.get("trainable", True) and settings.get("text", True):
        trained["conditioner"] = build.build_conditioner(config.conditioner, seed=config.seed)
    save(tmp_path / "run", text, "denoiser", randomise(trained, 1), kinds=kinds)
    return tmp_path / "run"


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- a whole pipeline -------------------------------------------------------------------------------------------


def test_the_folder_holds_every_part_and_its_digest(tmp_path):
    output = export(run_of(tmp_path), tmp_path / "out" / "pipeline")
    parts = files_of(output)
    assert {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
        "sdtrain.json",
    } <= parts
    facts = json.loads((output / "sdtrain.json").read_text())
    assert set(facts["files"]) == parts - {"sdtrain.json"}
    for name, digest in facts["files"].items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == digest
    assert (facts["step"], facts["ema"], facts["dtype"], facts["latent_size"]) == (4, True, "fp32", [8, 8])
    assert facts["source"] == "run/checkpoints/step-00000004"
    assert str(tmp_path) not in (output / "sdtrain.json").read_text()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pipeline"]


@pytest.mark.parametrize("trainable", [True, False])
def test_the_loaded_folder_is_the_checkpoint(tmp_path, trainable):
    run = run_of(tmp_path, trainable=trainable)
    direct, loaded = from_checkpoint(run), load_pipeline(export(run, tmp_path / "pipeline"))
    for name, module in direct.modules().items():
        theirs = loaded.modules()[name].state_dict()
        assert theirs.keys() == module.state_dict().keys()
        for key, tensor in module.state_dict().items():
            assert torch.equal(theirs[key], tensor), f"{name}.{key}"
    assert loaded.weights_sha256() == direct.weights_sha256()
    assert (loaded.latent_size, loaded.step, loaded.is_ema) == (direct.latent_size, 4, True) == ((8, 8), 4, True)
    assert loaded.autoencoder.scaling_factor == 0.5
    assert loaded.tokenizer is not None and loaded.tokenizer.model_max_length == 16
    assert torch.equal(loaded.process.alpha_bar, direct.process.alpha_bar)
    assert not any(
        p.requires_grad or module.training for module in loaded.modules().values() for p in module.parameters()
    )


def test_frozen_parts_without_stored_weights_are_those_that_the_training_built(tmp_path):
    config = load_training(run_of(tmp_path, trainable=False).parent / "page.yaml")
    torch.manual_seed(config.seed)  # as the trainer does
    task = build.build_task(config, Manifest.load(config.data.manifest))
    loaded = from_checkpoint(tmp_path / "run")
    for name in ("autoencoder", "conditioner"):
        theirs = loaded.modules()[name].state_dict()
        assert all(torch.equal(theirs[key], tensor) for key, tensor in task.frozen[name].state_dict().items())


def test_loading_leaves_the_random_state_alone(tmp_path):
    run, before = run_of(tmp_path), torch.get_rng_state()
    from_checkpoint(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_trained_conditioner_is_exported_and_not_a_fresh_one(tmp_path):
    output = export(run_of(tmp_path), tmp_path / "pipeline")
    weights = load_file(output / "text_encoder" / "model.safetensors")
    spread = weights["text_model.encoder.layers.0.mlp.fc1.weight"].std().item()
    assert spread == pytest.approx(0.1, rel=0.05)  # as `randomise` draws it; a fresh one has another


def test_ema_or_the_last_weights(tmp_path):
    run = run_of(tmp_path)
    name = "unet/diffusion_pytorch_model.safetensors"
    averaged = load_file(export(run, tmp_path / "ema") / name)
    last = load_file(export(run, tmp_path / "last", ema=False) / name)
    for key in averaged:
        assert torch.equal(last[key], 2 * averaged[key])
    assert json.loads((tmp_path / "last" / "sdtrain.json").read_text())["ema"] is False


def test_a_run_without_ema_says_that_it_gives_its_last_weights(tmp_path):
    output = export(run_of(tmp_path, kinds=("master",)), tmp_path / "pipeline")
    assert json.loads((output / "sdtrain.json").read_text())["ema"] is False


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision(tmp_path, dtype, torch_dtype):
    run = run_of(tmp_path)
    output = export(run, tmp_path / "pipeline", dtype=dtype)
    for file in output.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()} == {torch_dtype}
    full, half = from_checkpoint(run).denoiser.state_dict(), load_pipeline(output).denoiser.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in half.values())
    assert all(torch.equal(half[key], full[key].to(torch_dtype).float()) for key in full)


def test_an_unconditional_run_becomes_a_pipeline_without_text(tmp_path):
    output = export(run_of(tmp_path, text=False), tmp_path / "pipeline")
    index = json.loads((output / "model_index.json").read_text())
    assert index["_class_name"] == "LDMPipeline" and index["vqvae"] == ["diffusers", "AutoencoderKL"]
    assert not (output / "text_encoder").exists()
    loaded = load_pipeline(output)
    assert loaded.tokenizer is None and loaded.denoiser.context_dim is None


def test_the_cosine_schedule_comes_back(tmp_path):
    loaded = load_pipeline(export(run_of(tmp_path, schedule="cosine"), tmp_path / "pipeline"))
    assert loaded.process.beta_schedule == "cosine"
    assert torch.equal(loaded.process.alpha_bar, from_checkpoint(tmp_path / "run").process.alpha_bar)


def test_the_latent_size_can_be_given_where_the_data_is_not(tmp_path):
    run = run_of(tmp_path)
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(
        ConfigError, match=r"manifest.json: no such file here, and it alone says how large the latents are"
    ):
        export(run, tmp_path / "pipeline")
    assert load_pipeline(export(run, tmp_path / "pipeline", latent_size=(4, 8))).latent_size == (4, 8)


# --- an autoencoder ---------------------------------------------------------------------------------------------


def autoencoding_run(tmp_path: Path) -> Path:
    (tmp_path / "page.yaml").write_text(AUTOENCODING)
    config = load_training(tmp_path / "page.yaml")
    assert config.autoencoder is not None
    save(tmp_path / "run", AUTOENCODING, "autoencoder", randomise(build.build_autoencoder(config.autoencoder), 2))
    return tmp_path / "run"


def test_an_autoencoding_run_becomes_an_autoencoder(tmp_path):
    output = export(autoencoding_run(tmp_path), tmp_path / "vae")
    assert files_of(output) == {"config.json", "diffusion_pytorch_model.safetensors", "sdtrain.json"}
    facts = json.loads((output / "sdtrain.json").read_text())
    assert (facts["scaling_factor"], facts["ema"], facts["step"]) == (1.0, True, 4)
    loaded = load_autoencoder(str(output))
    assert loaded.encoder.conv_in.weight.std().item() == pytest.approx(0.1, rel=0.2)


def test_the_scale_of_the_train_split_is_stored_with_the_weights(tmp_path):
    manifest = shards(tmp_path / "images", field="jpg")
    output = export(autoencoding_run(tmp_path), tmp_path / "vae", scale_manifest=manifest)
    loaded = load_autoencoder(str(output))
    assert json.loads((output / "sdtrain.json").read_text())["scaling_factor"] == loaded.scaling_factor != 1.0
    images = [
        torch.from_numpy(record.fields["jpg"].copy())
        for record in read_fields(Manifest.load(manifest), "train", ["jpg"])
    ]
    with torch.no_grad():
        moments = loaded.encode(torch.stack(images).float() / 127.5 - 1)
    draws = torch.stack([loaded.posterior_sample(moments, torch.randn_like(moments[:, :4])) for _ in range(200)])
    assert loaded.scale(draws).std().item() == pytest.approx(1.0, rel=0.02)
    one_by_one = measure_scale(loaded, Manifest.load(manifest), batch_size=1)
    assert one_by_one == pytest.approx(loaded.scaling_factor, rel=1e-5)


def test_an_autoencoding_run_has_nothing_to_sample(tmp_path):
    with pytest.raises(
        ConfigError, match="a run of task autoencoding has no denoiser to sample from; give a latent_diff"
    ):
        from_checkpoint(autoencoding_run(tmp_path))


# --- refusals ---------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path):
    run = run_of(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match=r"there: exists; give a folder that does not, or remove it first"):
        export(run, tmp_path / "there")


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="dtype: found 'int8', allowed are fp32, fp16, bf16"):
        export(tmp_path, tmp_path / "out", dtype="int8")  # pyright: ignore[reportArgumentType]


def test_a_scale_is_for_autoencoders(tmp_path):
    with pytest.raises(ConfigError, match="scale_manifest: only an autoencoding run has latents to scale"):
        export(run_of(tmp_path), tmp_path / "out", scale_manifest=tmp_path / "m.json")


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    run = run_of(tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers, "save_tokenizer", fail)
    with pytest.raises(OSError, match="No space left"):
        export(run, tmp_path / "out" / "pipeline")
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_of_another_network_are_refused(tmp_path):
    text = page(tmp_path)
    save(tmp_path / "run", text, "denoiser", nn.ModuleDict({"denoiser": nn.Linear(2, 2)}))
    with pytest.raises(CheckpointError, match="the page in the checkpoint describes another network"):
        from_checkpoint(tmp_path / "run")


def test_a_network_that_diffusers_lacks_is_exported_with_a_warning(tmp_path, caplog):
    text = page(tmp_path).replace("mid_block: cross", "mid_block: cross, upsample: conv_transpose")
    (tmp_path / "page.yaml").write_text(text)
    config = load_training(tmp_path / "page.yaml")
    assert config.denoiser is not None and config.conditioner is not None
    trained = nn.ModuleDict(
        {"denoiser": build.build_denoiser(config.denoiser), "conditioner": build.build_conditioner(config.conditioner)}
    )
    save(tmp_path / "run", text, "denoiser", trained)
    with caplog.at_level(logging.WARNING):
        output = export(tmp_path / "run", tmp_path / "pipeline")
    assert "diffusers has no class for this denoiser" in caplog.text
    assert json.loads((output / "model_index.json").read_text())["unet"] == ["sdtrain", "UNet"]
    assert load_pipeline(output).latent_size == (8, 8)


# --- loading ----------------------------------------------------------------------------------------------------


def test_incomplete_pipelines_are_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"holds no model_index.json; give a folder that `sdtrain export` or diffusers"
    ):
        load_pipeline(tmp_path)
    output = export(run_of(tmp_path), tmp_path / "pipeline")
    (output / "scheduler").rename(output / "elsewhere")
    with pytest.raises(ConfigError, match=r"holds no scheduler/; the pipeline is not complete"):
        load_pipeline(output)
    (output / "unet").rename(output / "network")
    with pytest.raises(ConfigError, match=r"holds no unet/ or transformer/; the pipeline is not complete"):
        load_pipeline(output)


def test_a_pipeline_whose_denoiser_predicts_variances_is_refused(tmp_path):
    output = export(run_of(tmp_path, text=False), tmp_path / "pipeline")
    shape = {"in_channels": 4, "width": 16, "num_layers": 1, "num_heads": 2, "sample_size": 8}
    shutil.rmtree(output / "unet")
    save_denoiser(DiT(**shape, out_channels=4), output / "transformer")
    assert isinstance(load_pipeline(output).denoiser, DiT)
    save_denoiser(DiT(**shape, out_channels=8), output / "transformer")
    with pytest.raises(ConfigError) as error:
        load_pipeline(output)
    assert str(error.value) == (
        f"{output / 'transformer'}: predicts 8 channels, the autoencoder's latents have 4; networks that also predict "
        "variances, with twice as many, are not sampled"
    )


def test_a_pipeline_without_a_size_is_named(tmp_path):
    output = export(run_of(tmp_path), tmp_path / "pipeline")
    (output / "sdtrain.json").unlink()
    assert load_pipeline(output).latent_size == (8, 8)  # from unet/config.json, as diffusers' own folders have it
    assert load_pipeline(output).step is None
    config = json.loads((output / "unet" / "config.json").read_text())
    del config["sample_size"]
    (output / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config.json has no sample_size"):
        load_pipeline(output)


def test_a_tokenizer_that_pads_otherwise_is_refused(tmp_path):
    output = export(run_of(tmp_path), tmp_path / "pipeline")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = output / "tokenizer" / name
        if path.exists():
            path.write_text(re.sub(r'("pad_token": )"<\|endoftext\|>"', r'\1"!"', path.read_text()))
    with pytest.raises(ConfigError, match=r"tokenizer: pads with \d+; the conditioner's empty prompt pads with 49407"):
        load_pipeline(output)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"beta_schedule": "squaredcos_cap_v2"},
            "beta_schedule is 'squaredcos_cap_v2'; allowed are linear, scaled_linear",
        ),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}, "trained_betas are not those of the cosine schedule"),
        (None, "cannot be read"),
    ],
)
def test_schedulers_that_are_not_ours_are_refused(tmp_path, config, message):
    path = tmp_path / "scheduler_config.json"
    path.write_text("{" if config is None else json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        read_process(path)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_scheduler_config_is_the_process(tmp_path, zero_terminal_snr):
    process = DiffusionProcess(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=100,
        prediction_type="v_prediction",
        zero_terminal_snr=zero_terminal_snr,
    )
    config = scheduler_config(process)
    assert (config["steps_offset"], config["clip_sample"], config["set_alpha_to_one"]) == (1, False, False)
    assert config["timestep_spacing"] == ("trailing" if zero_terminal_snr else "leading")
    (tmp_path / "c.json").write_text(json.dumps(config))
    assert read_process(tmp_path / "c.json") == process


def test_a_flow_comes_back(tmp_path):
    run = run_of(tmp_path, process="{prediction_type: flow, shift: 3.0}")
    output = export(run, tmp_path / "pipeline")
    assert json.loads((output / "model_index.json").read_text())["scheduler"][1] == "FlowMatchEulerDiscreteScheduler"
    loaded = load_pipeline(output)
    assert (loaded.process.prediction_type, loaded.process.shift) == ("flow", 3.0)
    assert loaded.process == from_checkpoint(tmp_path / "run").process
