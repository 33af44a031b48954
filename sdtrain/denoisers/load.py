"""UNets on disk and on the hub, in diffusers' layout."""

from __future__ import annotations

from pathlib import Path

from sdtrain.denoisers.unet import UNet
from sdtrain.nn.folders import find_folder, load_strictly, read_folder, write_folder


def load_unet(source: str) -> UNet:
    """A UNet with its weights, in float32, on the CPU.

    Args:
        source: A folder with `config.json` and `diffusion_pytorch_model.safetensors`, a pipeline's folder with these in
            `unet/`, or a hub name.

    Raises:
        ConfigError: Nothing readable is there, or it does not fit this UNet.
    """
    folder = find_folder(source, part="unet")
    config, tensors = read_folder(folder)
    unet = UNet.from_diffusers_config(config)
    load_strictly(unet, tensors, where=folder)
    return unet


def save_unet(unet: UNet, folder: Path) -> None:
    """Save config and weights; `load_unet` opens the folder, and diffusers does where one of its classes holds it."""
    write_folder(folder, unet.diffusers_config(), unet.state_dict())
