"""Denoisers on disk and on the hub, in diffusers' layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from sdtrain.denoisers import dit_config, unet_config
from sdtrain.denoisers.dit import DiT
from sdtrain.denoisers.unet import UNet
from sdtrain.errors import ConfigError
from sdtrain.nn.folders import CONFIG_FILE, find_folder, load_strictly, read_folder, write_folder

Denoiser = UNet | DiT
_Kind = TypeVar("_Kind", UNet, DiT)

_UNET_CLASSES = (unet_config.CONDITIONAL_CLASS, unet_config.UNCONDITIONAL_CLASS, unet_config.OWN_CLASS)
_DIT_CLASSES = (dit_config.DIFFUSERS_CLASS, dit_config.OLD_CLASS, dit_config.OWN_CLASS)


def load_unet(source: str) -> UNet:
    """A UNet with its weights, in float32, on the CPU.

    Args:
        source: A folder with `config.json` and `diffusion_pytorch_model.safetensors`, a pipeline's folder with these in
            `unet/`, or a hub name.

    Raises:
        ConfigError: Nothing readable is there, it does not fit this UNet, or it is a DiT.
    """
    return _load(source, UNet, part="unet")


def load_dit(source: str) -> DiT:
    """A DiT with its weights, in float32, on the CPU.

    Args:
        source: A folder with `config.json` and `diffusion_pytorch_model.safetensors`, a pipeline's folder with these in
            `transformer/`, or a hub name.

    Raises:
        ConfigError: Nothing readable is there, it does not fit this DiT, or it is a UNet.
    """
    return _load(source, DiT, part="transformer")


def _load(source: str, wanted: type[_Kind], *, part: str) -> _Kind:
    folder = find_folder(source, part=part)
    denoiser = read_denoiser(folder)
    if not isinstance(denoiser, wanted):
        found = type(denoiser).__name__
        raise ConfigError(
            f"{folder}: holds a {found}, and a {wanted.__name__} is asked for; "
            f"write denoiser: {{type: {found.lower()}, weights: ...}}"
        )
    return denoiser


def read_denoiser(folder: Path) -> Denoiser:
    """The denoiser in a folder with `config.json`, whose class says which one it is.

    Raises:
        ConfigError: The weights cannot be read, or class, settings or weights are none of ours.
    """
    config, tensors = read_folder(folder)
    class_name = config.get("_class_name")
    if class_name in _UNET_CLASSES:
        denoiser: Denoiser = UNet.from_diffusers_config(config)
    elif class_name in _DIT_CLASSES:
        arch, tensors = dit_config.from_diffusers(config, tensors)
        denoiser = DiT(**arch)
    else:
        allowed = ", ".join((*_UNET_CLASSES, *_DIT_CLASSES))
        raise ConfigError(f"{folder / CONFIG_FILE}: _class_name is {class_name!r}; allowed are {allowed}")
    load_strictly(denoiser, tensors, where=folder)
    return denoiser


def save_denoiser(denoiser: Denoiser, folder: Path, **settings: Any) -> None:
    """Save config and weights; `read_denoiser` opens the folder, and diffusers does where one of its classes holds it.

    Args:
        denoiser: In any precision.
        folder: Made where it is missing.
        settings: Keys that the config gets beside those of the network.
    """
    config, tensors = in_diffusers_words(denoiser)
    write_folder(folder, config | settings, tensors)


def in_diffusers_words(denoiser: Denoiser) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Content of `config.json`, and the weights under the names of the class that it says."""
    match denoiser:
        case UNet():
            return denoiser.diffusers_config(), denoiser.state_dict()
        case DiT():
            weights = dit_config.to_diffusers_weights(denoiser.arch, denoiser.state_dict())
            return dit_config.to_diffusers(denoiser.arch), weights


def part_name(denoiser: Denoiser) -> str:
    """What diffusers' pipelines call a denoiser of this kind, and its folder."""
    return "unet" if isinstance(denoiser, UNet) else "transformer"
