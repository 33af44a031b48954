import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.checkpoints.pipelines import LoadedPipeline
from sdtrain.conditioners.none import NoConditioner
from sdtrain.conditioners.text import build_tokenizer, small_clip_text
from sdtrain.config.sampling import SamplingConfig
from sdtrain.denoisers.unet import UNet
from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.errors import CheckpointError, ConfigError
from sdtrain.evaluation import sampling
from sdtrain.evaluation.sampling import generate, load_for_sampling, sample, to_pixels

PROMPTS = ["a red seven", "a blue one", "", "a green handwritten nine on a yellow background", "a red seven"]
SEEDS = [3, 1, 4, 1, 5]


def tiny(*, text: bool = True) -> LoadedPipeline:
    """A small random system whose pictures do depend on the prompt."""
    torch.manual_seed(0)
    unet = UNet(
        in_channels=4,
        out_channels=4,
        channels=[16, 32],
        down_blocks=["cross", "plain"] if text else ["self", "plain"],
        layers_per_block=1,
        num_heads=2,
        head_dim=None,
        context_dim=16 if text else None,
        linear_projection=False,
        mid_block="cross" if text else "self",
        time_scale_shift="default",
        cross_attention_norm=None,
        norm_groups=8,
    )
    for parameter in unet.parameters():  # the output convolution begins with zeros
        parameter.data += 0.2 * torch.randn_like(parameter)
    autoencoder = AutoencoderKL(
        latent_channels=4,
        channels=[16, 32],
        layers_per_block=1,
        attention_in_middle=False,
        norm_groups=8,
        scaling_factor=0.5,
    )
    conditioner = small_clip_text(hidden_size=16, layers=1, heads=2, max_length=16, seed=0, trainable=False)
    process = DiffusionProcess(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        prediction_type="epsilon",
    )
    return LoadedPipeline(
        denoiser=unet.eval(),
        autoencoder=autoencoder.eval(),
        conditioner=conditioner.eval() if text else NoConditioner(),
        tokenizer=build_tokenizer(16) if text else None,
        process=process,
        latent_size=(8, 8),
        source="runs/tiny/checkpoints/step-00000004",
        step=4,
        is_ema=True,
    )


@pytest.fixture(scope="module")
def pipeline():
    return tiny()


def pictures(pipeline, prompts=PROMPTS, seeds=SEEDS, **settings) -> np.ndarray:
    settings = {"num_steps": 3, "guidance_scale": 2.0} | settings
    return generate(pipeline, prompts, seeds, **settings)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal but for the rounding of matrix products of another size: one grey level."""
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


# --- generate ---------------------------------------------------------------------------------------------------


def test_pictures_have_the_size_of_the_latents_and_differ(pipeline):
    pixels = pictures(pipeline)
    assert pixels.shape == (5, 16, 16, 3) and pixels.dtype == np.uint8
    assert len({picture.tobytes() for picture in pixels}) == 5


@pytest.mark.parametrize("settings", [{}, {"eta": 0.7}, {"sampler": "ddpm"}, {"guidance_scale": 1.0}])
def test_a_picture_depends_on_its_own_prompt_and_seed_alone(pipeline, settings):
    together = pictures(pipeline, **settings)
    assert_same(pictures(pipeline, batch_size=2, **settings), together)
    assert_same(pictures(pipeline, PROMPTS[::-1], SEEDS[::-1], **settings)[::-1], together)
    for i in (0, 3):
        assert_same(pictures(pipeline, [PROMPTS[i]], [SEEDS[i]], **settings)[0], together[i])


def test_seed_prompt_and_guidance_each_matter(pipeline):
    first = pictures(pipeline, ["a red seven"], [3])
    for prompts, seeds, settings in (
        (["a red seven"], [4], {}),
        (["a blue one"], [3], {}),
        (["a red seven"], [3], {"guidance_scale": 5.0}),
        (["a red seven"], [3], {"eta": 1.0}),
    ):
        other = pictures(pipeline, prompts, seeds, **settings)
        assert np.abs(other.astype(int) - first.astype(int)).max() > 1, (prompts, seeds, settings)


def test_the_same_call_gives_the_same_bytes(pipeline):
    assert pictures(pipeline).tobytes() == pictures(pipeline).tobytes()


def test_the_global_random_state_is_not_used(pipeline):
    torch.manual_seed(1)
    first, after = pictures(pipeline, eta=1.0), torch.get_rng_state()
    torch.manual_seed(2)
    assert pictures(pipeline, eta=1.0).tobytes() == first.tobytes()
    torch.manual_seed(1)
    assert torch.equal(after, torch.get_rng_state())


def test_progress_counts_pictures(pipeline):
    counted = []
    pictures(pipeline, batch_size=2, callback=counted.append)
    assert counted == [2, 2, 1]


def test_an_unconditional_system_takes_empty_prompts_only():
    pipeline = tiny(text=False)
    assert pictures(pipeline, ["", ""], [1, 2]).shape == (2, 16, 16, 3)
    with pytest.raises(
        ConfigError, match="runs/tiny/checkpoints/step-00000004: an unconditional system takes no prompts"
    ):
        pictures(pipeline, ["a dog"], [1])


@pytest.mark.parametrize(("prompts", "seeds", "batch_size"), [(["a"], [1, 2], 8), ([], [], 8), (["a"], [1], 0)])
def test_counts_that_do_not_fit_are_refused(pipeline, prompts, seeds, batch_size):
    with pytest.raises(ConfigError, match=r"found \d prompts, \d seeds and batch_size \d; needed is one seed for each"):
        generate(pipeline, prompts, seeds, batch_size=batch_size)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler"])
def test_more_steps_than_the_system_has_are_refused_before_anything_is_drawn(pipeline, sampler):
    total = pipeline.process.num_train_timesteps
    drawn = []
    with pytest.raises(ConfigError) as raised:
        pictures(pipeline, sampler=sampler, num_steps=total, callback=drawn.append)
    assert str(raised.value) == (
        f"num_steps = {total}: must be <= {total - 1} for {pipeline.source}, which has {total} timesteps, and whose "
        "last one is not pure noise: sampling then leaves out timestep 0. Lower it."
    )
    assert drawn == []


def test_pixels_are_rounded_and_capped():
    images = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 7.0]).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    assert to_pixels(images)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert to_pixels(images).shape == (6, 2, 2, 3)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path, pipeline, monkeypatch):
    monkeypatch.setattr(sampling, "load_for_sampling", lambda path: pipeline)
    return SamplingConfig(
        schema_version=1,
        kind="sampling",
        run=tmp_path,
        prompts=("a red seven", "a \u202ebidi\u202c caption"),
        num_steps=2,
        guidance_scale=2.0,
        seed=10,
        images_per_prompt=2,
        batch_size=3,
        output=tmp_path / "out",
    )


def test_a_folder_of_samples_says_how_it_was_made(page, pipeline):
    output = sample(page)
    facts = json.loads((output / "samples.json").read_text())
    assert [(item["file"], item["seed"]) for item in facts["items"]] == [(f"0000{i}.png", 10 + i) for i in range(4)]
    assert [item["prompt"] for item in facts["items"]] == [page.prompts[0]] * 2 + [page.prompts[1]] * 2
    assert facts["weights_sha256"] == pipeline.weights_sha256()
    wanted = {
        "n": 4,
        "seed": 10,
        "sampler": "ddim",
        "num_steps": 2,
        "guidance_scale": 2.0,
        "eta": 0.0,
        "step": 4,
        "ema": True,
    }
    assert {name: facts[name] for name in wanted} == wanted
    written = np.stack([np.asarray(Image.open(output / item["file"])) for item in facts["items"]])
    expected = generate(
        pipeline, [item["prompt"] for item in facts["items"]], [10, 11, 12, 13],
        num_steps=2, guidance_scale=2.0, batch_size=3,
    )  # fmt: skip
    assert (written == expected).all()
    with Image.open(output / "grid.png") as grid:
        assert grid.width > 4 * 16


def test_pictures_of_an_earlier_sampling_do_not_stay(page):
    page.output.mkdir()
    (page.output / "00099.png").write_bytes(b"old")
    (page.output / "notes.txt").write_text("mine")
    sample(page)
    assert not (page.output / "00099.png").exists()
    assert (page.output / "notes.txt").read_text() == "mine"


def test_the_digest_is_of_the_weights():
    first, second = tiny(), tiny()
    assert first.weights_sha256() == second.weights_sha256()
    with torch.no_grad():
        next(second.conditioner.parameters()).view(-1)[0] += 1e-3
    assert first.weights_sha256() != second.weights_sha256()


def test_folders_that_hold_nothing_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none: no such folder; give a run, a checkpoint or an exported pipeline"):
        load_for_sampling(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_for_sampling(tmp_path)


def test_sampling_needs_neither_deepspeed_nor_ray_nor_wandb():
    names = "{'deepspeed', 'ray', 'wandb', 'diffusers'}"
    code = f"import sdtrain.evaluation.sampling, sys; sys.exit(bool({names} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
