"""Rules between sections: what no single section can know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdtrain.config.load import load_config, load_sampling, load_training
from sdtrain.config.process import ProcessConfig
from sdtrain.config.run import allowed_world_sizes, grad_accum_steps, steps_fit_the_process
from sdtrain.config.samples import SamplesConfig
from sdtrain.errors import ConfigError, ExitCode

TRAINING = """\
schema_version: 1
task: {type: latent_diffusion}
data: {manifest: m.json, batch_size: 12, micro_batch_size: 2}
autoencoder:
  type: kl
  arch: {latent_channels: 4, channels: [16, 32], norm_groups: 8}
denoiser:
  type: unet
  arch:
    {in_channels: 4, out_channels: 4, channels: [32, 64], down_blocks: [cross, plain], num_heads: 4, context_dim: 32,
     norm_groups: 8}
conditioner: {type: clip_text, arch: {hidden_size: 32, num_layers: 1, num_heads: 4}}
process: {beta_schedule: linear, beta_start: 1e-4, beta_end: 0.02, prediction_type: epsilon}
optimizer: {learning_rate: 1e-3, lr_schedule: constant}
trainer: {max_steps: 4, precision: fp32}
"""
INGESTION = """\
schema_version: 1
kind: ingestion
output: data/x
source: {type: laion, metadata: metadata}
"""
DIT = (
    "denoiser={type: dit, arch: {in_channels: 4, out_channels: 4, width: 32, num_layers: 1, num_heads: 2, "
    "sample_size: 8, context_dim: 32}}"
)
SAMPLING = """\
schema_version: 1
kind: sampling
run: runs/x
output: out
"""

CUDA_GRAPHS = (
    "records CUDA graphs, which overwrite each other's outputs where blocks are compiled one by one "
    "(pytorch issue 152887)"
)


def page(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["data.micro_batch_size=5"],
            "data.micro_batch_size = 5 (command line): must divide data.batch_size = 12; allowed are 1, 2, 3, 4, 6, 12",
        ),
        (
            ["trainer.compile=true", "trainer.compile_mode=reduce-overhead", "data.micro_batch_size=12"],
            f'trainer.compile_mode = "reduce-overhead" (command line): {CUDA_GRAPHS}; '
            "allowed are default and max-autotune-no-cudagraphs",
        ),
        (
            ["trainer.compile=true", "trainer.compile_mode=max-autotune", "trainer.gradient_checkpointing=blocks"],
            f'trainer.compile_mode = "max-autotune" (command line): {CUDA_GRAPHS}, overwrite gradients that are added '
            "up over micro-steps or wait for their reduction (issues 96693, 169545), fail when gradient_checkpointing "
            "runs them twice (issue 154306); allowed are default and max-autotune-no-cudagraphs",
        ),
        (
            ["data.manifest=s3://bucket/m.json"],
            "data.cache_dir (line 3): is missing; shards of object storage are read through a folder on the node's own "
            "disk, for example cache_dir: /scratch/sdtrain",
        ),
        *(
            (
                [f"data.manifest={scheme}://host/m.json", "data.cache_dir=/scratch"],
                f'data.manifest = "{scheme}://host/m.json" (command line): must be a file or object storage (s3://, '
                f"gs://, az://, ...), not {scheme}://: a web server's answers and redirects are not trusted with "
                "training data; copy the data set, or mount it",
            )
            for scheme in ("http", "https", "ftp", "simplecache::s3")
        ),
        (
            ["trainer.max_epochs=1"],
            "trainer (line 15): give exactly one of max_steps and max_epochs, and set the other to null",
        ),
        (
            ["trainer.timeout_seconds=30", "trainer.hang_timeout_seconds=31"],
            "trainer.hang_timeout_seconds = 31 (command line): must be <= trainer.timeout_seconds = 30",
        ),
        (
            ["trainer.max_steps=null"],
            "trainer (line 15): give exactly one of max_steps and max_epochs, and set the other to null",
        ),
        (
            ["optimizer.warmup_steps=4"],
            "optimizer.warmup_steps = 4 (command line): must be < trainer.max_steps = 4",
        ),
        (
            ["optimizer.warmup_steps=1", "optimizer.warmup_start_lr=0.01"],
            "optimizer.warmup_start_lr = 0.01 (command line): must be <= optimizer.learning_rate = 0.001",
        ),
        (
            ["conditioner=null"],
            "conditioner = null (command line): is missing; task.type = latent_diffusion needs it, "
            "for example conditioner: {type: none}",
        ),
        (
            ["process=null"],
            "process = null (command line): is missing; task.type = latent_diffusion needs it, "
            "for example process: {beta_schedule: scaled_linear, prediction_type: epsilon}",
        ),
        (
            ["denoiser=null"],
            "denoiser = null (command line): is missing; task.type = latent_diffusion needs it, "
            "for example denoiser: {type: unet, preset: sd15}",
        ),
        (
            ["autoencoder.weights=some/vae"],
            "autoencoder (line 4): give exactly one of weights, preset, arch; found weights and arch",
        ),
        (
            ["autoencoder.arch=null"],
            "autoencoder (line 4): give exactly one of weights, preset, arch; found none",
        ),
        (
            ["denoiser.preset=unet_r3"],
            "denoiser (line 7): give exactly one of weights, preset, arch; found preset and arch",
        ),
        (
            ["conditioner.weights=some/clip"],
            "conditioner (line 12): give exactly one of weights, arch; found weights and arch",
        ),
        (
            ["autoencoder.arch.norm_groups=16", "autoencoder.arch.channels=[16, 24, 40]"],
            "autoencoder.arch.norm_groups = 16 (command line): "
            "must divide every width in autoencoder.arch.channels, not so 24, 40",
        ),
        (
            ["denoiser.arch.norm_groups=5"],
            "denoiser.arch.norm_groups = 5 (command line): "
            "must divide every width in denoiser.arch.channels, not so 32, 64",
        ),
        (
            ["denoiser.arch.down_blocks=[cross]"],
            'denoiser.arch.down_blocks = ["cross"] (command line): '
            "must name one block per width in denoiser.arch.channels, 2 in all",
        ),
        (
            ["denoiser.arch.head_dim=8"],
            "denoiser.arch (line 9): give exactly one of num_heads and head_dim",
        ),
        (
            ["denoiser.arch.num_heads=null"],
            "denoiser.arch (line 9): give exactly one of num_heads and head_dim",
        ),
        (
            ["denoiser.arch.num_heads=3"],
            "denoiser.arch.num_heads = 3 (command line): must divide the width of every attending block, not so 32, 64",
        ),
        (
            ["denoiser.arch.context_dim=null"],
            "denoiser.arch.context_dim = null (command line): is missing; "
            "cross-attention needs the width of the conditioning tokens",
        ),
        (
            ["conditioner.arch.num_heads=5"],
            "conditioner.arch.num_heads = 5 (command line): must divide conditioner.arch.hidden_size = 32",
        ),
        (
            ["conditioner.arch.hidden_size=64"],
            "conditioner.arch.hidden_size = 64 (command line): must be 32, the width that the denoiser attends to",
        ),
        (
            ["denoiser={type: unet, preset: sd15}"],
            "conditioner.arch.hidden_size = 32 (line 12): must be 768, the width that the denoiser attends to",
        ),
        (
            ["denoiser={type: dit, preset: dit_s_2}"],
            "denoiser.context_dim (command line): is missing; conditioner.type = clip_text gives tokens: write 32",
        ),
        (
            ["denoiser={type: dit, preset: dit_s_2}", "conditioner={type: clip_text, weights: some/clip}"],
            "denoiser.context_dim (command line): is missing; conditioner.type = clip_text gives tokens: write their "
            "width",
        ),
        (
            ["denoiser={type: dit, preset: dit_s_2, context_dim: 31}"],
            "conditioner.arch.hidden_size = 32 (line 12): must be 31, the width that the denoiser attends to",
        ),
        (
            ["denoiser={type: dit, preset: dit_s_2, context_dim: 32}", "conditioner={type: none}"],
            "denoiser.context_dim = 32 (command line): must be left out: conditioner.type = none gives no tokens",
        ),
        (
            ["denoiser={type: dit, weights: some/dit, sample_size: 8}"],
            "denoiser.sample_size = 8 (command line): is for denoiser.preset, which is null here; weights bring their "
            "own",
        ),
        (
            [DIT, "denoiser.context_dim=32"],
            "denoiser.context_dim = 32 (command line): is for denoiser.preset, which is null here; write "
            "denoiser.arch.context_dim",
        ),
        (
            [DIT, "denoiser.preset=dit_s_2"],
            "denoiser (command line): give exactly one of weights, preset, arch; found preset and arch",
        ),
        (
            [DIT, "denoiser.arch.context_dim=null"],
            "denoiser.arch.context_dim = null (command line): is missing; conditioner.type = clip_text gives tokens: "
            "write 32",
        ),
        (
            [DIT, "denoiser.arch.num_heads=3"],
            "denoiser.arch.num_heads = 3 (command line): must divide denoiser.arch.width = 32",
        ),
        (
            [DIT, "denoiser.arch.width=34"],
            "denoiser.arch.width = 34 (command line): must be a multiple of 4: sines and cosines of two coordinates",
        ),
        (
            [DIT, "denoiser.arch.patch_size=3"],
            "denoiser.arch.patch_size = 3 (command line): must divide denoiser.arch.sample_size = 8",
        ),
        (
            [DIT, "denoiser.arch.sinusoid_width=9"],
            "denoiser.arch.sinusoid_width = 9 (command line): must be even: half of it are cosines, half are sines",
        ),
        (
            [DIT, "denoiser.arch.out_channels=8"],
            "denoiser.arch.out_channels = 8 (command line): must be autoencoder.arch.latent_channels = 4",
        ),
        (
            ["denoiser.arch.in_channels=3"],
            "denoiser.arch.in_channels = 3 (command line): must be autoencoder.arch.latent_channels = 4",
        ),
        (
            ["denoiser.arch.out_channels=8"],
            "denoiser.arch.out_channels = 8 (command line): must be autoencoder.arch.latent_channels = 4",
        ),
        (["process.beta_start=0.5"], "process.beta_start = 0.5 (command line): must be < process.beta_end = 0.02"),
        (
            ["process.num_train_timesteps=8", "samples={every_steps: 1, prompts: [a], num_steps: 9}"],
            "samples.num_steps = 9 (command line): must be < process.num_train_timesteps = 8: sampling leaves out "
            "timestep 0 where the last one is not pure noise",
        ),
        (
            ["samples={every_steps: 1, prompts: [a], num_steps: 1000}"],
            "samples.num_steps = 1000 (command line): must be < process.num_train_timesteps = 1000: sampling leaves "
            "out timestep 0 where the last one is not pure noise",
        ),
        (
            [
                "process={prediction_type: flow, num_train_timesteps: 8}",
                "samples={every_steps: 1, prompts: [a], num_steps: 9}",
            ],
            "samples.num_steps = 9 (command line): must be <= process.num_train_timesteps = 8",
        ),
        (
            ["process.num_train_timesteps=8", "validation={every_steps: 1, num_samples: 1, batch_size: 1}"],
            "validation.timestep_bins (command line): must be <= process.num_train_timesteps = 8",
        ),
        (
            ["checkpoint={every_steps: 4, keep_every_steps: 6}"],
            "checkpoint.keep_every_steps = 6 (command line): must be a multiple of checkpoint.every_steps = 4",
        ),
        (
            ["checkpoint.upload_to=/mnt/backup"],
            'checkpoint.upload_to = "/mnt/backup" (command line): must be a URL, such as s3://bucket/runs/sd15 or '
            "file:///mnt/backup/sd15",
        ),
        (
            ["checkpoint={keep_best: 2}"],
            "checkpoint.keep_best = 2 (command line): needs a section validation, which measures validation/loss",
        ),
        (
            [
                "checkpoint={keep_best: 2, every_steps: 6}",
                "validation={every_steps: 4, num_samples: 1, batch_size: 1}",
            ],
            "checkpoint.keep_best = 2 (command line): needs validation at the steps of checkpoints: of "
            "checkpoint.every_steps = 6 and validation.every_steps = 4 one must be a multiple of the other",
        ),
    ],
)
def test_training_rules(tmp_path: Path, overrides: list[str], line: str) -> None:
    path = page(tmp_path, TRAINING)
    load_training(path)
    with pytest.raises(ConfigError) as caught:
        load_training(path, overrides)
    assert str(caught.value).splitlines()[1:-1] == [f"  {line}"]


def test_what_the_rules_leave_alone(tmp_path: Path) -> None:
    path = page(tmp_path, TRAINING)
    load_training(path, ["process.beta_schedule=cosine", "process.beta_start=0.5"])
    load_training(path, ["denoiser={type: unet, weights: some/unet}", "conditioner.arch.hidden_size=64"])
    load_training(path, ["denoiser={type: dit, weights: some/dit}", "conditioner.arch.hidden_size=64"])
    load_training(path, ["denoiser={type: dit, preset: dit_s_2}", "conditioner={type: none}"])
    load_training(path, [DIT])
    load_training(path, ["trainer.compile=true", "trainer.compile_mode=max-autotune-no-cudagraphs"])
    load_training(path, ["trainer.compile=false", "trainer.compile_mode=reduce-overhead"])
    autoencoding = ["task={type: autoencoding}", "denoiser=null", "conditioner=null", "process=null"]
    assert load_training(path, autoencoding).denoiser is None


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["filter.min_aspect_ratio=3"],
            "filter.min_aspect_ratio = 3 (command line): must be <= filter.max_aspect_ratio = 2, else no row is left",
        ),
        (
            ["filter.max_caption_chars=10"],
            "filter.min_caption_chars (command line): must be <= filter.max_caption_chars = 10, else no row is left",
        ),
        (
            ["filter.min_width=256"],
            "filter.min_width = 256 (command line): must be >= download.image_size = 512; "
            "raise it, or set download.only_if_bigger=false",
        ),
        (
            ["download.total_timeout_seconds=5"],
            "download.total_timeout_seconds = 5 (command line): must be >= download.timeout_seconds = 10",
        ),
        (
            ["download.bucket_shapes=[[64, 64]]"],
            "download.bucket_shapes = [[64, 64]] (command line): needs download.resize_mode=buckets, not center_crop",
        ),
        (
            ["download.allowed_ports=[80, 70000]"],
            "download.allowed_ports.1 = 70000 (command line): must be <= 65535",
        ),
        (["encode={}"], "encode.autoencoder (command line): is missing: A folder in diffusers' layout or a hub name."),
        (
            ["scores={weights: w.safetensors, min_aesthetic: 5.5}"],
            "scores.min_aesthetic = 5.5 (command line): needs scores.aesthetic_head, the file of the predictor; "
            "give it, or null",
        ),
        (
            ["content_dedup={radius: 11}"],
            "content_dedup.radius = 11 (command line): must be <= 10",
        ),
        (
            ["source.type=loain"],
            'source.type = "loain" (command line): must be one of laion, digits, shards; did you mean laion?',
        ),
    ],
)
def test_ingestion_rules(tmp_path: Path, overrides: list[str], line: str) -> None:
    path = page(tmp_path, INGESTION)
    load_config(path)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(caught.value).splitlines()[1:-1] == [f"  {line}"]


def test_smaller_pictures_may_be_enlarged(tmp_path: Path) -> None:
    path = page(tmp_path, INGESTION)
    load_config(path, ["filter.min_width=null", "filter.min_height=null"])
    load_config(path, ["filter.min_width=1", "filter.min_height=1", "download.only_if_bigger=false"])
    load_config(path, ["filter.min_width=1", "filter.min_height=1", "download.resize_mode=border"])


@pytest.mark.parametrize("overrides", [[], ["prompts=[a]", "prompts_file=p.txt"]])
def test_prompts_have_one_source(tmp_path: Path, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"prompts.*: give exactly one of prompts \(a list\) and prompts_file \(one"):
        load_sampling(page(tmp_path, SAMPLING), overrides)


def test_prompts_from_page_or_file(tmp_path: Path) -> None:
    path = page(tmp_path, SAMPLING)
    file = tmp_path / "prompts.txt"
    assert load_sampling(path, ["prompts=[a, b]"]).all_prompts() == ("a", "b")
    config = load_sampling(path, [f"prompts_file={file}"])
    with pytest.raises(ConfigError, match=r"prompts_file = .*prompts.txt cannot be read as text: .*No such file"):
        config.all_prompts()
    file.write_text(" \n\n")
    with pytest.raises(ConfigError, match=r"prompts_file = .*prompts.txt holds no prompt; write one per line"):
        config.all_prompts()
    file.write_text("a cat \n\n a dog\n")
    assert config.all_prompts() == ("a cat", "a dog")


# World sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "steps"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_accumulation_follows_from_the_ranks(tmp_path: Path, ranks: int, steps: int) -> None:
    config = load_training(page(tmp_path, TRAINING))
    assert grad_accum_steps(config, ranks) == steps
    assert config.data.batch_size == config.data.micro_batch_size * steps * ranks


def test_impossible_ranks_name_the_allowed_ones(tmp_path: Path) -> None:
    config = load_training(page(tmp_path, TRAINING))
    with pytest.raises(ConfigError) as caught:
        grad_accum_steps(config, 5)
    assert str(caught.value) == (
        "data.batch_size = 12 does not split into micro-batches of data.micro_batch_size = 2 on 5 ranks; "
        "with these sizes the number of ranks may be 1, 2, 3, 6"
    )
    assert caught.value.exit_code == ExitCode.CONFIG


def test_possible_ranks_with_another_micro_batch_name_it(tmp_path: Path) -> None:
    config = load_training(page(tmp_path, TRAINING), ["data.micro_batch_size=6"])
    with pytest.raises(ConfigError) as caught:
        grad_accum_steps(config, 4)
    assert str(caught.value) == (
        "data.batch_size = 12 does not split into micro-batches of data.micro_batch_size = 6 on 4 ranks; "
        "with these sizes the number of ranks may be 1, 2; on 4 ranks data.micro_batch_size may be 1, 3"
    )


def test_allowed_world_sizes_are_the_divisors() -> None:
    assert allowed_world_sizes(12) == (1, 2, 3, 4, 6, 12)
    assert allowed_world_sizes(512, 32) == (1, 2, 4, 8, 16)
    assert allowed_world_sizes(7, 7) == (1,)


@pytest.mark.parametrize(
    "process",
    [
        {"prediction_type": "epsilon", "beta_schedule": "scaled_linear"},
        {"prediction_type": "v_prediction", "beta_schedule": "linear", "zero_terminal_snr": True},
        {"prediction_type": "flow"},
    ],
    ids=str,
)
@pytest.mark.parametrize("total", [2, 5, 8])
def test_the_rule_allows_the_steps_that_samplers_take(process: dict[str, Any], total: int) -> None:
    from sdtrain.build import build_process
    from sdtrain.samplers.settings import SamplerSettings
    from sdtrain.samplers.steps import sampling_timesteps, spacing_of

    section = ProcessConfig(**process, num_train_timesteps=total)
    spacing = spacing_of(build_process(section))
    for num_steps in range(1, total + 3):
        samples = SamplesConfig(every_steps=1, prompts=("a",), num_steps=num_steps)
        allowed = not list(steps_fit_the_process(samples, section))
        try:
            sampling_timesteps(num_steps, total, spacing=spacing, steps_offset=SamplerSettings().steps_offset)
        except ConfigError:
            assert not allowed, num_steps
        else:
            assert allowed, num_steps
