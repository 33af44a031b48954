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
denoiser: {{type: unet, arch: {{in_channels: 4, out_channels: 4, channels: [32, 64], down_blocks: {blocks},
  layers_per_block: 1, {heads}, context_dim: {context}, mid_block: {mid}, norm_groups: 8}}}}
conditioner: {conditioner}
process: {{beta_schedule: {schedule}, prediction_type: {prediction}, num_train_timesteps: 50}}
optimizer: {{learning_rate: 1.0e-3, lr_schedule: constant}}
trainer: {{max_steps: 4, precision: fp32}}
"""
TEXT = {
    "blocks": "[cross, plain]",
    "heads": "num_heads: 4",
    "context": 16,
    "mid": "cross",
    "conditioner": "{type: clip_text, trainable: true, arch: {hidden_size: 16, num_layers: 2, num_heads: 2}}",
}
NO_TEXT = {
    "blocks": "[self, plain]",
    "heads": "head_dim: 16",
    "context": "null",
    "mid": "self",
    "conditioner": "{type: none}",
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
    if arch is TEXT:
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
