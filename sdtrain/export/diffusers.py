"""Trained weights as a folder that diffusers opens without a network, and back."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdtrain import __version__, build
from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.autoencoders.load import save_autoencoder
from sdtrain.checkpoints.manifest import Checkpoint
from sdtrain.checkpoints.pipelines import (
    FACTS,
    FLOW_SCHEDULER,
    MODEL_INDEX,
    LoadedPipeline,
    fill,
    from_checkpoint,
    is_averaged,
    load_pipeline,
    source_name,
)
from sdtrain.checkpoints.weights import load_weights, open_checkpoint, read_config
from sdtrain.conditioners.text import ClipTextConditioner, save_tokenizer
from sdtrain.config.task import AutoencodingTask
from sdtrain.data.manifest import Manifest, read_fields
from sdtrain.denoisers.load import Denoiser, in_diffusers_words, part_name, save_denoiser
from sdtrain.denoisers.unet import UNet
from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.errors import ConfigError
from sdtrain.run_dir import sync_folder, write_atomically
from sdtrain.samplers.steps import spacing_of
from sdtrain.tasks.autoencoding import latent_statistics
from sdtrain.tasks.parts import to_images

__all__ = ["export", "load_pipeline", "measure_scale"]

log = logging.getLogger(__name__)

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUT_VERSION = "0.38.0"  # of diffusers, whose layout and keys are written


def export(
    run_or_checkpoint: Path,
    output: Path,
    *,
    ema: bool = True,
    dtype: Dtype = "fp32",
    latent_size: tuple[int, int] | None = None,
    scale_manifest: Path | Manifest | None = None,
) -> Path:
    """Write a run's weights in diffusers' layout; the folder appears when it is complete.

    A latent diffusion run becomes a whole pipeline (a UNet's StableDiffusionPipeline, or LDMPipeline without text; a
    DiT's DiTPipeline without text), an autoencoding run a single AutoencoderKL. A denoiser that no class of diffusers
    holds is written for sdtrain alone, with a warning. `sdtrain.json` says where the weights come from and holds the
    digest of every file.

    Args:
        run_or_checkpoint: A run folder (its newest valid checkpoint) or a checkpoint folder.
        output: Folder to write; must not exist.
        ema: Take the averaged weights; where the run keeps none, its last weights.
        dtype: Precision of the written weights.
        latent_size: (height, width) of the latents, for a latent diffusion run whose data is not here.
        scale_manifest: For an autoencoding run: images whose train split gives the latents their scaling factor, which
            is stored with the weights; None keeps the run's own factor.

    Raises:
        CheckpointError: No valid checkpoint.
        ConfigError: `output` exists, an unknown dtype, or an option that this kind of run does not have.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: found {dtype!r}, allowed are {', '.join(DTYPES)}")
    if output.exists():
        raise ConfigError(f"{output}: exists; give a folder that does not, or remove it first")
    checkpoint = open_checkpoint(run_or_checkpoint)
    with _appearing(output) as folder:
        if isinstance(read_config(checkpoint).task, AutoencodingTask):
            facts = _write_autoencoder(checkpoint, folder, ema, DTYPES[dtype], scale_manifest)
        else:
            if scale_manifest is not None:
                raise ConfigError("scale_manifest: only an autoencoding run has latents to scale; leave it out")
            pipeline = from_checkpoint(checkpoint, ema=ema, latent_size=latent_size)
            facts = _write_pipeline(pipeline, folder, DTYPES[dtype])
        origin = {"source": source_name(checkpoint), "step": checkpoint.step, "dtype": dtype, "sdtrain": __version__}
        _write_facts(folder, origin | facts)
    return output


# Writing ------------------------------------------------------------------------------------------------------------


def _write_pipeline(pipeline: LoadedPipeline, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Every part of a pipeline; returns the facts about it."""
    facts = {
        "ema": pipeline.is_ema,
        "latent_size": list(pipeline.latent_size),
        "weights_sha256": pipeline.weights_sha256(),
    }
    for module in pipeline.modules().values():
        module.to(dtype)
    denoiser = pipeline.denoiser
    vae_config = pipeline.autoencoder.diffusers_config()
    denoiser_config, _ = in_diffusers_words(denoiser)
    denoiser_class = denoiser_config["_class_name"]
    settings: dict[str, Any] = {}
    if denoiser_class.startswith("sdtrain."):
        log.warning("diffusers has no class for this denoiser; sdtrain alone can open %s", folder.name)
    elif isinstance(denoiser, UNet):  # a DiT's own size is that of its positions
        height, width = pipeline.latent_size
        settings["sample_size"] = height if height == width else [height, width]
    save_denoiser(denoiser, folder / part_name(denoiser), **settings)
    is_text = isinstance(pipeline.conditioner, ClipTextConditioner)
    pipeline_class, autoencoder_part = _pipeline_class(denoiser, is_text)
    save_autoencoder(pipeline.autoencoder, folder / autoencoder_part)
    if isinstance(pipeline.conditioner, ClipTextConditioner) and pipeline.tokenizer is not None:
        pipeline.conditioner.save_pretrained(folder / "text_encoder")
        save_tokenizer(pipeline.tokenizer, folder / "tokenizer")
    scheduler = scheduler_config(pipeline.process)
    write_atomically(folder / "scheduler" / "scheduler_config.json", _json(scheduler))
    classes = {part_name(denoiser): denoiser_class, autoencoder_part: vae_config["_class_name"]}
    index = _model_index(pipeline_class, classes, scheduler["_class_name"], is_text)
    write_atomically(folder / MODEL_INDEX, _json(index))
    return facts


def _pipeline_class(denoiser: Denoiser, is_text: bool) -> tuple[str, str]:
    """diffusers' pipeline around such a denoiser, and what it calls the autoencoder.

    diffusers has no pipeline of text around this kind of transformer: the class is ours, and diffusers refuses it.
    """
    if isinstance(denoiser, UNet):
        return ("StableDiffusionPipeline", "vae") if is_text else ("LDMPipeline", "vqvae")
    return ("sdtrain.LoadedPipeline" if is_text else "DiTPipeline"), "vae"


def _model_index(pipeline: str, classes: dict[str, str], scheduler: str, is_text: bool) -> dict[str, Any]:
    """Which library and class opens which part."""

    def place(name: str) -> list[str]:
        return ["sdtrain", name.removeprefix("sdtrain.")] if name.startswith("sdtrain.") else ["diffusers", name]

    index: dict[str, Any] = {
        "_class_name": pipeline,
        "_diffusers_version": LAYOUT_VERSION,
        **{part: place(name) for part, name in classes.items()},
        "scheduler": ["diffusers", scheduler],
    }
    if is_text:
        index |= {
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "safety_checker": [None, None],
            "requires_safety_checker": False,
        }
    return index


def scheduler_config(process: DiffusionProcess) -> dict[str, Any]:
    """The config of diffusers' scheduler for our process and our sampler's defaults.

    A flow is sampled by FlowMatchEulerDiscreteScheduler. It tells a denoiser T * t where ours is told T * t - 1, and
    diffusers has no text-to-image pipeline of a flow around this kind of network: sdtrain alone samples it exactly.
    The cosine schedule is written as a list: diffusers' own caps its last beta elsewhere.
    """
    if process.prediction_type == "flow":
        return {
            "_class_name": FLOW_SCHEDULER,
            "_diffusers_version": LAYOUT_VERSION,
            "num_train_timesteps": process.num_train_timesteps,
            "shift": process.shift,
        }
    is_cosine = process.beta_schedule == "cosine"
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": LAYOUT_VERSION,
        "num_train_timesteps": process.num_train_timesteps,
        "beta_schedule": "linear" if is_cosine else process.beta_schedule,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "trained_betas": process.betas.tolist() if is_cosine else None,
        "prediction_type": process.prediction_type,
        "rescale_betas_zero_snr": process.zero_terminal_snr,
        "clip_sample": False,  # latents are not pixels
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": spacing_of(process),
    }


def _write_autoencoder(
    checkpoint: Checkpoint, folder: Path, ema: bool, dtype: torch.dtype, scale_manifest: Path | Manifest | None
) -> dict[str, Any]:
    """The autoencoder with its scaling factor; returns the facts about it."""
    config = read_config(checkpoint)
    assert config.autoencoder is not None, "the page's rules ask for an autoencoder"
    autoencoder = build.build_autoencoder(config.autoencoder)
    fill(autoencoder, load_weights(checkpoint, "autoencoder", ema=ema), where=checkpoint.path)
    if scale_manifest is not None:
        manifest = scale_manifest if isinstance(scale_manifest, Manifest) else Manifest.load(scale_manifest)
        autoencoder.scaling_factor = measure_scale(autoencoder, manifest)
    save_autoencoder(autoencoder.to(dtype), folder)
    return {"ema": is_averaged(checkpoint, "autoencoder", ema), "scaling_factor": autoencoder.scaling_factor}


def measure_scale(
    autoencoder: AutoencoderKL, manifest: Manifest, *, max_samples: int = 4096, batch_size: int = 32
) -> float:
    """The factor that gives the latents of a train split unit variance: 1 / standard deviation of posterior samples.

    Args:
        autoencoder: Encodes the images, in float32.
        manifest: Of shards with `jpg` images of one size.
        max_samples: Of the first so many images; one number needs no more.
        batch_size: Images encoded together; changes nothing but speed.

    Raises:
        DataError: No images, or latents without spread.
    """
    autoencoder.eval()
    moments = _moments(autoencoder, manifest, max_samples, batch_size)
    return latent_statistics(autoencoder, moments, latents="sample").scaling_factor


@torch.no_grad()
def _moments(autoencoder: AutoencoderKL, manifest: Manifest, max_samples: int, batch_size: int) -> Iterator[Tensor]:
    images: list[Tensor] = []
    for number, record in enumerate(read_fields(manifest, "train", ("jpg",))):
        if number == max_samples:
            break
        images.append(torch.from_numpy(record.fields["jpg"]))
        if len(images) == batch_size:
            yield autoencoder.encode(to_images(torch.stack(images)))
            images = []
    if images:
        yield autoencoder.encode(to_images(torch.stack(images)))


# Files --------------------------------------------------------------------------------------------------------------


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes `output` when all went well, and is removed otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(output.parent)


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """`sdtrain.json`: the facts and the digest of every other file, all of them on the disk first."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            files[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    write_atomically(folder / FACTS, _json(facts | {"files": files}))


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
