"""Autoencoders on disk and on the hub, in diffusers' layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.errors import ConfigError
from sdtrain.nn.folders import CONFIG_FILE, WEIGHTS_FILE, find_folder, load_strictly, read_folder, write_folder

# The middle attention's names in files from before diffusers 0.12, stabilityai/sd-vae-ft-mse among them.
_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_autoencoder(source: str) -> AutoencoderKL:
    """An autoencoder with its weights, in float32, on the CPU, in evaluation mode.

    Args:
        source: A folder with `config.json` and `diffusion_pytorch_model.safetensors`, a pipeline's folder with these in
            `vae/`, or a hub name such as `stabilityai/sd-vae-ft-mse`.

    Raises:
        ConfigError: Nothing readable is there, or it does not fit this autoencoder.
    """
    folder = find_folder(source, part="vae")
    config, tensors = read_folder(folder)
    autoencoder = AutoencoderKL.from_diffusers_config(config)
    load_strictly(autoencoder, with_current_names(tensors), where=folder)
    return autoencoder.eval()


def save_autoencoder(autoencoder: AutoencoderKL, folder: Path) -> None:
    """Save config and weights; diffusers and `load_autoencoder` open the folder."""
    write_folder(folder, autoencoder.diffusers_config(), autoencoder.state_dict())


def autoencoder_facts(source: str) -> dict[str, Any]:
    """Digest of the weights and what scales their latents: what shards of latents say of the encoder that made them.

    Ingestion writes these facts into the manifest's fingerprint, training compares them with its own autoencoder's.

    Args:
        source: As for `load_autoencoder`.

    Raises:
        ConfigError: Nothing readable is there.
    """
    folder = _folder_of(source)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise ConfigError(f"{weights}: missing; an autoencoder needs a folder with safetensors weights")
    stat = weights.stat()
    channels = config.get("block_out_channels") or config["channels"]  # diffusers' word, and our own class's
    return {
        "weights_sha256": _digest(weights, stat.st_size, stat.st_mtime_ns),
        "scaling_factor": config.get("scaling_factor", 0.18215),
        "shift_factor": config.get("shift_factor") or 0.0,
        "latent_channels": config.get("latent_channels", 4),
        "downsample_factor": 2 ** (len(channels) - 1),
    }


@lru_cache(maxsize=8)
def _folder_of(source: str) -> Path:
    """Asks the hub once per process: ingestion needs the facts for every unit."""
    return find_folder(source, part="vae")


@lru_cache(maxsize=8)
def _digest(path: Path, size_bytes: int, mtime_ns: int) -> str:
    """Digest of a file that is read again only where size or time changed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with the middle attention's old names replaced by those of today."""
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "attentions" in parts and len(parts) > 1:
            parts[-2] = _OLD_ATTENTION_NAMES.get(parts[-2], parts[-2])
        renamed[".".join(parts)] = tensor
    return renamed
