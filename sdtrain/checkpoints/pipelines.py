"""A trained system, whole and ready to sample: from a run, a checkpoint, or a folder in diffusers' layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sdtrain import build
from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.autoencoders.load import load_autoencoder
from sdtrain.checkpoints.manifest import Checkpoint
from sdtrain.checkpoints.recut import kinds_of
from sdtrain.checkpoints.weights import load_weights, open_checkpoint, read_config
from sdtrain.conditioners.none import NoConditioner
from sdtrain.conditioners.text import ClipTextConditioner, build_tokenizer, load_clip_text, tokenize
from sdtrain.config.conditioner import ClipTextConfig
from sdtrain.config.run import TrainingConfig
from sdtrain.data.manifest import Manifest
from sdtrain.denoisers.load import Denoiser, read_denoiser
from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.diffusion.schedules import betas
from sdtrain.errors import CheckpointError, ConfigError
from sdtrain.nn.folders import CONFIG_FILE, load_strictly

MODEL_INDEX = "model_index.json"
FACTS = "sdtrain.json"
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_AUTOENCODER_PARTS = ("vae", "vqvae")  # StableDiffusionPipeline's and DiTPipeline's name, LDMPipeline's name
_DENOISER_PARTS = ("unet", "transformer")


@dataclass(frozen=True, slots=True)
class LoadedPipeline:
    """All networks of a text-to-image system, on the CPU, in evaluation mode.

    Attributes:
        denoiser: The trained network.
        autoencoder: Decodes its latents.
        conditioner: Encodes prompts; tells nothing in an unconditional system.
        tokenizer: Prompts -> tokens; None in an unconditional system.
        process: Noise levels and prediction type.
        latent_size: (height, width) of the latents that the denoiser was trained on.
        source: Where the weights come from, for people.
        step: Optimiser step of the weights; None where the folder does not say.
        is_ema: Whether they are averaged weights; None where the folder does not say.
    """

    denoiser: Denoiser
    autoencoder: AutoencoderKL
    conditioner: ClipTextConditioner | NoConditioner
    tokenizer: CLIPTokenizer | None
    process: DiffusionProcess
    latent_size: tuple[int, int]
    source: str
    step: int | None
    is_ema: bool | None

    def modules(self) -> dict[str, nn.Module]:
        """The networks by name."""
        return {"denoiser": self.denoiser, "autoencoder": self.autoencoder, "conditioner": self.conditioner}

    def weights_sha256(self) -> str:
        """One digest of every network's weights, the same for a checkpoint and its float32 export."""
        digest = hashlib.sha256()
        for part, module in self.modules().items():
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


# From a checkpoint --------------------------------------------------------------------------------------------------


def from_checkpoint(
    path: Path | Checkpoint, *, ema: bool = True, latent_size: tuple[int, int] | None = None
) -> LoadedPipeline:
    """The system that a latent diffusion run has trained.

    Args:
        path: A run folder (its newest valid checkpoint) or a checkpoint folder.
        ema: Take the averaged weights; where the run keeps none, its last weights.
        latent_size: (height, width) of the latents; None reads it from the run's data manifest.

    Raises:
        CheckpointError: No valid checkpoint, or one whose weights do not fit its page.
        ConfigError: The run has no denoiser, or its data manifest is gone and no latent_size was given.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    config = read_config(checkpoint)
    if config.denoiser is None or config.autoencoder is None or config.process is None or config.conditioner is None:
        raise ConfigError(
            f"{checkpoint.path}: a run of task {config.task.type} has no denoiser to sample from; "
            "give a latent_diffusion run"
        )
    with torch.random.fork_rng(devices=[]):  # frozen parts without stored weights must be those of the training
        torch.manual_seed(config.seed)
        denoiser = build.build_denoiser(config.denoiser)
        conditioner = build.build_conditioner(config.conditioner, seed=config.seed)
        autoencoder = build.build_autoencoder(config.autoencoder)
    trained = nn.ModuleDict({"denoiser": denoiser})
    weights = load_weights(checkpoint, "denoiser", ema=ema)
    if any(name.startswith("conditioner.") for name in weights):
        trained["conditioner"] = conditioner
    fill(trained, weights, where=checkpoint.path)
    text = config.conditioner if isinstance(config.conditioner, ClipTextConfig) else None
    pipeline = LoadedPipeline(
        denoiser=denoiser,
        autoencoder=autoencoder,
        conditioner=conditioner,
        tokenizer=None if text is None else build_tokenizer(text.max_length),
        process=build.build_process(config.process),
        latent_size=latent_size or latent_size_of(config),
        source=source_name(checkpoint),
        step=checkpoint.step,
        is_ema=is_averaged(checkpoint, "denoiser", ema),
    )
    _evaluate(pipeline)
    return pipeline


def fill(module: nn.Module, weights: Mapping[str, Tensor], *, where: Path) -> None:
    """Load a checkpoint's weights; every name must fit.

    Raises:
        CheckpointError: A name is missing or left over, or a shape differs.
    """
    try:
        load_strictly(module, weights, where=where)
    except ConfigError as error:
        raise CheckpointError(f"{error}; the page in the checkpoint describes another network") from error


def is_averaged(checkpoint: Checkpoint, trainable: str, ema: bool) -> bool:
    """Whether `load_weights` with this `ema` gives averaged weights."""
    return ema and "ema" in kinds_of(checkpoint, trainable)


def source_name(checkpoint: Checkpoint) -> str:
    """`<run>/checkpoints/step-N`: names a checkpoint without the machine's own folders."""
    return "/".join(checkpoint.path.resolve().parts[-3:])


def latent_size_of(config: TrainingConfig) -> tuple[int, int]:
    """(height, width) of the latents in a run's shards.

    Raises:
        ConfigError: The data manifest is not where the run's page says.
        DataError: The shards hold no moments.
    """
    if isinstance(config.data.manifest, Path) and not config.data.manifest.is_file():
        raise ConfigError(
            f"data.manifest = {config.data.manifest}: no such file here, and it alone says how large the latents are; "
            "export the run where its data is, or give the latent size"
        )
    _, height, width = build.field_shape(Manifest.load(config.data.manifest), "moments")
    return height, width


# From a folder ------------------------------------------------------------------------------------------------------


def is_pipeline(path: Path) -> bool:
    """Whether a folder is in diffusers' layout."""
    return (path / MODEL_INDEX).is_file()


def load_pipeline(folder: Path) -> LoadedPipeline:
    """The system in a folder that `sdtrain export` or diffusers wrote; opens no connection.

    Args:
        folder: With `model_index.json`, `unet/` or `transformer/`, `vae/` or `vqvae/`, `scheduler/` and, for text,
            `text_encoder/` and `tokenizer/`.

    Raises:
        ConfigError: A part is missing, or is one that sdtrain does not have.
    """
    if not is_pipeline(folder):
        raise ConfigError(f"{folder}: holds no {MODEL_INDEX}; give a folder that `sdtrain export` or diffusers wrote")
    facts = _read_optional(folder / FACTS)
    network = _part(folder, *_DENOISER_PARTS)
    denoiser = read_denoiser(network)
    autoencoder = load_autoencoder(str(_part(folder, *_AUTOENCODER_PARTS)))
    if denoiser.out_channels != autoencoder.latent_channels:
        raise ConfigError(
            f"{network}: predicts {denoiser.out_channels} channels, the autoencoder's latents have "
            f"{autoencoder.latent_channels}; networks that also predict variances, with twice as many, are not sampled"
        )
    tokenizer = _load_tokenizer(folder) if (folder / "text_encoder").is_dir() else None
    pipeline = LoadedPipeline(
        denoiser=denoiser,
        autoencoder=autoencoder,
        conditioner=NoConditioner() if tokenizer is None else _load_conditioner(folder, tokenizer),
        tokenizer=tokenizer,
        process=read_process(_part(folder, "scheduler") / "scheduler_config.json"),
        latent_size=_latent_size(network, facts),
        source=facts.get("source", folder.name),
        step=facts.get("step"),
        is_ema=facts.get("ema"),
    )
    _evaluate(pipeline)
    return pipeline


def read_process(path: Path) -> DiffusionProcess:
    """The forward process behind a scheduler's config.

    Raises:
        ConfigError: It cannot be read, or its noise levels are none of ours.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    total = config.get("num_train_timesteps", 1000)
    if config.get("_class_name") == FLOW_SCHEDULER:
        return DiffusionProcess(num_train_timesteps=total, prediction_type="flow", shift=config.get("shift", 1.0))
    schedule = config.get("beta_schedule", "linear")
    trained = config.get("trained_betas")
    if trained is not None:
        if not _is_cosine(trained, total):
            raise ConfigError(f"{path}: trained_betas are not those of the cosine schedule; no other list is supported")
        schedule = "cosine"
    elif schedule not in ("linear", "scaled_linear"):
        raise ConfigError(
            f"{path}: beta_schedule is {schedule!r}; allowed are linear, scaled_linear, and cosine as trained_betas"
        )
    return DiffusionProcess(
        beta_schedule=schedule,
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        num_train_timesteps=total,
        prediction_type=config.get("prediction_type", "epsilon"),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )


def _is_cosine(trained: list[float], total: int) -> bool:
    ours = betas("cosine", 0.0, 0.0, total)
    return len(trained) == total and torch.allclose(torch.tensor(trained, dtype=torch.float64), ours, rtol=1e-6)


def _read_optional(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _part(folder: Path, *names: str) -> Path:
    """The part's folder, which may have any of these names."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    missing = " or ".join(f"{name}/" for name in names)
    raise ConfigError(f"{folder}: holds no {missing}; the pipeline is not complete, copy or export it again")


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(_part(folder, "tokenizer"), local_files_only=True)


def _load_conditioner(folder: Path, tokenizer: CLIPTokenizer) -> ClipTextConditioner:
    """The text encoder, whose own empty prompt must be the tokenizer's."""
    padding = build_tokenizer(tokenizer.model_max_length).pad_token_id
    if tokenizer.pad_token_id != padding:
        raise ConfigError(
            f"{folder / 'tokenizer'}: pads with {tokenizer.pad_token_id}; the conditioner's empty prompt pads with "
            f"{padding}, as Stable Diffusion 1 does, and no other padding is supported"
        )
    source = str(folder / "text_encoder")
    return load_clip_text(source, trainable=False, max_length=tokenizer.model_max_length)


def _latent_size(network: Path, facts: Mapping[str, Any]) -> tuple[int, int]:
    size = facts.get("latent_size") or _read_optional(network / CONFIG_FILE).get("sample_size")
    if size is None:
        raise ConfigError(f"{network}: config.json has no sample_size; write the size of the latents into it")
    height, width = size if isinstance(size, list) else (size, size)
    return int(height), int(width)


def _evaluate(pipeline: LoadedPipeline) -> None:
    for module in pipeline.modules().values():
        module.eval().requires_grad_(False)


def encode_prompts(pipeline: LoadedPipeline, prompts: list[str]) -> Tensor:
    """(batch, length) int64 tokens of prompts.

    Raises:
        ConfigError: The system takes no prompts.
    """
    if pipeline.tokenizer is None:
        raise ConfigError(f"{pipeline.source}: an unconditional system takes no prompts")
    return torch.from_numpy(tokenize(pipeline.tokenizer, prompts).astype("int64"))
