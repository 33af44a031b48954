"""What happens at a run's step boundaries beside training: validation loss and sample grids."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sdtrain import build, distributed
from sdtrain.conditioners.text import build_tokenizer, tokenize
from sdtrain.config.conditioner import ClipTextConfig
from sdtrain.config.run import TrainingConfig
from sdtrain.data.loader import validation_loader
from sdtrain.data.manifest import Manifest
from sdtrain.evaluation.grids import make_grid
from sdtrain.records import Conditioning, Task
from sdtrain.run_dir import RunDir
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask


@torch.no_grad()
def validate(
    config: TrainingConfig, task: Task, manifest: Manifest, pause: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Means over the first validation samples with the same draws every time; collective.

    Timesteps are spread evenly over `timestep_bins` bins, so that the mean hides no part of the schedule and two
    validations differ by the weights alone; each bin's mean is a figure of its own. `pause` is called before every
    batch, equally often on all ranks, and may raise to leave early.
    """
    settings = config.validation
    assert settings is not None, "called where the page has a validation section"
    place = distributed.ranks()
    num_samples = min(settings.num_samples, manifest.num_samples("validation"))
    loader = validation_loader(
        build.build_dataset(config, manifest, task.draws, split="validation"),
        num_samples=num_samples,
        batch_size=settings.batch_size,
        world_size=place.world_size,
        rank=place.rank,
        num_workers=0,
        prefetch=1,
    )
    columns: dict[str, list[torch.Tensor]] = {}
    batches = iter(loader)
    for _ in range(math.ceil(math.ceil(num_samples / place.world_size) / settings.batch_size)):  # of the longest part
        pause()
        batch = next(batches, None)
        if batch is None:
            continue
        on_device = batch.to(distributed.device())
        figures = dict(task.validate(on_device))
        read = on_device.weights > 0
        for name, values in figures.items():
            columns.setdefault(name, []).append(values[read].detach().cpu().double())
    loader.close()
    gathered = distributed.gather_objects({name: torch.cat(parts) for name, parts in columns.items()})
    names = dict.fromkeys(name for rank in gathered for name in rank)  # a rank without samples knows no names
    joined = {name: torch.cat([rank[name] for rank in gathered if name in rank]) for name in names}
    return _means(joined, config, settings.timestep_bins)


def _means(columns: dict[str, torch.Tensor], config: TrainingConfig, num_bins: int) -> dict[str, float]:
    timesteps = columns.pop("timesteps", None)
    means = {f"validation/{name}": float(values.mean()) for name, values in columns.items()}
    if timesteps is not None and config.process is not None:
        bins = (timesteps * num_bins / config.process.num_train_timesteps).long()
        for index in range(num_bins):
            inside = columns["loss"][bins == index]
            if len(inside):
                means[f"validation/loss_bin_{index:02d}"] = float(inside.mean())
    return means


def sample(config: TrainingConfig, task: Task, step: int, pause: Callable[[], None] = lambda: None) -> list[Path]:
    """A grid of the page's prompts with its fixed seeds; collective, each rank draws its share.

    `pause` is called after every step of the sampler, equally often on all ranks, and may raise to leave early.
    """
    settings = config.samples
    if settings is None or not isinstance(task, LatentDiffusionTask):
        return []
    place = distributed.ranks()
    mine = range(place.rank, len(settings.prompts), place.world_size)
    pixels = {}
    if len(mine):
        images = task.sample(
            _conditioning(config, task, [settings.prompts[index] for index in mine]),
            [settings.seed + index for index in mine],
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
            callback=lambda index, latents: pause(),
        )
        drawn = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        pixels = dict(zip(mine, drawn, strict=True))
    else:
        for _ in range(settings.num_steps):
            pause()
    everything: dict[int, np.ndarray] = {}
    for part in distributed.gather_objects(pixels):
        everything |= part
    if not place.is_main:
        return []
    path = RunDir(config.resolved_run_dir).samples / f"step-{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.stack([everything[index] for index in range(len(settings.prompts))])
    make_grid(rows, columns=min(8, len(rows)), captions=list(settings.prompts)).save(path)
    return [path]


def _conditioning(config: TrainingConfig, task: LatentDiffusionTask, prompts: list[str]) -> Conditioning:
    if not isinstance(config.conditioner, ClipTextConfig):
        return task.conditioner.null(len(prompts))
    tokens = tokenize(build_tokenizer(config.conditioner.max_length), prompts)
    with torch.no_grad():
        return task.conditioner(torch.from_numpy(tokens.astype(np.int64)).to(distributed.device()))
