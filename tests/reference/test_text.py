"""Our tokenizer and text conditioner against transformers, open_clip and a diffusers pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtrain.autoencoders import kl
from sdtrain.autoencoders.load import save_autoencoder
from sdtrain.conditioners.text import (
    ClipTextConditioner,
    build_tokenizer,
    load_clip_text,
    save_tokenizer,
    small_clip_text,
    tokenize,
)
from sdtrain.denoisers.load import save_denoiser
from sdtrain.denoisers.unet import UNet

CAPTIONS = ["a photo of a cat", "", "Isn't it 12 o'clock? Yes!", "a red handwritten seven on a blue background"]


def small(*, trainable: bool = False) -> ClipTextConditioner:
    return small_clip_text(hidden_size=32, layers=2, heads=4, max_length=77, seed=3, trainable=trainable)


def token_ids(captions: list[str]) -> torch.Tensor:
    return torch.from_numpy(tokenize(build_tokenizer(), captions).astype("int64"))


def test_large_clip_has_the_published_number_of_parameters() -> None:
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        conditioner = ClipTextConditioner(text_model=CLIPTextModel(config), trainable=False, max_length=77)
    assert sum(parameter.numel() for parameter in conditioner.parameters()) == 123_060_480
    assert conditioner.width == 768


def test_tokens_are_those_of_open_clip_up_to_the_padding() -> None:
    open_clip = pytest.importorskip("open_clip.tokenizer")
    theirs = torch.as_tensor(open_clip.SimpleTokenizer()(CAPTIONS))
    ours = token_ids(CAPTIONS)
    padding = theirs == 0
    assert torch.equal(ours[~padding], theirs[~padding])
    assert torch.equal(ours[padding], torch.full_like(ours[padding], 49407))


def test_transformers_opens_the_saved_encoder(tmp_path: Path) -> None:
    ours = small()
    ours.save_pretrained(tmp_path)
    theirs, report = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = token_ids(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(ours(ids).tokens, theirs(ids).last_hidden_state)


def test_the_text_half_of_a_published_clip_is_read(tmp_path: Path) -> None:
    """openai/clip-vit-large-patch14 holds both encoders and their projections in one file."""
    text = small().text_model.config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}))
    clip.save_pretrained(tmp_path)
    ids = token_ids(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(
            load_clip_text(str(tmp_path), trainable=False)(ids).tokens, clip.eval().text_model(ids).last_hidden_state
        )


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in diffusers' layout, all of it written by us."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    unet = UNet(
        in_channels=4,
        out_channels=4,
        channels=[32, 64],
        down_blocks=["cross", "plain"],
        layers_per_block=1,
        num_heads=4,
        context_dim=32,
        zero_init=False,
    )
    save_denoiser(unet, folder / "unet")
    save_autoencoder(kl.AutoencoderKL(**kl.PRESETS["tiny"]), folder / "vae")
    small().save_pretrained(folder / "text_encoder")
    save_tokenizer(build_tokenizer(), folder / "tokenizer")
    DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_diffusers_pipeline_opens_and_samples_what_we_saved(pipeline_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    assert isinstance(pipeline.unet, UNet2DConditionModel)
    assert isinstance(pipeline.vae, AutoencoderKL)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(CAPTIONS[0], num_inference_steps=2, height=16, width=16, output_type="np").images
    assert image.shape == (1, 16, 16, 3)


def test_a_diffusers_pipeline_reads_prompts_as_we_do(pipeline_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    prompt, empty = pipeline.encode_prompt(CAPTIONS[0], "cpu", 1, do_classifier_free_guidance=True)
    ours = load_clip_text(str(pipeline_folder), trainable=False)
    torch.testing.assert_close(ours(token_ids(CAPTIONS[:1])).tokens, prompt, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.null(1).tokens, empty, rtol=0, atol=1e-6)


def test_the_saved_tokenizer_reopens_with_its_length_and_padding(pipeline_folder: Path) -> None:
    reopened = CLIPTokenizer.from_pretrained(pipeline_folder / "tokenizer")
    assert reopened.model_max_length == 77
    assert reopened.pad_token_id == 49407
    assert (tokenize(reopened, CAPTIONS) == tokenize(build_tokenizer(), CAPTIONS)).all()
