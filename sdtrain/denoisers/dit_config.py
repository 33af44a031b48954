"""DiT settings and weights in diffusers' words and back, so that what is trained here opens there and the other way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdtrain.errors import ConfigError

OWN_CLASS = "sdtrain.DiT"
DIFFUSERS_CLASS = "DiTTransformer2DModel"
OLD_CLASS = "Transformer2DModel"  # of which diffusers' class was once a part; the authors' weights are published so

_SHARED = "emb."
_CLASSES = "class_embedder.embedding_table.weight"
_SINUSOID_WIDTH = 256

# Settings of which our network has only one value: diffusers' defaults, and in the old class the authors' choices.
_FIXED: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
_WITHOUT_EFFECT = {"norm_num_groups", "upcast_attention"}
_REQUIRED = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size")
_READ = {*_REQUIRED, "out_channels", "num_embeds_ada_norm", "dropout", "norm_eps"}


def fits_diffusers(arch: Mapping[str, Any]) -> bool:
    """Whether diffusers' class can hold a network with these constructor arguments."""
    return arch["context_dim"] is None and arch["sinusoid_width"] == _SINUSOID_WIDTH


def to_diffusers(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a network with these constructor arguments.

    Networks that diffusers' class cannot hold (tokens as conditions, another width of sinusoids) get our own class name
    and their constructor arguments, so that diffusers refuses them instead of building another network.
    """
    if not fits_diffusers(arch):
        return {"_class_name": OWN_CLASS, **arch}
    return {
        "_class_name": DIFFUSERS_CLASS,
        **{key: value for key, value in _FIXED.items() if key != "attention_type"},
        "num_attention_heads": arch["num_heads"],
        "attention_head_dim": arch["width"] // arch["num_heads"],
        "in_channels": arch["in_channels"],
        "out_channels": arch["out_channels"],
        "num_layers": arch["num_layers"],
        "patch_size": arch["patch_size"],
        "sample_size": arch["sample_size"],
        "num_embeds_ada_norm": arch["num_classes"] or 1,
        "dropout": arch["dropout"],
        "norm_eps": arch["norm_eps"],
    }


def to_diffusers_weights(arch: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights under the names of the class that `to_diffusers` says.

    diffusers' class has an embedding of timestep and class in every block: one that is shared is written into each,
    and a network without classes gets a table of zeros for one class.
    """
    if not fits_diffusers(arch):
        return dict(state)
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(_SHARED)}
    for block in range(arch["num_layers"]):
        prefix = f"transformer_blocks.{block}.norm1.emb."
        shared = {name.removeprefix(_SHARED): part for name, part in state.items() if name.startswith(_SHARED)}
        weights |= {prefix + name: part.clone() for name, part in shared.items()}
        if arch["num_classes"] is None:
            example = state["proj_out_1.weight"]
            weights[prefix + _CLASSES] = torch.zeros(2, arch["width"], dtype=example.dtype, device=example.device)
    return weights


def from_diffusers(
    config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and state dict of the network in a folder.

    What diffusers' class only has because it must is left out again: class tables of zeros tell nothing, and one
    embedding written into every block is one embedding, as the authors trained it.

    Raises:
        ConfigError: Another class, or a setting that our DiT does not have.
    """
    class_name = config.get("_class_name")
    if class_name == OWN_CLASS:
        return {key: value for key, value in config.items() if not key.startswith("_")}, dict(weights)
    if class_name not in (DIFFUSERS_CLASS, OLD_CLASS):
        raise ConfigError(
            f"DiT config: _class_name is {class_name!r}; allowed: {DIFFUSERS_CLASS}, {OLD_CLASS}, {OWN_CLASS}"
        )
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise ConfigError(f"DiT config: {', '.join(missing)} missing; a config.json that diffusers wrote has them")
    _refuse_unknown(config)
    arch = {
        "in_channels": config["in_channels"],
        "out_channels": config.get("out_channels") or config["in_channels"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "num_layers": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "patch_size": config["patch_size"],
        "sample_size": config["sample_size"],
        "num_classes": config.get("num_embeds_ada_norm", 1000),
        "shared_embedding": False,
        "dropout": config.get("dropout", 0.0),
        "norm_eps": config.get("norm_eps", 1e-5),
    }
    return _without_padding(arch, dict(weights))


def _without_padding(arch: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Leave out zero class tables and all but one of equal embeddings; anything else stays for a strict load."""
    prefixes = [f"transformer_blocks.{block}.norm1.emb." for block in range(arch["num_layers"])]
    tables = [prefix + _CLASSES for prefix in prefixes]
    if all(name in weights and not weights[name].any() for name in tables):
        arch["num_classes"] = None
        for name in tables:
            del weights[name]
    embeddings = [_within(weights, prefix) for prefix in prefixes]
    first = embeddings[0]
    if first and all(_equal(first, other) for other in embeddings[1:]):
        arch["shared_embedding"] = True
        weights = {name: tensor for name, tensor in weights.items() if ".norm1.emb." not in name}
        weights |= {_SHARED + name: tensor for name, tensor in first.items()}
    return arch, weights


def _within(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    """Every setting must be one that we read, one that has the only value we have, or one without effect."""
    for key, allowed in _FIXED.items():
        if config.get(key, allowed) != allowed:
            raise ConfigError(f"DiT config: {key} is {config[key]!r}; this DiT has only {allowed!r}")
    for key, found in config.items():
        unknown = key not in _READ and key not in _FIXED and key not in _WITHOUT_EFFECT and not key.startswith("_")
        if unknown and found not in (None, False):
            raise ConfigError(f"DiT config: {key} is {found!r}; this DiT does not have that setting, only without it")
