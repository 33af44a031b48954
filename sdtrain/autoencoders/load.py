"""Autoencoders on disk and on the hub, in diffusers' layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.nn.folders import find_folder, load_strictly, read_folder, write_folder

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


def with_current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with the middle attention's old names replaced by those of today."""
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "attentions" in parts and len(parts) > 1:
            parts[-2] = _OLD_ATTENTION_NAMES.get(parts[-2], parts[-2])
        renamed[".".join(parts)] = tensor
    return renamed
