"""Pictures from trained weights: a function for programs, and `sdtrain sample` for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sdtrain import __version__, distributed
from sdtrain.checkpoints.pipelines import LoadedPipeline, encode_prompts, from_checkpoint, is_pipeline, load_pipeline
from sdtrain.config.sampling import SamplingConfig
from sdtrain.errors import ConfigError
from sdtrain.evaluation.grids import make_grid
from sdtrain.records import Conditioning
from sdtrain.run_dir import write_atomically
from sdtrain.samplers.settings import SamplerName, SamplerSettings
from sdtrain.samplers.steps import spacing_of
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask

LISTING = "samples.json"
GRID = "grid.png"
MAX_GRID_PICTURES = 64
MAX_COLUMNS = 8
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_for_sampling(path: Path) -> LoadedPipeline:
    """What `path` means: an exported pipeline, or a run's or checkpoint's averaged weights.

    Raises:
        CheckpointError: A run or checkpoint without valid weights.
        ConfigError: There is no such folder, or it holds no denoiser.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give a run, a checkpoint or an exported pipeline")
    return load_pipeline(path) if is_pipeline(path) else from_checkpoint(path)


def generate(
    pipeline: LoadedPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    sampler: SamplerName = "ddim",
    num_steps: int = 30,
    guidance_scale: float = 7.5,
    eta: float = 0.0,
    batch_size: int = 8,
    callback: Callable[[int], None] | None = None,
) -> NDArray[np.uint8]:
    """Pictures of the prompts.

    Picture i depends on prompts[i] and seeds[i] alone: not on its neighbours, and on the batch size only by the
    rounding of larger or smaller matrix products.

    Args:
        pipeline: The networks, where and in which precision they shall work.
        prompts: One a picture; an unconditional system wants empty ones.
        seeds: As many.
        sampler: `ddim` or `ddpm`.
        num_steps: Calls of the denoiser.
        guidance_scale: Classifier-free guidance; 1 is off.
        eta: Noise added by `ddim`; 0 is deterministic.
        batch_size: Pictures made together.
        callback: Called with the number of pictures that were just finished.

    Returns:
        (num, height, width, 3) pixels.

    Raises:
        ConfigError: Counts that differ, nothing to do, prompts for an unconditional system, or settings that no sampler
            has.
    """
    if len(prompts) != len(seeds) or not prompts or batch_size < 1:
        raise ConfigError(
            f"found {len(prompts)} prompts, {len(seeds)} seeds and batch_size {batch_size}; "
            "needed is one seed for each prompt, at least one, and a batch_size of 1 or more"
        )
    _refuse_steps(num_steps, pipeline)
    settings = SamplerSettings(sampler=sampler, num_steps=num_steps, guidance_scale=guidance_scale, eta=eta)
    task = _task(pipeline, settings)
    parts = []
    for start in range(0, len(prompts), batch_size):
        chosen = slice(start, start + batch_size)
        images = task.sample(_conditioning(pipeline, prompts[chosen]), seeds[chosen])
        parts.append(to_pixels(images))
        if callback is not None:
            callback(len(parts[-1]))
    return np.concatenate(parts)


def _refuse_steps(num_steps: int, pipeline: LoadedPipeline) -> None:
    """What rule `steps_fit_the_process` says of a training page's `samples`, of the system that is sampled."""
    total = pipeline.process.num_train_timesteps
    most, why = total, ""
    if spacing_of(pipeline.process) == "leading":
        most, why = total - 1, ", and whose last one is not pure noise: sampling then leaves out timestep 0"
    if num_steps > most:
        raise ConfigError(
            f"num_steps = {num_steps}: must be <= {most} for {pipeline.source}, which has {total} timesteps{why}. "
            "Lower it."
        )


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """(batch, 3, height, width) images in [-1, 1] -> (batch, height, width, 3) pixels, to the nearest."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _task(pipeline: LoadedPipeline, settings: SamplerSettings) -> LatentDiffusionTask:
    """The task whose `sample` training uses too, so that a grid of the training and of today are the same."""
    return LatentDiffusionTask(
        denoiser=pipeline.denoiser,
        conditioner=pipeline.conditioner,
        autoencoder=pipeline.autoencoder,
        process=pipeline.process,
        latent_shape=(pipeline.autoencoder.latent_channels, *pipeline.latent_size),
        condition_dropout=0.0,
        loss_weighting=None,
        latents="mean",
        sampler=settings,
    )


def _conditioning(pipeline: LoadedPipeline, prompts: Sequence[str]) -> Conditioning:
    if pipeline.tokenizer is None and not any(prompts):
        return pipeline.conditioner.null(len(prompts))
    tokens = encode_prompts(pipeline, list(prompts))
    with torch.no_grad():
        return pipeline.conditioner(tokens.to(next(pipeline.conditioner.parameters()).device))


# The command --------------------------------------------------------------------------------------------------------


def sample(config: SamplingConfig) -> Path:
    """Write every prompt's pictures, a grid of the first ones and `samples.json` into the page's output folder.

    Returns:
        The folder.

    Raises:
        CheckpointError: A run or checkpoint without valid weights.
        ConfigError: A folder, prompts or settings that do not fit.
    """
    pipeline = load_for_sampling(config.run)
    listed = config.all_prompts()
    prompts = [prompt for prompt in listed for _ in range(config.images_per_prompt)]
    seeds = [config.seed + number for number in range(len(prompts))]
    weights = pipeline.weights_sha256()
    _place(pipeline, _DTYPES[config.precision])
    with _progress() as progress:
        bar = progress.add_task("sampling", total=len(prompts))
        pixels = generate(
            pipeline,
            prompts,
            seeds,
            sampler=config.sampler,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            eta=config.eta,
            batch_size=config.batch_size,
            callback=lambda finished: progress.advance(bar, finished),
        )
    facts = _facts(config, pipeline, len(prompts), weights)
    write_samples(config.output, pixels, prompts, seeds, facts)
    print(f"samples: {config.output} ({len(prompts)} pictures, {GRID}, {LISTING})", flush=True)
    return config.output


def write_samples(
    output: Path, pixels: NDArray[np.uint8], prompts: Sequence[str], seeds: Sequence[int], facts: dict[str, Any]
) -> None:
    """One PNG a picture, the grid and, last, the listing: where it stands, the folder is complete."""
    output.mkdir(parents=True, exist_ok=True)
    (output / LISTING).unlink(missing_ok=True)
    for stale in output.glob("[0-9][0-9][0-9][0-9][0-9].png"):
        stale.unlink()
    items = []
    for number, (picture, prompt, seed) in enumerate(zip(pixels, prompts, seeds, strict=True)):
        name = f"{number:05d}.png"
        Image.fromarray(picture).save(output / name)
        items.append({"file": name, "prompt": prompt, "seed": seed})
    first = slice(MAX_GRID_PICTURES)
    make_grid(pixels[first], MAX_COLUMNS, list(prompts[first])).save(output / GRID)
    write_atomically(output / LISTING, json.dumps(facts | {"items": items}, indent=2, ensure_ascii=False) + "\n")


def _place(pipeline: LoadedPipeline, dtype: torch.dtype) -> None:
    """Networks to the accelerator; the autoencoder stays float32, as in training."""
    device = distributed.device()
    pipeline.denoiser.to(device, dtype)
    pipeline.conditioner.to(device, dtype)
    pipeline.autoencoder.to(device)


def _facts(config: SamplingConfig, pipeline: LoadedPipeline, count: int, weights: str) -> dict[str, Any]:
    return {
        "n": count,
        "seed": config.seed,
        "sampler": config.sampler,
        "num_steps": config.num_steps,
        "guidance_scale": config.guidance_scale,
        "eta": config.eta,
        "precision": config.precision,
        "images_per_prompt": config.images_per_prompt,
        "weights_sha256": weights,
        "source": pipeline.source,
        "step": pipeline.step,
        "ema": pipeline.is_ema,
        "sdtrain": __version__,
    }


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
