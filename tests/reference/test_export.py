"""What we export is what diffusers opens: the same pictures from the same noise, without a network."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sdtrain import build
from sdtrain.checkpoints.manifest import rank_file
from sdtrain.checkpoints.pipelines import from_checkpoint, load_pipeline
from sdtrain.checkpoints.protocol import commit
from sdtrain.checkpoints.recut import Layout, spans, tensor_name
from sdtrain.config.load import load_training
from sdtrain.evaluation.sampling import generate
from sdtrain.export.diffusers import export
from sdtrain.samplers.guidance import seeded_noise

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PAGE = """\
schema_version: 1
kind: training
name: tiny
task: {{type: latent_diffusion}}
data: {{manifest: none.json, batch_size: 8, micro_batch_size: 4}}
autoencoder: {{type: kl, scaling_factor: 0.5, arch: {{latent_channels: 4, channels: [16, 32], layers_per_block: 1,
  attention_in_middle: false, norm_groups: 8}}}}
denoiser: {denoiser}
conditioner: {conditioner}
process: {{beta_schedule: {schedule}, prediction_type: {prediction}, num_train_timesteps: 50}}
optimizer: {{learning_rate: 1.0e-3, lr_schedule: constant}}
trainer: {{max_steps: 4, precision: fp32}}
"""
UNET = "{type: unet, arch: {in_channels: 4, out_channels: 4, channels: [32, 64], layers_per_block: 1, norm_groups: 8, "
DIT = "{type: dit, arch: {in_channels: 4, out_channels: 4, width: 32, num_layers: 3, num_heads: 2, sample_size: 8, "
CLIP = "{type: clip_text, trainable: true, arch: {hidden_size: 16, num_layers: 2, num_heads: 2}}"
NO_CLIP = "{type: none}"
TEXT = {
    "denoiser": UNET + "down_blocks: [cross, plain], num_heads: 4, context_dim: 16, mid_block: cross}}",
    "conditioner": CLIP,
}
NO_TEXT = {
    "denoiser": UNET + "down_blocks: [self, plain], head_dim: 16, context_dim: null, mid_block: self}}",
    "conditioner": NO_CLIP,
}
SEEDS = [3, 4]
PROMPTS = ["a red handwritten seven on a blue background", "ein  Hündchen, 2 cats!"]


def run_of(tmp_path: Path, *, prediction: str, schedule: str = "scaled_linear", arch=TEXT) -> Path:
    """A run with one checkpoint of random weights that no initialisation gives."""
    text = PAGE.format(prediction=prediction, schedule=schedule, **arch)
    (tmp_path / "page.yaml").write_text(text)
    config = load_training(tmp_path / "page.yaml")
    assert config.denoiser is not None and config.conditioner is not None
    trained = nn.ModuleDict({"denoiser": build.build_denoiser(config.denoiser)})
    if arch["conditioner"] == CLIP:
        trained["conditioner"] = build.build_conditioner(config.conditioner)
    torch.manual_seed(0)
    flat = torch.cat([(p.detach() + 0.05 * torch.randn_like(p)).flatten() for p in trained.parameters()])
    layout = Layout.of([{name: parameter.shape for name, parameter in trained.named_parameters()}])
    path = commit(
        tmp_path / "run" / "checkpoints",
        step=4,
        attempt="a",
        files={rank_file("denoiser", 0): {tensor_name(0, kind): flat for kind in ("master", "ema")}},
        facts={"layouts": {"denoiser": layout.to_json()}, "spans": {"denoiser": spans(layout, [len(flat)], 1)}},
        texts={"config.yaml": text},
    )
    assert path is not None
    return tmp_path / "run"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    ("prediction", "schedule"), [("epsilon", "scaled_linear"), ("v_prediction", "linear"), ("sample", "cosine")]
)
def test_diffusers_draws_the_same_pictures(tmp_path, no_network, prediction, schedule):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    run = run_of(tmp_path, prediction=prediction, schedule=schedule)
    theirs = StableDiffusionPipeline.from_pretrained(export(run, tmp_path / "pipeline", latent_size=(8, 8)))
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(theirs.scheduler, DDIMScheduler)
    noise = seeded_noise(SEEDS, (4, 8, 8), 0)
    with torch.no_grad():
        expected = theirs(PROMPTS, num_inference_steps=5, guidance_scale=3.0, latents=noise, output_type="np").images
    ours = generate(from_checkpoint(run, latent_size=(8, 8)), PROMPTS, SEEDS, num_steps=5, guidance_scale=3.0)
    assert ours.shape == (2, 16, 16, 3)
    assert ours.std() > 20  # pictures, not a flat colour that anything would equal
    np.testing.assert_allclose(ours / 255.0, expected, atol=1.5 / 255)


def test_diffusers_encodes_the_same_prompts(tmp_path, no_network):
    from diffusers import StableDiffusionPipeline

    run = run_of(tmp_path, prediction="epsilon")
    theirs = StableDiffusionPipeline.from_pretrained(export(run, tmp_path / "pipeline", latent_size=(8, 8)))
    with torch.no_grad():
        wanted, null = theirs.encode_prompt(PROMPTS, "cpu", 1, True)
        ours = from_checkpoint(run, latent_size=(8, 8))
        tokens = theirs.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")["input_ids"]
        torch.testing.assert_close(ours.conditioner(tokens).tokens, wanted)
        torch.testing.assert_close(ours.conditioner.null(2).tokens, null)


def test_diffusers_opens_an_unconditional_pipeline(tmp_path, no_network):
    from diffusers import LDMPipeline

    run = run_of(tmp_path, prediction="epsilon", arch=NO_TEXT)
    theirs = LDMPipeline.from_pretrained(export(run, tmp_path / "pipeline", latent_size=(8, 8)))
    ours = from_checkpoint(run, latent_size=(8, 8))
    noised, timesteps = seeded_noise(SEEDS, (4, 8, 8), 0), torch.tensor([1, 900])
    with torch.no_grad():
        expected = theirs.unet(noised, timesteps).sample
        torch.testing.assert_close(
            ours.denoiser(noised, timesteps, ours.conditioner.null(2)), expected, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            ours.autoencoder.decode(noised), theirs.vqvae.decode(noised).sample, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ("num_classes: null", 0),  # a class of zeros, which the class of diffusers must have
        ("num_classes: 7, dropout: 0.1", 7),  # one more than the last: none of them
        ("num_classes: 7, shared_embedding: false", 7),
    ],
)
def test_diffusers_draws_a_dit_s_pictures(tmp_path, no_network, monkeypatch, settings, label):
    from diffusers import DiTPipeline, DiTTransformer2DModel
    from diffusers.pipelines.dit import pipeline_dit

    run = run_of(tmp_path, prediction="v_prediction", arch={"denoiser": f"{DIT}{settings}}}}}", "conditioner": NO_CLIP})
    folder = export(run, tmp_path / "pipeline", latent_size=(8, 8))
    alone, report = DiTTransformer2DModel.from_pretrained(folder / "transformer", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, labels = from_checkpoint(run, latent_size=(8, 8)), torch.tensor([label] * 2)
    noised, timesteps = seeded_noise(SEEDS, (4, 8, 8), 0), torch.tensor([1, 40])
    with torch.no_grad():
        predicted = ours.denoiser(noised, timesteps, ours.conditioner.null(2))
        torch.testing.assert_close(alone(noised, timesteps, labels).sample, predicted, atol=1e-5, rtol=1e-4)
    theirs = DiTPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda shape, **_: noised.reshape(shape))
    expected = theirs(labels.tolist(), guidance_scale=1.0, num_inference_steps=5, output_type="np").images
    drawn = generate(ours, ["", ""], SEEDS, num_steps=5, guidance_scale=1.0)
    assert drawn.std() > 20
    np.testing.assert_allclose(drawn / 255.0, expected, atol=1.5 / 255)
    again = load_pipeline(folder)
    assert again.weights_sha256() == ours.weights_sha256()
    assert (again.denoiser.arch, again.latent_size) == (ours.denoiser.arch, (8, 8))


def test_a_dit_with_text_is_for_sdtrain_alone(tmp_path, no_network, caplog):
    from diffusers import DiffusionPipeline, DiTTransformer2DModel

    run = run_of(tmp_path, prediction="epsilon", arch={"denoiser": DIT + "context_dim: 16}}", "conditioner": CLIP})
    folder = export(run, tmp_path / "pipeline", latent_size=(8, 8))
    assert "diffusers has no class for this denoiser; sdtrain alone can open" in caplog.text
    with pytest.raises(AttributeError, match=r"diffusers has no attribute sdtrain.LoadedPipeline"):
        DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="expected shape"):
        DiTTransformer2DModel.from_pretrained(folder / "transformer")
    settings = {"num_steps": 5, "guidance_scale": 3.0}
    expected = generate(from_checkpoint(run, latent_size=(8, 8)), PROMPTS, SEEDS, **settings)
    assert expected.std() > 20
    np.testing.assert_array_equal(generate(load_pipeline(folder), PROMPTS, SEEDS, **settings), expected)


def test_a_pipeline_that_diffusers_wrote_is_opened(tmp_path, no_network):
    from diffusers import StableDiffusionPipeline

    folder = export(run_of(tmp_path, prediction="epsilon"), tmp_path / "ours", latent_size=(8, 8))
    StableDiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "sdtrain.json").exists()
    first, second = load_pipeline(folder), load_pipeline(tmp_path / "theirs")
    assert first.weights_sha256() == second.weights_sha256()
    assert (second.latent_size, second.process, second.step) == ((8, 8), first.process, None)
    assert json.loads((tmp_path / "theirs" / "unet" / "config.json").read_text())["sample_size"] == 8


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_diffusers_opens_half_precision(tmp_path, no_network, dtype):
    from diffusers import StableDiffusionPipeline

    folder = export(run_of(tmp_path, prediction="epsilon"), tmp_path / "pipeline", latent_size=(8, 8), dtype=dtype)
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    theirs = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=wanted)
    ours = load_pipeline(folder).denoiser.state_dict()
    assert theirs.unet.dtype == wanted
    assert all(torch.equal(ours[name], tensor.float()) for name, tensor in theirs.unet.state_dict().items())
