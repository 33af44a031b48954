"""UNet settings in diffusers' words and back, so that what is trained here opens there and the other way round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdtrain.errors import ConfigError

OWN_CLASS = "sdtrain.UNet"
CONDITIONAL_CLASS = "UNet2DConditionModel"
UNCONDITIONAL_CLASS = "UNet2DModel"

_BLOCK_TYPES = {
    "plain": ("DownBlock2D", "UpBlock2D"),
    "cross": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
    "self": ("AttnDownBlock2D", "AttnUpBlock2D"),
}
_KIND_OF_DOWN = {types[0]: kind for kind, types in _BLOCK_TYPES.items()}
_KIND_OF_UP = {types[1]: kind for kind, types in _BLOCK_TYPES.items()}
_MID_TYPES = {CONDITIONAL_CLASS: "UNetMidBlock2DCrossAttn", UNCONDITIONAL_CLASS: "UNetMidBlock2D"}

# Settings of which our network has only one value: diffusers' defaults.
_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
}
_FIXED_CONDITIONAL: dict[str, Any] = {
    "attention_type": "default",
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
}
_FIXED_UNCONDITIONAL: dict[str, Any] = {"add_attention": True, "downsample_type": "conv", "upsample_type": "conv"}

# Settings without effect on these blocks: sizes and hints, and two that diffusers accepts and ignores
# (`cross_attention_norm` never reaches its cross-attention blocks; SDPA computes the softmax in float32 anyway).
_WITHOUT_EFFECT = {
    "addition_embed_type_num_heads",
    "cross_attention_norm",
    "mid_block_only_cross_attention",
    "num_train_timesteps",
    "sample_size",
    "upcast_attention",
}
_REQUIRED = ("in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types")
_READ = {
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "in_channels",
    "layers_per_block",
    "mid_block_type",
    "norm_eps",
    "norm_num_groups",
    "out_channels",
    "resnet_time_scale_shift",
    "time_embedding_dim",
    "transformer_layers_per_block",
    "up_block_types",
    "use_linear_projection",
}


def num_heads_at(arch: Mapping[str, Any], channels: int) -> int:
    """Attention heads of our network at this many channels."""
    return arch["num_heads"] if arch["head_dim"] is None else channels // arch["head_dim"]


def to_diffusers(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a network with these constructor arguments.

    Networks that no diffusers class can hold (the `readme` preset, normed contexts, ...) get our own class name and
    their constructor arguments, so that diffusers refuses them instead of building another network.
    """
    class_name = _class_that_holds(arch)
    head_dims = None if class_name == OWN_CLASS else _attention_head_dim(arch)
    if head_dims is None:
        return {"_class_name": OWN_CLASS, **arch}
    config = {
        "_class_name": class_name,
        **_FIXED,
        **(_FIXED_CONDITIONAL if class_name == CONDITIONAL_CLASS else _FIXED_UNCONDITIONAL),
        "in_channels": arch["in_channels"],
        "out_channels": arch["out_channels"],
        "block_out_channels": list(arch["channels"]),
        "down_block_types": [_BLOCK_TYPES[kind][0] for kind in arch["down_blocks"]],
        "mid_block_type": _MID_TYPES[class_name],
        "up_block_types": [_BLOCK_TYPES[kind][1] for kind in reversed(arch["down_blocks"])],
        "layers_per_block": arch["layers_per_block"],
        "attention_head_dim": head_dims,
        "resnet_time_scale_shift": arch["time_scale_shift"],
        "norm_num_groups": arch["norm_groups"],
        "norm_eps": arch["norm_eps"],
    }
    if class_name == CONDITIONAL_CLASS:
        config |= {
            "cross_attention_dim": arch["context_dim"],
            "use_linear_projection": arch["linear_projection"],
            "transformer_layers_per_block": arch["transformer_layers"],
        }
    return config


def from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the network that a `config.json` describes.

    Raises:
        ConfigError: Another class, or a setting that our UNet does not have.
    """
    class_name = config.get("_class_name")
    if class_name == OWN_CLASS:
        return {key: value for key, value in config.items() if not key.startswith("_")}
    if class_name not in _MID_TYPES:
        raise ConfigError(
            f"UNet config: _class_name is {class_name!r}; allowed: {CONDITIONAL_CLASS}, {UNCONDITIONAL_CLASS}, "
            f"{OWN_CLASS}"
        )
    conditional = class_name == CONDITIONAL_CLASS
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise ConfigError(f"UNet config: {', '.join(missing)} missing; a config.json that diffusers wrote has them")
    _refuse_unknown(config, _FIXED | (_FIXED_CONDITIONAL if conditional else _FIXED_UNCONDITIONAL))
    for key in ("layers_per_block", "transformer_layers_per_block"):
        if not isinstance(config.get(key, 1), int):
            raise ConfigError(f"UNet config: {key} is {config[key]!r}; this UNet has one number for all levels")
    kinds = _block_kinds(config)
    _expect(config, "mid_block_type", _MID_TYPES[class_name])
    _expect(config, "time_embedding_dim", config["block_out_channels"][0] * 4)
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "channels": list(config["block_out_channels"]),
        "down_blocks": kinds,
        "layers_per_block": config.get("layers_per_block", 2),
        **_heads_from(config, kinds, conditional=conditional),
        "context_dim": config.get("cross_attention_dim", 1280) if conditional else None,
        "linear_projection": bool(config.get("use_linear_projection", False)),
        "mid_block": "cross" if conditional else "self",
        "time_scale_shift": config.get("resnet_time_scale_shift", "default"),
        "cross_attention_norm": None,
        "norm_groups": config.get("norm_num_groups", 32),
        "norm_eps": config.get("norm_eps", 1e-5),
        "transformer_layers": config.get("transformer_layers_per_block", 1),
    }


def _class_that_holds(arch: Mapping[str, Any]) -> str:
    ours_alone = (
        arch["feed_forward"] != "geglu"
        or not arch["decoder_extra_layer"]
        or arch["upsample"] != "nearest_conv"
        or arch["time_width"] != 4 * arch["channels"][0]
        or arch["cross_attention_norm"] is not None
    )
    if ours_alone:
        return OWN_CLASS
    if arch["mid_block"] == "cross":
        return CONDITIONAL_CLASS
    return OWN_CLASS if "cross" in arch["down_blocks"] else UNCONDITIONAL_CLASS


def _attention_head_dim(arch: Mapping[str, Any]) -> int | list[int] | None:
    """diffusers' `attention_head_dim`: heads at cross-attention, channels per head at self-attention.

    None where our network has no such numbers. On the way up, diffusers reads self-attention's from the unreversed
    list, so that the entry of the opposite level has to say the same.
    """
    channels, kinds = arch["channels"], arch["down_blocks"]
    last = len(channels) - 1
    needed: list[tuple[int, int]] = []  # (index of the list, value that it must have)
    for index, kind in [*enumerate(kinds), (last, arch["mid_block"])]:
        heads = num_heads_at(arch, channels[index])
        match kind:
            case "cross":
                needed.append((index, heads))
            case "self":
                needed += [(index, channels[index] // heads), (last - index, channels[index] // heads)]
    values = dict(needed)
    if any(values[index] != value for index, value in needed):
        return None
    filled = [values.get(index, values[last]) for index in range(len(channels))]
    if len(set(filled)) == 1:
        return filled[0]
    return None if arch["mid_block"] == "self" else filled


def _heads_from(config: Mapping[str, Any], kinds: Sequence[str], *, conditional: bool) -> dict[str, int | None]:
    """Our `num_heads` or `head_dim` from diffusers' `attention_head_dim`; see `_attention_head_dim`."""
    given = config.get("attention_head_dim", 8)
    channels = config["block_out_channels"]
    if given is None:
        return {"num_heads": 1, "head_dim": None}
    values = list(given) if isinstance(given, Sequence) else [given] * len(channels)
    places = [place for place in zip(kinds, channels, values, strict=True) if place[0] != "plain"]
    places += [place for place in zip(kinds, channels, reversed(values), strict=True) if place[0] == "self"]
    places.append(("cross" if conditional else "self", channels[-1], values[-1]))
    heads = {value if kind == "cross" else width // value for kind, width, value in places}
    head_dims = {width // value if kind == "cross" else value for kind, width, value in places}
    if not conditional and len(head_dims) == 1:
        return {"num_heads": None, "head_dim": head_dims.pop()}
    if len(heads) == 1:
        return {"num_heads": heads.pop(), "head_dim": None}
    if len(head_dims) == 1:
        return {"num_heads": None, "head_dim": head_dims.pop()}
    raise ConfigError(
        f"UNet config: attention_head_dim is {given!r}, with neither the same number of heads nor the same width of "
        "head at every level; such a network is not supported"
    )


def _block_kinds(config: Mapping[str, Any]) -> list[str]:
    """Our name of each level's attention; the way up must mirror the way down."""
    kinds = []
    for index, name in enumerate(config["down_block_types"]):
        if name not in _KIND_OF_DOWN:
            raise ConfigError(
                f"UNet config: down_block_types[{index}] is {name!r}; allowed: {', '.join(sorted(_KIND_OF_DOWN))}"
            )
        kinds.append(_KIND_OF_DOWN[name])
    upward = [_KIND_OF_UP.get(name) for name in config["up_block_types"]]
    if upward != kinds[::-1]:
        raise ConfigError(
            f"UNet config: up_block_types {list(config['up_block_types'])} do not mirror down_block_types "
            f"{list(config['down_block_types'])}; only mirrored networks are supported"
        )
    return kinds


def _expect(config: Mapping[str, Any], key: str, allowed: Any) -> None:
    found = config.get(key)
    if found is not None and found != allowed:
        raise ConfigError(f"UNet config: {key} is {found!r}; this UNet has only {allowed!r}")


def _refuse_unknown(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Every setting must be one that we read, one that has the only value we have, or one without effect."""
    for key, allowed in fixed.items():
        _expect(config, key, allowed)
    for key, found in config.items():
        unknown = key not in _READ and key not in fixed and key not in _WITHOUT_EFFECT and not key.startswith("_")
        if unknown and found not in (None, False):
            raise ConfigError(f"UNet config: {key} is {found!r}; this UNet does not have that setting, only without it")
